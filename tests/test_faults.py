"""Two thousand faults, wrong flags of every command and damaged files of every kind: each ends in one line or is done.

Run as a program, it prints the table of benchmarks/results/faults.md.
"""

import logging
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import pytest
import torch
from PIL import Image
from scripts_in_process import load_script
from tiny import make_encoder, make_model, make_references

from guided_diffusion import dist_util
from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation.images import list_images
from guided_diffusion.image_datasets import ImageError, load_image
from guided_diffusion.run import record
from guided_diffusion.run.files import read_json_or_none, write_json
from guided_diffusion.run.record import curves
from guided_diffusion.training import files as training_files

# Every command with flags that end it early: what it needs does not exist.
MODEL = ["--model_path", "{d}/none.pt"]
REFERENCES = [*MODEL, "--base_samples", "{d}/ref"]
COMMANDS = {
    **{f"{method}_sample": ("translate", REFERENCES) for method in ("ae", "ilvr", "sdedit", "super_res")},
    **{f"{kind}_train": ("train", ["--data_dir", "{d}/none"]) for kind in ("image", "classifier", "super_res")},
    "egsde_sample": ("translate", [*REFERENCES, "--ls", "0"]),
    "image_sample": ("translate", MODEL),
    "classifier_sample": ("translate", [*MODEL, "--classifier_path", "{d}/none.pt"]),
    "image_nll": ("evaluate", [*MODEL, "--data_dir", "{d}/ref"]),
    "evaluate": ("measure", ["--outputs", "{d}/none", "--sources", "{d}/ref"]),
    "convert": ("main", MODEL),
}
NO_RANKS = ("evaluate", "convert")
RANKS_ALONE = ("image_train", "classifier_train", "super_res_train")
VALUES = (
    "", " ", "-1", "0", "1", "3", "15", "1e3", "0.5", "-0.0", "nan", "inf", "-inf", "1e308", "99999999999999999999",
    "True", "maybe", "auto", "none", "None", "null", "[]", "{}", "a,b", ",", "1,2,4", "0,0", "-1,2", "1,x", "..", "/",
    "/dev/null", "/proc/self/mem",
    "./x\n y", "\x1b[31mred", "x" * 5000, "ünïcode", "\ud800", "%s", "ddim7", "linspace0",
    "leading3+9", "betas:0.1", "betas:2", "linear:1,0", "sigmoid:a,b", "dse", "vgg", "fp8", "cuda:99", "meta", "crop",
    "#12", "rgba(0,0,0,0)", "manifold", "released", "0x10", "1_000", "٣", "+5", "--", "1 2",
)  # fmt: skip


def wrong_flags(folder, seed, count):
    """Run commands with one to three flags of arbitrary values; yields (command, case, outcome, error or text)."""
    rng = random.Random(seed)
    make_references(folder / "ref", ["a.png", "b.png"])
    scripts = {name: load_script(name) for name in COMMANDS}
    parsers = {name: script.create_parser() for name, script in scripts.items()}
    for _ in range(count):
        name = rng.choice(sorted(COMMANDS))
        function, needed = COMMANDS[name]
        parser = parsers[name]
        flags = [a.option_strings[0] for a in parser._actions if a.option_strings and a.dest != "help"]
        case = [part.replace("{d}", str(folder)) for part in needed]
        if "--save_dir" in flags:
            case += ["--save_dir", str(folder / "out")]
        for flag in rng.sample(flags, rng.randint(1, 3)):
            if flag not in case:  # what keeps the command from running stays
                case += [flag, rng.choice(VALUES)]

        def run(name=name, function=function, parser=parser, case=case):
            given = parser.parse(case)
            call = getattr(scripts[name], function)
            if name in NO_RANKS:
                return call(given)
            ranks = dist_util.Ranks()
            return call(given, ranks if name in RANKS_ALONE else dist_util.connect(ranks))

        yield name, case, *outcome(run, parser.spell)


def outcome(run, spell=str):
    """How a call ended: "refused" with its line, "done" with its result, or "defect" with the exception."""
    try:
        return "done", run()
    except (InputError, ImageError) as error:
        return "refused", error.text(spell) if isinstance(error, InputError) else str(error)
    except SystemExit as error:
        return ("done", None) if error.code in (0, None) else ("defect", error)
    except BaseException as error:
        return "defect", error


def damaged_files(folder, seed, count):
    """Read files of every kind with bytes changed, lost or added; yields (kind, case, outcome, error or text)."""
    rng = random.Random(seed)
    readers = make_files(folder)
    for number in range(count):
        path, read = readers[rng.choice(sorted(readers))]
        sound = path.read_bytes()
        how = rng.choice(sorted(DAMAGES))
        try:
            path.write_bytes(DAMAGES[how](sound, rng.randrange(len(sound)), rng))
            yield path.name, f"{how} ({number})", *outcome(read)
        finally:
            path.write_bytes(sound)


