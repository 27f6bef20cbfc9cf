"""The outputs that a run is to make, checked before any model is loaded.

`Job` is what is wanted. `opening.open_plan` opens its save folder and finds out what is missing, and `loop.Loop` makes
that. What is done is what exists on disk: outputs appear whole, so a killed run resumes when it is started again.
"""

import os
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from ..dist_util import Peers
from ..errors import InputError, display_name
from ..image_datasets import RESIZE_MODES, ImageError, Reference, check_options, is_url, load_image
from ..options import check, option
from . import journal, record
from .files import Folder, remove_files
from .sources import References, Source

MOST_IMAGES = 1_000_000


@dataclass(frozen=True)
class RunOptions:
    """Where the results of a run go, and how it is made."""

    save_dir: str = option("output", "folder for the outputs", runtime=True, metavar="DIR")
    overwrite: bool = option(False, "start over where the save folder holds another run", runtime=True)
    batch_size: int | str = option(4, "images at once, or auto", least=1, runtime=True, metavar="N")
    seed: int = option(0, "with an image's relative path, determines its noise")

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise InputError("it must be a whole number above 0 or auto", parameter="batch_size", value=self.batch_size)


@dataclass(frozen=True)
class OutputOptions(RunOptions):
    """Options of a run that makes images."""

    save_trajectory: bool = option(False, "also write the denoising of every image as an animation to trajectory/")
    trajectory: str = option("x0", "what the animation shows: the predicted x_0, or x_t", choices=("x0", "xt"))
    grid: int = option(24, "images shown in grid.png, 0 for none", least=0, most=10_000, runtime=True)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values; version 0.1 showed x_0 and recorded no choice."""
        return set() if self.save_trajectory and self.trajectory != "x0" else {"trajectory"}


@dataclass(frozen=True)
class JobOptions(OutputOptions):
    """Options of a run that translates references."""

    base_samples: str = option(
        None, "a folder of references (searched recursively), or one image", runtime=True, metavar="PATH"
    )
    num_samples: int | None = option(
        None, "translate only the first so many references", least=1, most=MOST_IMAGES, runtime=True
    )
    samples_per_image: int = option(1, "translations of every reference", least=1, most=10_000)
    resize: str = option("crop", "how images that are not square become so", choices=RESIZE_MODES)
    background: str = option("white", "colour behind transparent pixels", metavar="COLOUR")
    white_level: int | None = option(
        None, "value of white in 16-bit greyscale references, such as 4095 for 12 bits; 65535 without it",
        least=1, most=2**31 - 1, metavar="N",
    )  # fmt: skip
    strict: bool = option(False, "stop at the first unreadable image", runtime=True)

    def ignored(self) -> set[str]:
        # Records of version 0.2 have no white_level.
        return super().ignored() | ({"white_level"} if self.white_level is None else set())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.resize, self.background)

    def references(self, peers: Peers) -> References:
        """The references that the options name."""
        return References(
            self.base_samples, peers, self.num_samples, samples=self.samples_per_image, strict=self.strict,
            resize=self.resize, background=self.background, white_level=self.white_level,
        )  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One output to make: the `sample`-th translation of a reference. `key` identifies it in the run."""

    reference: Reference
    sample: int

    @property
    def key(self) -> str:
        """The reference's relative path and the sample's number."""
        return f"{self.reference.name}#{self.sample}"


