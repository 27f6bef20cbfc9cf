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
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from PIL import Image
from prepared import fetch, prepare, report

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError, reading
from guided_diffusion.options import Checked, option

TARGET, SOURCE = "fluent3d", "twitter"
PACKAGES = {
    "fluent3d": {"role": "target", "package": "@lobehub/fluent-emoji-3d", "version": "1.1.0",
                 "folder": "package/assets/", "licence": "MIT"},
    "twitter": {"role": "source", "package": "emoji-datasource-twitter", "version": "16.0.0",
                "folder": "package/img/twitter/64/", "licence": "CC-BY-4.0"},
    "google": {"role": "second source", "package": "emoji-datasource-google", "version": "16.0.0",
               "folder": "package/img/google/64/", "licence": "Apache-2.0"},
}  # fmt: skip
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


def tarball_path(spec, from_dir, work):
    """The tarball of a package: in `from_dir` if that is given, else fetched with npm into the folder `work`."""
    package = f"{spec['package']}@{spec['version']}"
    name = tarball_name(spec["package"], spec["version"])
    if from_dir is not None:
        path = Path(from_dir) / name
        if not path.is_file():
            reason = f"it has no {name}; make it there with npm pack {package}"
            raise InputError(reason, parameter="from_dir", value=from_dir)
        return path
    packages = ", ".join(f"{each['package']}@{each['version']}" for each in PACKAGES.values())
    advice = f"give a folder as `from_dir` with the tarballs that `npm pack` makes elsewhere of {packages}"
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"npm is not installed: install Node.js, or {advice}")
    # npm waits 10 s and then 60 s between its tries; a machine without a network should hear so sooner.
    waits = ["--fetch-retry-mintimeout=2000", "--fetch-retry-maxtimeout=10000"]
    return fetch(package, [npm, "pack", package, "--pack-destination", str(work), *waits], work, name, advice)


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
    return {
        "counts": {
            style: {split: sum(p.startswith(f"{style}/{split}/") for p in hashes) for split in ("train", "test")}
            for style in PACKAGES
        },
        "digest": hashlib.sha256(lines.encode()).hexdigest(),
        "paired": {split: [code for code in paired if split_of(code) == split] for split in ("train", "test")},
        "left_out": {style: sorted(pictures[style].keys() - set(paired)) for style in PACKAGES},
        "pixels_sha256": {path: hashes[path] for path in sorted(hashes)},
    }


@dataclass(frozen=True)
class Options(Checked):
    """The set to make."""

    size: int = option(64, "side of the pictures in pixels", least=8, most=1024)
    out: str = option("data/emoji", "folder of the set", metavar="DIR")
    from_dir: str | None = option(
        None, "folder with the tarballs of `npm pack`; without it npm fetches them", metavar="DIR"
    )
    overwrite: bool = option(False, "replace another emoji set in the folder")


def create_parser() -> Parser:
    parser = Parser("Make the emoji set: flat and glossy 3D emoji, matched by code point.")
    parser.usage = "python datasets/%(prog)s [flags]"
    parser.add(Options, title="the set")
    return parser


def main(given: Given) -> None:
    options = given.options(Options)
    if options.from_dir is not None and not os.path.isdir(options.from_dir):
        raise InputError("it is not a folder", parameter="from_dir", value=options.from_dir)

    def write(folder: Path, work: Path) -> dict:
        tarballs = {style: tarball_path(spec, options.from_dir, work) for style, spec in PACKAGES.items()}
        pictures = {style: read_tarball(path, PACKAGES[style]) for style, path in tarballs.items()}
        return write_set(pictures, options.size, folder)

    report(options.out, *prepare(options.out, settings(options.size), write, PACKAGES, options.overwrite))


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
