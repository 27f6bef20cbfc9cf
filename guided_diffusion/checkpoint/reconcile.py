"""Join what tensors, metadata, published tables, flags and defaults say of a network, and report what contradicts.

In rising order of weight: the defaults of `script_util`, the table of published models, what is stated beside the
tensors (metadata, train.json, a scheduler file), and flags that are given. What the tensors tell is never overruled.
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, display_name, one_line, shown
from ..options import check, check_value, option
from ..script_util import (
    CHANNEL_MULT,
    attention_factors,
    channel_multipliers,
    classifier_defaults,
    diffusion_defaults,
    extension_defaults,
    model_and_diffusion_defaults,
    str2bool,
)
from .published import published
from .reading import read_json_object

log = logging.getLogger(__name__)

MODEL_TYPES = ("ADM", "DDPM", "ENCODER")

# Flags that shape the network but leave no trace in its tensors.
UNDETECTABLE_FLAGS = (
    *("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "dropout"),
    *("norm_groups", "norm_eps", "sines_first", "pad_end", "middle_norm"),
)
# Flags that describe how the network was trained, and so how it must be used.
TRAINING_FLAGS = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps", "predict_v")
# Flags that concern one use of a model only, so that any value fits any file.
RUNTIME_FLAGS = (
    "use_checkpoint",
    "use_fp16",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "dropout",
    "sigma_small",
)

EXTENSIONS = extension_defaults()
# What these are in every DDPM UNet.
DDPM_EXTENSIONS = {"norm_groups": 32, "norm_eps": 1e-6, "sines_first": True, "pad_end": True, "middle_norm": True}

FLAGS = {
    *model_and_diffusion_defaults(),
    *classifier_defaults(),
    *EXTENSIONS,
    *RUNTIME_FLAGS,
    "num_classes",
    "num_class",
    "head",
}


@dataclass(frozen=True)
class ModelFlags:
    """The network and its diffusion process; what is None is read from the checkpoint."""

    image_size: int | None = option(None, "side of the images in pixels", least=1, most=1 << 16)
    num_channels: int | None = option(None, "base width of the network", least=1, most=1 << 16)
    num_res_blocks: int | None = option(None, "residual blocks per level", least=1, most=1 << 10)
    num_heads: int | None = option(None, "attention heads, where `num_head_channels` is -1", least=-1, most=1 << 16)
    num_heads_upsample: int | None = option(
        None, "the same for the upsampling half, -1 for equal", least=-1, most=1 << 16
    )
    num_head_channels: int | None = option(None, "width of an attention head", least=-1, most=1 << 16)
    attention_resolutions: str | None = option(None, "sides of the feature maps with attention, as 16 or 32,16,8")
    channel_mult: str | None = option(
        None, "width of every level in multiples of `num_channels`, as 1,2,4; empty for the usual ones"
    )
    dropout: float | None = option(None, "dropout; has no effect when sampling", least=0, most=1, runtime=True)
    class_cond: bool | None = option(None, "whether the model is class-conditional (give `class_index` then)")
    use_checkpoint: bool | None = option(None, "activation checkpointing; has no effect when sampling", runtime=True)
    use_scale_shift_norm: bool | None = option(None, "scale and shift by the time embedding, instead of adding it")
    resblock_updown: bool | None = option(None, "resample inside residual blocks")
    use_fp16: bool | None = option(
        None, "compute in half precision; the release's name for `precision` fp16", runtime=True
    )
    use_new_attention_order: bool | None = option(None, "order in which the file packs queries, keys and values")
    learn_sigma: bool | None = option(None, "whether the model predicts variances")
    diffusion_steps: int | None = option(None, "steps that the model was trained with", least=1, most=1_000_000)
    noise_schedule: str | None = option(
        None,
        "linear or cosine; or as in diffusers linear:A,B, scaled_linear:A,B, sigmoid:A,B, laplace, betas:B0,B1,...",
    )
    timestep_respacing: str | None = option(
        None, "steps to sample with, as 100, 10,10,5, ddim25, linspace25, leading25 or trailing25; empty for all"
    )
    use_kl: bool | None = option(None, "the training loss; has no effect when sampling", runtime=True)
    predict_xstart: bool | None = option(None, "the model predicts x_0 instead of the noise")
    predict_v: bool | None = option(None, "the model predicts the velocity instead of the noise")
    rescale_timesteps: bool | None = option(None, "the model was trained with timesteps scaled to 1000")
    rescale_learned_sigmas: bool | None = option(None, "the training loss; has no effect when sampling", runtime=True)
    norm_groups: int | None = option(None, "groups of the normalisations (usually 32)", least=1, most=1 << 16)
    norm_eps: float | None = option(None, "eps of the normalisations (usually 1e-5)", above=0, most=1)
    sines_first: bool | None = option(None, "DDPM's time embedding in an ADM network (usually False)")
    pad_end: bool | None = option(None, "pad strided convolutions on the right and at the bottom only (usually False)")
    middle_norm: bool | None = option(None, "normalise in the middle block's attention (usually True)")

    def __post_init__(self) -> None:
        check(self)

    def given(self) -> dict[str, Any]:
        """The flags that are not None, for `load_model`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