class Job:
    """The outputs wanted of a source: `items` by key, and the `folder` that they go to.

    Raises InputError for what can be known to fail: a folder that cannot be written, an output that would replace a
    source or lie outside of the folder. source: by default the references that the options (`JobOptions`) name.
    """

    def __init__(self, options: RunOptions, peers: Peers, device: torch.device, source: Source | None = None) -> None:
        if source is None:
            if not isinstance(options, JobOptions):
                raise TypeError("options that name no references need a source")
            source = options.references(peers)
        self.options, self.peers, self.device, self.source = options, peers, device, source
        if source.strict and source.failed:
            name, reason = next(iter(source.failed.items()))
            raise InputError(f"{display_name(name)}: {reason}")
        self._check_outside()
        self.folder = Folder(options.save_dir)
        items = [Item(reference, k) for k in range(source.samples) for reference in source.entries]
        self.items = {item.key: item for item in items}
        self._check_inside()
        self._protected = self._find_protected()
        self.refuse_protected(self.own_files() + [path for key in self.items for path in self.paths(key)])

    def path(self, item: Item) -> str:
        """Where an item's image is written."""
        return self.paths(item.key)[0]

    def paths(self, key: str, samples: int | None = None) -> tuple[str, ...]:
        """Where a key's image and its trajectory are written; samples: of each reference, by default this job's."""
        name, _, sample = key.rpartition("#")
        folder = "" if (samples or self.source.samples) == 1 else f"sample_{sample}/"
        stem = f"{folder}{posixpath.splitext(name)[0]}"
        names = f"{stem}.png", f"trajectory/{stem}.gif"
        return tuple(os.path.join(self.options.save_dir, *each.split("/")) for each in names)

    def exists(self, item: Item) -> bool:
        """Whether an item's image is there: a file, and no link to one."""
        return os.path.isfile(self.path(item)) and not os.path.islink(self.path(item))

    def discard(self, keys: Iterable[str]) -> None:
        """Remove the outputs of keys."""
        remove_files(path for key in keys for path in self.paths(key))

    def made(self) -> int:
        """How many of the wanted outputs exist."""
        return sum(map(self.exists, self.items.values()))

    def image(self, item: Item, side: int) -> np.ndarray:
        """An output as uint8 [side, side, 3]; raises InputError, naming the file, where it is none of ours any more."""
        try:
            return load_image(self.path(item), side)
        except ImageError as error:
            raise InputError(f"{display_name(self.path(item))} cannot be read: {error.reason}") from None

    def own_files(self) -> list[str]:
        """Files that a run writes besides the outputs, the record last."""
        return [os.path.join(self.options.save_dir, name) for name in ("grid.png", journal.NAME, record.NAME)]

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(reason, parameter="save_dir", value=self.options.save_dir)

    def _check_outside(self) -> None:
        base = self.source.base
        if base is not None and not is_url(base) and os.path.isdir(base) and _inside(self.options.save_dir, base):
            self._refuse("it lies in `base_samples`, and outputs would become references; move it")

    def _check_inside(self) -> None:
        """Raise InputError where a link in the save folder leads an output out of it."""
        for folder in {os.path.dirname(path) for key in self.items for path in self.paths(key)}:
            if not self.holds(folder):
                name = display_name(os.path.relpath(folder, self.options.save_dir))
                self._refuse(f"its folder {name} is a link out of it; remove the link")

    def holds(self, folder: str) -> bool:
        """Whether a folder lies in the save folder once links are followed."""
        return _inside(folder, self.options.save_dir)

    def _find_protected(self) -> dict[str, str]:
        """Files that must not be overwritten: real path -> name. Includes sources that cannot be used."""
        base = self.source.base
        if base is None or is_url(base):
            return {}
        if not os.path.isdir(base):
            return {os.path.realpath(base): os.path.basename(base)}
        failed = {os.path.realpath(os.path.join(base, name)): name for name in self.source.failed}
        return failed | {os.path.realpath(reference.path): reference.name for reference in self.source.entries}

    def refuse_protected(self, paths: list[str]) -> None:
        """Raise InputError where a file that the run writes or removes is one of its sources."""
        for path in paths if self._protected else ():
            if os.path.lexists(path) and (source := self._protected.get(os.path.realpath(path))) is not None:
                output = display_name(os.path.relpath(path, self.options.save_dir))
                reason = f"the output {output} would replace the reference {display_name(source)}"
                self._refuse(f"{reason}; give another folder")


def _inside(path: str, folder: str) -> bool:
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) == root
