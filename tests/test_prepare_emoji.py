"""datasets/prepare_emoji.py: matching, split, pixels, manifest, and what it does when something is wrong."""

import hashlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_training import end_at, finish, start

from guided_diffusion.errors import InputError

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "prepare_emoji.py"
spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)
prepare_emoji = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare_emoji)

TARBALLS = {
    "fluent3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz", "assets", "webp"),
    "twitter": ("emoji-datasource-twitter", "16.0.0", "emoji-datasource-twitter-16.0.0.tgz", "img/twitter/64", "png"),
    "google": ("emoji-datasource-google", "16.0.0", "emoji-datasource-google-16.0.0.tgz", "img/google/64", "png"),
}
KNOWN_PIXELS = "c9166b1f653b16152b00ac593c105a16cb5da2f7e00017f24737a6d91e03f557"
# A heart, a thumb and its tones, a robot (held out), two people, and what only one vendor draws.
PAIRED = ["2764", "1f44d", "1f44d-1f3fb", "1f44d-1f3ff", "1f916", "1f9d1-200d-1f91d-200d-1f9d1",
          "1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fc", "26a7"]  # fmt: skip
_BOTH = [code for code in PAIRED if code not in ("2764", "26a7")] + ["2764-fe0f", "26a7-fe0f"]
FILES = {
    "fluent3d": ["26a7", *_BOTH, "23-20e3"],
    "twitter": [*(code.replace("1f44d", "1F44D") for code in _BOTH), "1f3fb", "0023-20e3"],
    "google": ["2764-fe0f", "1f44d", "1f916", "1f3fb"],
}


def colour(style, stem):
    """A colour that tells whose drawing of what this is."""
    return tuple(hashlib.sha256(f"{style} {stem}".encode()).digest()[:3])


def encoded(picture, format):
    buffer = io.BytesIO()
    picture.save(buffer, format=format, lossless=True)
    return buffer.getvalue()


def add(archive, name, data):
    member = tarfile.TarInfo(f"package/{name}")
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def make_tarball(folder, style, files=None, version=None):
    """Write a package as npm packs it; `files` maps stems to encoded pictures."""
    package, own_version, name, pictures, extension = TARBALLS[style]
    if files is None:
        files = {stem: encoded(Image.new("RGBA", (24, 24), colour(style, stem)), extension) for stem in FILES[style]}
    with tarfile.open(folder / name, "w:gz") as archive:
        add(archive, "package.json", json.dumps({"name": package, "version": version or own_version}).encode())
        add(archive, "img/sheets/1f916.png", b"a sprite sheet is no picture of the set")
        add(archive, f"{pictures}/readme.txt", b"nor is this")
        for stem, data in files.items():
            add(archive, f"{pictures}/{stem}.{extension}", data)
    return folder / name


@pytest.fixture(scope="session")
def shared_tarballs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    for style in TARBALLS:
        make_tarball(folder, style)
    return folder


@pytest.fixture
def tarballs(shared_tarballs, tmp_path):
    """A copy of the tarballs that a test may spoil."""
    return Path(shutil.copytree(shared_tarballs, tmp_path / "packages"))


def run(*arguments):
    """The command in this process, without its handling of errors."""
    prepare_emoji.main(prepare_emoji.create_parser().parse(list(map(str, arguments))))


def refused(*arguments):
    """The one line of a refusal."""
    with pytest.raises(InputError) as caught:
        run(*arguments)
    return caught.value.text(prepare_emoji.create_parser().spell)


def in_a_process(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path: (folder / path).read_bytes() for path in tree(folder)}


def split_by_hand(base):
    return "test" if int(hashlib.sha256(base.encode()).hexdigest(), 16) % 10 == 0 else "train"


@pytest.fixture(scope="session")
def made(shared_tarballs, tmp_path_factory):
    """A set that no test changes, and what the command printed."""
    folder = tmp_path_factory.mktemp("made") / "set"
    completed = in_a_process("--size", 16, "--out", folder, "--from_dir", shared_tarballs)
    assert completed.returncode == 0, completed.stderr
    return folder, completed.stdout


