"""Cheaper evaluations against their plain twins: shared deep features, fused layers, VGG in bf16."""

import copy

import pytest
import tiny
import torch
from scripts_in_process import run_script
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import Translator, baselines, ddpm, energy, methods, sddm, unet
from guided_diffusion.caching import cached
from guided_diffusion.errors import InputError
from guided_diffusion.runtime import CompiledModel
from guided_diffusion.script_util import create_diffusion, create_model

STEPS, RANGE_T = 8, 4
NETWORKS = {
    "updown": {},
    "convolutions": {"resblock_updown": False, "num_res_blocks": 2, "channel_mult": "1,2,2"},
    "classes": {"class_cond": True, "num_classes": 3},
    "ddpm": None,
    "bf16": {},
}


def network(name):
    torch.manual_seed(0)
    if NETWORKS[name] is None:
        shape = {"ch": 32, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": (8,), "image_size": 16}
        model = ddpm.Model(**shape)
    else:
        model = create_model(**{**tiny.MODEL, **NETWORKS[name]})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = model.eval().requires_grad_(False)
    return model.set_dtype(torch.bfloat16) if name == "bf16" else model


def labels(name, count=2):
    return [torch.tensor([0, 2][:count])] if name == "classes" else []


class Twin:
    """Every evaluation in full by the network itself; hooks put stored features in place of the deep levels' own.

    shares: (x, t) -> whether an evaluation takes part; None: all do. depth: residual blocks a level on the way down.
    """

    def __init__(self, model, interval, shares=None, depth=1):
        self.model, self.interval, self.calls = model, interval, 0
        self.shares = shares or (lambda x, t: True)
        # The first stage up of the first level, and the channels of what it gets from the way down.
        if isinstance(model, ddpm.Model):
            self.block, self.width = model.up[0].block[0], model.ch
        else:
            self.block, self.width = model.output_blocks[-depth - 1], model.model_channels

    def __call__(self, x, t, *y):
        if not self.shares(x, t):
            return self.model(x, t, *y)
        full = self.calls % self.interval == 0
        self.calls += 1

        def swap(module, arguments):
            joined, emb = arguments
            deep, skip = joined[:, : -self.width], joined[:, -self.width :]
            if full:
                self.stored = deep.clone()
            return torch.cat([self.stored, skip], dim=1), emb

        handle = self.block.register_forward_pre_hook(swap)
        try:
            return self.model(x, t, *y)
        finally:
            handle.remove()


# --- shared deep features


@pytest.mark.parametrize("name", NETWORKS)
def test_shared_features_are_those_that_hooks_put_there(name):
    model, interval = network(name), 3
    fast = cached(model, interval)
    slow = Twin(model, interval, depth=2 if name == "convolutions" else 1)
    different = []
    for call in range(5):
        x, t = torch.randn(2, 3, 16, 16), torch.tensor([900 - 100 * call, 800 - 100 * call])
        found = fast(x, t, *labels(name))
        assert torch.equal(found, slow(x, t, *labels(name)))
        different.append(not torch.equal(found, model(x, t, *labels(name))))
    assert different == [call % interval > 0 for call in range(5)]


def states_of(method, model, seed=0, **options):
    """The states of a run, one by one; draws are those of the seed."""
    generator = torch.Generator().manual_seed(seed)
    ref = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    diffusion = create_diffusion(timestep_respacing=str(STEPS))
    noise = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    return (state["x"] for state in method(model, diffusion, ref, noise=noise, **options))


def run(*arguments, **options):
    return list(states_of(*arguments, **options))


SDDM = {"blocks": 4, "range_t": RANGE_T}
METHODS = {
    "manifold": (sddm.sample.steps, SDDM),
    "released": (sddm.sample.steps, {**SDDM, "variant": "released"}),
    "dpmpp_2m": (sddm.sample.steps, {**SDDM, "sampler": "dpmpp_2m"}),
    "ilvr": (baselines.ilvr.steps, {"down_n": 4, "range_t": RANGE_T}),
    "egsde": (baselines.egsde.steps, {"start": 6, "ls": 0, "li": 0.1, "encoder": None, "down_n": 4}),
    "unconditional": (baselines.unconditional.steps, {}),
}


def in_tail(x, t):
    """Whether a step of the respaced schedule is a plain one."""
    process = create_diffusion(timestep_respacing=str(STEPS))
    return int(t[0]) <= int(process.model_timesteps(torch.tensor([RANGE_T])))


@pytest.mark.parametrize(
    "name, guided",
    [("manifold", False), ("manifold", True), ("released", False), ("dpmpp_2m", True), ("ilvr", False), ("egsde", True),
     ("unconditional", None)],
)  # fmt: skip
def test_methods_share_features_of_the_steps_that_are_asked_for(name, guided):
    method, options = METHODS[name]
    if name in ("manifold", "released"):
        options = {**options, "energies": [energy.dct(4)]}
    model = network("updown")
    plain = run(method, model, **options)
    extra = {} if guided is None else {"cache_guided": guided}
    found = run(method, model, **options, cache_interval=3, **extra)
    wanted = run(method, Twin(model, 3, in_tail if guided is False else None), **options)
    assert all(map(torch.equal, found, wanted))
    alike = [torch.equal(*pair) for pair in zip(found, plain)]
    # In the plain tail alone: the guided steps and the first plain one are as without.
    first = STEPS - RANGE_T if guided is False else 1
    assert alike == [step < first for step in range(len(alike))]
    assert all(map(torch.equal, run(method, model, **options, cache_interval=1), plain))


def test_runs_do_not_share_features():
    model, method = network("updown"), baselines.unconditional.steps
    alone = [run(method, model, seed, cache_interval=3)[-1] for seed in (1, 2)]
    *_, together = zip(*(states_of(method, model, seed, cache_interval=3) for seed in (1, 2)))  # in turns
    assert all(map(torch.equal, together, alone))


def test_models_that_cannot_share_are_refused():
    for model, words in ((CompiledModel(network("updown")), "give compile False"), (abs, "is a builtin_function"),
                         (unet.SuperResModel(16, 3, 32, 3, 1, ()), "is a SuperResModel")):  # fmt: skip
        with pytest.raises(InputError, match=rf"cache_interval is 2; .*{words}"):
            cached(model, 2)
    with pytest.raises(InputError, match="cache_interval is 0; it must be at least 1"):
        cached(network("ddpm"), 0)
    with pytest.raises(InputError, match="cache_guided True"):
        methods.EGSDE(ls=0, cache_interval=2)  # where it would do nothing


def test_command_and_translator(tmp_path):
    model = tiny.make_model(tmp_path / "model.safetensors")
    base = tiny.make_references(tmp_path / "ref", ["a.png"])

    def translate(out, *more):
        assert run_script("ae_sample", *tiny.command(model, base, tmp_path / out, *more)[2:]) == 0
        return tiny.record(tmp_path / out)["settings"], tiny.pictures(tmp_path / out)["a.png"]

    plain, picture = translate("plain")
    assert not {"cache_interval", "cache_guided", "fuse", "vgg_bf16"} & plain.keys()
    assert translate("plain", "--cache_interval", 1)[0] == plain  # resumes
    settings, shared = translate("shared", "--cache_interval", 2, "--cache_guided", True)
    assert settings == {**plain, "cache_interval": 2, "cache_guided": True} and (shared != picture).any()
    settings, fused = translate("fused", "--fuse", True)
    assert settings == {**plain, "fuse": True} and abs(fused - picture).max() <= 1
    with pytest.raises(InputError, match="other settings: cache_interval was not recorded and is 2"):
        translate("plain", "--cache_interval", 2)
    options = {"steps": 6, "range_t": 2, "area": 4, "energy": "dct", "device": "cpu"}
    python = Translator(model, **options, cache_interval=2, cache_guided=True)(base / "a.png")
    assert (tiny.np.asarray(python) == shared).all()
    with pytest.raises(InputError, match="cache_interval is 2"):
        Translator(model, **options, cache_interval=2, compile=True)


# --- fused layers


@pytest.mark.parametrize("name", ["updown", "convolutions", "classes", "ddpm"])
def test_fused_layers_are_equal_up_to_rounding(name):
    model = network(name)
    fused = copy.deepcopy(model).fuse()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    outputs, counts = [], []
    for each in (model, fused):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs.append(each(x, t, *labels(name)))
        counts.append(counter.get_total_flops())
    scale = outputs[0].abs().max()
    torch.testing.assert_close(outputs[1] / scale, outputs[0] / scale, atol=2e-6, rtol=0)
    assert not torch.equal(*outputs) and counts[1] < counts[0]


# --- energies


def test_vgg_in_bf16_and_in_channels_last():
    torch.manual_seed(0)
    weights = energy._vgg_layers(1).state_dict()
    ref, x = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 64, 64)
    t = torch.tensor([500, 500])
    found = []
    for options in ({}, {"channels_last": True}, {"bf16": True}):
        each = energy.vgg(weights, 16, **options)
        each.prepare(ref)
        found.append(each.energy_and_grad(x, t, 0.5))
    exact = found[0][1]
    assert all(grad.dtype == torch.float32 and value.dtype == torch.float32 for value, grad in found)
    torch.testing.assert_close(found[1][1], exact, atol=1e-5 * exact.abs().max().item(), rtol=0)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    error = (found[2][1] - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.01
    assert F.cosine_similarity(found[2][1].flatten(1), exact.flatten(1)).min() > 0.9999
    torch.testing.assert_close(found[2][0], found[0][0], rtol=0.01, atol=0)


def test_vgg_in_bf16_is_for_models_in_bf16(tmp_path):
    torch.manual_seed(0)
    path, model = tmp_path / "vgg.pth", tiny.make_model(tmp_path / "model.safetensors")
    torch.save(energy._vgg_layers(1).state_dict(), path)
    options = {"steps": 6, "range_t": 2, "area": 4, "energy": "vgg", "weights": str(path), "device": "cpu"}
    with pytest.raises(InputError, match="it needs precision bf16, and that is fp32") as caught:
        Translator(model, **options, vgg_bf16=True)
    assert caught.value.parameter == "vgg_bf16"
    for given in ({"vgg_bf16": True, "precision": "bf16"}, {"fuse": True}, {}):
        made = Translator(model, **options, **given).translation.energies[0]
        assert (made.bf16, made.channels_last) == ("vgg_bf16" in given, bool(given))
