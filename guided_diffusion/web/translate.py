"""The work behind the page: one model on the device, and a translation as a generator of frames.

    studio = Studio(["models/fluent3d_64.safetensors"])
    for frame in studio.translate("models/fluent3d_64.safetensors", "cat.png", Settings()):
        frame.preview  # the predicted result so far; the last frame has `results`

A thread samples. It keeps the newest state only, so that a slow page does not slow it down, and it ends at the next
step once the generator is closed.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..checkpoint import ModelFlags
from ..checkpoint.targets import TargetOptions, load_target, num_classes
from ..errors import InputError, first_line
from ..image_datasets import ImageError, load_image, measure_image, to_uint8
from ..manifold import check_blocks
from ..methods import ENERGIES, energy_names
from ..options import check, option
from ..presets import PRESETS
from ..run.grid import contact_sheet
from ..runtime import PRECISIONS, is_out_of_memory, pick_device
from ..sddm import VARIANTS
from ..solvers import SOLVERS
from ..target import Target
from ..translator import Translator

log = logging.getLogger("sddm")

# Energies that need no file besides, and vgg, whose file has a usual place.
ENERGY_NAMES = ("dct", "low_pass", "vgg")
MOST_RESULTS = 4

RECOMMENDED = PRESETS["emoji"].options("sddm")
"""The page's defaults: those of the demo's model."""
EMOJI_MODEL = os.path.basename(RECOMMENDED["model_path"])


@dataclass(frozen=True)
class Settings:
    """Settings of a translation, with the page's defaults; the help texts stand below its controls."""

    area: int = option(
        RECOMMENDED["blocks"],
        "The picture is cut into this many blocks a side, and every block keeps the average colour and contrast of "
        "yours. More blocks: closer to your picture.",
        least=1,
    )
    range_t: float = option(
        RECOMMENDED["range_t"],
        "The share of the steps, at the end, that the model takes without your picture. Larger: more realistic, "
        "further from it.",
        least=0,
        most=0.95,
    )
    steps: int = option(
        int(RECOMMENDED["timestep_respacing"]),
        "The result emerges from noise in this many steps. More: slower, finer.",
        least=1,
        most=1000,
    )
    seed: int = option(0, "Any number; another one gives another result.", least=0, most=2**53 - 1)
    count: int = option(1, "So many results at once, with this seed and those after it.", least=1, most=MOST_RESULTS)
    start: float = option(
        RECOMMENDED.get("start", 1.0),
        "1 begins with pure noise. Less begins later, with your picture under so much noise: fewer steps.",
        least=0.05,
        most=1,
    )
    details: float = option(
        RECOMMENDED.get("details", 1.0),
        "Eyes, mouths and other thin features are kept down to this share of the steps. Less: better. 1: not kept.",
        least=0,
        most=1,
    )
    energy: str = option(
        RECOMMENDED["energy"],
        "Further guidance: edges and textures (dct), overall shapes (low_pass), features of a network (vgg, where its "
        "file is present).",
    )
    variant: str = option(
        "manifold", "The method as the paper describes it, or as its authors' code computes it.", choices=VARIANTS
    )
    sampler: str = option(
        RECOMMENDED.get("sampler", "ancestral"),
        "How a step is taken. ddim and dpmpp_2m keep more of your picture, and look flatter.",
        choices=SOLVERS,
    )
    precision: str = option(
        "fp32", "Arithmetic of the network. bf16 is faster on recent hardware, and less exact.", choices=PRECISIONS
    )
    class_index: str | None = option(None, "What the model is to paint: a class by its number or name.")

    def __post_init__(self) -> None:
        check(self)
        energy_names(self.energy)

    @property
    def seeds(self) -> range:
        """The seed of every result."""
        return range(self.seed, self.seed + self.count)


LABELS = {
    "picture": "Your picture",
    "model": "Model",
    "area": "Closeness (area)",
    "range_t": "Freedom (T0)",
    "steps": "Steps",
    "seed": "Seed",
    "count": "Results",
    "start": "Late start",
    "details": "Details",
    "energy": "Energy",
    "variant": "Variant",
    "sampler": "Sampler",
    "precision": "Precision",
    "class_index": "Class",
}
"""The page's names of parameters."""

# Names that the parts have for them.
LABELS |= {"model_path": LABELS["model"], "blocks": LABELS["area"], "timestep_respacing": LABELS["steps"]}
LABELS |= {
    "start_t": LABELS["start"],
    "details_t": LABELS["details"],
    "down_n": "Reduction of the energy low_pass",
    "weights": "File of the energy vgg",
}


