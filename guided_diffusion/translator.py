"""The whole job for people who write Python: a model, a method and its options in, translated pictures out.

    translate = Translator(preset="emoji")
    translate = Translator("models/fluent3d_64.safetensors", range_t=0.3, area=16, steps=50)
    picture = translate("cat.png", seed=0)
    for state in translate.steps("cat.png"): ...

The commands are built from the same parts: `checkpoint.targets.load_target`, `methods.METHODS`, `methods.Translation`.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checkpoint import ModelFlags
from .checkpoint.targets import TargetOptions, adapt, check_flags, load_target
from .codec import Autoencoder, in_range
from .errors import InputError, log, renaming
from .image_datasets import check_options, load_image, to_tensor, to_uint8
from .methods import ENERGIES, METHODS, Translation, energy_names
from .presets import preset_options
from .run.noise import ImageNoise, image_key
from .runtime import pick_device
from .target import Batch, Target

PARAMETERS = {"blocks": "area", "timestep_respacing": "steps", "model_path": "model"}
"""The translator's names of options that the parts call otherwise."""


class Translator:
    """Translates pictures into the domain of a diffusion model; refuses what a command refuses, in the same words.

    options: fields of the method's and the energies' options and of `ModelFlags`; `area` is SDDM's `blocks`. `method`
    has the method's options, `evaluations` is the number of steps of a translation.
    """

    def __init__(
        self,
        model: str | os.PathLike | Target | None = None,  # a checkpoint, diffusers folder or Hub id; a shared `Target`
        *,
        preset: str | None = None,  # name in `presets.PRESETS`, whose model and options count where none are given
        method: str = "sddm",  # or ilvr, sdedit, egsde
        steps: int | str | None = None,  # denoising steps, all by default; as `timestep_respacing`, "ddim25" fits, too
        energy: str | Sequence[str] | None = None,  # names of energies (SDDM)
        device: str | torch.device = "auto",  # a `Target` has its own device, precision and compilation
        precision: str | None = None,
        compile: bool = False,
        resize: str = "crop",  # how pictures become square: crop, pad or stretch
        background: str = "white",  # colour behind transparent pixels
        **options: Any,
    ) -> None:
        check_options(resize, background)
        self.resize, self.background = resize, background
        with renaming(PARAMETERS):
            kind = METHODS.pick(method)
            recommended = preset_options(preset, method) if preset is not None else {}
            checkpoint, energies = recommended.pop("model_path", None), recommended.pop("energy", None)
            model, energy = checkpoint if model is None else model, energies if energy is None else energy
            if model is None:
                raise InputError("give a checkpoint or a preset", parameter="model")
            names = {shown: name for name, shown in PARAMETERS.items()}
            given = {**recommended, **{names.get(name, name): value for name, value in options.items()}}
            if steps is not None:
                given["timestep_respacing"] = str(steps)
            wanted = energy_names(energy, given.get("weights", "models/vgg_normalised.pth"))
            classes = [kind, ModelFlags, TargetOptions]
            classes += [ENERGIES[name] for name in wanted] if kind.takes_energies else []
            known = {field.name for cls in classes for field in dataclasses.fields(cls)}
            for name in [name for name in given if name not in known][:1]:
                raise TypeError(f"Translator got an unexpected option {PARAMETERS.get(name, name)!r} for {method}")
            path = model.info.path if isinstance(model, Target) else os.fspath(model)
            given |= {"model_path": path, "precision": precision, "compile": compile}
            self.method, flags, loading, *chosen = [
                cls(**{field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given})
                for cls in classes
            ]
            self.method.check_fit(None, check_flags(loading, flags))
            if isinstance(model, Target):
                self.target = adapt(model, loading, flags)
            else:
                self.target = load_target(loading, flags, pick_device(device))
            if energy is None and isinstance(self.target.codec, Autoencoder):
                chosen = []
            self.translation = Translation(self.method, self.target, chosen)
        self.evaluations = self.translation.steps

    def __call__(self, pictures: Any, *, seed: int | Sequence[int] = 0, name: str | None = None) -> Any:
        """Translate a picture or a list of them; returns a PIL image, or a list for a list of pictures or seeds.

        pictures: paths, PIL images, arrays uint8 [H, W, 3] or [H, W], or tensors [3, H, W] or [1, H, W] in [-1, 1].
        seed and name determine the noise. name: of a single picture, by default that of its file; with a command's
        relative path and seed, the pixels are the command's.
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

        Yields a dict after each step: `i`, `x` and `pred_xstart` [N, C, H, W] in the model's space for N seeds,
        `guided`, and, unless previews is False, `preview`, the first predicted x_0 as a PIL image.
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
        names = [_name(picture, n) if name is None else name for n, picture in enumerate(pictures)]
        noise = ImageNoise([image_key(each, of) for of in names for each in seeds], self.target.device)
        return Batch(ref.repeat_interleave(len(seeds), 0), tuple(of for of in names for _ in seeds)), noise

    def read(self, picture: Any) -> torch.Tensor:
        """A picture as the model gets it: float32 [1, 3, H, W] in [-1, 1]. Raises InputError or ImageError."""
        size = self.target.image_size
        options: dict[str, Any] = {"resize": self.resize, "background": self.background}
        needed, value = "a path, PIL image, array or tensor is needed", type(picture).__name__
        if isinstance(picture, torch.Tensor):
            shape = tuple(picture.shape[1:] if picture.ndim == 4 and len(picture) == 1 else picture.shape)
            if shape in ((3, size, size), (1, size, size)):
                x = in_range(picture.detach().float(), "picture").reshape(1, *shape).expand(-1, 3, -1, -1)
                if x.min() >= 0:
                    log.warning(
                        "a picture is a tensor without negative values; [-1, 1] is expected: 2 * x - 1 converts"
                    )
                return x
            needed, value = f"a tensor [3, {size}, {size}] in [-1, 1] is needed", f"a tensor {list(picture.shape)}"
        if isinstance(picture, np.ndarray):
            if picture.dtype == np.uint8 and (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
                picture = Image.fromarray(picture)
            else:
                needed, value = "an array uint8 [H, W, 3] is needed", f"an array {picture.dtype} {list(picture.shape)}"
        if isinstance(picture, (str, os.PathLike, Image.Image)):
            return to_tensor([load_image(picture, size, **options)])
        raise InputError(needed, parameter="picture", value=value)


def _name(picture: Any, number: int) -> str:
    """The name that stands for a picture's relative path: that of its file, or its number in the list."""
    path = picture if isinstance(picture, (str, os.PathLike)) else getattr(picture, "filename", "")
    return os.path.basename(os.fspath(path)) or f"{number}.png"
