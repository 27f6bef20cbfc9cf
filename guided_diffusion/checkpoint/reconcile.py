"""Join what tensors, metadata, published tables, flags and defaults say of a network, and report contradictions.

In rising order of weight: the defaults of `script_util`, the table of published models, what is stated beside the
tensors (metadata, train.json, betas, hyper-parameters, a scheduler file), and flags that are given. What the tensors
tell is never overruled.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError, display_name, log, one_line
from ..gaussian_diffusion import get_named_beta_schedule
from ..options import check, check_value, field_types, option
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
from . import architecture
from .reading import Source
from .stated import TRAINING_FLAGS, UNDETECTABLE_FLAGS, Published, Stated, published

# Flags that concern one use of a model only, so that any value fits any file.
RUNTIME_FLAGS = {
    *("use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas", "dropout"),
    "sigma_small",
}
EXTENSIONS = extension_defaults()


@dataclass(frozen=True)
class Kind:
    """Properties of all networks of one kind.

    name: `ModelInfo.model_type`. embedding: a pattern for the tensors of its time embedding. detector: of
    `architecture`. defaults: the kind's flags and their usual values. fixed: flags that are the same in all of its
    networks and no option. width, sides: its flags for the base width and for the sides with attention.
    """

    name: str
    embedding: str
    detector: Callable[..., dict[str, Any]]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    width: str = "num_channels"
    sides: str = "attention_resolutions"


UNET_FLAGS = {**model_and_diffusion_defaults(), **EXTENSIONS}
ENCODER_FLAGS = {**classifier_defaults(), "num_head_channels": 64, **diffusion_defaults()}
DDPM_LAYERS = {"norm_groups": 32, "norm_eps": 1e-6, "sines_first": True, "pad_end": True, "middle_norm": True}
ADM = Kind("ADM", "time_embed.[02]", architecture.adm, UNET_FLAGS)
DDPM = Kind("DDPM", "temb.dense.[01]", architecture.ddpm, UNET_FLAGS, DDPM_LAYERS)
ENCODER = Kind(
    *("ENCODER", "time_embed.[02]", architecture.encoder, ENCODER_FLAGS),
    width="classifier_width",
    sides="classifier_attention_resolutions",
)


@dataclass(frozen=True)
class ModelFlags:
    """The network and its diffusion process; what is None is read from the checkpoint."""

    image_size: int | None = option(None, "height and width of the images in pixels", least=1, most=1 << 16)
    num_channels: int | None = option(None, "base number of channels", least=1, most=1 << 16)
    num_res_blocks: int | None = option(None, "residual blocks per resolution", least=1, most=64)
    num_heads: int | None = option(None, "attention heads; `num_head_channels` overrides it", least=-1, most=1 << 16)
    num_heads_upsample: int | None = option(None, "heads of the decoder; -1: as `num_heads`", least=-1, most=1 << 16)
    num_head_channels: int | None = option(None, "channels per attention head", least=-1, most=1 << 16)
    attention_resolutions: str | None = option(None, "resolutions with attention, such as 16 or 32,16,8")
    channel_mult: str | None = option(None, "channels per resolution in multiples of `num_channels`, such as 1,2,4")
    dropout: float | None = option(None, "dropout probability in residual blocks", least=0, most=1, runtime=True)
    class_cond: bool | None = option(None, "the model is class-conditional; `class_index` chooses the class")
    use_checkpoint: bool | None = option(None, "gradient checkpointing: less memory, but slower", runtime=True)
    use_scale_shift_norm: bool | None = option(None, "condition normalisation layers on the timestep (FiLM)")
    resblock_updown: bool | None = option(None, "down- and upsample in residual blocks")
    use_fp16: bool | None = option(None, "same as `precision` fp16", runtime=True)
    use_new_attention_order: bool | None = option(None, "split into queries, keys and values before splitting heads")
    learn_sigma: bool | None = option(None, "the model predicts the variance of the reverse steps")
    diffusion_steps: int | None = option(None, "number of diffusion steps in training", least=1, most=1_000_000)
    noise_schedule: str | None = option(
        None,
        "linear or cosine; or as in diffusers linear:A,B, scaled_linear:A,B, sigmoid:A,B, laplace, betas:B0,B1,...",
    )
    timestep_respacing: str | None = option(
        None, "sampling steps, such as 100, 10,10,5, ddim25, linspace25, leading25 or trailing25; empty for all"
    )
    use_kl: bool | None = option(None, "minimise the variational bound instead of the squared error", runtime=True)
    in_channels: int | None = option(None, "channels of the images: 3, or 1 for greyscale", choices=(1, 3))
    predict_xstart: bool | None = option(None, "the model predicts x_0 instead of the noise")
    predict_v: bool | None = option(None, "the model predicts the velocity instead of the noise")
    rescale_timesteps: bool | None = option(None, "timesteps are scaled to the range of 1000 steps")
    rescale_learned_sigmas: bool | None = option(None, "scale the variances' loss as for 1000 steps", runtime=True)
    norm_groups: int | None = option(None, "groups of each GroupNorm (usually 32)", least=1, most=1 << 16)
    norm_eps: float | None = option(None, "eps of each GroupNorm (usually 1e-5)", above=0, most=1)
    sines_first: bool | None = option(None, "sines before cosines in the time embedding, as in DDPM (usually False)")
    pad_end: bool | None = option(None, "pad strided convolutions only at the right and bottom (usually False)")
    middle_norm: bool | None = option(None, "normalisation in the middle block's attention (usually True)")

    def __post_init__(self) -> None:
        check(self)

    def given(self) -> dict[str, Any]:
        """The flags that are not None, for `load_model`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