def explain(error: BaseException) -> str:
    """One line for the page about an error, in the page's words."""
    if isinstance(error, InputError):
        return error.text(lambda name: LABELS.get(name, name))
    if isinstance(error, ImageError):
        return f"{LABELS['picture']} cannot be used: {error.reason}"
    if is_out_of_memory(error):
        return "The device has too little memory for this model."
    return f"This is a defect of the program, and its log has the details: {first_line(error)}"


@dataclass(frozen=True)
class Model:
    """Description of a model for the page. classes: how many, 0 for a model without."""

    path: str
    image_size: int
    training_steps: int
    classes: int

    @property
    def areas(self) -> list[int]:
        """The numbers of blocks a side that suit the model, ascending."""
        return [n for n in range(1, self.image_size) if self._suits(n)]

    def _suits(self, blocks: int) -> bool:
        with contextlib.suppress(InputError):
            check_blocks((self.image_size, self.image_size), blocks)
            return True
        return False

    def nearest_area(self, wanted: int) -> int:
        """The suitable number of blocks that is closest to a wanted one."""
        return min(self.areas, key=lambda n: (abs(n - wanted), -n))


def looks_like_a_photograph(picture: str | os.PathLike) -> bool:
    """Whether most pixels of a picture, reduced to 64 x 64, have a colour of their own.

    A hint, not a classification: the share of distinct colours is at most 0.59 in emoji, and 0.71 in the one photograph
    that was measured.
    """
    image = Image.fromarray(load_image(os.fspath(picture), 64))
    return len(image.getcolors(64 * 64) or ()) > 0.6 * 64 * 64


@dataclass(frozen=True)
class Frame:
    """How far a translation is.

    step: steps done of `steps`, and the seconds since the first began; 0 while it waits for the model. preview: the
    predicted results side by side, None before the first step. reference: the picture as the model got it, and results:
    its translations, one for each seed, both in the last frame only. All pictures are PIL images.
    """

    step: int
    steps: int
    seconds: float
    preview: Image.Image | None = None
    reference: Image.Image | None = None
    results: Sequence[Image.Image] = ()

    @property
    def words(self) -> str:
        """Status line of the page."""
        if self.results:
            return f"Done: {self.steps} steps in {self.seconds:.1f} s."
        if not self.step:
            return "Waiting for the model …"
        left = self.seconds / self.step * (self.steps - self.step)
        return f"Step {self.step} of {self.steps}, {self.seconds:.0f} s so far, about {left:.0f} s left"


