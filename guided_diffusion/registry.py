"""Registries: the parts of one kind by name, such as energies, solvers and manifolds."""

from collections.abc import Callable, Mapping
from typing import Any

from .errors import check_choice


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
        check_choice(self.parameter, name, self)
        return self[name]