def test_the_set_holds_exactly_the_code_points_that_target_and_source_both_draw(made):
    folder, printed = made
    split = {code: split_by_hand(code) for code in PAIRED}
    split["1f44d-1f3fb"] = split["1f44d-1f3ff"] = split["1f44d"]
    split["1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3fc"] = split["1f9d1-200d-1f91d-200d-1f9d1"]
    assert split["1f916"] == "test" and split["2764"] == "train"
    drawn = {"fluent3d": PAIRED, "twitter": PAIRED, "google": ["2764", "1f44d", "1f916"]}
    expected = sorted(f"{style}/{split[code]}/{code}.png" for style, codes in drawn.items() for code in codes)
    assert tree(folder) == sorted([*expected, "manifest.json"])

    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["paired"]["train"] + manifest["paired"]["test"]) == sorted(PAIRED)
    assert all(split[code] == name for name, codes in manifest["paired"].items() for code in codes)
    assert manifest["left_out"] == {"fluent3d": ["23-20e3"], "twitter": ["0023-20e3", "1f3fb"], "google": ["1f3fb"]}
    assert sum(manifest["counts"]["google"].values()) == 3
    assert "google/t" in printed and manifest["digest"] in printed

    hashes = manifest["pixels_sha256"]
    assert sorted(hashes) == expected
    stems = {style: {stem.lower().replace("-fe0f", ""): stem for stem in FILES[style]} for style in FILES}
    for path in expected:
        picture, style = Image.open(folder / path), path.split("/")[0]
        assert (picture.mode, picture.size) == ("RGB", (16, 16))
        # Fluent draws 26a7 twice; the fully qualified name, which comes later in FILES, is the one to take.
        assert picture.getcolors() == [(256, colour(style, stems[style][Path(path).stem]))]
        assert hashlib.sha256(picture.tobytes()).hexdigest() == hashes[path]
    lines = "".join(f"{path} {hashes[path]}\n" for path in expected)
    assert hashlib.sha256(lines.encode()).hexdigest() == manifest["digest"]


