"""Load a target: the model of a checkpoint on its device, with its process and its class."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..codec import Codec, pixels
from ..errors import InputError, display_name, log, reading
from ..options import Checked, option
from ..respace import space_timesteps
from ..runtime import DTYPES, PRECISIONS, CompiledModel, memory_format, pick_precision
from ..script_util import NUM_CLASSES, create_diffusion
from ..target import Batch, Counted, Target, WithClass
from ..upscaler import load_upscaler
from . import pipelines, remote
from .loading import LOADED, fingerprint, load_model
from .reconcile import ModelFlags, ModelInfo


@dataclass(frozen=True)
class TargetOptions(Checked):
    """The target domain's diffusion model, and how it computes."""

    model_path: str = option(None, "checkpoint, diffusers folder or Hub id of the model", file=True, metavar="PATH")
    class_index: int | str | None = option(None, "class to sample, for class-conditional models", metavar="CLASS")
    precision: str | None = option(
        None,
        "dtype of the network; auto: bf16 where the device supports it natively, else fp32 (default fp32)",
        choices=PRECISIONS,
    )
    fuse: bool = option(False, "fuse some layers for speed; equal up to rounding")
    compile: bool = option(False, "use torch.compile; worthwhile for many batches on a GPU", runtime=True)
    sigma_small: bool | None = option(None, "variance if not learned: the posterior's, or beta (default True)")
    clip_denoised: bool | None = option(None, "clip predicted images to [-1, 1] (default True)")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", runtime=True, metavar="NAME")
    upscale: bool | None = option(None, "enlarge with the checkpoint's upscaler (default True if it has one)")
    prompt: str | None = option(None, "what the results should show, for models with prompts")
    negative_prompt: str | None = option(None, "what the results should not show")
    # Its content is recorded.
    prompt_file: str | None = option(
        None, "a prompt per image: a CSV file of name and prompt, or a folder of NAME.txt", runtime=True, metavar="PATH"
    )
    guidance_scale: float | None = option(None, "classifier-free guidance (default the pipeline's)", least=0, most=100)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return set() if self.fuse else {"fuse"}


def check_flags(options: TargetOptions, flags: ModelFlags) -> int | None:
    """Refuse what the options alone tell to be wrong; returns the number of steps where they tell it."""
    _precision(options, flags, torch.device("cpu"))
    if flags.diffusion_steps is None or not flags.timestep_respacing:
        return flags.diffusion_steps
    return len(space_timesteps(flags.diffusion_steps, flags.timestep_respacing))


def _precision(options: TargetOptions, flags: ModelFlags, device: torch.device) -> str:
    if options.precision and flags.use_fp16 and options.precision != "fp16":
        raise InputError("`use_fp16` True contradicts it", parameter="precision", value=options.precision)
    return pick_precision(options.precision or ("fp16" if flags.use_fp16 else None), device)


@torch.inference_mode(False)
def load_target(
    options: TargetOptions, flags: ModelFlags, device: torch.device, *, any_class: bool = False, super_res: bool = False
) -> Target:
    """Load the model of a checkpoint, with its process, onto a device.

    any_class: a class-conditional model for which no class is given takes the labels of each batch. super_res: load a
    super-resolution model, not one of whole pictures. Raises InputError for a file or an option that does not fit.
    """
    path, precision = options.model_path, _precision(options, flags, device)
    if options.precision == "auto":
        log.info("precision auto is %s on %s", precision, device)
    prompt = options.prompt if options.prompt is not None else options.prompt_file
    if pipelines.is_pipeline(path) or (prompt is not None and remote.is_id(path)):
        return _load_pipeline(options, flags, device, precision)
    if prompt is not None:
        raise InputError("the model takes no prompt", parameter="prompt", value=prompt)
    model, info = load_model(path, device=device, dtype=DTYPES[precision], **flags.given())
    if info.model_type == "ENCODER":
        reason = "it is a classifier or extractor, not a diffusion model"
        raise InputError(reason, parameter="model_path", value=path)
    if bool(info.flags.get("super_res")) != super_res:
        kind = "no super-resolution model" if super_res else "a super-resolution model, which needs small images"
        raise InputError(f"it is {kind}", parameter="model_path", value=path)
    model.to(memory_format=memory_format(device, options.compile))  # type: ignore[call-overload]
    if options.fuse:
        model.fuse()  # type: ignore[operator]
    sigma_small = info.choose("sigma_small", options.sigma_small)
    size, channels = info.flags["image_size"], info.flags.get("in_channels", 3)
    codec = pixels(channels) if super_res else _codec(options, info, channels, device)
    target = Target(
        model=Counted(CompiledModel(model) if options.compile else model),
        diffusion=create_diffusion(**{**info.flags, "sigma_small": sigma_small}),
        codec=codec,
        shape=(channels, size, size),
        image_size=size * codec.factor,
        clip_denoised=info.choose("clip_denoised", options.clip_denoised),
        device=device,
        info=info,
        options=options,
        precision=precision,
        sigma_small=sigma_small,
        fuse=options.fuse,
    )
    return target if super_res else _with_class(target, options.class_index, any_class)