_OTHERS = {**classifier_defaults(), "super_res": False, "sigma_small": True, "num_classes": 1, "num_class": 1}
_OTHERS |= {"head": ""}
_OTHER_FLAGS = dataclasses.make_dataclass("_OTHER_FLAGS", [(name, type(value)) for name, value in _OTHERS.items()])
FLAGS = {field.name: field for cls in (_OTHER_FLAGS, ModelFlags) for field in dataclasses.fields(cls)}
"""All flags of networks and processes by name, as fields that know their type and bounds."""


@dataclass
class ModelInfo:
    """Description of a checkpoint.

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


def reconcile(
    source: Source, kind: Kind, found: dict[str, Any], given: Mapping[str, Any], stated: Stated | None
) -> ModelInfo:
    """Everything that is known of a network.

    kind, found: its kind and architecture. given: flags that the caller knows, none of them None. stated: those of the
    file. Raises InputError for contradictions, naming the flag where one was given.
    """
    file = display_name(source.path)
    if source.metadata.get("model_type", kind.name) != kind.name:
        text = one_line(source.metadata["model_type"], 60)
        raise InputError(f"{file}: its metadata has model_type={text}, its tensors are of type {kind.name}")
    concerned = {*kind.defaults, *found} & FLAGS.keys()
    given = {flag: value for flag, value in given.items() if flag in concerned}
    said = {flag: value for flag, value in (stated.flags if stated else {}).items() if flag in concerned}
    said = {flag: _typed(flag, value) for flag, value in said.items() if value is not None}
    row, complete = published(kind.name, found), stated is not None and stated.complete
    try:
        flags = _join(file, kind, found, given, said, row.flags if row else {}, complete)
    except InputError as error:
        if error.parameter is None or given.get(error.parameter) == error.value:
            raise
        where = stated.where if stated else file  # the value is not the caller's
        raise InputError(f"{where} has {error.parameter}={one_line(error.value, 60)}; {error.reason}") from None
    info = ModelInfo(source.path, kind.name, flags, dict(source.metadata))
    _report(info, kind, stated, row, given, found, said)
    return info


def _join(
    file: str, kind: Kind, found: dict[str, Any], given: dict[str, Any], said: dict[str, Any], known: dict[str, Any],
    complete: bool,
) -> dict[str, Any]:  # fmt: skip
    """The flags of a network; complete: what is not said has its default."""
    for flag, value in (*given.items(), *said.items()):
        check_value(FLAGS[flag], value)
    found, levels = dict(found), found["channel_mult"].count(",") + 1
    usual = {",".join(f"{m:g}" for m in mult): size for size, mult in CHANNEL_MULT.items()}
    sizes = [source["image_size"] for source in (given, found, said, known) if "image_size" in source]
    image_size, multiple = sizes[0] if sizes else usual.get(found["channel_mult"]), 2 ** (levels - 1)
    if image_size is None:
        raise InputError(f"{file} does not tell it; give a multiple of {multiple}", parameter="image_size")
    if image_size % multiple:
        raise InputError(f"{file} needs a multiple of {multiple}", parameter="image_size", value=image_size)
    found[kind.sides] = ",".join(str(image_size // factor) for factor in found.pop("attention_factors"))

    def meaning(flag: str, value: Any) -> Any:
        if flag == "channel_mult":
            return [int(m * found[kind.width]) for m in channel_multipliers(value or found[flag], image_size)]
        if flag == kind.sides:  # sides at which the network has no level never had an effect
            return {2**level for level in range(levels)} & {*attention_factors(value, image_size)}
        return value

    untold = {flag: said[flag] for flag in UNDETECTABLE_FLAGS + TRAINING_FLAGS if flag in said} | dict(kind.fixed)
    if complete and not kind.fixed:
        untold = {k: v for k, v in EXTENSIONS.items() if k in kind.defaults and k not in found} | untold
    told, trained = f"the tensors of {file} have", f"{file} was trained with"
    for flags, facts, says in ((given, untold, trained), (given, found, told), (said, found, told)):
        for flag, value in flags.items():
            fits = facts.get(flag, value)
            if flag not in RUNTIME_FLAGS and meaning(flag, value) != meaning(flag, fits):
                raise InputError(f"{says} {flag}={one_line(fits, 60) or 'none'}", parameter=flag, value=value)
    flags = {**kind.defaults, **known, **untold, **{k: v for k, v in given.items() if k in kind.defaults}, **found}
    flags["image_size"] = image_size
    flags = {k: v for k, v in flags.items() if k not in EXTENSIONS or (k not in kind.fixed and v != EXTENSIONS[k])}
    if "num_heads" in given and "num_head_channels" not in {*given, *untold}:
        flags["num_head_channels"] = -1  # `num_heads` overrides the published `num_head_channels`
    get_named_beta_schedule(flags["noise_schedule"], flags["diffusion_steps"])
    return flags


def _typed(flag: str, value: Any) -> Any:
    """A file's value in a flag's type: forks write 4.0, "4", "True" or lists. Itself where it has no such meaning."""
    kind = field_types(FLAGS[flag])[0]
    with contextlib.suppress(Exception):  # str2bool raises argparse's type, numbers raise several
        if kind is str:
            return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if kind is bool:
            return str2bool(value)
        number = float(value)
        return int(number) if kind is int and number.is_integer() else number
    return value


def _report(
    info: ModelInfo, kind: Kind, stated: Stated | None, row: Published | None, given: Mapping[str, Any],
    found: Mapping[str, Any], said: Mapping[str, Any],
) -> None:  # fmt: skip
    """Log what the file tells, what is assumed, and where a given flag differs from what was published."""
    file, known = display_name(info.path), row.flags if row else {}

    def text(names: Any, values: Mapping[str, Any] = info.flags) -> str:
        return ", ".join(f"{name}={one_line(values[name], 60)}" for name in names)

    differing = [flag for flag in given if given[flag] != known.get(flag, given[flag]) and flag not in RUNTIME_FLAGS]
    if row and differing:
        line = "%s has the layout of a published model (%s), which has %s; %s is used, as given"
        log.warning(line, file, row.files, text(differing, known), text(differing, given))
    told = {*given, *found, *said, *known}
    heads = ["num_heads", "num_head_channels"] if not {"num_heads", "num_head_channels"} & told else []
    others = ["image_size", "use_new_attention_order", *TRAINING_FLAGS]
    if kind is DDPM:  # without attention heads
        heads, others = [], ["image_size", *TRAINING_FLAGS]
    if stated and stated.complete:
        others = []
    elif stated and (from_file := [name for name in said if name in info.flags and name not in given]):
        log.info("%s: %s tells %s", file, stated.where.removeprefix(f"{file}: "), text(from_file))
    info.assumed = tuple(flag for flag in (*heads, *others) if flag not in told and flag in info.flags)
    if info.assumed:
        named = text(flag for flag in info.assumed if info.flags[flag] != -1)
        # A command line has flags for its model only.
        advice = "Convert it to .safetensors with" if kind is ENCODER else "Give"
        log.warning("%s does not tell everything; assumed: %s. %s what differs", file, named, advice)
