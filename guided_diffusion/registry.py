"""Registries: the parts of one kind by name, such as energies, solvers and manifolds."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import InputError


def fitting(value: object, names: Iterable) -> str:
    """List the names that fit, with the closest one where it looks like a slip."""
    known = [str(name) for name in names]
    close = difflib.get_close_matches(str(value), known, 1)
    listed = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
    return f"it can be {listed}" + (f"; did you mean {close[0]}?" if close else "")


class Registry(dict[str, Any]):
    """Parts of one kind by name.

    parameter: the option that names one of them, for errors. check: called with all entries before one is added.
    """

    def __init__(self, parameter: str, check: Callable[[Mapping[str, Any]], Any] = lambda entries: None) -> None:
        super().__init__()
        self.parameter, self.check = parameter, check

    def add(self, *names: str) -> Callable[[Any], Any]:
        """A decorator that registers what it decorates under its names; another entry of a name is replaced."""

        def register(entry: Any) -> Any:
            added = dict.fromkeys(names, entry)
            self.check({**self, **added})
            self.update(added)
            return entry

        return register

    def pick(self, name: str) -> Any:
        """The entry of that name; raises InputError that lists the names."""
        if name not in self:
            raise InputError(fitting(name, self), parameter=self.parameter, value=name)
        return self[name]
