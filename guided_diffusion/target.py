"""What is sampled from, and what is given to a method."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """References of one call of a method.

    ref: [N, 3, S, S] in [-1, 1]. names: their relative paths. labels: classes [N], or None.
    """

    ref: Tensor
    names: tuple[str, ...]
    labels: Tensor | None = None


@dataclass
class Count:
    """A number of evaluations of models, each of one image."""

    total: int = 0


_open = threading.local()


@contextlib.contextmanager
def count_evaluations() -> Iterator[Count]:
    """Count the evaluations of `counted` models within the context, in this thread."""
    count, outer = Count(), getattr(_open, "count", None)
    _open.count = count
    try:
        yield count
    finally:
        _open.count = outer
        if outer is not None:
            outer.total += count.total


def counted(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A model(x, ...) that adds the images of x to `count_evaluations`."""
    return _Counted(model)


@dataclass(frozen=True)
class _Counted:
    model: Callable[..., Tensor]

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if (count := getattr(_open, "count", None)) is not None:
            count.total += len(x)
        return self.model(x, *arguments, **options)
