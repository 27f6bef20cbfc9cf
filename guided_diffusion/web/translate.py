"""The work behind the page: one model on the device, and a translation as a generator of frames."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..checkpoint import ModelFlags
from ..checkpoint.targets import TargetOptions, load_target, num_classes
from ..errors import InputError, check_choice, first_line, log
from ..image_datasets import ImageError, load_image, measure_image, to_uint8
from ..methods import energy_names
from ..options import Checked, option
from ..presets import preset_options
from ..run.grid import contact_sheet
from ..runtime import PRECISIONS, is_out_of_memory, pick_device
from ..sddm import VARIANTS
from ..solvers import SOLVERS
from ..target import Target
from ..translator import Translator

MOST_RESULTS = 4
RECOMMENDED = preset_options("emoji", "sddm")
"""The page's defaults: those of the demo's model."""


@dataclass(frozen=True)
class Settings(Checked):
    """Settings of a translation, with the page's defaults; the help texts stand below its controls."""

    area: int = option(RECOMMENDED["blocks"], "More blocks keep the result closer to your picture.", least=1)
    range_t: float = option(
        RECOMMENDED["range_t"], "Larger is more realistic, smaller is closer to your picture.", least=0, most=0.95
    )
    steps: int = option(
        int(RECOMMENDED["timestep_respacing"]), "Number of sampling steps. More give finer results.", least=1, most=1000
    )
    seed: int = option(0, "Another seed gives another result.", least=0, most=2**53 - 1)
    count: int = option(1, "Number of results, with consecutive seeds.", least=1, most=MOST_RESULTS)
    start: float = option(
        RECOMMENDED["start"], "1 starts from pure noise, less from your picture with less noise.", least=0.05, most=1
    )
    details: float = option(
        RECOMMENDED["details"], "Keep eyes and other thin features down to this share of steps.", least=0, most=1
    )
    energy: str = option(
        RECOMMENDED["energy"], "More guidance: edges and textures (dct), shapes (low_pass), network features (vgg)."
    )
    variant: str = option("manifold", "manifold: as in the paper. released: as in its code.", choices=VARIANTS)
    sampler: str = option("ancestral", "ddim and dpmpp_2m keep more of your picture, but look flat.", choices=SOLVERS)
    precision: str = option("fp32", "bf16 is faster on recent hardware, but less exact.", choices=PRECISIONS)
    class_index: str | None = option(None, "Class to paint, by number or name.")

    @property
    def seeds(self) -> range:
        """The seed of every result."""
        return range(self.seed, self.seed + self.count)


LABELS = {
    "picture": "Your picture",
    "model_path": "Model",
    "area": "Closeness (area)",
    "range_t": "Freedom (T0)",
    "count": "Results",
    "start": "Late start",
    "class_index": "Class",
    "down_n": "Reduction of the energy low_pass",
    "weights": "File of the energy vgg",
}


def label(name: str) -> str:
    """The page's name of a parameter, by any name that the parts have for it."""
    return LABELS.get(name, name.capitalize())


def explain(error: BaseException) -> str:
    """One line for the page about an error, in the page's words; a defect's traceback goes to the log."""
    if isinstance(error, InputError):
        return error.text(label)
    if isinstance(error, ImageError):
        return f"{label('picture')} cannot be used: {error.reason}"
    if is_out_of_memory(error):
        return "The device does not have enough memory for this model."
    log.error("a translation failed", exc_info=error)
    return f"Internal error, see the log for details: {first_line(error)}"


class Model(NamedTuple):
    """Description of a model for the page: its path, what suits it, and how many classes it has, 0 for none."""

    path: str
    areas: list[int]
    most_steps: int
    classes: int

    def nearest_area(self, wanted: int) -> int:
        """The suitable number of blocks per side that is closest to a wanted one."""
        return min(self.areas, key=lambda n: (abs(n - wanted), -n))


def looks_like_a_photograph(picture: str | os.PathLike) -> bool:
    """Whether more than 60 % of the pixels, of 64 x 64, have a colour of their own: emoji reach 59 %."""
    image = Image.fromarray(load_image(os.fspath(picture), 64))
    return len(image.getcolors(64 * 64) or ()) > 0.6 * 64 * 64