def flipped(data, rng, count):
    data = bytearray(data)
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def swapped(data, one, other):
    data = bytearray(data)
    data[one : one + 16], data[other : other + 16] = data[other : other + 16], data[one : one + 16]
    return bytes(data)


DAMAGES = {
    "cut": lambda data, at, rng: data[:at],
    "flip": lambda data, at, rng: flipped(data, rng, 1),
    "flips": lambda data, at, rng: flipped(data, rng, 30),
    "zeros": lambda data, at, rng: data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :],
    "insert": lambda data, at, rng: data[:at] + rng.randbytes(rng.randint(1, 40)) + data[at:],
    "swap": lambda data, at, rng: swapped(data, at, rng.randrange(len(data))),
    "repeat": lambda data, at, rng: data + data[at:],
    "nest": lambda data, at, rng: data[:at] + b"[" * 100_000 + data[at:],
    "empty": lambda data, at, rng: b"",
}


def make_files(folder):
    """Sound files, and how each is read: {name: (path, function)}."""
    model = make_model(folder / "model.safetensors")
    state = load_model(model)[0].state_dict()
    torch.save(state, folder / "model.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    encoder = make_encoder(folder / "encoder.safetensors", 3)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.save({**optimizer.state_dict(), "train": {"samples": 3}}, folder / "opt000001.pt")
    make_references(folder / "pictures", ["a.png"])
    for suffix in ("jpg", "webp", "gif", "bmp", "tif", "ppm"):
        Image.open(folder / "pictures" / "a.png").save(folder / "pictures" / f"a_{suffix}.{suffix}")
    steps = {"5": [2, 0.5, 0.5, 0, 1.0]}
    content = {
        "format": record.FORMAT, "settings": {"seed": 0}, "versions": {}, "plan": [["a.png#0"]], "batch_size": 1,
        "started": "2026-01-01T00:00:00Z", "seconds": 1.0, "finished": None,
        "monitor": {"images": 2, "seconds": 1.0, "evaluations": 4, "steps": steps, "parts": []},
    }  # fmt: skip
    write_json(folder / "run.json", content)
    write_json(folder / "train.json", {"model": {"image_size": 16}, "flags": {}, "versions": {}, "started": ""})
    (folder / "metadata.json").write_text('{"a": [1, 2, {"b": null}]}')
    opt = folder / "opt000001.pt"
    readers = {
        "model": (model, lambda: load_model(model)),
        "torch file": (folder / "model.pt", lambda: load_model(folder / "model.pt", num_head_channels=32)),
        "older torch file": (folder / "old.pt", lambda: load_model(folder / "old.pt", num_head_channels=32)),
        "encoder": (encoder, lambda: load_model(encoder)),
        "optimizer": (opt, lambda: training_files.load_optimizer_file(str(opt), [weight])),
        "run.json": (folder / "run.json", lambda: curves(record.read(folder) or {})),
        "train.json": (folder / "train.json", lambda: training_files.read_run(str(folder))),
        "json": (folder / "metadata.json", lambda: read_json_or_none(folder / "metadata.json")),
    }
    for path in sorted((folder / "pictures").iterdir()):
        readers[path.name] = (path, lambda path=path: load_image(path, 8))
    readers["listing"] = (folder / "pictures" / "a.png", lambda: list_images(folder / "pictures", "outputs"))
    return readers


@pytest.mark.slow
@pytest.mark.parametrize("battery, kinds", [(wrong_flags, len(COMMANDS)), (damaged_files, 15)])
def test_every_fault_ends_in_one_line_or_is_done(battery, kinds, tmp_path, caplog):
    met, defects = set(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about damaged metadata
        for kind, case, ended, what in battery(tmp_path, 1, 1000):
            met.add(kind)
            if ended == "defect":
                defects.append((kind, case, repr(what)[:300]))
            if ended == "refused":
                assert "\n" not in what and what.isprintable() and 0 < len(what) < 4100, (kind, case, what)
    assert not defects, "\n".join(map(str, defects))
    assert len(met) == kinds


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    total = Counter()
    with tempfile.TemporaryDirectory() as place:
        for battery in (wrong_flags, damaged_files):
            (Path(place) / battery.__name__).mkdir()
            for kind, case, ended, what in battery(Path(place) / battery.__name__, 0, 1200):
                total.update([(kind, ended), ("**all**", ended)])
                if ended == "defect":
                    print(kind, case, repr(what)[:300], file=sys.stderr)
    print("| what | cases | refused in one line | done | tracebacks |", "|---|---|---|---|---|", sep="\n")
    for kind in sorted({kind for kind, _ in total}, key=lambda kind: (kind == "**all**", kind)):
        counts = [total[kind, ended] for ended in ("refused", "done", "defect")]
        print(f"| {kind} | {sum(counts)} | {' | '.join(map(str, counts))} |")
