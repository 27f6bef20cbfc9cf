"""The documents, followed literally: commands and snippets that need no download run in a copy of the repository; all
others are read by the real parsers of their scripts.

What is changed when they run: flags in RUN are appended, so that fewer steps are taken, and EDITS are made in snippets.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT
from PIL import Image
from scripts_in_process import load_script

from guided_diffusion import methods
from guided_diffusion.errors import InputError

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "models/README.md", "datasets/README.md", *PAGES)

# Commands that run, by their beginnings, with the flags that are appended. Later ones use earlier results.
RUN = {
    "bash scripts/demo.sh": "--timestep_respacing 3",
    "python scripts/ae_sample.py --preset emoji --base_samples my_pictures --save_dir output/mine":
        "--timestep_respacing 3",
    "python scripts/image_train.py --data_dir my_targets": "--iterations 2",
    "python scripts/classifier_train.py --domains my_sources,my_targets": "--iterations 2",
    "python scripts/ae_sample.py --model_path output/target/model.safetensors": "--timestep_respacing 3",
    "python scripts/ae_sample.py --preset emoji --base_samples ref_imgs --save_dir output/late":
        "--timestep_respacing 5 --num_samples 2",
    "python scripts/fetch_model.py": "",
}  # fmt: skip
# Python snippets by a text in them: replacements for running them, or None where they need a download.
EDITS: dict[str, list[tuple[str, str]] | None] = {
    'Translator(preset="emoji")': [('preset="emoji"', 'preset="emoji", steps=3')],
    "sddm.sample(model": [('"timestep_respacing": "100"', '"timestep_respacing": "5"'), ("range_t=20", "range_t=1")],
    "SDDMPipeline.from_pretrained": None,
    "my_sampling.py": [],
}
BRIGHTNESS = (
    "--manifold brightness --preset emoji --base_samples my_pictures --save_dir output/own --timestep_respacing 3"
)


@dataclass(frozen=True)
class Command:
    """A command line of a document, on one line; inline: it stands in a sentence."""

    document: str
    section: str
    text: str
    inline: bool = False

    @property
    def words(self):
        return shlex.split(self.text, comments=True)

    def starts(self, prefix):
        words = shlex.split(prefix)
        return self.words[: len(words)] == words

    @property
    def script(self):
        """The Python script that it starts, as scripts/ae_sample.py; a shell script that passes its flags on counts."""
        found = [word for word in self.words if re.fullmatch(r"(scripts|datasets|docs)/\w+\.py|scripts/demo\.sh", word)]
        return found[0].replace("demo.sh", "ae_sample.py") if found else None

    @property
    def flags(self):
        return self.words[next(n for n, word in enumerate(self.words) if "/" in word and "." in word) + 1 :]


def blocks(document):
    """Code blocks: (section, language, text)."""
    text = (ROOT / document).read_text(encoding="utf-8")
    section = ""
    for part in re.finditer(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if part[1] is not None:
            section = part[1]
        else:
            yield section, part[2], part[3]


def commands():
    """All commands of all documents, those in sentences last."""
    found, inline = [], []
    for document in DOCUMENTS:
        for section, language, text in blocks(document):
            lines = text.replace("\\\n", " ").splitlines() if language in ("", "bash") else []
            if re.search(r"^data/\S+ +\S|^data/\w+/$", text, re.MULTILINE):  # trees of files
                continue
            found += [Command(document, section, " ".join(line.split())) for line in lines if line.strip()]
        text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / document).read_text(encoding="utf-8"))
        for line in re.findall(r"`((?:bash|python|torchrun) [^`]+)`", text):
            inline.append(Command(document, "", " ".join(line.split()), True))
    return [*found, *inline]


COMMANDS = commands()
SNIPPETS = [
    (document, section, text) for document in DOCUMENTS for section, kind, text in blocks(document) if kind == "python"
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with an environment in .venv that is the one of this test, and somebody's pictures."""
    copy = tmp_path_factory.mktemp("clone")
    for name in ("scripts", "guided_diffusion", "resizer"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("models", "ref_imgs", "requirements.txt"):
        (copy / name).symlink_to(ROOT / name)
    folder = copy / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod(0o755)
    (folder / "activate").write_text(f'export PATH="{folder}:$PATH"\n')
    shutil.copyfile(ROOT / "requirements.txt", copy / ".venv" / ".requirements")
    drawings = sorted((ROOT / "ref_imgs").glob("*.png"))
    for name, chosen in {"my_pictures": drawings[:2], "my_sources": drawings[:4], "my_targets": drawings[4:8]}.items():
        (copy / name).mkdir()
        for path in chosen:
            shutil.copyfile(path, copy / name / path.name)
    return copy


def run(clone, line):
    """A line as it is typed into bash in the clone's folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "VENV"):
        environment.pop(name, None)
    return subprocess.run(["bash", "-ec", f"source .venv/bin/activate\n{line}"], cwd=clone, env=environment,
                          capture_output=True, text=True, timeout=600)  # fmt: skip


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.script], ids=lambda each: each.text[:60])
def test_flags_exist_and_values_fit(command):
    """By the parser of the script, and the checks of its options."""
    assert (ROOT / command.script).is_file()
    parser = load_script(f"../{command.script.removesuffix('.py')}").create_parser()
    if command.flags[-1:] == ["..."] or command.words[:1] == ["sbatch"]:
        return
    mine = ["--preset", "emoji", "--base_samples", "ref_imgs"] if "demo.sh" in command.text else []
    given = parser.parse([*mine, *command.flags])
    for cls in parser.added.keys() - {methods.EGSDE, *methods.ENERGIES.values()}:
        given.options(cls)


def test_flags_and_programs_in_sentences_exist():
    known = {"--pdb", "--nproc_per_node", "--input_pertub"}  # pytest's, torchrun's, a fork's
    for pattern in ("scripts/*.py", "docs/make.py", "datasets/prepare_*.py"):
        for path in ROOT.glob(pattern):
            known |= {*load_script(f"../{path.parent.name}/{path.stem}").create_parser()._option_string_actions}
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert {*re.findall(r"(?<![\w-])--[a-z]\w+", text)} <= known, document
        for program in re.findall(r"\b(?:scripts|benchmarks|datasets|notebooks)/[\w/]*\w+\.(?:py|sh)\b", text):
            assert (ROOT / program).exists(), (document, program)


@pytest.mark.parametrize("prefix", RUN)
def test_commands_that_need_no_download_run(clone, prefix):
    command = min((each for each in COMMANDS if each.starts(prefix)), key=lambda each: len(each.words))
    done = run(clone, f"{shlex.join(command.words)} {RUN[prefix]}")  # without the comment at its end
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if (out := save_dir(command)) is not None:
        assert (clone / out / "model.safetensors").exists() or (clone / out / "grid.png").exists()


def save_dir(command):
    """Where a command writes; None where that is no folder of its own."""
    if command.script is None or command.flags[-1:] == ["..."]:
        return None
    for flag in ("--save_dir", "--out"):
        if flag in command.flags:
            return command.flags[command.flags.index(flag) + 1]
    if "demo.sh" in command.text:
        return "output_demo"
    parser = load_script(f"../{command.script.removesuffix('.py')}").create_parser()
    return None if "fetch_model" in command.script else parser.get_default("save_dir") or parser.get_default("out")


def test_no_two_commands_of_a_document_write_to_the_same_folder():
    for document in ("README.md", *PAGES):
        mine = dict.fromkeys(each for each in COMMANDS if each.document == document and not each.inline)
        folders = [folder for folder in map(save_dir, mine) if folder is not None]
        assert len(set(folders)) == len(folders), sorted(folders)
        assert not [(a, b) for a in folders for b in folders if b.startswith(f"{a}/")]


def test_the_command_that_shows_what_a_file_is(capsys, monkeypatch):
    (command,) = [each for each in COMMANDS if each.starts("python -c")]
    monkeypatch.chdir(ROOT)
    exec(command.words[2].replace("models/FILE", "models/fluent3d_64.safetensors"), {})
    assert "ADM" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", dict.fromkeys(text for _, _, text in SNIPPETS), ids=lambda text: text.split("\n")[0][:60]
)
def test_snippets_run(clone, text, monkeypatch):
    (mark,) = [mark for mark in EDITS if mark in text]
    edits = EDITS[mark]
    code = compile(text, "snippet", "exec")
    if edits is None:  # the names that it imports from this project exist
        for module, names in re.findall(r"^from (guided_diffusion[\w.]*) import (.*)$", text, re.MULTILINE):
            source = importlib.util.find_spec(module).origin
            assert all(re.search(rf"^class {name}\b", open(source).read(), re.MULTILINE) for name in names.split(", "))
        assert code
        return
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    if mark != "my_sampling.py":
        monkeypatch.chdir(clone)
        exec(compile(text, "snippet", "exec"), {})
        return
    (clone / mark).write_text(text)
    done = run(clone, f"PYTHONPATH=. python {mark} {BRIGHTNESS}")
    assert done.returncode == 0, done.stderr
    assert '"manifold": "brightness"' in (clone / "output" / "own" / "run.json").read_text()


def test_the_table_of_presets_is_up_to_date():
    """`python docs/make.py presets` writes it."""
    make, text = load_script("../docs/make"), (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    assert make.presets_table() in text and make.with_presets(text) == text


def links(path):
    """The files that a document links to, with their anchors."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield (path.parent / file).resolve() if file else path, anchor


def anchors(path):
    """Those of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for path, anchor in links(ROOT / document):
        assert path.exists() and (not anchor or anchor in anchors(path)), (path, anchor)


def test_the_readme_is_short_and_leads_to_every_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    linked = {path for path, _ in links(ROOT / "README.md")}
    assert {ROOT / document for document in DOCUMENTS[1:]} <= linked


def test_the_architecture_names_every_module():
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The path")[0]
    modules = {path.stem for path in (ROOT / "guided_diffusion").rglob("*.py")} - {"__init__"}
    assert {word for row in re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.MULTILINE)
            for word in re.findall(r"`(\w+)`", row)} - {"guided_diffusion"} == modules  # fmt: skip


def test_pictures_can_be_made_again(tmp_path):
    """With two steps; the layout is that of the committed ones, which are light and at least as wide as a page."""
    make = load_script("../docs/make")
    names = ("range_t_area", "demo", "samples")
    given = make.create_parser().parse([*names, "--steps", "2", "--out", str(tmp_path), "--device", "cpu"])
    assert make.make(given) == 0
    for name in names:
        committed = ROOT / "docs" / f"{name}.png"
        with Image.open(tmp_path / f"{name}.png") as mine, Image.open(committed) as theirs:
            assert mine.size == theirs.size and mine.width >= 800
        assert committed.stat().st_size < 450_000
    with pytest.raises(InputError, match="did you mean demo"):
        make.make(make.create_parser().parse(["dmo"]))
