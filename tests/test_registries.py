"""An energy, a solver, a manifold and a metric from outside of the package are used from the command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_references, pictures, record

ROOT = Path(__file__).resolve().parent.parent

OWN = '''
import runpy
import sys
from dataclasses import dataclass

from guided_diffusion.energy import ENERGIES
from guided_diffusion.evaluation import paired_metric
from guided_diffusion.manifold import MANIFOLDS
from guided_diffusion.options import option
from guided_diffusion.solvers import SOLVERS, Ancestral


class Darker:
    def __init__(self, strength):
        self.strength = strength

    def prepare(self, ref):
        self.calls = 0

    def energy_and_grad(self, x, t, alpha_bar):
        return self.strength * x.flatten(1).sum(1), x.new_full(x.shape, self.strength) * x


@ENERGIES.add("darker")
@dataclass(frozen=True)
class DarkerOptions:
    strength: float = option(1.0, "how much darker", above=0)

    def create(self, target):
        return Darker(self.strength)


@SOLVERS.add("silent")
class Silent(Ancestral):
    """Ancestral steps without noise."""

    def step(self, out, x, i, t, noise):
        return out["mean"]


@MANIFOLDS.add("brightness")
class Brightness:
    def __init__(self, ref, *, blocks, down_n):
        self.mean = ref.mean((2, 3), keepdim=True)

    def restrict(self, x, alpha_bar):
        return x - x.mean((2, 3), keepdim=True) + alpha_bar**0.5 * self.mean

    def decompose(self, x, vector, alpha_bar):
        normal = vector.mean((2, 3), keepdim=True).expand_as(vector)
        return vector - normal, normal


@paired_metric("mae", "MAE", lower_is_better=True)
def mae(a, b):
    return (a - b).abs().flatten(1).mean(1)


script = sys.argv.pop(1)
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A function that runs a script with the parts above: the finished process; and the folder of its files."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    make_model(folder / "model.safetensors")
    make_references(folder / "ref", ["a.png", "b.png"])

    def run(script, *flags):
        command = [sys.executable, folder / "own.py", ROOT / "scripts" / script, *map(str, flags)]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)

    return run, folder


def test_energy_solver_and_manifold_from_outside(own):
    run, folder = own
    common = ("--model_path", "model.safetensors", "--base_samples", "ref", "--timestep_respacing", 4, "--range_t", 1)
    plain = run("ae_sample.py", *common, "--area", 4, "--save_dir", "plain", "--energy", "none")
    assert plain.returncode == 0, plain.stderr
    flags = ("--energy", "darker", "--strength", 2.5, "--sampler", "silent", "--manifold", "brightness")
    done = run("ae_sample.py", *common, *flags, "--save_dir", "own")
    assert done.returncode == 0, done.stderr
    settings = record(folder / "own")["settings"]
    assert settings["energy"] == ["darker"] and settings["strength"] == 2.5
    assert settings["sampler"] == "silent" and settings["manifold"] == "brightness"
    made, others = pictures(folder / "own"), pictures(folder / "plain")
    assert made.keys() == others.keys() == {"a.png", "b.png"}
    assert all((made[name] != others[name]).any() for name in made)
    wrong = run("ae_sample.py", *common, *flags[:2], "--strength", 0, "--save_dir", "wrong")
    assert wrong.returncode == 2 and wrong.stderr == "error: --strength is 0.0; it must be above 0\n"


def test_their_names_and_options_stand_in_the_help(own):
    run, _ = own
    text = run("ae_sample.py", "--help").stdout
    assert "--strength" in text and "how much darker" in text and "silent" in text and "brightness" in text


def test_a_metric_from_outside(own):
    run, folder = own
    done = run("evaluate.py", "--outputs", "ref", "--sources", "ref", "--lpips", False, "--image_size", 16,
               "--out", folder / "result")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "result.json").read_text())["metrics"]["source_mae"] == 0
    assert "MAE" in done.stdout
