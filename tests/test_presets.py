"""Presets: one table of values, which flags, Translator, help, shell scripts and documents take; given flags win."""

import json
import os
import re
import shutil
import subprocess

import pytest
import rows
import tiny
from conftest import ROOT
from scripts_in_process import load_script, message, run_script

from guided_diffusion import Translator
from guided_diffusion.checkpoint.reconcile import ModelFlags
from guided_diffusion.cli.flags import preset_flags
from guided_diffusion.errors import InputError
from guided_diffusion.methods import ENERGIES, METHODS, energy_names
from guided_diffusion.presets import PRESETS, Preset, preset_options
from guided_diffusion.respace import space_timesteps

SCRIPT_OF = {"sddm": "ae_sample", "ilvr": "ilvr_sample", "sdedit": "sdedit_sample", "egsde": "egsde_sample"}
PAIRS = [(name, method) for name, preset in PRESETS.items() for method in preset.methods]


@pytest.fixture
def own(tmp_path):
    """A preset that suits a tiny model, registered for the time of a test, and the flags that it stands for."""
    model = tiny.make_model(tmp_path / "model.safetensors")
    tiny.make_references(tmp_path / "ref", ("a.png", "b.png"))
    sddm = {"timestep_respacing": "6", "blocks": 4, "range_t": 0.34, "energy": "dct", "start": 0.84}
    PRESETS.add("tiny")(Preset("a test", str(model), {"sddm": sddm}))
    yield ("--model_path", model, "--timestep_respacing", 6, "--area", 4, "--energy", "dct")
    del PRESETS["tiny"]


def parse(script, *flags):
    return load_script(script).create_parser().parse(list(map(str, flags)))


@pytest.mark.parametrize("name, method", PAIRS)
def test_every_value_is_an_option_that_fits(name, method, monkeypatch):
    """Each option belongs to the method, its energies or the model, and passes their checks and the schedule's."""
    monkeypatch.setattr(os.path, "exists", lambda path: True)  # EGSDE looks for its extractor
    options = preset_options(name, method)
    energies = [ENERGIES[each] for each in energy_names(options.get("energy"))] if method == "sddm" else []
    known = {"model_path", "energy"} if method == "sddm" else {"model_path"}
    for cls in (METHODS[method], ModelFlags, *energies):
        fields = {key: value for key, value in options.items() if key in cls.__dataclass_fields__}
        made = cls(**fields)
        known |= fields.keys()
        if cls is METHODS[method]:
            size = 64 if "_64" in options["model_path"] else 256
            made.check_fit((size, size), len(space_timesteps(1000, options.get("timestep_respacing", "1000"))))
    assert options.keys() <= known
    assert all(0 < options.get(name, 0.5) < 1 for name in ("range_t", "start")), "right for any number of steps"


@pytest.mark.parametrize("name, method", PAIRS)
def test_a_preset_is_its_flags(name, method):
    """--preset NAME gives what its words in help and documents give."""
    chosen, written = parse(SCRIPT_OF[method], "--preset", name), parse(SCRIPT_OF[method], *preset_flags(name, method))
    mine, theirs = chosen.digestible(), written.digestible()
    assert mine.pop("preset") == name and theirs.pop("preset") == "None"
    assert mine == theirs
    assert mine != {**parse(SCRIPT_OF[method]).digestible(), "preset": None}


def test_given_flags_win():
    given = parse("ae_sample", "--area", 8, "--preset", "emoji", "--model_path", "mine.pt", "--timestep_respacing=7")
    emoji = preset_options("emoji", "sddm")
    assert (given.area, given.model_path, given.timestep_respacing) == (8, "mine.pt", "7")
    assert given.range_t == emoji["range_t"] and given.energy == emoji["energy"]
    parser = load_script("ae_sample").create_parser()
    default = parser.parse(["--preset", "emoji", "--area", "16", "--range_t", "0"])
    assert (default.area, default.range_t) == (16, 0), "even where the value is the flag's default"
    assert parser.parse([]).start_t is None, "one command line's preset is not the next one's"


def test_unknown_names_are_refused_with_a_near_miss():
    for script, name, words in (
        ("ae_sample", "cat2dgo", "--preset is 'cat2dgo'; it can be cat2dog, "),
        ("ae_sample", "cat2dgo", "; did you mean cat2dog?"),
        ("ilvr_sample", "fast", "--preset is 'fast'; it has no options for ilvr; it has for sddm"),
    ):
        with pytest.raises(InputError) as caught:
            parse(script, "--preset", name)
        assert words in message(script, caught.value)
    with pytest.raises(InputError, match="preset is 'fast'"):
        Translator(preset="fast", method="sdedit")