FIELDS = {field.name: field for field in dataclasses.fields(ModelFlags)}


@dataclass
class ModelInfo:
    """What was found out about a checkpoint.

    model_type: "ADM", "DDPM" or "ENCODER". flags: the architecture with the flag names of `script_util`, and the
    diffusion flags that it was trained with; those of `extension_defaults` only where they differ. metadata: texts of
    the file. assumed: the flags that nothing told. scheduler: what a diffusers folder's scheduler file says of
    `sigma_small` and `clip_denoised`.
    """

    path: str
    model_type: str
    flags: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    scheduler: dict[str, Any] = field(default_factory=dict)

    def choose(self, name: str, given: Any = None) -> Any:
        """The value of `sigma_small` or `clip_denoised`: the given one, else the scheduler file's, else True."""
        return given if given is not None else self.scheduler.get(name, True)


@dataclass(frozen=True)
class Stated:
    """Flags that a file states beside its tensors. where: the place, the beginning of an error line about it."""

    flags: Mapping[str, Any]
    where: str
    complete: bool = True  # what is left out has its default; else it is unknown


def stated_in_metadata(path: str, metadata: Mapping[str, str]) -> Stated | None:
    """The flags that a .safetensors file's metadata states; None where it has no entry for them."""
    if "flags" not in metadata:
        return None
    try:
        flags = json.loads(metadata["flags"])
    except (ValueError, RecursionError):
        flags = None
    if not isinstance(flags, dict):
        raise InputError(f"{display_name(path)}: the entry `flags` of its metadata is not a JSON object")
    return Stated(
        {flag: value for flag, value in flags.items() if value is not None}, f"{display_name(path)}: its metadata"
    )


def stated_in_run(path: str) -> Stated | None:
    """The flags of the training run that a file without metadata belongs to: train.json beside it; None without one."""
    record = os.path.join(os.path.dirname(path), "train.json")
    if "://" in path or not os.path.isfile(record):
        return None
    try:
        flags = read_json_object(record).get("model")
    except InputError as error:
        log.warning("%s; it is not used for %s", error, display_name(path))
        return None
    if not isinstance(flags, dict):
        return None  # another program's file of that name
    return Stated({flag: value for flag, value in flags.items() if value is not None}, display_name(record))


def belongs(stated: Stated, found: Mapping[str, Any]) -> bool:
    """Whether a run's flags are those of a network with the sizes that its tensors tell."""
    sizes = ("num_channels", "num_res_blocks", "classifier_width", "classifier_depth", "class_cond", "learn_sigma")
    return all(stated.flags.get(name, found.get(name)) == found.get(name) for name in sizes)