def _codec(options: TargetOptions, info: ModelInfo, channels: int, device: torch.device) -> Codec:
    """The codec of a model of pixels: the upscaler beside it that its metadata names, or none."""
    name = os.path.basename(str(info.metadata.get("upscaler", ""))) if channels == 3 else ""
    path = os.path.join(os.path.dirname(info.path), name)
    if options.upscale is not False and name and os.path.isfile(path):
        info.flags["upscaler"] = fingerprint(path)
        return load_upscaler(path, device)
    if options.upscale:
        reason = f"the file {display_name(path)} is missing" if name else "the checkpoint names no upscaler"
        raise InputError(reason, parameter="upscale", value=True)
    return pixels(channels)


def _load_pipeline(options: TargetOptions, flags: ModelFlags, device: torch.device, precision: str) -> Target:
    """A pipeline with prompts; see `pipelines`."""
    if options.class_index is not None:
        raise InputError("the model is not class-conditional", parameter="class_index", value=options.class_index)
    if options.compile:
        raise InputError("it is for models without prompts", parameter="compile", value=True)
    steps = flags.timestep_respacing or "50"  # as in diffusers
    if not steps.isdecimal():
        reason = "a pipeline takes a number, and its scheduler spaces the steps"
        raise InputError(reason, parameter="timestep_respacing", value=steps)
    pipe, identity = pipelines.load_pipeline(options.model_path, DTYPES[precision], device)
    LOADED[options.model_path] = identity
    by_name = {} if options.prompt_file is None else _read_prompts(options.prompt_file)

    def text_of(name: str) -> str:
        text = by_name.get(name, by_name.get(os.path.splitext(name)[0], options.prompt))
        if text is None:
            reason = f"it has no prompt for {display_name(name)}, and `prompt` is not given"
            raise InputError(reason, parameter="prompt_file", value=options.prompt_file)
        return text

    def prompt(batch: Batch) -> pipelines.Prompt:
        texts = options.prompt if options.prompt_file is None else [text_of(name) for name in batch.names]
        return pipelines.Prompt(texts, options.negative_prompt, options.guidance_scale)

    kind = pipelines.KINDS.pick(type(pipe).__name__)(pipe)
    target = pipelines.pipeline_target(kind, prompt, int(steps), device, flags.image_size)
    kept = {"image_size": target.image_size, "timestep_respacing": steps, "prompts": None}
    if options.prompt_file is not None:
        content = json.dumps(sorted(by_name.items())).encode()
        kept["prompts"] = f"sha256 {hashlib.sha256(content).hexdigest()}"
    info = ModelInfo(options.model_path, type(pipe).__name__, kept)
    return dataclasses.replace(target, info=info, options=options, precision=precision)


def _read_prompts(path: str) -> dict[str, str]:
    """The prompts of pictures by name: of a CSV file of name and prompt, or of a folder with NAME.txt for each."""
    if not os.path.isdir(path):
        with reading(path, "a CSV file of names and prompts"), open(path, encoding="utf-8", newline="") as file:
            return {row[0]: row[1].strip() for row in csv.reader(file) if row}
    prompts = {}
    for file in Path(path).rglob("*.txt"):
        with reading(file):
            prompts[file.relative_to(path).with_suffix("").as_posix()] = file.read_text(encoding="utf-8").strip()
    return prompts


def load_beside(target: Target, path: str, *, class_index: int | str | None = None) -> Target:
    """Load a second model for a method of two, with the schedule, precision, compilation and device of the first."""
    flags = ModelFlags(timestep_respacing=target.info.flags.get("timestep_respacing") or None)
    options = dataclasses.replace(target.options, model_path=path, class_index=class_index)
    return load_target(options, flags, target.device)


def adapt(target: Target, options: TargetOptions, flags: ModelFlags) -> Target:
    """A target from `load_target` with any_class, with another schedule and class; what else is asked has no effect."""
    if target.info.model_type in pipelines.KINDS:
        raise InputError("a pipeline with prompts cannot be shared; give its path", parameter="model")
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
    if given is not None:
        number = class_number(given, target.info, "class_index")
        return dataclasses.replace(target, model=WithClass(target.model, number), condition=None)
    if not any_class:
        reason = f"the model is class-conditional and needs a class, 0 to {classes - 1}"
        raise InputError(reason, parameter="class_index")

    def condition(batch: Batch) -> Callable:
        return target.model if batch.labels is None else WithClass(target.model, batch.labels)

    return dataclasses.replace(target, condition=condition)


def named_classes(metadata: Mapping[str, Any]) -> list[str]:
    """The names of a checkpoint's classes, in the order of their numbers; [] where its metadata has none."""
    names = metadata.get("classes")
    with contextlib.suppress(ValueError, TypeError, RecursionError):  # somebody else's entry of that name
        names = json.loads(names)  # type: ignore[arg-type]
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def class_number(given: int | str, info: Any, parameter: str) -> int:
    """The number of a class that is given by number or by name; names are in a checkpoint's metadata `classes`."""
    count = info.flags.get("num_class") or info.flags.get("num_classes") or 0
    names = named_classes(info.metadata)
    if str(given) in names:
        return names.index(str(given))
    number = int(given) if str(given).isdecimal() else -1
    if not 0 <= number < count:
        known = f", or a name such as {', '.join(names[:8])}" if names else ""
        reason = f"{display_name(info.path)} has classes 0 to {count - 1}{known}"
        raise InputError(reason, parameter=parameter, value=given)
    return number
