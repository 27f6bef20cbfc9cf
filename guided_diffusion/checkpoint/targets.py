"""Load a target: the model of a checkpoint on its device, with its process and its class."""

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..codec import Pixels
from ..errors import InputError, display_name
from ..options import check, option
from ..respace import space_timesteps
from ..runtime import DTYPES, PRECISIONS, CompiledModel, memory_format, pick_precision
from ..script_util import NUM_CLASSES, create_diffusion
from ..target import Batch, Counted, Target, WithClass
from .loading import load_model
from .reconcile import ModelFlags

log = logging.getLogger("sddm")


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


@torch.inference_mode(False)
def load_target(
    options: TargetOptions,
    flags: ModelFlags,
    device: torch.device,
    *,
    any_class: bool = False,
    super_res: bool = False,
) -> Target:
    """Load the model of a checkpoint, with its process, onto a device.

    any_class: a class-conditional model for which no class is given takes the labels of each batch. super_res: load a
    super-resolution model, not one of whole pictures. Raises InputError for a file or an option that does not fit.
    """
    precision = pick_precision(_precision(options, flags), device)
    if options.precision == "auto":
        log.info("precision auto is %s on %s", precision, device)
    model, info = load_model(options.model_path, device=device, dtype=DTYPES[precision], **flags.given())
    wrong = {"parameter": "model_path", "value": options.model_path}
    if info.model_type == "ENCODER":
        raise InputError("it is a classifier or extractor, not a diffusion model", **wrong)
    if bool(info.flags.get("super_res")) != super_res:
        kind = "no super-resolution model" if super_res else "a super-resolution model, which needs small images"
        raise InputError(f"it is {kind}", **wrong)
    model.to(memory_format=memory_format(device, options.compile))  # type: ignore[call-overload]
    if options.fuse:
        model.fuse()  # type: ignore[operator]
    sigma_small = info.choose("sigma_small", options.sigma_small)
    size = info.flags["image_size"]
    target = Target(
        model=Counted(CompiledModel(model) if options.compile else model),
        diffusion=create_diffusion(**{**info.flags, "sigma_small": sigma_small}),
        codec=Pixels(),
        shape=(3, size, size),
        image_size=size,
        clip_denoised=info.choose("clip_denoised", options.clip_denoised),
        device=device,
        info=info,
        options=options,
        precision=precision,
        sigma_small=sigma_small,
        fuse=options.fuse,
    )
    return target if super_res else _with_class(target, options.class_index, any_class)


def load_beside(target: Target, path: str, *, class_index: int | str | None = None) -> Target:
    """Load a second model for a method of two, with the schedule, precision, compilation and device of the first."""
    flags = ModelFlags(timestep_respacing=target.info.flags.get("timestep_respacing") or None)
    options = dataclasses.replace(target.options, model_path=path, class_index=class_index)
    return load_target(options, flags, target.device)


def adapt(target: Target, options: TargetOptions, flags: ModelFlags) -> Target:
    """A loaded target with another schedule and class; target: from `load_target` with any_class.

    The other options and flags have no effect. Raises InputError for the class.
    """
    known = {**target.info.flags, "sigma_small": target.sigma_small}
    diffusion = create_diffusion(**{**known, "timestep_respacing": flags.timestep_respacing or ""})
    return _with_class(dataclasses.replace(target, diffusion=diffusion), options.class_index, any_class=False)


def num_classes(target: Target) -> int | None:
    """Number of classes of a class-conditional model; None for one without."""
    flags = target.info.flags if target.info is not None else {}
    return flags.get("num_classes", NUM_CLASSES) if flags.get("class_cond") else None


def _with_class(target: Target, given: int | str | None, any_class: bool) -> Target:
    """The target with the class that is asked for, by number or name."""
    classes = num_classes(target)
    if classes is None:
        if given is not None:
            raise InputError("the model is not class-conditional", parameter="class_index", value=given)
        return target
    if given is None and any_class:

        def condition(batch: Batch) -> Callable:
            return target.model if batch.labels is None else WithClass(target.model, batch.labels)

        return dataclasses.replace(target, condition=condition)
    if given is None:
        reason = f"the model is class-conditional and needs a class, 0 to {classes - 1}"
        raise InputError(reason, parameter="class_index")
    chosen = WithClass(target.model, class_number(given, target.info, "class_index"))
    return dataclasses.replace(target, model=chosen, condition=None)


def class_number(given: int | str, info: Any, parameter: str) -> int:
    """The number of a class that is given by number or by name; names are in a checkpoint's metadata `classes`."""
    flags = info.flags
    count = flags.get("num_class") or flags.get("num_classes") or 0
    names = info.metadata.get("classes")
    if isinstance(names, str):
        try:
            names = json.loads(names)
        except ValueError:
            names = None  # somebody else's entry of that name
    names = names if isinstance(names, list) else []
    if str(given) in names:
        return names.index(str(given))
    number = int(given) if str(given).isdecimal() else -1
    if not 0 <= number < count:
        known = f", or a name such as {', '.join(map(str, names[:8]))}" if names else ""
        reason = f"{display_name(info.path)} has classes 0 to {count - 1}{known}"
        raise InputError(reason, parameter=parameter, value=given)
    return number