def scheduler_in_metadata(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a converted model's scheduler file said of `sigma_small` and `clip_denoised`; {} where there was none."""
    try:
        entries = json.loads(metadata.get("scheduler", "{}"))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise InputError(f"{display_name(path)}: the entry `scheduler` of its metadata is not a JSON object")
    clip = entries.get("clip_denoised")
    said = {"sigma_small": entries.get("sigma_small")} if isinstance(entries.get("sigma_small"), bool) else {}
    if isinstance(clip, bool) or (isinstance(clip, (int, float)) and 0 < clip < math.inf):
        said["clip_denoised"] = clip
    return said


def reconcile(
    path: str,
    kind: str,
    found: dict[str, Any],
    given: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    stated: Stated | None = None,
) -> ModelInfo:
    """What is known about a network.

    kind, found: from `architecture`. given: flags that the caller knows, none of them None. stated: what the file says
    besides. Raises InputError for what contradicts itself, naming the flag where one was given.
    """
    file = display_name(path)
    metadata = metadata or {}
    if metadata.get("model_type", kind) != kind:
        raise InputError(
            f"{file}: its metadata has model_type={_brief(metadata['model_type'])}, its tensors are of type {kind}"
        )
    encoder = kind == "ENCODER"
    defaults = (
        {**classifier_defaults(), "num_head_channels": 64, **diffusion_defaults()}
        if encoder
        else {**model_and_diffusion_defaults(), **EXTENSIONS}
    )
    sides = "classifier_attention_resolutions" if encoder else "attention_resolutions"
    row = published(kind, found)
    known = dict(row.flags) if row else {}
    likes = {**defaults, **found}
    said = _typed(stated.flags, likes, stated.where) if stated else {}
    given = _typed(given, likes)

    found = dict(found)
    usual = next((size for size, mult in CHANNEL_MULT.items() if _text(mult) == found["channel_mult"]), None)
    sources = (given, found, said, known)
    image_size = next((source["image_size"] for source in sources if "image_size" in source), usual)
    factors = found.pop("attention_factors")
    multiple = 2 ** found["channel_mult"].count(",")
    if image_size is None:
        raise InputError(f"{file} does not tell it; give a multiple of {multiple}", parameter="image_size")
    if not 1 <= image_size <= 1 << 16 or image_size % multiple:
        if "image_size" in given:
            raise _misfit("image_size", image_size, f"{file} needs a multiple of {multiple}")
        raise InputError(f"{file}: image_size={image_size} does not suit its levels; a multiple of {multiple} does")
    found[sides] = ",".join(str(image_size // factor) for factor in factors)

    untold = {flag: value for flag, value in said.items() if flag in UNDETECTABLE_FLAGS + TRAINING_FLAGS}
    if kind == "DDPM":
        untold |= DDPM_EXTENSIONS
    elif stated and stated.complete and not encoder:
        untold = {**{name: value for name, value in EXTENSIONS.items() if name not in found}, **untold}
    for flag, value in given.items():
        if flag not in RUNTIME_FLAGS and value != untold.get(flag, value):
            raise _misfit(flag, value, f"{file} was trained with {flag}={_brief(untold[flag])}")
    for flag, value in [*given.items(), *said.items()]:
        try:
            agrees = flag not in found or _agree(flag, value, found, image_size)
        except InputError as error:
            if flag in given and value == given[flag]:
                raise
            raise InputError(f"{stated.where if stated else file} has {flag}={_brief(value)}; {error.reason}") from None
        if not agrees:
            fits = f"{flag}={_brief(found[flag]) if found[flag] != '' else 'none'}"
            if flag in given:
                usual_ones = (
                    f" (empty means {_text(CHANNEL_MULT[image_size])})"
                    if value == "" and flag == "channel_mult"
                    else ""
                )
                raise _misfit(flag, value, f"{file} has {fits}{usual_ones}")
            where = stated.where if stated else file
            raise InputError(f"{where} has {flag}={_brief(value)}, but its tensors have {fits}")
    flags = {**defaults, **known, **untold, **{k: v for k, v in given.items() if k in defaults}, **found}
    flags["image_size"] = image_size
    left_out = DDPM_EXTENSIONS if kind == "DDPM" else {}
    flags = {k: v for k, v in flags.items() if k not in EXTENSIONS or (k not in left_out and v != EXTENSIONS[k])}
    if "num_heads" in given and "num_head_channels" not in {*given, *untold}:
        # Who says how many heads there are does not want the published width of a head.
        flags["num_head_channels"] = -1
    info = ModelInfo(path, kind, flags, dict(metadata))
    if kind != "DDPM":
        _check_heads(info, factors, given)
    _report(info, sources, row.files if row else None, stated)
    return info


def _misfit(flag: str, value: Any, reason: str) -> InputError:
    return InputError(reason, parameter=flag, value=value)


def _brief(value: Any) -> str:
    return one_line(value, 60)


def _report(info: ModelInfo, sources: tuple[Mapping[str, Any], ...], files: str | None, stated: Stated | None) -> None:
    """One log line on what is assumed, and one where a given flag differs from what was published."""
    given, found, said, known = sources
    differing = [
        flag for flag, value in given.items() if flag in known and value != known[flag] and flag not in RUNTIME_FLAGS
    ]
    if differing:
        log.warning(
            "%s has the layout of a published model (%s), which has %s; %s is used, as given",
            display_name(info.path),
            files,
            ", ".join(f"{flag}={known[flag]}" for flag in differing),
            ", ".join(f"{flag}={given[flag]}" for flag in differing),
        )
    told = {*given, *found, *said, *known}
    heads = ("num_head_channels",) if info.model_type == "ENCODER" else ("num_heads", "num_head_channels")
    assumed = [] if info.model_type == "DDPM" or {"num_heads", "num_head_channels"} & told else list(heads)
    if not (stated and stated.complete):
        others = ["image_size", *(["use_new_attention_order"] if info.model_type == "ADM" else []), *TRAINING_FLAGS]
        assumed += [flag for flag in others if flag not in told and flag in info.flags]
    info.assumed = tuple(assumed)
    if assumed:
        named = ", ".join(f"{flag}={info.flags[flag]}" for flag in assumed if info.flags[flag] != -1)
        # A command line has flags for its model only.
        advice = "Convert it to .safetensors with" if info.model_type == "ENCODER" else "Give"
        log.warning("%s does not tell everything; assumed: %s. %s what differs", display_name(info.path), named, advice)


def _typed(flags: Mapping[str, Any], likes: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """The flags that concern a network, each in the type of its other values and within bounds.

    where: the place that states them, None for flags that are given.
    """
    typed = {}
    for flag, value in flags.items():
        if flag not in likes:
            continue
        like = likes[flag]
        fits = {bool: "True or False", int: "a whole number", float: "a number"}.get(type(like), "a text")
        try:
            converted = _converted(value, like)
            if converted is None:
                raise InputError(f"it must be {fits}", parameter=flag, value=value)
            if flag in FIELDS and flag not in ("num_heads", "num_head_channels", "image_size"):
                check_value(FIELDS[flag], converted)
        except InputError as error:
            if where is None:
                raise
            raise InputError(f"{where} has {flag}={shown(value)}; {error.reason}") from None
        typed[flag] = converted
    return typed


def _converted(value: Any, like: Any) -> Any:
    """A value in the type of another; None where it has no meaning in it."""
    try:
        if isinstance(like, bool):
            return str2bool(value if isinstance(value, bool) else str(value))
        converted = type(like)(value)
        return converted if isinstance(like, str) or converted == float(value) else None
    except Exception:  # str2bool raises argparse's type, numbers raise several
        return None


def _base_width(flags: Mapping[str, Any]) -> int:
    return flags["num_channels"] if "num_channels" in flags else flags["classifier_width"]


def _text(multipliers: tuple[float, ...]) -> str:
    return ",".join(f"{m:g}" for m in multipliers)


def _agree(flag: str, value: Any, found: Mapping[str, Any], image_size: int) -> bool:
    """Whether a flag's value means what the tensors have."""
    fits = found[flag]
    if flag == "channel_mult":
        if value == "" and image_size not in CHANNEL_MULT:
            return True
        base = _base_width(found)
        try:
            widths, fitting = ([int(m * base) for m in channel_multipliers(v, image_size)] for v in (value, fits))
        except OverflowError:  # 1e308 times the base
            return False
        return widths == fitting
    if flag.endswith("attention_resolutions"):
        # Sides at which the network has no level never had an effect.
        reached = {2**level for level in range(found["channel_mult"].count(",") + 1)}
        return set(attention_factors(value, image_size)) & reached == set(attention_factors(fits, image_size))
    return value == fits


def _check_heads(info: ModelInfo, factors: tuple[int, ...], given: Mapping[str, Any]) -> None:
    """Raise InputError where the channels of an attention layer cannot be shared among its heads."""
    flags = info.flags
    base = _base_width(flags)
    mults = channel_multipliers(flags["channel_mult"], flags["image_size"])
    outer = {int(mult * base) for level, mult in enumerate(mults) if 2**level in factors}
    inner = {*outer, int(mults[-1] * base)}
    if info.model_type == "ENCODER" or flags["num_head_channels"] != -1:
        checks = [("num_head_channels", inner)]
    else:
        checks = [("num_heads", inner)]
        if flags["num_heads_upsample"] != -1:
            checks.append(("num_heads_upsample", outer))
    for flag, widths in checks:
        value, shared = flags[flag], math.gcd(*widths)
        if shared and (value < 1 or shared % value):
            file, channels = display_name(info.path), ", ".join(map(str, sorted(widths)))
            needs = f"attention layers of {channels} channels, so it must divide {shared}"
            if flag in given:
                raise _misfit(flag, value, f"{file} has {needs}")
            give = f"convert it to .safetensors with `{flag}`" if info.model_type == "ENCODER" else f"give `{flag}`"
            raise InputError(
                f"{file}: {flag}={value}, which its tensors do not tell, does not fit: it has {needs}; {give}"
            )


__all__ = [
    "FLAGS",
    "MODEL_TYPES",
    "RUNTIME_FLAGS",
    "TRAINING_FLAGS",
    "UNDETECTABLE_FLAGS",
    "ModelFlags",
    "ModelInfo",
    "reconcile",
]
