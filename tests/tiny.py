"""A model and references so small that whole runs take a fraction of a second; for tests of the engine."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from guided_diffusion.checkpoint import save_model
from guided_diffusion.script_util import create_classifier, create_model

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "ae_sample.py"
SIZE = 16
MODEL = {
    "image_size": SIZE,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "learn_sigma": False,
}
ENCODER = {
    "image_size": SIZE,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
    "channel_mult": "1,2",
    "num_head_channels": 32,
}
PROCESS = {"diffusion_steps": 1000, "noise_schedule": "linear"}
METHOD = ("--range_t", "2", "--area", "4", "--energy", "dct", "--device", "cpu")


def random_state(network, scale=lambda weight: 0.05):
    """A state dict of the network's shapes in which every weight matters; biases and scales stay as they are."""
    return {key: torch.randn_like(v) * scale(v) if v.ndim > 1 else v for key, v in network.state_dict().items()}


def make_model(path, seed=0, **flags):
    """A checkpoint of random weights; flags: of its network, in place of MODEL's."""
    torch.manual_seed(seed)
    flags = {**MODEL, **flags}
    save_model(path, random_state(create_model(**flags)), model_type="ADM", flags={**flags, **PROCESS})
    return path


def make_encoder(path, classes, **head):
    """A checkpoint of a noisy-image classifier, or with head="I2Iout" of an extractor, with random weights."""
    flags = {**ENCODER, "num_class": classes}
    state = random_state(create_classifier(**flags, **head))
    save_model(path, state, model_type="ENCODER", flags={**flags, **PROCESS})
    return path


def make_judge(path, vendors):
    """A judge with random weights; returns the path."""
    from judge import Judge  # in benchmarks/emoji

    torch.manual_seed(0)
    judge = Judge(vendors, image_size=SIZE, width=8, features=12, embedding=6)
    save_file({key: value.contiguous() for key, value in random_state(judge).items()}, path, judge.metadata())
    return path


def make_references(folder, names, size=SIZE, seed=0):
    """Pictures of random pixels below `folder`, each its own; returns the folder."""
    for n, name in enumerate(names, seed):
        pixels = np.random.default_rng(n).integers(0, 256, (size, size, 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def command(model, base, out, *flags, steps=6):
    """The command line of a run, as strings."""
    folders = ("--model_path", model, "--base_samples", base, "--save_dir", out)
    return list(map(str, [sys.executable, SCRIPT, *folders, "--timestep_respacing", steps, *METHOD, *flags]))


def record(out):
    """The content of a run's run.json."""
    return json.loads((Path(out) / "run.json").read_text(encoding="utf-8", errors="surrogateescape"))


def files(out):
    """Every file of a run but its records, by relative name, hidden and temporary ones included: its bytes."""
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}
    return {name: content for name, content in found.items() if not re.fullmatch(r"run\.json|images.*\.jsonl", name)}


def pictures(out):
    """The outputs of a run by relative name: int [H, W, 3]."""
    names = [p for p in sorted(Path(out).rglob("*.png")) if p.name != "grid.png"]
    return {p.relative_to(out).as_posix(): np.asarray(Image.open(p)).astype(int) for p in names}


def assert_within_one_level(found, wanted):
    assert found.keys() == wanted.keys()
    for name, image in found.items():
        assert np.abs(image - wanted[name]).max() <= 1, name
