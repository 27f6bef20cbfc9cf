"""run.json: what a run is, so that it can be resumed, repeated, and told from another.

The record holds the settings (all that determines the outputs: options, checkpoints' hashes, the seed), versions,
counts, times, and the plan: the batches into which the outputs are divided. Keeping the plan makes a restarted run
compute each image in the same company as the first did, and so to the same last bit; and it tells what a run has
written. `job.Job` is the only writer.
"""

import hashlib
import json
import os
import platform
from importlib import metadata
from typing import Any

from ..errors import InputError, display_name, one_line, shown
from .files import json_text, read_json

NAME = "run.json"
FORMAT = 1
"""Changes when earlier records cannot be resumed any more."""


def sha256(path: str | os.PathLike) -> str | None:
    """Hash of a file as hexadecimal digits; None for an address that is no local file."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(path: str | os.PathLike) -> str:
    """What stands in a record for a checkpoint: the hash of its content, or the address where it is no local file."""
    from ..checkpoint import fingerprint as of_checkpoint

    return of_checkpoint(path)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def read(save_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The record in a folder, or None. Raises InputError where it cannot be understood."""
    path = os.path.join(save_dir, NAME)
    try:
        record = read_json(path)
        _check_entries(record)
        return record
    except FileNotFoundError:
        return None
    except InputError as error:
        reason = error.reason.removeprefix(f"{display_name(path)} ")
    except RecursionError:
        reason = "its entries are nested too deeply"
    except (ValueError, TypeError) as error:
        reason = one_line(error)
    raise InputError(f"{display_name(path)} cannot be resumed ({reason}); `overwrite` True starts over") from None


def _check_entries(record: Any) -> None:
    """Raise ValueError unless a record has what resuming reads."""
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError("its entries are not those of a run")
    if record["format"] != FORMAT:
        raise ValueError(
            f"it has format {shown(record['format'])}, of another version of this program; this one has {FORMAT}"
        )
    entries = {"settings": dict, "batch_size": int, "plan": list, "started": str, "seconds": (int, float)}
    for name, kind in entries.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"its entry {name!r} is missing or damaged")
    # A comparison refuses NaN, and a bound what is no number of seconds.
    if not 0 <= record["seconds"] < 1e12:
        raise ValueError("its entry 'seconds' is damaged")
    if not isinstance(record.get("versions", {}), dict):
        raise ValueError("its entry 'versions' is damaged")
    samples = record["settings"].get("samples_per_image", 1)
    if not isinstance(samples, int) or samples < 1:
        raise ValueError("its entry 'samples_per_image' is damaged")
    for batch in record["plan"]:
        if not isinstance(batch, list) or not all(isinstance(key, str) and "#" in key for key in batch):
            raise ValueError("its entry 'plan' is damaged")
        if not all(_is_path(key) for key in batch):
            raise ValueError("its entry 'plan' names what cannot be a file")
    json_text(record).encode("utf-8", "surrogateescape")  # as it will be written again


def _is_path(key: str) -> bool:
    try:
        return b"\0" not in os.fsencode(key)
    except UnicodeEncodeError:
        return False


def check_same(save_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError with the list of differences unless two records' settings are equal."""

    def value(settings: dict[str, Any], name: str) -> str:
        return shown(settings[name]) if name in settings else "not recorded"

    # Tuples and the like become what they are in the file.
    new = json.loads(json.dumps(new))
    names = [name for name in sorted({*old, *new}) if not (name in old and name in new and old[name] == new[name])]
    if names:
        differences = "; ".join(f"`{name}` was {value(old, name)} and is {value(new, name)}" for name in names)
        reason = (
            f"it holds a run with other settings: {differences}. Give another folder, or `overwrite` True to start over"
        )
        raise InputError(reason, parameter="save_dir", value=save_dir)
