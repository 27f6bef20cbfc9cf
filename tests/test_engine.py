"""The sampling engine: what outputs depend on, resuming after an end of any kind, the record, disks, memory, ranks."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import logging
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scripts_in_process import load_script
from tiny import SIZE, assert_within_one_level, command, files, make_model, make_references, pictures, record
from torch.distributed import HashStore

from guided_diffusion import dist_util
from guided_diffusion.cli.progress import Progress
from guided_diffusion.dist_util import Peers, Ranks, Stopped
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import list_references
from guided_diffusion.run import files as run_files
from guided_diffusion.run.job import Job, JobOptions, opened
from guided_diffusion.run.likelihood import data_images
from guided_diffusion.run.loop import Loop
from guided_diffusion.run.record import curves
from guided_diffusion.run.sources import Source
from guided_diffusion.solvers import NotFiniteError
from guided_diffusion.target import Counted

NAMES = ("a.png", "b.png", "c c.png", "d.png", "more/a.png", "more/é.png", "more/still/f.png", "g.png", "h.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model and nine references; no test writes here."""
    root = tmp_path_factory.mktemp("data")
    make_model(root / "model.safetensors")
    make_references(root / "ref", NAMES)
    return root


@pytest.fixture(scope="module")
def script():
    """ae_sample.py as a module."""
    return load_script("ae_sample")


@pytest.fixture
def out(tmp_path):
    """The save folder, which does not exist yet."""
    return tmp_path / "out"


class Painter:
    """A sampler that costs nothing: every step mixes in a draw. Keeps the sizes of its batches.

    before(painter): called at the start of every batch, as something that goes wrong.
    """

    steps = 3

    def __init__(self, before=None):
        self.batches, self.before = [], before

    def __call__(self, batch, *, noise, callback):
        ref = batch.ref
        self.batches.append(len(ref))
        x = noise(ref.shape)
        for i in reversed(range(self.steps)):
            if i == 1 and self.before:
                self.before(self)
            x = 0.5 * x + 0.3 * ref + 0.2 * noise(ref.shape)
            callback({"i": i, "x": x, "pred_xstart": x, "guided": []})
        return x


def create_job(base, out, peers=None, **options):
    """A job on the CPU."""
    options = JobOptions(base_samples=str(base), save_dir=str(out), **options)
    peers = peers or dist_util.connect(Ranks())
    return Job(options, peers, torch.device("cpu"), options.source(peers))


def paint(base, out, before=None, settings=(), peers=None, painter=None, **options):
    """One run of the engine with a `Painter`; returns its loop, the painter, and the steps told as progress."""
    job = create_job(base, out, peers, **options)
    painter, told = painter or Painter(before), []
    with opened(job, SIZE, {"seed": 0, **dict(settings)}) as plan:
        loop = Loop(job, plan, painter, painter.steps, lambda *each: told.append(each))
        loop.run()
        loop.finish()
    progress, counts = [steps for steps, _ in told], [images for _, images in told]
    # Images on disk: never fewer than before, and all of them at the end.
    assert counts == sorted(counts) and (job.peers.rank or counts[-1:] in ([], [job.made()]))
    assert sum(progress) == (0 if job.peers.rank else plan.image_steps(painter.steps))
    return loop, painter, progress


