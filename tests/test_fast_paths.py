"""Every fast path gives what its plain twin gives, and the sampling loop never waits for the device."""

import itertools
import platform
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny
import torch
from conftest import ROOT
from scripts_in_process import run_script
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion import energy, nn, runtime, sddm
from guided_diffusion.ddpm import Model
from guided_diffusion.nn import GroupNorm32, norm_silu
from guided_diffusion.script_util import create_diffusion, create_model
from guided_diffusion.sddm import sample


def tiny_network(**flags):
    torch.manual_seed(0)
    flags = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,4", "attention_resolutions": "8", **flags}
    model = create_model(image_size=16, **flags)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# --- networks


def random_norm(channels):
    torch.manual_seed(0)
    norm = GroupNorm32(32, channels)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("affine, channels", [(False, 32), (True, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_in_one_buffer(dtype, channels, affine):
    norm = random_norm(channels)
    x = torch.randn(2, channels, 32, 32).to(dtype, memory_format=torch.channels_last)
    scale, shift = torch.randn(2, 2, channels, 1, 1) if affine else (None, None)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    exact = F.silu(exact * (1 + scale) + shift if affine else exact)
    given = x.clone()
    with torch.no_grad():
        fast = norm_silu(norm, x, scale, shift)
    plain = norm_silu(norm, x, scale, shift)
    assert torch.equal(x, given) and fast.dtype == plain.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(fast, plain)
    else:
        # One rounding at the end, or a few on the way, of 2^-9 each.
        assert (fast - exact).abs().mean() <= (plain - exact).abs().mean() * 1.05 < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalisation_of_gpus_in_half_precision(dtype, monkeypatch):
    """The kernel that reads halves, with parameters in x's dtype: less than three times the error of a float32 copy."""
    norm = random_norm(64)
    x, (scale, shift) = 3 * torch.randn(2, 64, 16, 16) + 1, torch.randn(2, 2, 64, 1, 1)
    exact = F.silu(F.group_norm(x.to(dtype).float(), 32, norm.weight, norm.bias, norm.eps) * (1 + scale) + shift)
    with torch.no_grad():
        copied = norm_silu(norm, x.to(dtype), scale, shift)
        parameters = nn._parameters_for_halves(norm, SimpleNamespace(dtype=dtype, device=torch.device("cuda")))
        assert [p.dtype for p in parameters] == [dtype, dtype]
        monkeypatch.setattr(nn, "_parameters_for_halves", lambda norm, x: parameters)
        read = norm_silu(norm, x.to(dtype), scale, shift)
    assert read.dtype == dtype and not torch.equal(read, copied)
    assert (read - exact).abs().mean() < 3 * (copied - exact).abs().mean()


@pytest.mark.parametrize("scale_shift", [False, True])
def test_networks_give_the_same_bits_with_it_and_without(scale_shift):
    shape = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "image_size": 16}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    for model in (tiny_network(use_scale_shift_norm=scale_shift), Model(**shape).eval()):
        with torch.no_grad():
            fast = model(x, t)
        assert torch.equal(model(x, t), fast)


def test_compiled_network_stays_close_and_leaves_other_shapes_alone():
    model = tiny_network(channel_mult="1")  # compiling takes as long as there are layers
    fast = runtime.CompiledModel(model)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(fast(x, t), model(x, t), atol=1e-4, rtol=1e-4)
        assert fast.compiled is not None
        assert torch.equal(fast(x[:1], t[:1]), model(x[:1], t[:1]))


def test_network_that_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    error = RuntimeError("no C++ compiler\nand more of it")
    monkeypatch.setattr(torch, "compile", lambda model, **options: Mock(side_effect=error))
    model = tiny_network()
    fast = runtime.CompiledModel(model)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3])
    for _ in range(2):
        assert torch.equal(fast(x, t), model(x, t))
    assert caplog.messages == ["compilation failed, the network runs eagerly: no C++ compiler"]


def test_out_of_memory_is_no_failure_to_compile(monkeypatch):
    error = torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(torch, "compile", lambda model, **options: Mock(side_effect=error))
    fast = runtime.CompiledModel(tiny_network())
    with pytest.raises(torch.OutOfMemoryError):
        fast(torch.randn(4, 3, 16, 16), torch.tensor([3] * 4))
    # The next, smaller batch is tried again.
    assert fast.compiled is not None and fast.shape is None


def test_automatic_precision_is_one_that_the_device_has(monkeypatch):
    cpu = torch.device("cpu")
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native, raising=False)
        assert runtime.best_precision(cpu) == expected
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert runtime.best_precision(torch.device("cuda")) == expected
    assert runtime.best_precision(torch.device("mps")) == "fp32"


# --- the method


class OnDevice(TorchDispatchMode):
    """Fails at operations that would copy from the host to the device: those with tensors of both."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {
            a.device.type
            for a in torch.utils._pytree.tree_leaves((args, kwargs or {}, result))
            if isinstance(a, torch.Tensor) and a.ndim
        }
        assert len(devices) < 2, f"{function} has tensors on {devices}"
        return result


@pytest.mark.parametrize("detail_merge", [False, True])
@pytest.mark.parametrize("variant, sampler", [("manifold", "dpmpp_2m"), ("released", "ancestral")])
def test_no_step_waits_for_the_device(variant, sampler, detail_merge):
    """On the meta device, which has no values, everything that needs one on the host is an error."""
    device = torch.device("meta")
    diffusion = create_diffusion(timestep_respacing="6", learn_sigma=True)
    ref = torch.empty(2, 3, 16, 16, device=device)
    model = tiny_network(learn_sigma=True).to(device)
    records = []

    def run():
        steps = sample.steps(
            model, diffusion, ref, blocks=4, range_t=2, variant=variant, sampler=sampler, detail_merge=detail_merge,
            energies=[energy.dct(4), energy.low_pass(4)], noise=lambda shape: torch.empty(shape, device=device),
        )  # fmt: skip
        for state in itertools.islice(steps, 5):  # the last state is read: whether it is finite
            records.extend(state["guided"])
        return state["x"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sddm, "check_references", lambda ref, _: ref)  # reads their range, once per batch
        run()  # fills the tables of coefficients
        for kind, made in ((energy.LowPassEnergy, energy.low_pass(4)), (energy.BlockStatisticsEnergy, energy.dct(4))):
            made.prepare(ref)  # makes matrices on the host, once per batch
            patch.setattr(kind, "prepare", lambda self, ref, made=made: self.__dict__.update(made.__dict__))
        with OnDevice():
            assert run().device == device
    assert len(records) == 2 * (3 + (4 if variant == "released" else 0))


# --- the command


def test_automatic_precision_stands_for_the_one_that_it_finds(tmp_path):
    model = tiny.make_model(tmp_path / "tiny.safetensors")
    base = tiny.make_references(tmp_path / "ref", ["a.png"])
    files = ("--model_path", model, "--base_samples", base, "--save_dir", tmp_path / "out", "--timestep_respacing", 6)
    found = runtime.best_precision(torch.device("cpu"))
    for precision in ("auto", found):  # the second resumes the first
        run_script("ae_sample", *files, *tiny.METHOD, "--device", "cpu", "--precision", precision)
        assert tiny.record(tmp_path / "out")["settings"]["precision"] == found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept():
    code = """
import resource, torch
from guided_diffusion.runtime import keep_freed_memory
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
assert keep_freed_memory()
before = resident()
block = torch.empty(256 << 20, dtype=torch.uint8).fill_(1)
held = resident() - before
del block
print(held, resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    held, left = map(int, run.stdout.split())
    assert held > 200 and left > 200
