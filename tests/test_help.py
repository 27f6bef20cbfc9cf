"""--help of every command: every flag explained, one style of value names, defaults shown, what matters first."""

import re

import pytest
from conftest import ROOT
from scripts_in_process import load_script

from guided_diffusion.cli.flags import NO_EFFECT, shown_default

NAMES = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
SAMPLING = {  # the flags that matter, by command
    "ae_sample": ["area", "range_t", "timestep_respacing"],
    "ilvr_sample": ["down_N", "range_t", "timestep_respacing"],
    "sdedit_sample": ["t", "timestep_respacing"],
    "egsde_sample": ["t", "ls", "li", "dsepath", "down_N", "timestep_respacing"],
}
# Words for values: one capital word, or the choices in braces; [...] for a value that may be missing.
METAVAR = re.compile(r"[A-Z]+|\{[\w\-.]+(,[\w\-.]+)*\}")


@pytest.fixture(params=NAMES)
def parser(request):
    parser = load_script(request.param).create_parser()
    parser.prog = f"{request.param}.py"
    return parser


def actions(parser):
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def titles(text):
    return re.findall(r"^([a-zA-Z].*):$", text, re.MULTILINE)


def flags_of(text):
    return re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_every_flag_is_explained_with_its_values_and_default(parser):
    for action in actions(parser):
        flag, text = action.option_strings[0], action.help.replace("%%", "%")
        assert len(text) > 5 and text[0] != " " and not re.search(r"[^.]\.$", text), flag
        assert METAVAR.fullmatch(action.metavar), f"{flag}: {action.metavar}"
        field = parser.fields.get(action.dest)
        if field is not None and (choices := field.metadata.get("choices")):
            assert action.metavar == "{" + ",".join(map(str, choices)) + "}"
        assert action.default is None or text.endswith(f"(default {shown_default(action.default)})"), flag
        assert text.count("(default ") <= 1, flag


def test_defaults_are_those_of_the_dataclasses(parser):
    """Where no command sets another: the values of options that are made without arguments."""
    own = {"batch_size", "save_dir", "iterations", "lr", "ema_rate", "vgg_path", "examples", "num_samples", "npz",
           "sigma_small"}  # set by commands  # fmt: skip
    for flag, field in parser.fields.items():
        assert flag in own or parser.get_default(flag) == field.default, flag


def test_it_fits_the_terminal(parser, monkeypatch):
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = [line for line in parser.format_help().splitlines() if not line.startswith("usage: ")]
        assert max(map(len, lines)) <= columns and all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) > 80


def test_what_has_no_effect_stands_at_the_end(parser):
    rest, _, last = parser.format_help().partition(f"\n{NO_EFFECT}:\n")
    assert "no effect" not in rest and not titles(last) and set(flags_of(last)) == parser.without_effect.keys()


@pytest.mark.parametrize("name, first", SAMPLING.items())
def test_the_flags_that_matter_come_first_then_input_and_output(name, first):
    text = load_script(name).create_parser().format_help()
    flags = flags_of(text)
    assert sorted(flags[: len(first)]) == sorted(first)
    assert flags[len(first) : len(first) + 4] == ["preset", "model_path", "base_samples", "save_dir"]
    groups = [title for title in titles(text) if title != "example"]
    assert groups[:3] == ["method", "presets", "input and output"]
    assert len(set(flags)) == len(flags)


def test_the_three_flags_of_the_readme_come_first_in_its_order():
    rows = re.findall(r"^\| `--(\w+) \w+` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows[:3] == flags_of(load_script("ae_sample").create_parser().format_help())[:3] == SAMPLING["ae_sample"]