def refused(function, *arguments, kind=InputError, **options):
    """The error that a call must end with."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def error_of(function, *arguments, **options):
    """The message of the error that a call must end with."""
    return str(refused(function, *arguments, **options))


# ---- what an output depends on --------------------------------------------------------------------------------------


def translate(script, data, out, *flags, base=None):
    """ae_sample.py in this process; returns its exit status."""
    given = command(data / "model.safetensors", base or data / "ref", out, *flags)[2:]
    return script.translate(script.create_parser().parse(given), dist_util.connect(Ranks()))


@pytest.fixture(scope="module")
def translated(script, data, tmp_path_factory):
    """Folders of finished runs with the tiny model, by batch size; no test writes here."""
    root = tmp_path_factory.mktemp("translated")
    for size in (3, 8):
        assert translate(script, data, root / str(size), "--batch_size", size) == 0
    return root


def test_outputs_do_not_depend_on_the_batch_size(translated):
    found, wanted = pictures(translated / "8"), pictures(translated / "3")
    assert list(wanted) == sorted(NAMES)
    assert_within_one_level(found, wanted)
    levels = np.stack(list(wanted.values()))
    # Pictures, of which equality says something.
    assert levels.std() > 20 and ((levels > 0) & (levels < 255)).mean() > 0.5
    assert all(np.abs(a - b).mean() > 10 for n, a in enumerate(levels) for b in levels[:n])


def test_seed_and_relative_path_alone_determine_the_noise(script, data, translated, tmp_path):
    """Not the other references: among few of them, and as a single file."""
    wanted = pictures(translated / "3")
    (tmp_path / "base" / "more").mkdir(parents=True)
    for name, copy in (("more/é.png", "more/é.png"), ("a.png", "a.png"), ("a.png", "more/a.png"), ("a.png", "z.png")):
        shutil.copy(data / "ref" / name, tmp_path / "base" / copy)
    assert translate(script, data, tmp_path / "names", base=tmp_path / "base") == 0
    found = pictures(tmp_path / "names")
    assert_within_one_level(*({name: each[name] for name in ("a.png", "more/é.png")} for each in (found, wanted)))
    assert min(np.abs(found[name] - found["a.png"]).mean() for name in ("more/a.png", "z.png")) > 5
    assert translate(script, data, tmp_path / "one", "--seed", 1, base=data / "ref" / "a.png") == 0
    assert np.abs(pictures(tmp_path / "one")["a.png"] - found["a.png"]).mean() > 5
    assert translate(script, data, tmp_path / "d", base=data / "ref" / "d.png") == 0
    assert_within_one_level(pictures(tmp_path / "d"), {"d.png": wanted["d.png"]})


def test_several_samples_of_a_reference_differ(script, data, translated, tmp_path, out):
    assert translate(script, data, out, "--samples_per_image", 3, base=data / "ref" / "more") == 0
    found = pictures(out)
    names = ("a.png", "still/f.png", "é.png")
    assert list(found) == [f"sample_{k}/{name}" for k in range(3) for name in names]
    for name in names:
        several = [found[f"sample_{k}/{name}"] for k in range(3)]
        assert min(np.abs(several[k] - several[k - 1]).mean() for k in range(3)) > 5
    assert translate(script, data, tmp_path / "one", base=data / "ref" / "more") == 0
    first = {name.removeprefix("sample_0/"): image for name, image in found.items() if name.startswith("sample_0/")}
    assert_within_one_level(first, pictures(tmp_path / "one"))


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painted(data, tmp_path_factory):
    """The folder of an unbroken run of the `Painter` in batches of two; no test writes here."""
    out = tmp_path_factory.mktemp("painted") / "out"
    paint(data / "ref", out, batch_size=2)
    return out


class Broken(Exception):
    """Something that the engine knows nothing of."""


def break_at(batch, error):
    """What makes a Painter fail in the middle of its n-th batch."""

    def before(painter):
        if len(painter.batches) == batch:
            raise error

    return before


@pytest.mark.parametrize("batch, error", [(1, KeyboardInterrupt), (3, Broken)])
def test_a_broken_run_resumes(data, painted, out, batch, error):
    error_of(paint, data / "ref", out, break_at(batch, error), batch_size=2, kind=error)
    made = files(out)
    assert len(made) == 2 * (batch - 1) and all(files(painted)[name] == image for name, image in made.items())
    assert record(out)["finished"] is None and "counts" not in record(out)
    times = {name: (out / name).stat().st_mtime_ns for name in made}
    summary, painter, progress = paint(data / "ref", out, batch_size=2)
    assert painter.batches == [2, 2, 2, 2, 1][batch - 1 :]  # nothing that is already present is made again
    assert summary.skipped == len(made) and summary.done == len(NAMES) - len(made)
    assert sum(progress) == Painter.steps * summary.done
    assert files(out) == files(painted)
    assert {name: (out / name).stat().st_mtime_ns for name in made} == times
    if batch == 3:  # in batches of another size
        for name in sorted(NAMES)[4:]:
            (out / name).unlink()
        assert paint(data / "ref", out, batch_size=3)[1].batches == [3, 2]
        assert_within_one_level(pictures(out), pictures(painted))


def test_lost_outputs_and_half_written_files(data, painted, out):
    """Only batches of which an image is missing are sampled again, in the same company; what is present stays."""
    shutil.copytree(painted, out)
    for name in ("a.png", "more/a.png"):
        (out / name).unlink()
    (out / "b.png").write_bytes(b"as it was")
    for name in (".a.png.12-34.writing", "more/.x.png.5-6.writing"):
        (out / name).write_bytes(b"half")
    (out / "mine.txt").write_bytes(b"not of the run")
    summary, painter, _ = paint(data / "ref", out, batch_size=2)
    assert painter.batches == [2, 2] and (summary.done, summary.skipped) == (2, 7)
    found = files(out)
    assert found.pop("mine.txt") == b"not of the run" and found.pop("b.png") == b"as it was"
    assert found.pop("grid.png")  # of the file that another put there
    assert found == {name: image for name, image in files(painted).items() if name not in ("b.png", "grid.png")}


def test_references_may_come_and_go(data, painted, tmp_path, out):
    base = tmp_path / "base"
    make_references(base, NAMES)
    first = base / "a.png"
    paint(base, out, num_samples=4, batch_size=2)
    assert list(pictures(out)) == sorted(NAMES)[:4]
    first.unlink()
    summary, painter, _ = paint(base, out, batch_size=2)
    assert painter.batches == [2, 2, 1] and summary.skipped == 3
    found, wanted = pictures(out), pictures(painted)
    assert_within_one_level(found, wanted)  # the output of the reference that is gone stays
    assert record(out)["counts"] == {"references": 8, "outputs": 8, "failed": 0}
    assert sorted(key for batch in record(out)["plan"] for key in batch) == sorted(f"{name}#0" for name in NAMES)


# ---- whose pictures these are ---------------------------------------------------------------------------------------


def exchange(base, name, other):
    shutil.copy(base / other, base / name)


def test_outputs_whose_sources_changed_are_made_again(data, painted, tmp_path, out, caplog):
    """Each as in a run that never knew the old source, also where the restart is killed."""
    base = shutil.copytree(data / "ref", tmp_path / "base")
    shutil.copytree(painted, out)
    for name, other in (("a.png", "b.png"), ("more/é.png", "h.png")):
        exchange(base, name, other)
    error_of(paint, base, out, break_at(1, Broken), batch_size=2, kind=Broken)
    assert not (out / "a.png").exists()
    summary, painter, _ = paint(base, out, batch_size=2)
    assert (summary.done, summary.skipped) == (2, 7) and painter.batches == [2, 1]
    said = [entry.getMessage() for entry in caplog.records]
    assert said == ["outputs that are made again, because their sources have changed: 2, such as a.png"]
    paint(base, tmp_path / "fresh", batch_size=2)
    assert files(out) == files(tmp_path / "fresh") != files(painted)
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert paint(elsewhere, out, batch_size=2)[1].batches == []  # equal contents are the same sources


def test_a_source_that_changes_while_it_is_read_is_noticed_by_the_next_run(data, tmp_path, out, monkeypatch):
    base = shutil.copytree(data / "ref", tmp_path / "base")
    read = Source.read

    def replaced(source, reference, size):
        exchange(base, "a.png", "b.png")
        return read(source, reference, size)

    monkeypatch.setattr(Source, "read", replaced)
    paint(base, out, num_samples=1)
    monkeypatch.undo()
    assert paint(base, out, num_samples=1)[0].done == 1
    assert paint(base, out, num_samples=1)[0].skipped == 1


def test_a_record_of_version_0_2_resumes_without_knowing_sources(data, painted, out, caplog):
    out = shutil.copytree(painted, out)
    (out / "images.jsonl").unlink()
    changed(format=1, monitor={"images": 9, "steps": {}, "parts": []})(out / "run.json")
    (out / ".monitor-0-1-2.json").write_text("{}")
    (out / "h.png").unlink()
    summary, _, _ = paint(data / "ref", out, batch_size=2)
    assert (summary.done, summary.skipped) == (1, 8) and files(out) == files(painted)
    assert caplog.messages == ["outputs that are kept, although their sources are not recorded: 8, such as a.png"]
    assert record(out)["format"] == 2 and record(out)["monitor"]["images"] == 1


def test_the_class_of_an_image_belongs_to_its_content(tmp_path):
    """It depends on the other folders; paths do not count."""
    make_references(tmp_path / "x", ["a/1.png", "b/1.png"])
    make_references(tmp_path / "y", ["a/1.png", "aa/2.png", "b/1.png"])
    shutil.copy(tmp_path / "x" / "b" / "1.png", tmp_path / "y" / "b" / "1.png")
    sources = [data_images(list_references(tmp_path / each), classes=True) for each in "xy"]
    first, second = ({r.name: source.fingerprint(r) for r in source.entries} for source in sources)
    assert first["a/1.png"] == second["a/1.png"] and first["b/1.png"] != second["b/1.png"]


# ---- the record -----------------------------------------------------------------------------------------------------


def test_the_record_says_what_made_the_outputs(data, translated):
    found = record(translated / "3")
    settings = found["settings"]
    digest = hashlib.sha256((data / "model.safetensors").read_bytes()).hexdigest()
    assert settings["model_path"] == f"sha256 {digest}" and settings["seed"] == 0 and settings["method"] == "sddm"
    assert settings["energy"] == ["dct"] and settings["variant"] == "manifold" and settings["range_t"] == 2
    assert found["versions"].keys() == {"python", "torch", "numpy", "pillow"}
    assert found["counts"] == {"references": 9, "outputs": 9, "failed": 0} and found["failed"] == {}
    assert found["started"] <= found["finished"] and found["started"][:2] == "20" and 0 < found["seconds"] < 600
    assert found["batch_size"] == 3 and found["processes"] == 1 and found["device"] == "cpu"
    assert [len(batch) for batch in found["plan"]] == [3, 3, 3]


def test_other_settings_are_refused_with_the_differences(script, data, translated, out):
    shutil.copytree(translated / "3", out)
    before = {**files(out), "run.json": (out / "run.json").read_bytes()}
    flags = ("--seed", 7, "--area", 2, "--samples_per_image", 2, "--energy", "none", "--resize", "pad")
    error = refused(translate, script, data, out, *flags)
    for difference in (
        "`seed` was 0 and is 7", "`area` was 4 and is 2", "`samples_per_image` was 1 and is 2",
        "`energy` was \"['dct']\" and is '[]'", "`resize` was 'crop' and is 'pad'",
    ):  # fmt: skip
        assert difference in error.reason
    assert error.parameter == "save_dir" and error.value == str(out)
    assert error.reason.count(" was ") == 5 and "`overwrite` True to start over" in error.reason
    assert {**files(out), "run.json": (out / "run.json").read_bytes()} == before


def test_overwrite_starts_over(script, data, translated, out):
    """What the old run wrote goes, what others wrote stays."""
    assert translate(script, data, out, "--samples_per_image", 2, "--seed", 5, "--save_trajectory") == 0
    (out / "mine.txt").write_text("not of the run")
    assert translate(script, data, out, "--overwrite", "--batch_size", 3) == 0
    found = files(out)
    assert found.pop("mine.txt") == b"not of the run"
    assert found == files(translated / "3")
    assert record(out)["settings"]["seed"] == 0


@pytest.mark.parametrize("name", ["grid.png", "more/é.png"])
def test_files_of_others_are_not_overwritten(data, out, name):
    (out / "more").mkdir(parents=True)
    (out / name).write_text("mine")
    error = refused(paint, data / "ref", out)
    assert (error.parameter, error.value) == ("save_dir", str(out))
    assert error.reason.startswith(f"{name} is already present") and "`overwrite` True" in error.reason
    assert files(out) == {name: b"mine"}
    paint(data / "ref", out, overwrite=True)
    assert len(pictures(out)) == 9 and files(out)[name] != b"mine"


def changed(**entries):
    """What makes a run.json whose entries have other kinds."""

    def make(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return make


def fifo(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "a FIFO": fifo,
    "another kind": lambda path: path.write_text("[]"),
    "a later format": changed(format=99),
    "an entry of another type": changed(settings={"samples_per_image": "2"}),
    "a plan of other things": changed(plan=["a.png#0"]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_record_of_the_wrong_kind_is_one_line(data, painted, out, damage):
    shutil.copytree(painted, out)
    damage(out / "run.json")
    before = sorted(os.listdir(out))
    error = refused(paint, data / "ref", out, batch_size=2)
    assert error.parameter in (None, "save_dir") and len(str(error)) < 5000
    assert str(out) in str(error) and "`overwrite` True" in error.reason
    assert sorted(os.listdir(out)) == before
    paint(data / "ref", out, batch_size=2, overwrite=True)
    assert files(out) == files(painted)


# ---- the lines of images --------------------------------------------------------------------------------------------


def told(i, n, value):
    """The state after a step of n images with known records: norms `value` and 2 `value`, weights 0.995 and 0.005."""
    tangent = torch.zeros(n, 3, 4, 4)
    tangent[:, 0, 0, 0] = value
    weights = torch.tensor([0.995, 0.005]).expand(n, 3, 2)
    sign = -1 if value > 4.5 else 1
    return {"tangent": tangent, "normal": 2 * tangent, "move": sign * tangent, "weights": weights}


class Guided(Painter):
    """Evaluates a model once a step; its first two steps are guided, with known records, the second twice."""

    def __call__(self, batch, *, noise, callback):
        model, n = Counted(lambda x: x), len(batch.ref)

        def telling(state):
            i = state["i"]
            model(batch.ref)
            callback({**state, "guided": [told(i, n, 2 * i + each) for each in range((0, 2, 1)[i])]})

        return super().__call__(batch, noise=noise, callback=telling)


def test_lines_add_up_over_kills_and_restarts(data, out, caplog):
    """However often a run is killed, every image counts once, and costs what its last making did."""
    caplog.set_level(logging.INFO, logger="sddm")
    broken, settings = break_at(3, Broken), {"energy": ["dct"]}
    for before in (broken, break_at(1, Broken), broken, None):
        with contextlib.suppress(Broken):
            paint(data / "ref", out, painter=Guided(before), settings=settings, batch_size=2)
    found = record(out)
    assert found["monitor"]["images"] == len(NAMES) and found["model_evaluations"] == 3
    assert found["monitor"]["evaluations"] == 3 * len(NAMES) and 0 < found["seconds_per_image"] < 60
    assert found["negative_impact"] == 0 and found["energy_weights"] == pytest.approx([0.005])
    assert [(step["i"], step["tangent"], step["normal"]) for step in curves(found)] == [(2, 4, 8), (1, 2.5, 5)]
    assert found["monitor"]["steps"]["1"][0] == 2 * len(NAMES)
    assert "energies that hardly acted, by their mean weight in guided steps: dct 0.5 %" in caplog.messages
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(f"{name}#0" for name in NAMES)
    assert not list(out.glob("images-*.jsonl"))


def test_damaged_lines_do_no_harm(data, painted, out, caplog):
    """What a killed process leaves, or anybody writes: sound lines count, for others no source is known."""
    out = shutil.copytree(painted, out)
    lines = (out / "images.jsonl").read_bytes().splitlines()
    junk = [b"", b"[]", b"7", b"[" * 100_000, b"\xff\xfe", b'{"key": 7, "source": ""}', lines[0][:-9]]
    junk += [
        lines[0].replace(b'"evaluations": 0', b'"evaluations": %s' % value) for value in (b"NaN", b"[]", b"9" * 400)
    ]
    (out / "images.jsonl").write_bytes(b"\n".join([*junk, *lines[1:]]))
    (out / "images-7.jsonl").write_bytes(lines[1][: len(lines[1]) // 2])
    assert paint(data / "ref", out, batch_size=2)[1].batches == [] and not caplog.records
    assert record(out)["monitor"]["images"] == len(NAMES) - 1 and files(out) == files(painted)
    assert curves({"monitor": 7}) == curves({"monitor": {"steps": {"x": []}}}) == curves({}) == []


# ---- what is not the run's ------------------------------------------------------------------------------------------


def single(root):
    """One picture, to be translated into its own folder."""
    make_references(root / "out", ["a.png"])
    return root / "out" / "a.png", {}


def linked_output(root):
    make_references(root / "ref", ["a.png"])
    (root / "out").mkdir()
    (root / "out" / "a.png").symlink_to("../ref/a.png")
    return root / "ref", {}


def earlier_outputs(root):
    """Outputs of a run are the references of the next, which starts over in the same folder."""
    make_references(root / "ref", ["more/a.png"])
    paint(root / "ref", root / "out")
    return root / "out" / "more", {}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [single, linked_output, earlier_outputs])
def test_references_are_never_replaced_or_removed(tmp_path, out, make, overwrite):
    base, options = make(tmp_path)
    if make is earlier_outputs and not overwrite:
        options = {"settings": {"seed": 1}}  # another run, which is refused anyway
    before = files(tmp_path)
    error = refused(paint, base, out, overwrite=overwrite, **options)
    assert (error.parameter, error.value) == ("save_dir", str(out))
    assert overwrite is False or "would replace the reference" in error.reason
    assert files(tmp_path) == before


@pytest.mark.parametrize("link, overwrite", [("more/still", False), ("trajectory", True)])
def test_links_out_of_the_save_folder_are_refused(data, tmp_path, out, link, overwrite):
    """Nothing is written through them, and nothing removed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_text("mine")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(tmp_path / "elsewhere")
    error = refused(paint, data / "ref", out, overwrite=overwrite)
    assert (error.parameter, error.value) == ("save_dir", str(out))
    assert "is a link out of it; remove the link" in error.reason and link in error.reason
    assert files(tmp_path / "elsewhere") == {"a.png": b"mine"} and not files(out)


