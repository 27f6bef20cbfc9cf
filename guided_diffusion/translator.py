"""The whole job for people who write Python: a model, a method and its options in, translated pictures out.

    translate = Translator(preset="emoji")
    translate = Translator("models/fluent3d_64.safetensors", range_t=0.3, area=16, steps=50)
    picture = translate("cat.png", seed=0)
    for state in translate.steps("cat.png"): ...

The commands are built from the same parts: `load_target`, `sddm.METHODS` and `create_energies`.
"""

import dataclasses
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import baselines  # noqa: F401  (registers their methods)
from .caching import WithClass, cached
from .checkpoint import ModelInfo, load_model
from .checkpoint.reconcile import ModelFlags
from .energy import ENERGIES, Energy, class_number
from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import check_options, load_image, load_picture, to_tensor, to_uint8
from .options import check, fitting, option
from .presets import preset_options
from .respace import space_timesteps
from .run.noise import ImageNoise, image_key
from .runtime import DTYPES, PRECISIONS, CompiledModel, memory_format, pick_device, pick_precision
from .script_util import create_diffusion
from .sddm import METHODS

log = logging.getLogger("sddm")

PARAMETERS = {"blocks": "area", "timestep_respacing": "steps", "model_path": "model"}
"""The translator's names of options that the parts call otherwise."""


@dataclass(frozen=True)
class TargetOptions:
    """The target domain's diffusion model, and how it computes."""

    model_path: str = option(
        None, "the target domain's diffusion model: a file, a diffusers folder or a Hub id", file=True, metavar="PATH"
    )
    class_index: int | str | None = option(None, "class to make, for a class-conditional model", metavar="CLASS")
    precision: str | None = option(
        None,
        "arithmetic of the network; auto: bf16 where the device computes in it, else fp32 (default fp32)",
        choices=PRECISIONS,
    )
    fuse: bool = option(False, "faster forms of some layers, equal up to rounding")
    compile: bool = option(False, "compile the network first, which pays over many batches on a GPU", runtime=True)
    sigma_small: bool | None = option(
        None, "variance where the model has none: the posterior's, as released; False for beta (default True)"
    )
    clip_denoised: bool | None = option(None, "keep predicted images in range (default True)")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", runtime=True, metavar="NAME")

    def __post_init__(self) -> None:
        check(self)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return set() if self.fuse else {"fuse"}


@dataclass(frozen=True)
class Target:
    """A diffusion model that is ready to sample.

    model: model(x, t) with its class, if any; diffusion: the respaced process. sigma_small, clip_denoised: as given,
    else as the model's scheduler file says, else True. fuse: energies take faster forms, too, equal up to rounding.
    """

    model: Callable[..., torch.Tensor]
    diffusion: GaussianDiffusion
    info: ModelInfo
    device: torch.device
    precision: str
    sigma_small: bool
    clip_denoised: bool | float
    fuse: bool = False

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.info.flags["image_size"]


def check_flags(options: TargetOptions, flags: ModelFlags) -> int | None:
    """Refuse what the options alone tell to be wrong; returns the number of steps where they tell it."""
    pick_precision(_precision(options, flags), torch.device("cpu"))
    if flags.diffusion_steps is None or not flags.timestep_respacing:
        return flags.diffusion_steps
    return len(space_timesteps(flags.diffusion_steps, flags.timestep_respacing))


def _precision(options: TargetOptions, flags: ModelFlags) -> str | None:
    if options.precision and flags.use_fp16 and options.precision != "fp16":
        raise InputError("`use_fp16` True contradicts it", parameter="precision", value=options.precision)
    return options.precision or ("fp16" if flags.use_fp16 else None)


