"""Make the emoji set: flat emoji (source) and glossy 3D emoji (target), matched by code point.

    python datasets/prepare_emoji.py --size 64 --out data/emoji [--from_dir DIR] [--overwrite True]

The pictures come from three npm packages (`PACKAGES`), fetched with the npm client or read from the tarballs in
`--from_dir`. Written are `<out>/<style>/{train,test}/<codepoint>.png` (RGB, on white) and `<out>/manifest.json`, for
every code point that both the target vendor and the source vendor draw. `google` is a second source.

Code points are the packages' file names in lower case with `-fe0f` dropped. Held out (test) is every code point with
int(sha256(base), 16) % 10 == 0, where the base is the code point without its skin-tone modifiers 1f3fb .. 1f3ff.

The manifest holds the sha256 of every picture's pixels (RGB bytes, row by row), not of its file: PNG bytes depend on
the zlib that wrote it, pixels do not.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from PIL import Image

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError, reading
from guided_diffusion.options import check, option
from guided_diffusion.run.files import read_json_or_none

TARGET, SOURCE = "fluent3d", "twitter"
PACKAGES = {
    "fluent3d": {"role": "target", "package": "@lobehub/fluent-emoji-3d", "version": "1.1.0",
                 "folder": "package/assets/", "licence": "MIT"},
    "twitter": {"role": "source", "package": "emoji-datasource-twitter", "version": "16.0.0",
                "folder": "package/img/twitter/64/", "licence": "CC-BY-4.0"},
    "google": {"role": "second source", "package": "emoji-datasource-google", "version": "16.0.0",
               "folder": "package/img/google/64/", "licence": "Apache-2.0"},
}  # fmt: skip
MANIFEST = "manifest.json"
MIN_SIZE, MAX_SIZE = 8, 1024
WORKERS = 2
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# Fluent joins the tag characters of its three subdivision flags with "_".
PICTURE_NAME = re.compile(r"([0-9a-f]+(?:[-_][0-9a-f]+)*)\.(?:png|webp)", re.IGNORECASE)


def code_point(stem):
    """The key that vendors share: `1F441-FE0F-200D-1F5E8` and `1f441-200d-1f5e8` are one emoji."""
    return stem.lower().replace("-fe0f", "")


def skin_tone_base(code):
    """The code point without its skin tones; a lone skin-tone swatch is its own base.

    All modifiers go, so that a couple of two tones falls on the side of the couple without any.
    """
    return "-".join(part for part in code.split("-") if part not in SKIN_TONES) or code


def split_of(code):
    """The split of a code point, which all its skin-tone variants share."""
    held_out = int(hashlib.sha256(skin_tone_base(code).encode()).hexdigest(), 16) % 10 == 0
    return "test" if held_out else "train"


def tarball_name(package, version):
    """The file name that `npm pack` gives a package: `@scope/name` becomes `scope-name`."""
    return f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def npm_error(completed):
    """npm's reason in one line: the summary of its JSON report, or else the last line of its error log."""
    try:
        error = json.loads(completed.stdout)["error"]
        reason = f"{error['code']}: {error['summary']}"
    except (ValueError, KeyError, TypeError):
        lines = [re.sub(r"^npm (error|ERR!)\s*", "", line).strip() for line in completed.stderr.splitlines()]
        lines = [line for line in lines if line and not line.startswith("A complete log of this run")]
        reason = lines[-1] if lines else f"npm ended with status {completed.returncode}"
    return " ".join(reason.split())


