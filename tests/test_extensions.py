"""Extensions from outside of the package: an energy, solvers of one and two evaluations, a manifold, a method of two
models. Each is one file that is imported before the command runs."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from test_solvers import gaussian_error
from tiny import make_model, make_references, pictures, record

from guided_diffusion.manifold import MANIFOLDS
from guided_diffusion.methods import ENERGIES
from guided_diffusion.solvers import SOLVERS

ROOT = Path(__file__).resolve().parent.parent

PARTS = '''
from dataclasses import dataclass

from guided_diffusion.manifold import MANIFOLDS
from guided_diffusion.methods import ENERGIES, EnergyOptions
from guided_diffusion.options import option
from guided_diffusion.solvers import DDIM, SOLVERS, Ancestral


class Darker:
    def __init__(self, strength):
        self.strength = strength

    def prepare(self, ref):
        self.calls = 0

    def energy_and_grad(self, x, t, alpha_bar):
        return self.strength * x.flatten(1).sum(1), x.new_full(x.shape, self.strength) * x


@ENERGIES.add("darker")
@dataclass(frozen=True)
class DarkerOptions(EnergyOptions):
    strength: float = option(1.0, "how much darker", above=0)

    def create(self, target):
        return Darker(self.strength)


@SOLVERS.add("silent")
class Silent(Ancestral):
    """Ancestral steps without noise."""

    def step(self, denoise, x, i, out, noise, state):
        return out["mean"], None


@SOLVERS.add("heun")
class Heun(DDIM):
    """DDIM with Heun's correction: the mean of the noises at both ends of a step. Two evaluations a step."""

    takes_eta = False

    def step(self, denoise, x, i, out, noise, state):
        if i == 0:
            return out["mean"], None
        process = self.diffusion
        a, b = (float(process.alphas_cumprod[k]) for k in (i, i - 1))
        sigma, sigma_next = ((1 - a) / a) ** 0.5, ((1 - b) / b) ** 0.5
        z = x / a**0.5
        first = (z - out["pred_xstart"]) / sigma
        ahead = z + (sigma_next - sigma) * first
        second = (ahead - denoise(ahead * b**0.5, i - 1)["pred_xstart"]) / sigma_next
        return (z + (sigma_next - sigma) * (first + second) / 2) * b**0.5, None


@MANIFOLDS.add("brightness")
class Brightness:
    def __init__(self, ref, *, blocks, down_n):
        self.mean = ref.mean((2, 3), keepdim=True)

    def restrict(self, x, alpha_bar):
        return x - x.mean((2, 3), keepdim=True) + alpha_bar**0.5 * self.mean

    def decompose(self, x, vector, alpha_bar):
        normal = vector.mean((2, 3), keepdim=True).expand_as(vector)
        return vector - normal, normal
'''

DDIB = '''"""DDIB (Su et al. 2023): encode with DDIM under a source model, decode with DDIM under the target's."""

from dataclasses import dataclass

from guided_diffusion.checkpoint.targets import load_beside
from guided_diffusion.methods import METHODS, Method
from guided_diffusion.options import option
from guided_diffusion.solvers import at_step, bind, sampler


@sampler
def ddib(model, diffusion, ref, *, source, clip_denoised=True, noise=None):
    x = ref
    for i in range(diffusion.num_timesteps - 1):
        out = diffusion.ddim_reverse_sample(source, x, at_step(x, i), clip_denoised)
        x = out["sample"]
        yield {"i": i + 1, "x": x, "pred_xstart": out["pred_xstart"], "guided": []}
    for i in reversed(range(diffusion.num_timesteps)):
        out = diffusion.ddim_sample(model, x, at_step(x, i), clip_denoised, noise=x)
        x = out["sample"]
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": []}


@METHODS.add("ddib")
@dataclass(frozen=True)
class DDIB(Method):
    source_path: str | None = option(None, "the source domain's diffusion model", file=True, metavar="PATH")
    source_class: int | str | None = option(None, "class of the references", metavar="CLASS")

    def steps(self, total):
        return 2 * total - 1

    def bind(self, target, energies=()):
        source = load_beside(target, self.source_path, class_index=self.source_class)
        return bind(ddib, source=source.model, clip_denoised=target.clip_denoised)


