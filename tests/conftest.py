"""What all tests share: golden data and the models built from it, the markers of slow tests, and a line that says which
golden data are missing."""

import json
import os
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file

from guided_diffusion.script_util import (
    create_diffusion,
    create_model,
    diffusion_defaults,
    model_and_diffusion_defaults,
)
from guided_diffusion.sddm import sample
from guided_diffusion.unet import EncoderUNetModel

ROOT = Path(__file__).resolve().parent.parent
COMMITTED_DIR = ROOT / "tests" / "golden"
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or COMMITTED_DIR)
MODEL_FLAGS = sorted(model_and_diffusion_defaults().keys() - diffusion_defaults().keys() | {"learn_sigma"})

# No test depends on a clock.
settings.register_profile("sddm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sddm")

# A shell starts background jobs deaf to Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The golden files in tests/golden. Their tests are collected whether the files exist or not, so that a lost file fails.
# Tests of other golden files are collected where GOLDEN_DIR has them; the summary lists those that are missing.
COMMITTED = (
    "block_ops_4", "ddim10", "energy_low_pass", "energy_vgg_badain", "frank_wolfe_2", "frank_wolfe_3", "frank_wolfe_4",
    "frank_wolfe_blockwise", "p_mean_variance", "resizer", "schedules", "sddm_vgg_b4", "sdedit_m12",
    "unet_updown_scaleshift_learnsigma",
)  # fmt: skip

# Files whose tests start processes or train: `-m "not slow"` leaves them out.
SLOW_FILES = (
    "test_ablations", "test_bench_scripts", "test_benchmark", "test_engine", "test_evaluate",
    "test_extensions_metric", "test_fast_paths", "test_fetch", "test_jobs", "test_judge", "test_notebook",
    "test_prepare_emoji", "test_presets", "test_processes", "test_readme", "test_sampling_scripts", "test_train_util",
    "test_training", "test_training_faults", "test_training_runs", "test_translator", "test_upscaler",
    "test_web_page",
)  # fmt: skip
# Others that take more than about two seconds, by file and function.
SLOW_TESTS = ("test_web::test_the_command_runs_in_a_shell",)


def pytest_collection_modifyitems(items):
    for item in items:
        function = f"{item.path.stem}::{getattr(item, 'originalname', item.name)}"
        if item.path.stem in SLOW_FILES or function in SLOW_TESTS:
            item.add_marker(pytest.mark.slow)
        if "mpi" in item.name.lower() and item.path.stem == "test_processes":
            item.add_marker(pytest.mark.mpi)
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "golden" in item.name or any(isinstance(value, str) and value in golden_index() for value in parameters):
            item.add_marker(pytest.mark.golden)


def pytest_terminal_summary(terminalreporter):
    missing = [name for name in golden_index() if not golden_path(name).exists()]
    if missing:
        count = f"{len(missing)} of {len(golden_index())} golden sets are missing, and nothing was compared with them"
        terminalreporter.section("golden data")
        terminalreporter.line(f"{count}: {', '.join(missing)}. GOLDEN_DIR names a folder that has them.")


def golden_path(name):
    """Where the golden file or folder `name` is: in GOLDEN_DIR, or else in tests/golden."""
    names = (name, f"{name}.safetensors")
    found = [folder / each for folder in (GOLDEN_DIR, COMMITTED_DIR) for each in names if (folder / each).exists()]
    return found[0] if found else GOLDEN_DIR / f"{name}.safetensors"


@cache
def golden_index():
    """The settings of every golden file, by its name."""
    committed, others = (json.loads((folder / "index.json").read_text()) for folder in (COMMITTED_DIR, GOLDEN_DIR))
    return committed | others


def golden(name):
    """Tensors of the golden file `name`; a missing file is an error and fails the test."""
    return load_file(golden_path(name))


def golden_names(prefix, committed=COMMITTED):
    """Names of golden files with a prefix: those committed with the repository and all others that GOLDEN_DIR has."""
    found = {path.stem for path in GOLDEN_DIR.glob(f"{prefix}*.safetensors")}
    return sorted(found | {name for name in committed if name.startswith(prefix)})


def golden_metrics():
    """The golden entry of the metrics, for parametrising: its pictures are too large to be committed."""
    return ["metrics"] if (GOLDEN_DIR / "metrics").is_dir() else []