def npm_pack(package, version, folder):
    """Fetch a package with the npm client into `folder`; returns the tarball's path."""
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(
            "npm is not installed: install Node.js, or give a folder as `from_dir` with the tarballs that `npm pack` "
            "makes elsewhere of " + ", ".join(f"{p['package']}@{p['version']}" for p in PACKAGES.values())
        )
    call = [npm, "pack", f"{package}@{version}", "--json", "--pack-destination", str(folder)]
    # npm waits 10 s and then 60 s between its tries; a machine without a network should hear so sooner.
    call += ["--fetch-retry-mintimeout=2000", "--fetch-retry-maxtimeout=10000"]
    completed = subprocess.run(call, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    path = Path(folder) / tarball_name(package, version)
    if completed.returncode != 0 or not path.is_file():
        raise InputError(
            f"npm could not fetch {package}@{version} ({npm_error(completed)}); "
            "with tarballs made elsewhere by `npm pack`, give their folder as `from_dir`"
        )
    return path


def tarball_path(spec, from_dir, work):
    """The tarball of a package: in `from_dir` if that is given, else fetched into the folder `work`."""
    if from_dir is None:
        command.say(f"fetching {spec['package']}@{spec['version']}", sys.stdout)
        return npm_pack(spec["package"], spec["version"], work)
    path = Path(from_dir) / tarball_name(spec["package"], spec["version"])
    if not path.is_file():
        reason = f"it has no {path.name}; make it there with npm pack {spec['package']}@{spec['version']}"
        raise InputError(reason, parameter="from_dir", value=from_dir)
    return path


def read_tarball(path, spec):
    """A package's pictures, {code point: (file name, encoded bytes)}, from a tarball of `npm pack`.

    Raises InputError where it is no intact tarball, is another package, or holds no picture.
    """
    with reading(path, "an npm tarball"):
        # Decompressed whole: that checks the CRC of every byte, where tarfile stops reading at the last file.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(path.read_bytes())), mode="r:") as archive:
            package = json.load(archive.extractfile("package/package.json"))
            files = {
                member.name[len(spec["folder"]) :]: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and member.name.startswith(spec["folder"])
            }
        found, wanted = f"{package['name']}@{package['version']}", f"{spec['package']}@{spec['version']}"
    if found != wanted:
        raise InputError(f"{path} holds {found}, and not {wanted}")

    pictures = {}
    # Two files of Fluent differ in -fe0f only; the fully qualified name is the emoji proper, and it is the longer one.
    for name in sorted(files, key=lambda name: (len(name), name)):
        match = PICTURE_NAME.fullmatch(name)
        if match:
            pictures[code_point(match[1])] = (name, files[name])
    if not pictures:
        raise InputError(f"{path} holds no picture under {spec['folder']}")
    return pictures


def render(encoded, size):
    """Decode a picture, lay it over white, pad it to a square and resize it to size×size RGB.

    Every step is integer arithmetic on 8 bits (Pillow's compositing and its fixed-point LANCZOS), hence the same
    everywhere. Compositing comes first: colours of transparent pixels must not bleed in through the filter.
    """
    picture = Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")).convert("RGBA")
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def write_picture(job):
    """Render one (name, encoded bytes, size, path) to a PNG file; returns the sha256 of its pixels."""
    name, encoded, size, path = job
    with reading(f"the package's picture {name}"):
        picture = render(encoded, size)
    picture.save(path, format="PNG")
    return hashlib.sha256(picture.tobytes()).hexdigest()


def settings(size):
    """Settings that decide every pixel of the set; two sets with equal settings are the same set."""
    return {
        "format": 1,
        "size": size,
        "background": "white",
        "filter": "lanczos",
        "packages": {
            style: {key: spec[key] for key in ("role", "package", "version", "licence")}
            for style, spec in PACKAGES.items()
        },
    }


def write_set(pictures, size, folder):
    """Write the set of {style: {code point: (file name, bytes)}} into the empty `folder`; returns its manifest."""
    paired = sorted(pictures[TARGET].keys() & pictures[SOURCE].keys())
    if not paired:
        raise InputError(f"no code point is drawn by both {TARGET} and {SOURCE}: are these the right tarballs?")
    jobs = {}
    for style in PACKAGES:
        for split in ("train", "test"):
            (folder / style / split).mkdir(parents=True)
        for code in paired:
            if code in pictures[style]:
                path = f"{style}/{split_of(code)}/{code}.png"
                jobs[path] = (*pictures[style][code], size, folder / path)
    with ThreadPoolExecutor(WORKERS) as pool:
        hashes = dict(zip(jobs, pool.map(write_picture, jobs.values())))

    lines = "".join(f"{path} {hashes[path]}\n" for path in sorted(hashes))
    manifest = {
        "settings": settings(size),
        "counts": {
            style: {split: sum(p.startswith(f"{style}/{split}/") for p in hashes) for split in ("train", "test")}
            for style in PACKAGES
        },
        "digest": hashlib.sha256(lines.encode()).hexdigest(),
        "paired": {split: [code for code in paired if split_of(code) == split] for split in ("train", "test")},
        "left_out": {style: sorted(pictures[style].keys() - set(paired)) for style in PACKAGES},
        "pixels_sha256": {path: hashes[path] for path in sorted(hashes)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def existing_set(out, size, overwrite):
    """The manifest in `out` if that is the complete set that is asked for; None if a set is to be written.

    Raises InputError where it holds anything else and may not, or must not, be replaced.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise InputError("it is a file; name a folder", parameter="out", value=out)
    entries = sorted(path.name for path in out.iterdir())
    foreign = [name for name in entries if name not in (*PACKAGES, MANIFEST)]
    if foreign:
        reason = f"it holds other files ({foreign[0]}); name a folder that is new or empty"
        raise InputError(reason, parameter="out", value=out)
    if overwrite or not entries:
        return None
    manifest = read_json_or_none(out / MANIFEST)
    try:
        present = {"counts": {style: dict(split) for style, split in manifest["counts"].items()}}
        present["digest"], found, paths = manifest["digest"], manifest["settings"], list(manifest["pixels_sha256"])
    except (KeyError, TypeError, ValueError, AttributeError):  # what is no manifest fails in many ways
        problem = f"it has no usable {MANIFEST}"
    else:
        missing = [path for path in paths if not (out / path).is_file()]
        if found == settings(size) and not missing:
            return present
        problem = (
            f"it lacks pictures of its set, such as {missing[0]}" if missing else "it holds the set in another size"
        )
    raise InputError(f"{problem}; name another folder or set `overwrite` to True", parameter="out", value=out)


def put_in_place(new, out, work):
    """Rename the finished folder `new` to `out`; what was there goes into `work`, and back if the rename fails."""
    old = work / "old"
    if out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise


def prepare(size, out, from_dir=None, overwrite=False):
    """Make the emoji set in the folder `out`, which appears whole or not at all, unless it is there already.

    from_dir: a folder with the packages' tarballs; None fetches them with npm. Returns (a dict with the set's `counts`
    and `digest`, whether it was written now). Raises InputError where it cannot be made; `out` is then as it was.
    """
    out = Path(os.path.realpath(out))
    work = None
    try:
        present = existing_set(out, size, overwrite)
        if present is not None:
            return present, False
        if from_dir is not None and not Path(from_dir).is_dir():
            raise InputError("it is not a folder", parameter="from_dir", value=from_dir)
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, hence on its file system: the last step is a rename.
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        pictures = {style: read_tarball(tarball_path(spec, from_dir, work), spec) for style, spec in PACKAGES.items()}
        new = work / "new"
        new.mkdir()
        manifest = write_set(pictures, size, new)
        put_in_place(new, out, work)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(f"cannot be written: {error.strerror or error}{where}", parameter="out", value=out) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return manifest, True


@dataclass(frozen=True)
class Options:
    """The set to make."""

    size: int = option(64, "side of the pictures in pixels", least=MIN_SIZE, most=MAX_SIZE)
    out: str = option("data/emoji", "folder of the set", metavar="DIR")
    from_dir: str | None = option(
        None, "folder with the tarballs of `npm pack`; without it npm fetches them", metavar="DIR"
    )
    overwrite: bool = option(False, "replace another emoji set in the folder")

    def __post_init__(self) -> None:
        check(self)


def create_parser() -> Parser:
    parser = Parser("Make the emoji set: flat and glossy 3D emoji, matched by code point.")
    parser.usage = "python datasets/%(prog)s [flags]"
    parser.add(Options, title="the set")
    return parser


def main(given: Given) -> None:
    options = given.options(Options)
    manifest, written = prepare(options.size, options.out, options.from_dir, options.overwrite)
    lines = [f"{options.out}: {'written' if written else 'already present with these settings, left alone'}"]
    lines += [f"  {style}: {n['train']} train, {n['test']} test" for style, n in manifest["counts"].items()]
    command.say("\n".join([*lines, f"  digest {manifest['digest']}"]), sys.stdout)


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