if __name__ == "__main__":
    from guided_diffusion.cli import main
    from guided_diffusion.cli.sampling import translate_command

    translate, create_parser = translate_command("ddib", __doc__, first=("source_path",))
    main.run(translate, create_parser())
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A function that runs a command with the parts above: the finished process; and the folder of its files."""
    folder = tmp_path_factory.mktemp("own")
    script = str(ROOT / "scripts" / "ae_sample.py")
    (folder / "parts.py").write_text(f"{PARTS}\n\nimport runpy\n\nrunpy.run_path({script!r}, run_name='__main__')\n")
    (folder / "ddib.py").write_text(DDIB)
    make_model(folder / "model.safetensors")
    make_model(folder / "source.safetensors", seed=1)
    make_references(folder / "ref", ["a.png", "b.png"])

    def run(file, *flags):
        command = [sys.executable, file, *map(str, flags)]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run, folder


COMMON = ("--model_path", "model.safetensors", "--base_samples", "ref", "--timestep_respacing", 4)


def test_energy_solver_and_manifold_from_outside(own):
    run, folder = own
    flags = ("--range_t", 1, "--energy", "darker", "--strength", 2.5, "--sampler", "silent", "--manifold", "brightness")
    done = run("parts.py", *COMMON, *flags, "--save_dir", "own")
    assert done.returncode == 0, done.stderr
    settings = record(folder / "own")["settings"]
    assert settings["energy"] == ["darker"] and settings["strength"] == 2.5
    assert settings["sampler"] == "silent" and settings["manifold"] == "brightness"
    assert pictures(folder / "own").keys() == {"a.png", "b.png"}
    wrong = run("parts.py", *COMMON, *flags[:4], "--strength", 0, "--save_dir", "wrong")
    assert wrong.returncode == 2 and wrong.stderr == "error: --strength is 0.0; it must be above 0\n"
    text = run("parts.py", "--help").stdout
    assert "--strength" in text and "how much darker" in text and "silent" in text and "brightness" in text


def test_a_solver_that_evaluates_twice_reports_its_evaluations(own):
    run, folder = own
    flags = ("--range_t", 3, "--area", 4, "--energy", "none", "--sampler", "heun", "--save_dir", "heun")
    done = run("parts.py", *COMMON, *flags)
    assert done.returncode == 0, done.stderr
    assert record(folder / "heun")["model_evaluations"] == 7  # two a step, but for the last


def test_heun_is_of_second_order():
    """Its error against an exact solution falls fourfold with twice the steps."""
    exec(compile(PARTS, "parts", "exec"), {"__name__": "parts"})
    try:
        errors = [gaussian_error("heun", steps) for steps in (20, 40, 80)]
    finally:
        for name in ("heun", "silent"):
            del SOLVERS[name]
        del MANIFOLDS["brightness"]
        del ENERGIES["darker"]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.5 < coarse / fine < 4.5


def test_a_method_with_two_models(own):
    assert len(DDIB.splitlines()) <= 80
    run, folder = own
    flags = (*COMMON, "--source_path", "source.safetensors", "--precision", "bf16")
    done = run("ddib.py", *flags, "--save_dir", "ddib")
    assert done.returncode == 0, done.stderr
    content = record(folder / "ddib")
    assert content["model_evaluations"] == 2 * 4 - 1
    assert content["settings"]["precision"] == "bf16" and content["settings"]["source_path"].startswith("sha256 ")
    # Encoded and decoded by one model, a picture comes back better than by another.
    same = run("ddib.py", *COMMON, "--source_path", "model.safetensors", "--save_dir", "same")
    assert same.returncode == 0, same.stderr
    given, made, back = (pictures(folder / name) for name in ("ref", "ddib", "same"))
    for name in given:
        assert abs(back[name] - given[name]).mean() < abs(made[name] - given[name]).mean()
    wrong = run("ddib.py", *COMMON, "--save_dir", "w", "--source_path", "ref/a.png")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