def test_a_name_that_cannot_be_written_fails_alone(data, tmp_path, out):
    """The longest that a file system takes is written; one byte more, and a folder that is a file, are failures."""
    base = tmp_path / "base"
    long, longest, too_long = ("x" * 240 + ".png", "y" * 251 + ".png", "z" * 252 + ".bw")
    make_references(base, ["a.png", "more/b.png", long, longest])
    shutil.copy(base / "a.png", base / too_long)
    out.mkdir()
    (out / "more").write_text("a file")
    summary, _, _ = paint(base, out)
    assert list(pictures(out)) == ["a.png", long, longest] and summary.done == 3
    assert summary.failed.keys() == {"more/b.png", too_long} == record(out)["failed"].keys()
    assert summary.failed["more/b.png"] == "its output cannot be written: File exists"
    assert summary.failed[too_long] == "its output cannot be written: File name too long"
    (out / "more").unlink()
    summary, _, _ = paint(base, out)
    assert (summary.done, summary.skipped) == (1, 3) and list(summary.failed) == [too_long]


def test_a_second_run_is_kept_out(data, out):
    def second(painter):
        assert "another run is writing there now" in error_of(paint, data / "ref", out)

    paint(data / "ref", out, second)


def test_a_save_folder_that_is_removed_ends_the_run(data, tmp_path, out):
    def remove(painter):
        if len(painter.batches) == 9:
            # Moved first: the writer, which runs beside this, renames files while they are being removed.
            shutil.rmtree((out).rename(tmp_path / "removed"))

    error = refused(paint, data / "ref", out, remove, batch_size=1)
    assert error.parameter == "save_dir" and error.reason == "it was removed while the run was writing to it"
    assert not (out).exists()  # nothing appears there again


