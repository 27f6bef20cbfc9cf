"""Python files that register metrics and feature networks, loaded before an evaluation."""

import importlib
import os
import sys
from dataclasses import dataclass

from ..errors import InputError, reading
from ..options import Checked, option
from ..presets import ROOT

OWN = os.path.join(ROOT, "benchmarks", "emoji", "judge.py")
"""The repository's own extension; a package that was installed without the repository does not have it."""


@dataclass(frozen=True)
class Extensions(Checked):
    """Metrics and feature networks from outside."""

    extend: str = option(
        "", "comma-separated Python files that register metrics or feature networks; they are executed",
        metavar="FILES",
    )  # fmt: skip

    def load(self) -> None:
        """Run the files and the repository's own; raises InputError that names a file which fails."""
        for path in [OWN] * os.path.isfile(OWN) + [path.strip() for path in self.extend.split(",") if path.strip()]:
            folder, name = os.path.split(os.path.abspath(path).removesuffix(".py"))
            sys.path.insert(0, folder)
            with reading(path, "a Python file that registers metrics or feature networks"):
                os.stat(path)
                module = importlib.import_module(name)
                if not os.path.samefile(module.__file__ or sys.executable, path):
                    raise InputError("another module has its name; rename it", parameter="extend", value=path)
            sys.path.remove(folder)