class Studio:
    """Models of which one is on the device, and translations with them.

    paths: checkpoints, diffusers folders or Hub ids. Each is loaded once to see that it can be; the first stays.
    max_side: pictures of more pixels a side are refused. weights: the file of the energy vgg. Raises InputError.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        device: str = "auto",
        precision: str = Settings.precision,
        max_side: int = 4096,
        weights: str = "models/vgg_normalised.pth",
    ) -> None:
        self.device, self.max_side, self.weights = pick_device(device), max_side, weights
        self._changed = threading.Condition()
        self._key: tuple[str, str] | None = None
        self._target: Target | None = None
        self._users = 0
        self._runs: set[_Run] = set()
        self.models: dict[str, Model] = {}
        for path in reversed(paths):
            with self._borrow((path, precision), threading.Event()) as target:
                steps, classes = target.diffusion.num_timesteps, num_classes(target) or 0
                self.models[path] = Model(path, target.shape[-1], steps, classes)
        self.models = {path: self.models[path] for path in paths}

    @property
    def energies(self) -> list[str]:
        """The energies that can be used here."""
        usable = [name for name in ENERGY_NAMES if name in ENERGIES]
        return [name for name in usable if name != "vgg" or os.path.exists(self.weights)]

    def translate(
        self,
        model: str,
        picture: str | os.PathLike | None,
        settings: Settings,
        *,
        name: str | None = None,
        interval: float = 0.3,
    ) -> Iterator[Frame]:
        """Translate a picture file; yields a frame at least every `interval` seconds, the results in the last.

        model: one of the paths. name: the picture's name, which with the seed determines the noise; by default the
        file's. Closing the generator ends the sampling at its next step. Raises InputError and ImageError.
        """
        if model not in self.models:
            raise InputError(f"it can be {', '.join(self.models)}", parameter="model", value=model)
        if not picture:
            raise InputError("choose, drop or paste one first", parameter="picture")
        size = measure_image(picture)
        if max(size) > self.max_side:
            reason = f"its sides may have up to {self.max_side} pixels"
            raise InputError(reason, parameter="picture", value=f"{size[0]} x {size[1]} pixels")
        run = _Run(self, model, os.fspath(picture), name or os.path.basename(picture), settings)
        self._runs.add(run)
        run.start()
        shown = None
        try:
            while not run.done.wait(interval):
                shown = run.frame()
                yield shown
            if run.error is not None:
                raise run.error
            if shown is None or shown.preview is None:
                yield run.frame()
            yield run.frame(result=True)
        finally:
            run.stop.set()
            run.join()
            self._runs.discard(run)

    def close(self) -> None:
        """End all translations at their next steps."""
        runs = list(self._runs)
        for run in runs:
            run.stop.set()
        for run in runs:
            run.join()

    @contextlib.contextmanager
    def _borrow(self, key: tuple[str, str], stop: threading.Event) -> Iterator[Target]:
        """The model of a path and precision on the device, loaded when no translation uses another."""
        with self._changed:
            while self._key != key and self._users:
                if stop.is_set():
                    raise _Stopped
                self._changed.wait(0.2)
            if self._key != key:
                self._key = self._target = None  # its memory is free before the next one needs some
                options = TargetOptions(model_path=key[0], precision=key[1])
                self._target = load_target(options, ModelFlags(), self.device, any_class=True)
                self._key = key
            target = self._target
            self._users += 1
        try:
            yield target  # type: ignore[misc]
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()


class _Stopped(Exception):
    """Nobody wants the result any more."""


class _Run(threading.Thread):
    """The thread of one translation."""

    def __init__(self, studio: Studio, model: str, picture: str, name: str, settings: Settings) -> None:
        super().__init__(daemon=True, name=f"translation of {name!r}")
        self.studio, self.model, self.settings = studio, model, settings
        self.picture, self.name_of_picture = picture, name
        self.stop, self.done = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.total = 0
        self.began = self.ended = 0.0
        self.reference: Any = None
        self.newest: tuple[int, Any, Any] | None = None  # steps done, and the state and the predictions after them
        self.translator: Translator | None = None

    def run(self) -> None:
        try:
            with self.studio._borrow((self.model, self.settings.precision), self.stop) as target:
                self._sample(target)
        except _Stopped:
            pass
        except BaseException as error:  # the generator raises it
            if not isinstance(error, (InputError, ImageError)):
                log.exception("a translation failed")
            self.error = error
        finally:
            self.ended = time.monotonic()
            self.done.set()

    def _sample(self, target: Target) -> None:
        wanted = self.settings
        names = ("area", "range_t", "steps", "energy", "variant", "sampler", "class_index")
        options = {name: getattr(wanted, name) for name in names}
        options |= {name: getattr(wanted, name) for name in ("start", "details") if getattr(wanted, name) != 1}
        if "vgg" in energy_names(wanted.energy):
            options["weights"] = self.studio.weights
        self.translator = Translator(target, **options)
        self.reference = self.translator.read(self.picture)
        self.began = time.monotonic()
        try:
            self._sample_seeds([wanted.seeds])
        except Exception as error:
            if wanted.count == 1 or not is_out_of_memory(error):
                raise
            self._sample_seeds([range(seed, seed + 1) for seed in wanted.seeds])

    def _sample_seeds(self, batches: Sequence[range]) -> None:
        """Sample every batch of seeds, one batch after the other."""
        assert self.translator is not None
        self.total = self.translator.evaluations * len(batches)
        step, finished = 0, []
        for seeds in batches:
            for state in self.translator.steps(self.reference, seed=seeds, name=self.name_of_picture, previews=False):
                step += 1
                x, predicted = (torch.cat([*finished, state[key]]) for key in ("x", "pred_xstart"))
                self.newest = step, x, predicted
                if self.stop.is_set():
                    return
            finished = [x]

    def frame(self, result: bool = False) -> Frame:
        """The newest state as a frame. It is converted here, in the thread that shows it."""
        if self.newest is None:
            return Frame(0, self.total, 0.0)
        assert self.translator is not None
        step, x, predicted = self.newest
        seconds = (self.ended or time.monotonic()) - self.began
        pictures = self.translator.images(x if result else predicted)
        preview = pictures[0]
        if len(pictures) > 1:
            preview = Image.fromarray(contact_sheet([[np.asarray(each)] for each in pictures], preview.width, 2))
        if not result:
            return Frame(step, self.total, seconds, preview)
        return Frame(step, self.total, seconds, preview, Image.fromarray(to_uint8(self.reference)[0]), pictures)
