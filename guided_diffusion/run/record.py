"""run.json: what a run is, so that it can be gone on with, repeated, and told from another.

The record holds the settings (all that determines the outputs: flags, checkpoints' hashes, the seed), versions, counts,
times, and the plan: the batches into which the outputs are divided. Keeping the plan makes a restarted run compute each
image in the same company as the first did, and so to the same last bit; and it tells what a run has written.
"""

import hashlib
import json
import os
import platform
from importlib import metadata

from ..errors import UserError

NAME = "run.json"
FORMAT = 1
"""Changes when records of before can no longer be gone on with."""


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
        if not isinstance(record, dict) or "format" not in record:
            raise ValueError("its entries are not those of a run")
        if record["format"] != FORMAT:
            raise ValueError(f"it has format {record['format']!r}, of another version of this program; this one has {FORMAT}")
        entries = {"settings": dict, "batch_size": int, "plan": list, "started": str, "seconds": (int, float)}
        for name, kind in entries.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(f"its entry {name!r} is missing or damaged")
        if not all(isinstance(key, str) and "#" in key for batch in record["plan"] for key in batch):
            raise ValueError("its entry 'plan' is damaged")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be gone on with ({error}); --overwrite True starts anew") from None


def check_same(save_dir, old, new):
    """Raise UserError with the list of differences unless two records' settings are equal."""

    def shown(settings, name):
        return repr(settings[name]) if name in settings else "not recorded"

    # Tuples and the like become what they are in the file.
    new = json.loads(json.dumps(new))
    differences = [
        f"--{name} was {shown(old, name)} and is {shown(new, name)}"
        for name in sorted({*old, *new})
        if shown(old, name) != shown(new, name)
    ]
    if differences:
        raise UserError(
            f"--save_dir {save_dir} holds a run with other settings: {'; '.join(differences)}. "
            "Give another folder, or --overwrite True to start anew"
        )


def plan(items, batch_size, old_plan=()):
    """Divide items (strings) into batches; an earlier plan's batches stay as they are, items new to it are added."""
    placed = {item for batch in old_plan for item in batch}
    rest = [item for item in items if item not in placed]
    return [*old_plan, *(rest[i : i + batch_size] for i in range(0, len(rest), batch_size))]


def without(plan, items):
    """A plan less some of its items."""
    return [kept for batch in plan if (kept := [item for item in batch if item not in items])]