def test_a_known_picture_renders_to_known_pixels():
    """Pins compositing, padding and filter: the manifest is worth something only if every Pillow gives these pixels."""
    picture = Image.frombytes("RGBA", (40, 30), bytes((7 * i * i + i // 4) % 256 for i in range(40 * 30 * 4)))
    pixels = prepare_emoji.render(encoded(picture, "png"), 16).tobytes()
    assert hashlib.sha256(pixels).hexdigest() == KNOWN_PIXELS


@given(
    parts=st.lists(st.sampled_from(["1f468", "1f469", "200d", "1f91d", "2764"]), min_size=1, max_size=6),
    tones=st.lists(st.sampled_from(["", "-1f3fb", "-1f3fc", "-1f3fd", "-1f3fe", "-1f3ff"]), min_size=6, max_size=6),
)
def test_skin_tone_variants_are_always_in_the_split_of_their_base(parts, tones):
    base = "-".join(parts)
    variant = "-".join(part + tone for part, tone in zip(parts, tones))
    assert prepare_emoji.skin_tone_base(variant) == base
    assert prepare_emoji.split_of(variant) == split_by_hand(base)


def test_a_complete_set_with_the_same_settings_is_left_alone(made, monkeypatch, capsys):
    folder, printed = made
    before = {path: (folder / path).stat().st_mtime_ns for path in tree(folder)}
    monkeypatch.setenv("PATH", "")  # nothing is fetched
    run("--size", 16, "--out", folder)
    again = capsys.readouterr().out
    assert "left alone" in again and again.splitlines()[1:] == printed.splitlines()[1:]
    assert before == {path: (folder / path).stat().st_mtime_ns for path in tree(folder)}


def test_other_sets_are_refused_and_replaced_with_overwrite(made, shared_tarballs, tmp_path):
    """One of another size, one that lost a picture, and one without a manifest."""
    folder = Path(shutil.copytree(made[0], tmp_path / "set"))
    flags = ["--out", folder, "--from_dir", shared_tarballs]
    line = refused("--size", 24, *flags)
    assert "with other settings" in line and "set --overwrite to True" in line
    (folder / "twitter" / "test" / "1f916.png").unlink()
    assert "lacks pictures of its set, such as twitter/test/1f916.png" in refused("--size", 16, *flags)
    for text in ("{", "[]", '{"settings": 1}'):
        (folder / "manifest.json").write_text(text)
        assert "no usable manifest.json" in refused("--size", 16, *flags)
    run("--size", 24, *flags, "--overwrite", "True")
    assert Image.open(folder / "twitter" / "test" / "1f916.png").size == (24, 24)
    assert os.listdir(tmp_path) == ["set"]


def test_a_place_that_holds_something_else_is_refused(shared_tarballs, tmp_path):
    flags = ["--from_dir", shared_tarballs, "--overwrite", "True", "--out"]
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused(*flags, tmp_path)
    assert "is a file" in refused(*flags, tmp_path / "thesis.tex")
    line = refused(*flags, tmp_path / "thesis.tex" / "set")
    assert "--out is " in line and "cannot be written" in line and line.endswith(f"({tmp_path / 'thesis.tex'})")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_missing_tarball_is_named_with_the_command_that_makes_it(tarballs, tmp_path):
    (tarballs / "lobehub-fluent-emoji-3d-1.1.0.tgz").unlink()
    line = refused("--out", tmp_path / "set", "--from_dir", tarballs)
    assert "lobehub-fluent-emoji-3d-1.1.0.tgz" in line and "npm pack @lobehub/fluent-emoji-3d@1.1.0" in line
    assert "is not a folder" in refused("--out", tmp_path / "set", "--from_dir", tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["packages"]


OTHER = {"1f600": encoded(Image.new("RGB", (8, 8)), "png")}
BAD_PACKAGES = {
    "truncated": (lambda data: data[: len(data) // 2], "is damaged or not an npm tarball"),
    "another version": ({"version": "15.0.0"}, "twitter@15.0.0, and not emoji-datasource-twitter@16"),
    "no picture": ({"files": {}}, "holds no picture"),
    "nothing in common": ({"files": OTHER}, "no code point is drawn by both"),
    "a broken picture": ({"files": {"1f916": b"no picture"}}, "1f916.png cannot be read"),
}


@pytest.mark.parametrize("wrong, message", BAD_PACKAGES.values(), ids=BAD_PACKAGES)
def test_tarballs_that_do_not_fit_are_named_and_leave_nothing(wrong, message, tarballs, tmp_path):
    path = tarballs / "emoji-datasource-twitter-16.0.0.tgz"
    if callable(wrong):
        path.write_bytes(wrong(path.read_bytes()))
    else:
        make_tarball(tarballs, "twitter", **wrong)
    assert message in refused("--out", tmp_path / "set", "--from_dir", tarballs)
    assert os.listdir(tmp_path) == ["packages"]


def test_a_write_that_fails_midway_keeps_the_old_set_and_leaves_no_temporary_folder(made, shared_tarballs, tmp_path):
    folder = Path(shutil.copytree(made[0], tmp_path / "set"))
    before = contents(folder)

    def no_file_over_1000_bytes():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the pictures fit, the manifest does not

    flags = ["--size", 24, "--out", folder, "--from_dir", shared_tarballs, "--overwrite", "True"]
    done = in_a_process(*flags, preexec_fn=no_file_over_1000_bytes)
    assert done.returncode == 2 and done.stderr.startswith("error: --out is ") and done.stderr.count("\n") == 1
    assert "cannot be written" in done.stderr and "File too large" in done.stderr
    assert os.listdir(tmp_path) == ["set"] and before == contents(folder)


def fake_npm(monkeypatch, folder, body):
    """Put an executable `npm` with a Python body into `folder`, the only one where programs are found."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!{sys.executable}\nimport json, pathlib, shutil, sys, time\n{body}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_packages_are_asked_of_npm_by_name_and_version(made, shared_tarballs, tmp_path, monkeypatch, capsys):
    body = f"""
name, version = sys.argv[2].rsplit("@", 1)
tarball = f"{{name.lstrip('@').replace('/', '-')}}-{{version}}.tgz"
shutil.copy(pathlib.Path({str(shared_tarballs)!r}) / tarball, sys.argv[sys.argv.index("--pack-destination") + 1])
"""
    fake_npm(monkeypatch, tmp_path / "bin", body)
    run("--size", 16, "--out", tmp_path / "set")
    assert "fetching @lobehub/fluent-emoji-3d@1.1.0" in capsys.readouterr().out
    assert contents(tmp_path / "set") == contents(made[0])
    assert sorted(os.listdir(tmp_path)) == ["bin", "set"]


def test_npms_own_reason_is_passed_on_in_one_line(tmp_path, monkeypatch):
    log = 'sys.exit("npm warn x\\nnpm ERR! code E404\\nnpm ERR! A complete log of this run can be found in: x")'
    fake_npm(monkeypatch, tmp_path / "bin", log)
    line = refused("--out", tmp_path / "set")
    assert "@lobehub/fluent-emoji-3d@1.1.0 could not be fetched (npm ERR! code E404)" in line and "--from_dir" in line
    assert os.listdir(tmp_path) == ["bin"]
    monkeypatch.setenv("PATH", "")
    line = refused("--out", tmp_path / "set")
    assert "npm is not installed" in line and "--from_dir" in line and "emoji-datasource-google@16.0.0" in line


def test_an_interrupted_run_leaves_no_half_set_and_no_temporary_folder(tmp_path, monkeypatch):
    fake_npm(monkeypatch, tmp_path / "bin", f"pathlib.Path({str(tmp_path / 'started')!r}).touch(); time.sleep(60)")
    process = start(SCRIPT, "--out", tmp_path / "set")
    end_at(process, tmp_path / "started", signal.SIGTERM)
    messages = finish(process, 130)
    assert "SIGTERM" in messages.splitlines()[-1] and "Traceback" not in messages
    assert sorted(os.listdir(tmp_path)) == ["bin", "started"]