def load_target(options: TargetOptions, flags: ModelFlags, device: torch.device, *, any_class: bool = False) -> Target:
    """The model on its device, with its process. Raises InputError for a file or an option that does not fit.

    any_class: a class-conditional model for which no class is given stays as it is, model(x, t, y).
    """
    precision = pick_precision(_precision(options, flags), device)
    if options.precision == "auto":
        log.info("precision auto is %s on %s", precision, device)
    model, info = load_model(options.model_path, device=device, dtype=DTYPES[precision], **flags.given())
    wrong = {"parameter": "model_path", "value": options.model_path}
    if info.model_type == "ENCODER":
        raise InputError("it is a classifier or extractor, not a diffusion model", **wrong)
    if info.flags.get("super_res"):
        raise InputError("it is a super-resolution model, which needs small images; super_res_sample takes it", **wrong)
    model.to(memory_format=memory_format(device, options.compile))  # type: ignore[call-overload]
    if options.fuse:
        model.fuse()  # type: ignore[operator]
    sigma_small = info.choose("sigma_small", options.sigma_small)
    return Target(
        model=_with_class(CompiledModel(model) if options.compile else model, info, options.class_index, any_class),
        diffusion=create_diffusion(**{**info.flags, "sigma_small": sigma_small}),
        info=info,
        device=device,
        precision=precision,
        sigma_small=sigma_small,
        clip_denoised=info.choose("clip_denoised", options.clip_denoised),
        fuse=options.fuse,
    )


def adapt(target: Target, options: TargetOptions, flags: ModelFlags) -> Target:
    """A loaded target's network with another schedule and class; target: from `load_target` with any_class.

    What else the options and flags say about network and device is not looked at. Raises InputError for the class.
    """
    known = {**target.info.flags, "sigma_small": target.sigma_small}
    return dataclasses.replace(
        target,
        model=_with_class(target.model, target.info, options.class_index, any_class=False),
        diffusion=create_diffusion(**{**known, "timestep_respacing": flags.timestep_respacing or ""}),
    )


def _with_class(model: Callable, info: ModelInfo, given: int | str | None, any_class: bool) -> Callable:
    """The model with the class that is asked for, by number or name."""
    if not info.flags["class_cond"]:
        if given is not None:
            raise InputError("the model is not class-conditional", parameter="class_index", value=given)
        return model
    if given is None and any_class:
        return model
    if given is None:
        classes = info.flags.get("num_classes", 1000)
        reason = f"the model is class-conditional and needs a class, 0 to {classes - 1}"
        raise InputError(reason, parameter="class_index")
    return WithClass(model, class_number(given, info, "class_index"))


def energy_names(given: str | Sequence[str] | None, weights: str | None = None) -> list[str]:
    """The energies that are asked for: a comma-separated text or a list, "none" for none.

    None chooses vgg where the file `weights` exists, else dct. Raises InputError for an unknown or repeated name.
    """
    if given is None:
        if weights and os.path.exists(weights):
            return ["vgg"]
        return ["dct"]
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    names = [name for name in names if name not in ("", "none")]
    for name in names:
        if name not in ENERGIES:
            raise InputError(fitting(name, [*ENERGIES, "none"]), parameter="energy", value=name)
    if len(set(names)) < len(names):
        raise InputError("it names an energy twice", parameter="energy", value=given)
    return names


