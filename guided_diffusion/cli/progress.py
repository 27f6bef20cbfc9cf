"""Progress of a run: a bar on a terminal, lines in a log."""

import sys
import time
from typing import Any

from tqdm import tqdm

from .main import say


class Progress:
    """Context that shows images, steps and time left, estimated without the first step, which includes compiling.

    A log gets at most a line per half minute and per cent. total: image-steps of the run; images: outputs wanted; made:
    those that exist.
    """

    def __init__(self, total: int, images: int, made: int = 0, file: Any = None) -> None:
        self.total, self.images, self.made, self.file = total, images, made, file or sys.stderr
        self.started = self.told_at = time.monotonic()
        self.done = self.told = 0
        self.first: tuple[float, int] | None = None  # when the first steps were done, and how many
        self.bar: Any = None
        if total and self.file.isatty():
            layout = "{percentage:3.0f}%|{bar}| {desc}, step {n_fmt}/{total_fmt} [{elapsed} elapsed{postfix}]"
            self.bar = tqdm(total=total, smoothing=0, bar_format=layout, desc=self._images(), file=self.file)

    def _images(self) -> str:
        return f"{self.made}/{self.images} images"

    def seconds_left(self) -> float | None:
        """The estimate; None before the first step."""
        if self.first is None:
            return None
        since, before = self.first if self.done > self.first[1] else (self.started, 0)
        return (time.monotonic() - since) / (self.done - before) * (self.total - self.done)

    def __call__(self, image_steps: int, made: int) -> None:
        """Add steps that were done; made: outputs that exist."""
        self.done, self.made, now = self.done + image_steps, made, time.monotonic()
        if self.first is None and image_steps:
            self.first = now, self.done
        if self.bar is not None:
            self.bar.set_description_str(self._images(), refresh=False)
            self.bar.set_postfix_str(f"{tqdm.format_interval(self.seconds_left() or 0)} remaining", refresh=False)
            self.bar.update(image_steps)
        elif now >= self.told_at + 30 and self.total > self.done >= self.told + self.total / 100:
            self._line()

    def _line(self) -> None:
        self.told_at, self.told = time.monotonic(), self.done
        elapsed, left = map(tqdm.format_interval, (self.told_at - self.started, self.seconds_left() or 0))
        share = f"{100 * self.done // self.total}%, {self._images()}, step {self.done}/{self.total}"
        say(f"{share}, {elapsed} elapsed, {left} remaining", self.file)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done > self.told:
            self._line()
