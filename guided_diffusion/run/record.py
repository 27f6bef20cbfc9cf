"""run.json: what a run is, so that it can be resumed, repeated, and told from another.

The record holds the settings (all that determines the outputs: options, checkpoints' hashes, the seed), versions,
counts, times, and the plan: the batches into which the outputs are divided. Keeping the plan makes a restarted run
compute each image in the same company as the first did, and so to the same last bit; and it tells what a run has
written.
"""

import json
import os
import platform
from importlib import metadata
from typing import Any

from ..errors import InputError, display_name, reading, shown
from .files import Folder, json_text, read_json, write_json

NAME = "run.json"
FORMAT = 2
"""Changes when programs that know earlier formats alone cannot resume a run. Records of format 1 can be resumed."""


def sha256(path: str | os.PathLike) -> str | None:
    """Hash of a file as hexadecimal digits; None for an address that is no local file."""
    if not os.path.isfile(path):
        return None
    from ..checkpoint.reading import hash_file

    return hash_file(os.fspath(path))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def read(save_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The record in a folder, or None. Raises InputError where it cannot be resumed."""
    path = os.path.join(save_dir, NAME)
    try:
        with reading(path, "the record of a run"):
            found = read_json(path)
            if found["format"] not in (1, FORMAT):
                known = f"this version reads formats 1 to {FORMAT}"
                raise InputError(f"{display_name(path)} has format {shown(found['format'])}, and {known}")
            _check_entries(found)
            return found
    except InputError as error:
        if not os.path.exists(path):
            return None
        raise InputError(f"{error.reason}; it cannot be resumed, and `overwrite` True starts over") from None


def _check_entries(found: dict[str, Any]) -> None:
    """Raise an exception unless the entries of a record are what resuming needs."""
    kinds = {"settings": dict, "versions": dict, "plan": list, "batch_size": int, "started": str}
    for name, kind in kinds.items():
        if not isinstance(found[name], kind):
            raise ValueError(f"its entry {name} is of another type")
    if not 0 <= found["seconds"] < 1e12 or found["settings"].get("samples_per_image", 1) < 1:
        raise ValueError("its numbers are out of range")
    for batch in found["plan"]:
        for key in batch:
            if not isinstance(batch, list) or b"\0" in os.fsencode(key) or int(key.rpartition("#")[2]) < 0:
                raise ValueError("its plan names what cannot be outputs")
    json_text(found).encode("utf-8", "surrogateescape")  # as it will be written again


def check_same(save_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError with the list of differences unless two records' settings are equal."""
    new = json.loads(json.dumps(new))  # tuples and the like become what they are in the file
    differences = []
    for name in sorted({*old, *new}):
        was, now = (shown(each[name]) if name in each else "not recorded" for each in (old, new))
        if not (name in old and name in new and old[name] == new[name]):
            differences.append(f"`{name}` was {was} and is {now}")
    if differences:
        reason = f"it holds a run with other settings: {'; '.join(differences)}. Give another folder"
        raise InputError(f"{reason}, or `overwrite` True to start over", parameter="save_dir", value=save_dir)


def write(folder: Folder, record: dict[str, Any]) -> None:
    """Write the record of a run into its folder."""
    write_json(os.path.join(folder.path, NAME), record, folder)
