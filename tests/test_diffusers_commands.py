"""Every method of the command line takes a model of diffusers; a resumed run notices that the model changed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN_DIR
from tiny import make_references, pictures

ROOT = Path(__file__).resolve().parent.parent
MODEL = GOLDEN_DIR / "diffusers" / "ddpm_eps"

pytestmark = pytest.mark.slow

COMMANDS = {
    "ae_sample": ("--range_t", "2", "--area", "4", "--energy", "dct"),
    "ilvr_sample": ("--down_N", "4", "--range_t", "1"),
    "image_sample": ("--num_samples", "2"),
}


def run(name, model, out, *flags):
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", "--model_path", model, "--save_dir", out]
    command += ["--device", "cpu"]
    return subprocess.run([*map(str, command), *map(str, flags)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_methods_take_a_folder(name, tmp_path):
    references = () if name == "image_sample" else ("--base_samples", make_references(tmp_path / "refs", ["a.png"]))
    flags = (*references, "--timestep_respacing", "leading6", *COMMANDS[name])
    done = run(name, MODEL, tmp_path / "out", *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert pictures(tmp_path / "out")


def test_a_resumed_run_notices_another_model(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    flags = ("--base_samples", make_references(tmp_path / "refs", ["a.png"]), "--timestep_respacing", "6")
    flags += COMMANDS["ae_sample"]
    assert run("ae_sample", tmp_path / "model", tmp_path / "out", *flags).returncode == 0
    assert run("ae_sample", tmp_path / "model", tmp_path / "out", *flags).returncode == 0
    scheduler = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("fixed_small", "fixed_large"))
    changed = run("ae_sample", tmp_path / "model", tmp_path / "out", *flags)
    assert changed.returncode == 2 and changed.stderr.count("error:") == 1


def test_what_cannot_be_is_one_line(tmp_path):
    refused = run("ae_sample", MODEL.parent / "refused" / "latent", tmp_path / "out", "--base_samples", tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: ")


def test_conversion_there_and_back(tmp_path):
    flags = ("--model_path", MODEL, "--save_dir", tmp_path / "m.safetensors")
    command = [sys.executable, ROOT / "scripts" / "convert.py", *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and (tmp_path / "m.safetensors").exists(), done.stderr
    again = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: --save_dir is")