def test_a_save_folder_that_becomes_another_runs_ends_the_run(data, tmp_path, out):
    """The folder is removed, and another run begins there: neither gets an image of the other."""
    second = {"settings": {"seed": 1}, "batch_size": 2}

    def replace(painter):
        if len(painter.batches) == 3:
            shutil.rmtree(out.rename(tmp_path / "removed"))
            refused(paint, data / "ref", out, break_at(2, Broken), kind=Broken, **second)

    error = refused(paint, data / "ref", out, replace, batch_size=2)
    assert error.parameter == "save_dir" and error.reason == "it was removed while the run was writing to it"
    paint(data / "ref", out, **second)
    paint(data / "ref", tmp_path / "alone", **second)
    assert files(out) == files(tmp_path / "alone") and record(out)["settings"]["seed"] == 1


def test_a_file_system_without_locks_is_written_all_the_same(data, painted, out, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    paint(data / "ref", out, batch_size=2)
    assert {**files(out), ".lock": b""} == {**files(painted), ".lock": b""}


# ---- images that fail -----------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data, tmp_path):
    """The references, two of which cannot be read, and one beside them that would be written to another's output."""
    base = shutil.copytree(data / "ref", tmp_path / "damaged")
    (base / "b.png").write_bytes(b"")
    (base / "more" / "a.png").write_text("no picture")
    shutil.copy(base / "g.png", base / "d.gif")
    return base


REASONS = {
    "b.png": "the file is empty (0 bytes)",
    "more/a.png": "not an image, or damaged at its head: begins with b'no picture'; supported are PNG, JPEG, "
    "WEBP, BMP, TIFF, GIF, AVIF, JPEG2000, PPM, ICO, QOI, SGI, DDS, PSD, PCX, TGA",
    "d.png": "its output d.png would overwrite that of d.gif",
}


def test_what_fails_is_named_and_tried_again_and_the_rest_is_made(damaged, data, painted, out):
    summary, _, progress = paint(damaged, out, batch_size=2)
    assert summary.failed == REASONS == record(out)["failed"]
    assert summary.done == 7 and record(out)["counts"] == {"references": 10, "outputs": 7, "failed": 3}
    assert sum(progress) == 9 * Painter.steps  # what cannot be made leaves no gap
    wanted = {name: image for name, image in pictures(painted).items() if name not in REASONS}
    assert_within_one_level({name: image for name, image in pictures(out).items() if name != "d.png"}, wanted)
    shutil.copy(data / "ref" / "b.png", damaged / "b.png")
    summary, painter, _ = paint(damaged, out, batch_size=2)
    assert painter.batches == [2] and summary.done == 1
    assert summary.failed == {name: REASONS[name] for name in ("d.png", "more/a.png")}


def test_strict_stops_at_the_first(damaged, out):
    message = error_of(paint, damaged, out, strict=True)
    assert message == f"d.png: {REASONS['d.png']}" and not files(out)
    (damaged / "d.gif").unlink()
    message = error_of(paint, damaged, out, strict=True, batch_size=1)
    assert message == f"b.png: {REASONS['b.png']}"
    assert list(pictures(out)) == ["a.png"]


def test_values_that_are_not_finite_fail_their_image_only(data, painted, out):
    class Faulty(Painter):
        def __call__(self, batch, *, noise, callback):
            x = super().__call__(batch, noise=noise, callback=callback)
            if len(self.batches) == 1:
                x[1, 2, 3, 4] = float("nan")
                raise NotFiniteError(x, x.isfinite().flatten(1).all(1))
            return x

    summary, _, _ = paint(data / "ref", out, painter=Faulty(), batch_size=4)
    assert list(summary.failed) == ["b.png"] and "NaN or infinite" in summary.failed["b.png"] and summary.done == 8
    wanted = {name: image for name, image in pictures(painted).items() if name != "b.png"}
    assert_within_one_level(pictures(out), wanted)


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory_for(count, error):
    """What makes a Painter fail for batches of more images than `count`."""

    def before(painter):
        if painter.batches[-1] > count:
            raise type(error)(*error.args)

    return before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_automatic_batches_are_halved_until_they_fit(data, painted, out, caplog, error):
    caplog.set_level(logging.INFO, logger="sddm")
    _, painter, progress = paint(data / "ref", out, memory_for(3, error), batch_size="auto")
    assert painter.batches == [8, 4, 2, 2, 2, 2, 1]
    assert caplog.messages == [f"out of memory at batch size {n} on cpu; continuing with {n // 2}" for n in (8, 4)]
    assert sum(progress) == Painter.steps * len(NAMES)  # steps of failed attempts do not count
    assert_within_one_level(pictures(out), pictures(painted))


def test_a_given_batch_size_that_does_not_fit_is_an_error_that_says_what_may(data, out):
    error = torch.OutOfMemoryError("CUDA out of memory")
    message = error_of(paint, data / "ref", out, memory_for(3, error), batch_size=7)
    assert message == "out of memory at batch size 7 on cpu; give batch_size 4 or less, or auto"
    message = error_of(paint, data / "ref", out, memory_for(0, error), batch_size="auto")
    assert message.startswith("out of memory at batch size 1 on cpu: one image does not fit")


# ---- disks and folders ----------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_which_can_be_resumed(data, painted, out, monkeypatch):
    written, fsync = itertools.count(), os.fsync

    def full(descriptor):
        if next(written) >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = error_of(paint, data / "ref", out, batch_size=2)
    assert message.startswith("no room left to write ") and "(No space left on device)" in message
    assert message.endswith("; make room and run the same command again")
    made = pictures(out)
    assert 0 < len(made) < len(NAMES)
    assert all(files(painted)[name] == (out / name).read_bytes() for name in made)  # whole images
    monkeypatch.undo()
    assert paint(data / "ref", out, batch_size=2)[0].skipped == len(made)
    assert files(out) == files(painted)


def test_errors_of_writing_name_the_file_and_no_link_is_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    opened = open

    def planted(path, mode):
        with contextlib.suppress(FileExistsError):
            os.symlink(tmp_path / "mine", path)
        return opened(path, mode)

    monkeypatch.setattr("builtins.open", planted)
    assert "a.json cannot be written: File exists" in error_of(run_files.write_json, tmp_path / "a.json", {})
    monkeypatch.undo()
    assert (tmp_path / "mine").read_text() == "mine" and len(os.listdir(tmp_path)) == 1


SAVE_DIRS = {
    "file": "is a file; give a folder",
    "link": "cannot be written: File exists",
    "ref/out": "lies in `base_samples`, and outputs would become",
    "gs://bucket/out": "outputs are written to a local folder only",
    "/proc/out": "cannot be written: No such file or directory",
}


@pytest.mark.parametrize("save_dir, words", SAVE_DIRS.items())
def test_a_save_folder_that_cannot_be_used_is_found_at_once(tmp_path, monkeypatch, save_dir, words):
    monkeypatch.chdir(make_references(tmp_path, ["ref/a.png"]))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere/at all")
    error = refused(create_job, "ref", save_dir)
    assert (error.parameter, error.value) == ("save_dir", save_dir) and words in error.reason
    assert sorted(os.listdir()) == ["file", "link", "ref"] and os.listdir("ref") == ["a.png"]


# ---- the time left --------------------------------------------------------------------------------------------------


def test_time_left_after_a_tenth(monkeypatch):
    """After a slow start, 100 images in batches of 5, of 10 steps: the first 7 take 3 seconds, the others 2."""
    moments = [61, *[3.0 if step < 7 else 2.0 for _ in range(20) for step in range(10)][1:]]
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(1000, 100, 0, io.StringIO())
    assert progress.seconds_left() is None
    for n, seconds in enumerate(moments):
        clock[0] += seconds
        progress(5, (n + 1) // 10 * 5)
        really = sum(moments[n + 1 :])
        if 19 <= n < 190:  # within the last batch there are no expensive steps left
            assert abs(progress.seconds_left() - really) <= 0.2 * really
    progress.__exit__()
    lines = progress.file.getvalue().splitlines()
    assert lines[-1].startswith("100%, 100/100 images, step 1000/1000, ") and 2 <= len(lines) <= 100


# ---- ranks ----------------------------------------------------------------------------------------------------------


def two():
    """The `Peers` of two ranks in this process, with a real store between them."""
    store = HashStore()
    return [Peers(Ranks(rank, 2, rank, "srun"), store) for rank in range(2)]


def test_two_ranks_share_the_batches(damaged, tmp_path, out):
    """Every batch is made once, by either; rank 0 has the sums, the reasons, and all of the progress."""
    meeting = threading.Barrier(2)

    def together(painter):  # so that neither makes all while the other starts
        if len(painter.batches) <= 2:
            meeting.wait(600)

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda p: paint(damaged, out, together, peers=p, batch_size=1), two())
    (summary, first, progress), (_, second, nothing) = runs
    assert len(first.batches) + len(second.batches) == 7 and min(len(first.batches), len(second.batches)) >= 2
    assert summary.done == 7 and summary.failed == REASONS
    assert sum(progress) == 9 * Painter.steps and nothing == []
    assert record(out)["processes"] == 2
    paint(damaged, tmp_path / "alone", batch_size=1)
    assert files(out) == files(tmp_path / "alone")


def test_a_rank_that_dies_silently_is_missed(data, out, monkeypatch):
    """As under a plain srun, which leaves the others alone: rank 0 makes what it can, then says who is gone."""
    monkeypatch.setattr(dist_util, "HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr(dist_util, "HEARTBEAT_TIMEOUT", 0.5)
    peers = two()
    peers[1].count("claimed")  # it has taken the first batch, and gives no result
    time.sleep(0.2)
    peers[1]._leaving.set()  # the signs of life end
    message = error_of(paint, data / "ref", out, peers=peers[0], batch_size=2)
    assert message.startswith("rank 1 of 2 has given no sign of life for ") and "run the same command again" in message
    assert len(pictures(out)) == 7
    summary, painter, _ = paint(data / "ref", out, batch_size=2)
    assert painter.batches == [2] and summary.skipped == 7


def test_an_interruption_is_told_by_one_rank():
    """By the first; by none after an error, which was told."""
    for first, second in (two(), two()[::-1]):
        assert first.interrupted() is True and second.interrupted() is False
        with pytest.raises(Stopped):
            second.watch()
    first, second = two()
    assert second.stop("an error") and first.interrupted() is False and second.interrupted() is False


ENVIRONMENTS = [
    ("RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=a MASTER_PORT=1", Ranks(3, 4, 1, "torchrun")),
    ("OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=1", Ranks(5, 8, 1, "mpiexec")),
    ("SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=0 PMI_RANK=2 PMI_SIZE=4", Ranks(2, 4, 0, "srun")),
    ("SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=7", Ranks()),  # plain python in a batch script
    ("SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
     Ranks(1, 2, 0, "torchrun")),
    ("RANK=1 WORLD_SIZE=2", "no MASTER_ADDR and MASTER_PORT; started without torchrun, unset RANK"),
    ("PMI_RANK=x PMI_SIZE=2", "variable PMI_RANK is 'x'; it must be a whole number"),
    ("SLURM_PROCID=4 SLURM_STEP_NUM_TASKS=4", "SLURM_PROCID=4, which is no rank of SLURM_STEP_NUM_TASKS=4"),
]  # fmt: skip


@pytest.fixture
def no_launcher(monkeypatch):
    """An environment without any launcher's variables."""
    prefixes = ("SLURM_", "PMI_", "OMPI_", "MPI_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name in [name for name in os.environ if name.startswith(prefixes)]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("variables, found", ENVIRONMENTS)
def test_ranks_are_read_from_the_environment(no_launcher, variables, found):
    for each in variables.split():
        no_launcher.setenv(*each.split("="))
    if isinstance(found, str):
        assert found in error_of(dist_util.ranks)
    else:
        assert dist_util.ranks() == found


def test_the_first_host_of_a_slurm_list():
    lists = ("node1,node2", "node[003-010,012],gpu1", "a-b,n[7,9]", "gpu-[7,9]")
    assert [dist_util._first_host(each) for each in lists] == ["node1", "node003", "a-b", "gpu-7"]


def test_mpiexec_without_mpi4py_is_one_line(no_launcher):
    no_launcher.setitem(sys.modules, "mpi4py", None)  # an import of it fails
    message = error_of(dist_util.open_store, Ranks(0, 2, 0, "mpiexec"))
    assert message.startswith("mpiexec needs a working mpi4py (pip install mpi4py)")
    assert message.endswith("torchrun needs none")