def load_golden(data, model, prefix="model."):
    """Put the weights of a golden file into a model and switch it to evaluation."""
    model.load_state_dict({k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})
    return model.eval()


@cache
def golden_unet(name):
    """The ADM UNet of the golden file `name`."""
    flags = golden_index()[name]["flags"]
    return load_golden(golden(name), create_model(**{flag: flags[flag] for flag in MODEL_FLAGS}))


@cache
def golden_encoder():
    """The domain-specific extractor of the golden file `dse`."""
    return load_golden(golden("dse"), EncoderUNetModel(**golden_index()["dse"]["config"], head="I2Iout"))


def golden_model_and_diffusion(settings):
    """Model and process of an index entry: it names the model, its own entries replace the model's flags."""
    flags = {**golden_index()[settings["model"]]["flags"], **settings}
    model = create_model(**{flag: flags[flag] for flag in MODEL_FLAGS})
    diffusion = create_diffusion(**flags)
    return load_golden(golden(settings["model"]), model), diffusion


class Counted(torch.nn.Module):
    """A model that counts its evaluations."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, *arguments):
        self.calls += 1
        return self.model(*arguments)


class Replay:
    """A noise source that gives recorded draws in order."""

    def __init__(self, draws):
        self.draws = list(draws)

    def __call__(self, shape):
        draw = self.draws.pop(0)
        assert tuple(shape) == tuple(draw.shape)
        return draw


class LinearModel(torch.nn.Module):
    """A cheap stand-in for a UNet: mixes channels and neighbouring pixels, and depends on the timestep.

    Smooth in x, so that rounding differences stay small over a whole run; images of a batch do not see each other. It
    records its calls.
    """

    def __init__(self, learn_sigma=False):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = 0.15 * torch.randn(6 if learn_sigma else 3, 3, 3, 3, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        self.inputs, self.timesteps = [], []

    def forward(self, x, t):
        self.inputs.append(x)
        self.timesteps.append(t.clone())
        h = torch.nn.functional.conv2d(x, self.weight.to(x.dtype), padding=1)
        return (h * (1 + t.to(x.dtype) / 2000)[:, None, None, None]).tanh()


class TimedEncoder(torch.nn.Module):
    """A small smooth network with an extractor's and a classifier's interface; it records the timesteps."""

    def __init__(self):
        super().__init__()
        weight = 0.3 * torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(3))
        self.weight, self.timesteps = torch.nn.Parameter(weight), []

    def middle_features(self, x, t):
        self.timesteps.append(t.clone())
        scale = (1 + t.to(x.dtype) / 1000)[:, None, None, None]
        return torch.tanh(torch.nn.functional.conv2d(x, self.weight, stride=2, padding=1) * scale) + 0.1

    def forward(self, x, t):
        return self.middle_features(x, t).mean(dim=(2, 3))


def small_run(steps=8, n=2, learn_sigma=False):
    """(model, diffusion, references, draws) of a small run."""
    generator = torch.Generator().manual_seed(0)
    diffusion = create_diffusion(timestep_respacing=str(steps), learn_sigma=learn_sigma)
    ref = torch.rand(n, 3, 16, 16, generator=generator) * 2 - 1
    draws = torch.randn(steps + 1, *ref.shape, generator=generator)
    return LinearModel(learn_sigma), diffusion, ref, draws


def run_states(model, diffusion, ref, draws, **options):
    """All states of a run of SDDM, by step; the draws must be used up."""
    noise, states = Replay(draws), {}
    options = {"blocks": 4, "range_t": 2, **options}
    result = sample(model, diffusion, ref, noise=noise, callback=states.__setitem__, **options)
    assert not noise.draws and torch.equal(result, states[0])
    return states


def minimum_norm_point(vectors):
    """The minimum-norm point [D] of a float64 array [K, D] by non-negative least squares.

    min |V w|^2 + m^2 (sum w - 1)^2 over w >= 0 has, for every m > 0, a multiple of the wanted weights as its solution.
    """
    from scipy.optimize import nnls

    weight = max(np.linalg.norm(vectors, axis=1).min(), 1e-12)
    zeros = np.zeros(vectors.shape[1])
    w, _ = nnls(np.vstack([vectors.T, np.full((1, len(vectors)), weight)]), np.append(zeros, weight))
    return w / w.sum() @ vectors
