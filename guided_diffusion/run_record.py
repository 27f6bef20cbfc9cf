"""run.json: what a run is, so that it can be gone on with, repeated, and told from another.

The record holds the flags that determine the outputs, the checkpoints' hashes, versions, the seed, and the plan: the
batches into which the references are divided. Keeping the plan makes a restarted run compute each image in the same
company as the first did, and so to the same last bit.
"""

import hashlib
import json
import os
import platform
from importlib import metadata

from .errors import UserError

NAME = "run.json"


def sha256(path):
    """Hash of a file as hexadecimal digits; None for an address that is no local file."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions():
    """Versions of what the numbers depend on."""
    names = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def read(save_dir):
    """The record in a folder, or None. Raises UserError if it cannot be understood."""
    path = os.path.join(save_dir, NAME)
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            record = json.load(file)
        if not isinstance(record, dict) or not {"settings", "batch_size", "plan"} <= set(record):
            raise ValueError("its entries are not those of a run")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); --overwrite True starts anew") from None


def check_same(save_dir, old, new):
    """Raise UserError with the list of differences unless two records' settings are equal."""
    differences = [
        f"--{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise UserError(
            f"--save_dir {save_dir} holds a run with other settings: {'; '.join(differences)}. "
            "Give another folder, or --overwrite True to start anew"
        )


def plan(items, batch_size, old_plan=()):
    """Divide items (strings) into batches; items that an earlier plan has stay in its batches, new ones are added."""
    wanted = set(items)
    batches = [kept for batch in old_plan if (kept := [item for item in batch if item in wanted])]
    placed = {item for batch in batches for item in batch}
    rest = [item for item in items if item not in placed]
    return batches + [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
