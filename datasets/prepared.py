"""A data set as a folder that appears whole, with a manifest, or is left alone; and the command that makes it."""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from guided_diffusion.cli import main as command
from guided_diffusion.errors import InputError, one_line
from guided_diffusion.run.files import json_text, read_json_or_none

MANIFEST = "manifest.json"


def prepare(
    out: str,
    settings: dict[str, Any],
    write: Callable[[Path, Path], dict[str, Any]],
    folders: Collection[str],
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Make a set in the folder `out`, unless it is there already: (its manifest, whether it was written now).

    settings: decide every pixel; sets with equal ones are the same. write(folder, work) fills the empty `folder` and
    returns the manifest's other entries, among them `pixels_sha256` by path; `work` is for downloads. folders: the
    names in a set, the only ones that `overwrite` replaces. Raises InputError; `out` is then as it was.
    """
    place = Path(os.path.realpath(out))
    try:
        if manifest := _present(place, settings, folders, overwrite):
            return manifest, False
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, hence on its file system: the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as work:
            new, old = Path(work, "new"), Path(work, "old")
            new.mkdir()
            manifest = {"settings": settings, **write(new, Path(work))}
            (new / MANIFEST).write_text(json_text(manifest), encoding="utf-8")
            if place.exists():
                place.rename(old)
            try:
                new.rename(place)
            except OSError:
                if old.exists():
                    old.rename(place)
                raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(f"cannot be written: {error.strerror or error}{where}", parameter="out", value=out) from error
    return manifest, True


def _present(out: Path, settings: dict[str, Any], folders: Collection[str], overwrite: bool) -> dict[str, Any] | None:
    """The manifest of the complete set in `out`; None where a set is to be written, InputError where it may not."""
    if out.exists() and not out.is_dir():
        raise InputError("it is a file; name a folder", parameter="out", value=out)
    entries = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if foreign := [name for name in entries if name not in (*folders, MANIFEST)]:
        reason = f"it holds other files ({foreign[0]}); name a folder that is new or empty"
        raise InputError(reason, parameter="out", value=out)
    if overwrite or not entries:
        return None
    manifest = read_json_or_none(out / MANIFEST)
    paths = manifest.get("pixels_sha256") if isinstance(manifest, dict) else None
    if not isinstance(paths, dict):
        problem = f"it has no usable {MANIFEST}"
    elif manifest.get("settings") != settings:
        problem = "it holds the set with other settings"
    elif missing := [path for path in paths if not (out / path).is_file()]:
        problem = f"it lacks pictures of its set, such as {missing[0]}"
    else:
        return manifest
    raise InputError(f"{problem}; name another folder or set `overwrite` to True", parameter="out", value=out)


def fetch(package: str, call: list[str], folder: Path, pattern: str, advice: str) -> Path:
    """Run a package manager's command that writes into `folder`; return the file there whose name has a pattern.

    Raises InputError with the first error that it prints, and an advice.
    """
    command.say(f"fetching {package}", sys.stdout)
    done = subprocess.run(call, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    path = next(folder.glob(pattern), None)
    if done.returncode or path is None:
        errors = [line for line in done.stderr.splitlines() if "err" in line.lower()] or [f"status {done.returncode}"]
        raise InputError(f"{package} could not be fetched ({one_line(errors[0])}); {advice}")
    return path


def report(out: str, manifest: dict[str, Any], written: bool) -> None:
    """Print whether a set was written, and its number of pictures by folder."""
    counts = sorted(Counter(os.path.dirname(path) for path in manifest["pixels_sha256"]).items())
    lines = [f"{out}: {'written' if written else 'already present with these settings, left alone'}"]
    lines += [f"  {folder}: {number}" for folder, number in counts]
    command.say("\n".join([*lines, *([f"  digest {manifest['digest']}"] if "digest" in manifest else [])]), sys.stdout)