@pytest.mark.parametrize("method, script", SCRIPT_OF.items())
def test_help_lists_them_with_what_they_set(method, script):
    text = " ".join(load_script(script).create_parser().format_help().split())
    for name, preset in PRESETS.items():
        words = " ".join(preset_flags(name, method)) if method in preset.methods else None
        assert (f"{name} {preset.about}" in text) == (words is not None)
        assert words is None or words.replace(f"{ROOT}{os.sep}", "") in text


def test_run_json_records_the_flags_and_either_spelling_resumes(own, tmp_path, capsys):
    out = tmp_path / "out"
    base = ("--base_samples", tmp_path / "ref", "--device", "cpu", "--save_dir", out)
    assert run_script("ae_sample", "--preset", "tiny", *base) == 0
    settings, made = tiny.record(out)["settings"], tiny.files(out)
    assert settings["area"] == 4 and settings["range_t"] == 2 and settings["start_t"] == 5
    assert "preset" not in json.dumps(settings)
    (out / "b.png").unlink()
    assert run_script("ae_sample", *own, "--range_t", 2, "--start_t", 5, *base) == 0
    assert "1 done, 1 already present, 0 failed" in capsys.readouterr().out
    assert tiny.files(out) == made and tiny.record(out)["settings"] == settings
    with pytest.raises(InputError, match="area"):
        run_script("ae_sample", "--preset", "tiny", "--area", 8, *base)


def test_translator_takes_a_preset_and_gives_the_commands_pixels(own, tmp_path):
    translate = Translator(preset="tiny", device="cpu")
    assert translate.method == METHODS["sddm"](blocks=4, range_t=0.34, start=0.84)
    assert translate.evaluations == 5 and [energy.blocks for energy in translate.translation.energies] == [4]
    flags = ("--base_samples", tmp_path / "ref" / "a.png", "--save_dir", tmp_path / "out", "--device", "cpu")
    assert run_script("ae_sample", "--preset", "tiny", *flags) == 0
    picture = translate(tmp_path / "ref" / "a.png")
    assert picture.tobytes() == tiny.Image.open(tmp_path / "out" / "a.png").tobytes()
    other = Translator(tmp_path / "model.safetensors", preset="tiny", steps=9, area=8, energy="none", device="cpu")
    assert other.target.diffusion.num_timesteps == 9, "what is given wins"
    assert other.method.blocks == 8 and not other.translation.energies


def test_rows_know_their_presets_by_their_values():
    """What is compared with a finished run is the values: a preset that changes makes its rows again."""
    row = rows.parse_row("S | x | ae_sample.py --preset emoji --area 8")
    assert "--preset" not in row.flags and "--model_path" not in row.flags
    assert row.flags.count("--area") == 1 and row.flags[-2:] == ("--area", "8")
    found, wanted = parse("ae_sample", *row.flags), parse("ae_sample", "--preset", "emoji", "--area", 8)
    for flag in ("timestep_respacing", "range_t", "area", "energy", "sampler"):
        assert getattr(found, flag) == getattr(wanted, flag)
    assert rows.parse_row("S | x | ae_sample.py --preset=emoji --area 8").flags == row.flags
    dse = rows.parse_row("E | x | egsde_sample.py --preset cat2dog")
    assert dse.flags[dse.flags.index("--dsepath") + 1] == "models/cat2dog_dse.pt"
    for line in ("S | x | ae_sample.py --preset emojy", "S | x | ae_sample.py --preset"):
        with pytest.raises(InputError):
            rows.parse_row(line)


@pytest.mark.parametrize("script, task", [
    ("male2female", "male2female"), ("emoji", "emoji"), ("ablation_energy", "cat2dog"), ("ablation_moo", "emoji"),
])  # fmt: skip
def test_task_scripts_give_rows_that_their_commands_read(tmp_path, script, task):
    """The real shell scripts with an interpreter that prints the table which benchmark.py would get."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\ncat\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".requirements")
    files = dict.fromkeys(("VENV", "MODEL", "SOURCES", "TARGETS", "DSE", "VGG"), str(tmp_path))
    command = ["bash", ROOT / "scripts" / f"{script}.sh", "--quick"]
    done = subprocess.run(command, env={**os.environ, "TASK": task, **files}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = rows.parse_table(done.stdout)
    assert len(table) >= 3
    for row in table:
        given = parse(row.script.removesuffix(".py"), *row.flags)
        steps = len(space_timesteps(1000, given.timestep_respacing or "1000"))
        T0 = re.search(r"(?:T0|M)=([\d.]+)T", row.setting)
        if T0:
            value = given.range_t if row.script == "ae_sample.py" else given.t
            assert (value if value < 1 else value / steps) == pytest.approx(float(T0[1]), abs=0.03)
