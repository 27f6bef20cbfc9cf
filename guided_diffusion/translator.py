"""The whole job for people who write Python: a model, a method and its options in, translated pictures out.

    translate = Translator(preset="emoji")
    translate = Translator("models/fluent3d_64.safetensors", range_t=0.3, area=16, steps=50)
    picture = translate("cat.png", seed=0)
    for state in translate.steps("cat.png"): ...

The commands are built from the same parts: `checkpoint.targets.load_target`, `methods.METHODS`, `methods.Translation`.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checkpoint import ModelFlags
from .checkpoint.targets import TargetOptions, adapt, check_flags, load_target
from .codec import Autoencoder, in_range
from .errors import InputError, renaming
from .image_datasets import check_options, load_image, load_picture, to_tensor, to_uint8
from .methods import ENERGIES, METHODS, Translation, energy_names
from .options import check
from .presets import preset_options
from .run.noise import ImageNoise, image_key
from .runtime import pick_device
from .target import Batch, Target

log = logging.getLogger("sddm")

PARAMETERS = {"blocks": "area", "timestep_respacing": "steps", "model_path": "model"}
"""The translator's names of options that the parts call otherwise."""


class Translator:
    """Translates pictures into the domain of a diffusion model.

    Args:
        model: path of a checkpoint, a diffusers folder, or a Hub id; or a `Target` that `load_target` loaded with
            any_class, which several translators can share. Device, precision and compilation are then the target's.
            None: the preset's.
        preset: a name in `presets.PRESETS`, whose options count where none are given.
        method: `sddm`, `ilvr`, `sdedit` or `egsde`.
        steps: number of denoising steps; as `timestep_respacing`, a text like "ddim25" fits, too. None: all.
        energy: names of energies (SDDM), None for the default.
        device, precision, compile: how the network computes; see `runtime`.
        resize, background: how pictures become square, and the colour behind transparent pixels.
        options: fields of the method's and the energies' options and of `ModelFlags`; `area` is SDDM's `blocks`.

    Raises:
        InputError: what a command refuses, in the same words.
    """

    def __init__(
        self,
        model: str | os.PathLike | Target | None = None,
        *,
        preset: str | None = None,
        method: str = "sddm",
        steps: int | str | None = None,
        energy: str | Sequence[str] | None = None,
        device: str | torch.device = "auto",
        precision: str | None = None,
        compile: bool = False,
        resize: str = "crop",
        background: str = "white",
        **options: Any,
    ) -> None:
        check_options(resize, background)
        self.resize, self.background = resize, background
        names = {shown: name for name, shown in PARAMETERS.items()}
        given = {names.get(name, name): value for name, value in options.items()}
        if steps is not None:
            given["timestep_respacing"] = str(steps)
        with renaming(PARAMETERS):
            kind = METHODS.pick(method)
            recommended = preset_options(preset, method) if preset is not None else {}
            checkpoint, energies = recommended.pop("model_path", None), recommended.pop("energy", None)
            model, energy = checkpoint if model is None else model, energies if energy is None else energy
            if model is None:
                raise InputError("give a checkpoint or a preset", parameter="model")
            given = {**recommended, **given}
            weights = given.get("weights", "models/vgg_normalised.pth")
            wanted = energy_names(energy, weights) if kind.takes_energies else []
            parts = {"method": kind, "flags": ModelFlags, "target": TargetOptions}
            parts |= {name: ENERGIES[name] for name in wanted}
            known = {field.name for cls in parts.values() for field in dataclasses.fields(cls)}
            for name in given:
                if name not in known:
                    raise TypeError(f"Translator got an unexpected option {PARAMETERS.get(name, name)!r} for {method}")
            built = {key: cls(**_chosen(given, cls)) for key, cls in parts.items() if key != "target"}
            path = model.info.path if isinstance(model, Target) else os.fspath(model)
            runtime = {"model_path": path, "precision": precision, "compile": compile}
            wanted_target = TargetOptions(**{**_chosen(given, TargetOptions), **runtime})
            for each in built.values():
                check(each)
            built["method"].check_fit(None, check_flags(wanted_target, built["flags"]))
            if isinstance(model, Target):
                self.target = adapt(model, wanted_target, built["flags"])
            else:
                self.target = load_target(wanted_target, built["flags"], pick_device(device))
            if energy is None and isinstance(self.target.codec, Autoencoder):
                wanted = []
            self.translation = Translation.of(built["method"], self.target, [built[name] for name in wanted])

    @property
    def method(self) -> Any:
        """The method's options."""
        return self.translation.method

    @property
    def evaluations(self) -> int:
        """Number of steps of a translation."""
        return self.translation.steps

    def __call__(self, pictures: Any, *, seed: int | Sequence[int] = 0, name: str | None = None) -> Any:
        """Translate a picture or a list of them.

        pictures: paths, PIL images, arrays uint8 [H, W, 3] or [H, W], or tensors [3, H, W] or [1, H, W] in [-1, 1],
        one or a list. seed and name determine the noise; several seeds: a result of every picture for each, as one
        batch. name: of a single picture, by default that of its file: a command's relative path gives the command's
        very pixels. Returns a PIL image, or a list of them for a list of pictures or seeds.
        """
        many = isinstance(pictures, (list, tuple))
        if many and name is not None and len(pictures) > 1:
            raise InputError("it is for a single picture", parameter="name", value=name)
        with renaming(PARAMETERS):
            batch, noise = self._batch(list(pictures) if many else [pictures], seed, name)
            made = self.translation(batch, noise=noise)
        images = [Image.fromarray(image) for image in to_uint8(made)]
        return images if many or isinstance(seed, Sequence) else images[0]

    def steps(
        self, picture: Any, *, seed: int | Sequence[int] = 0, name: str | None = None, previews: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Translate one picture step by step; closing the generator stops.

        Yields a dict after each step: the index `i`, the tensors `x` and `pred_xstart` [N, C, H, W] in the model's
        space, one for each seed, `guided`, and, unless previews is False, `preview`, the first predicted x_0 as a PIL
        image.
        """
        with renaming(PARAMETERS):
            batch, noise = self._batch([picture], seed, name)
            for state in self.translation.states(batch, noise):
                yield {**state, "preview": self.images(state["pred_xstart"][:1])[0]} if previews else state

    def images(self, x: torch.Tensor) -> list[Image.Image]:
        """A batch of states [N, C, H, W] as PIL images."""
        return [Image.fromarray(image) for image in to_uint8(self.translation.picture(x).nan_to_num())]

    def _batch(self, pictures: list[Any], seed: int | Sequence[int], name: str | None) -> tuple[Batch, ImageNoise]:
        """Pictures as a batch, each as often as there are seeds, and its random draws."""
        seeds = seed if isinstance(seed, Sequence) else [seed]
        if not pictures or not seeds:
            missing = "seed" if pictures else "pictures"
            raise InputError("one at least is needed", parameter=missing, value="an empty list")
        ref = torch.cat([self.read(picture) for picture in pictures]).to(self.target.device)
        names = [name if name is not None else _name(picture, n) for n, picture in enumerate(pictures)]
        noise = ImageNoise([image_key(each, of) for of in names for each in seeds], self.target.device)
        repeated = tuple(of for of in names for _ in seeds)
        return Batch(ref.repeat_interleave(len(seeds), 0), repeated), noise

    def read(self, picture: Any) -> torch.Tensor:
        """A picture as the model gets it: float32 [1, 3, H, W] in [-1, 1]. Raises InputError or ImageError."""
        size = self.target.image_size
        options: dict[str, Any] = {"resize": self.resize, "background": self.background}
        if isinstance(picture, (str, os.PathLike)):
            return to_tensor([load_image(os.fspath(picture), size, **options)])
        if isinstance(picture, torch.Tensor):
            shape = tuple(picture.shape[1:] if picture.ndim == 4 and len(picture) == 1 else picture.shape)
            if shape not in ((3, size, size), (1, size, size)):
                reason = f"a tensor [3, {size}, {size}] in [-1, 1] is needed"
                raise InputError(reason, parameter="picture", value=f"a tensor {list(picture.shape)}")
            picture = in_range(picture.detach().float(), "picture").reshape(1, *shape).expand(-1, 3, -1, -1)
            if picture.min() >= 0:
                log.warning("a picture is a tensor without negative values; [-1, 1] is expected: 2 * x - 1 converts")
            return picture
        if isinstance(picture, np.ndarray):
            layers = picture.shape[2] if picture.ndim == 3 else 3
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or layers not in (3, 4):
                what = f"an array {picture.dtype} {list(picture.shape)}"
                raise InputError("an array uint8 [H, W, 3] is needed", parameter="picture", value=what)
            picture = Image.fromarray(picture)
        if not isinstance(picture, Image.Image):
            raise InputError(
                "a path, PIL image, array or tensor is needed", parameter="picture", value=type(picture).__name__
            )
        return to_tensor([load_picture(picture, size, **options)])


def _chosen(given: dict[str, Any], cls: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in given.items() if name in names}


def _name(picture: Any, number: int) -> str:
    """The name that stands for a picture's relative path: that of its file, or its number in the list."""
    path = picture if isinstance(picture, (str, os.PathLike)) else getattr(picture, "filename", "")
    return os.path.basename(os.fspath(path)) or f"{number}.png"
