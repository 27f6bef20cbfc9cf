"""Python files that register metrics and feature networks, loaded before an evaluation."""

import importlib.util
import os
import sys
from dataclasses import dataclass

from ..errors import InputError, reading
from ..options import option
from ..presets import ROOT

OWN = os.path.join(ROOT, "benchmarks", "emoji", "judge.py")
"""The repository's own extension; a package that was installed without the repository does not have it."""


@dataclass(frozen=True)
class Extensions:
    """Metrics and feature networks from outside."""

    extend: str = option(
        "", "Python files, separated by commas, that register metrics or feature networks; they are run",
        metavar="FILES",
    )  # fmt: skip

    def load(self) -> None:
        """Run the files and the repository's own; raises InputError that names a file which fails."""
        for path in [OWN] * os.path.isfile(OWN) + [path.strip() for path in self.extend.split(",") if path.strip()]:
            load_file(path)


def load_file(path: str) -> None:
    """Import a Python file under its own name, unless it has been imported."""
    name = os.path.splitext(os.path.basename(path))[0]
    known = getattr(sys.modules.get(name), "__file__", None)
    if known is not None and os.path.exists(path) and os.path.samefile(known, path):
        return
    with reading(path, "a Python file that registers metrics or feature networks"):
        if name in sys.modules or not name.isidentifier():
            raise InputError("another module has its name; rename it", parameter="extend", value=path)
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None and specification.loader is not None, "its name does not end in .py"
        sys.modules[name] = module = importlib.util.module_from_spec(specification)
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