class Frame(NamedTuple):
    """Progress in words, and the predicted results side by side; the last has the model's input and the results."""

    words: str
    preview: Image.Image
    reference: Image.Image | None = None
    results: Sequence[Image.Image] = ()


class Studio:
    """Translations with models (checkpoints, folders or Hub ids), one of which is on the device at a time.

    All are loaded once, to check them. max_side: limit of pictures. weights: file of the energy vgg. Raises InputError.
    """

    def __init__(
        self, paths: Sequence[str], *, device: str = "auto", precision: str = Settings.precision, max_side: int = 4096,
        weights: str = "models/vgg_normalised.pth",
    ) -> None:  # fmt: skip
        self.device, self.max_side, self.weights = pick_device(device), max_side, weights
        self._lock = threading.Lock()  # held while the device computes
        self._closed = False
        self._loaded: tuple[tuple[str, str], Target] | None = None
        models = {path: self._describe(path, precision) for path in reversed(paths)}
        self.models: dict[str, Model] = {path: models[path] for path in paths}

    def _describe(self, path: str, precision: str) -> Model:
        target = self._load(path, precision)
        side = target.shape[-1]
        areas = [n for n in range(1, side // 2 + 1) if side % n == 0]
        return Model(path, areas, min(250, target.diffusion.num_timesteps), num_classes(target) or 0)

    def translate(
        self, model: str, picture: str | os.PathLike | None, settings: Settings, *, name: str | None = None,
        interval: float = 0.3,
    ) -> Iterator[Frame]:  # fmt: skip
        """Translate a picture file; yields a frame every `interval` seconds or step, and the results in the last.

        name: the picture's name, which with the seed determines the noise. Raises InputError and ImageError.
        """
        check_choice("model", model, self.models)
        if not picture:
            raise InputError("choose, drop or paste one first", parameter="picture")
        size = measure_image(picture)
        if max(size) > self.max_side:
            reason = f"its sides may have up to {self.max_side} pixels"
            raise InputError(reason, parameter="picture", value=f"{size[0]} x {size[1]} pixels")
        own = ("seed", "count", "precision")
        own += tuple(name for name in ("start", "details") if getattr(settings, name) == 1)
        options = {option: value for option, value in vars(settings).items() if option not in own}
        if "vgg" in energy_names(settings.energy):
            options["weights"] = self.weights
        with self._lock:
            translator = Translator(self._load(model, settings.precision), **options)
        reference, name = translator.read(picture), name or os.path.basename(picture)
        states = translator.steps(reference, seed=settings.seeds, name=name, previews=False)
        steps, state, began = translator.evaluations, {}, time.monotonic()
        shown = began - interval
        for step in range(1, steps + 1):
            with self._lock:
                if self._closed:
                    raise InputError("the page is closed")
                state = next(states)
            if time.monotonic() - shown >= interval:
                seconds = time.monotonic() - began
                left = seconds / step * (steps - step)
                words = f"Step {step} of {steps}, {seconds:.0f} s so far, about {left:.0f} s left"
                yield Frame(words, _side_by_side(translator.images(state["pred_xstart"])))
                shown = time.monotonic()
        words, results = f"Done: {steps} steps in {time.monotonic() - began:.1f} s.", translator.images(state["x"])
        yield Frame(words, _side_by_side(results), Image.fromarray(to_uint8(reference)[0]), results)

    def _load(self, path: str, precision: str) -> Target:
        """The model of a path on the device, in place of the one that was there."""
        if self._loaded is None or self._loaded[0] != (path, precision):
            self._loaded = None  # its memory is free before the next one needs some
            options = TargetOptions(model_path=path, precision=precision)
            self._loaded = (path, precision), load_target(options, ModelFlags(), self.device, any_class=True)
        return self._loaded[1]

    def close(self) -> None:
        """End all translations; returns when the device is idle."""
        self._closed = True
        with self._lock:
            pass


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    if len(pictures) == 1:
        return pictures[0]
    return Image.fromarray(contact_sheet([[np.asarray(each)] for each in pictures], pictures[0].width, 2))