def create_energies(options: Sequence[Any], target: Target) -> list[Energy]:
    """The energies that options like `energy.VGG` describe, tried out at the model's size."""
    energies = [each.create(target) for each in options]
    for energy in energies:
        energy.prepare(torch.zeros(1, 3, target.image_size, target.image_size, device=target.device))
    return energies


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
        with _speaking():
            kind = METHODS.pick(method)
            recommended = preset_options(preset, method) if preset is not None else {}
            checkpoint, energies = recommended.pop("model_path", None), recommended.pop("energy", None)
            model, energy = checkpoint if model is None else model, energies if energy is None else energy
            if model is None:
                raise InputError("give a checkpoint or a preset", parameter="model")
            given = {**recommended, **given}
            wanted = energy_names(energy, given.get("weights", "models/vgg_normalised.pth")) if method == "sddm" else []
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
            built["method"].check_fit(built["flags"].image_size, check_flags(wanted_target, built["flags"]))
            if isinstance(model, Target):
                self.target = adapt(model, wanted_target, built["flags"])
            else:
                self.target = load_target(wanted_target, built["flags"], pick_device(device))
            built["method"].check_fit(self.target.image_size, self.target.diffusion.num_timesteps)
            self.method = built["method"]
            self.energies = create_energies([built[name] for name in wanted], self.target)
            self.sampler = bind_method(self.method, self.target, self.energies)

    @property
    def evaluations(self) -> int:
        """How many steps a translation takes."""
        return self.method.steps(self.target.diffusion.num_timesteps)

    def __call__(self, pictures: Any, *, seed: int = 0, name: str | None = None) -> Any:
        """Translate a picture or a list of them.

        pictures: paths, PIL images, arrays uint8 [H, W, 3], or tensors [3, H, W] in [-1, 1], one or a list. seed and
        name determine the noise; name: of a single picture, by default that of its file: a command's relative path
        gives the command's very pixels. Returns a PIL image, or a list of them for a list.
        """
        many = isinstance(pictures, (list, tuple))
        if many and name is not None and len(pictures) > 1:
            raise InputError("it is for a single picture", parameter="name", value=name)
        states = self._states(list(pictures) if many else [pictures], seed, name)
        last = deque(states, maxlen=1)[0]  # the tensors of all steps may not fit into memory
        images = [Image.fromarray(image) for image in to_uint8(last["x"].nan_to_num())]
        return images if many else images[0]

    def steps(
        self, picture: Any, *, seed: int = 0, name: str | None = None, previews: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Translate one picture step by step; closing the generator stops.

        Yields a dict after each step: the index `i`, the tensors `x` and `pred_xstart` [1, 3, H, W], `guided`, and,
        unless previews is False, `preview`, the predicted x_0 as a PIL image.
        """
        for state in self._states([picture], seed, name):
            if not previews:
                yield state
                continue
            preview = Image.fromarray(to_uint8(state["pred_xstart"].nan_to_num())[0])
            yield {**state, "preview": preview}

    def _states(self, pictures: list[Any], seed: int, name: str | None) -> Iterator[dict[str, Any]]:
        if not pictures:
            raise InputError("it has no picture", parameter="pictures", value="an empty list")
        with _speaking():
            images = [self.read(picture) for picture in pictures]
            names = [name if name is not None else _name(picture, n) for n, picture in enumerate(pictures)]
            ref = torch.cat(images).to(self.target.device)
            noise = ImageNoise([image_key(seed, each) for each in names], self.target.device)
            yield from self.sampler.steps(self.target.model, self.target.diffusion, ref, noise=noise)  # type: ignore

    def read(self, picture: Any) -> torch.Tensor:
        """A picture as the model gets it: float32 [1, 3, H, W] in [-1, 1]. Raises InputError or ImageError."""
        size, options = self.target.image_size, {"resize": self.resize, "background": self.background}
        if isinstance(picture, (str, os.PathLike)):
            return to_tensor([load_image(os.fspath(picture), size, **options)])
        if isinstance(picture, torch.Tensor):
            if (
                tuple(picture.shape[-3:]) != (3, size, size)
                or picture.ndim > 4
                or (picture.ndim == 4 and len(picture) > 1)
            ):
                reason = f"a tensor [3, {size}, {size}] in [-1, 1] is needed"
                raise InputError(reason, parameter="picture", value=f"a tensor {list(picture.shape)}")
            return picture.detach().float().reshape(1, 3, size, size)
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


def bind_method(method: Any, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
    """A method's sampler for a target: a function of (model, diffusion, ref, noise=, callback=)."""
    # Raises InputError for a model that cannot share features.
    cached(target.model, getattr(method, "cache_interval", 1))
    return method.bind(
        energies=energies, target=target, clip_denoised=target.clip_denoised, sigma_small=target.sigma_small
    )


def _chosen(given: dict[str, Any], cls: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in given.items() if name in names}


def _name(picture: Any, number: int) -> str:
    """What stands for a picture's relative path: the name of its file, or its number in the list."""
    path = picture if isinstance(picture, (str, os.PathLike)) else getattr(picture, "filename", "")
    return os.path.basename(os.fspath(path)) or f"{number}.png"


class _speaking:
    """Errors of the parts, with the translator's names of their parameters."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, InputError):
            error.parameter = PARAMETERS.get(error.parameter, error.parameter)  # type: ignore[arg-type]
