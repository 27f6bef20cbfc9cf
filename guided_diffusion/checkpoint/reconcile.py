"""Join what tensors, metadata, published tables, flags and defaults say of a network, and report contradictions.

In rising order of weight: the defaults of `script_util`, the table of published models, what is stated beside the
tensors (metadata, train.json, betas, hyper-parameters, a scheduler file), and flags that are given. What the tensors
tell is never overruled. Sources of the table: the READMEs of guided-diffusion, improved-diffusion, ILVR, P2-weighting,
EGSDE and DDPM's ports.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError, display_name, log, one_line, reading, shown
from ..gaussian_diffusion import get_named_beta_schedule
from ..options import Checked, check_value, field_types, option
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
from .reading import Source, plain, read_json_object

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
class ModelFlags(Checked):
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


# ---- statements of a file --------------------------------------------------------------------------------------------

# Flags that shape the network but leave no trace in its tensors.
UNDETECTABLE_FLAGS = (
    *("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "dropout"),
    *("norm_groups", "norm_eps", "sines_first", "pad_end", "middle_norm"),
)
# Flags that describe how the network was trained, and so how it must be used.
TRAINING_FLAGS = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps", "predict_v")


@dataclass(frozen=True)
class Stated:
    """Flags that a file states beside its tensors; those that are None count as not stated.

    where: the place, the beginning of an error line about it. complete: what is left out has its default. in_run: the
    place is a train.json, which may be another network's.
    """

    flags: Mapping[str, Any]
    where: str
    complete: bool = True
    in_run: bool = False

    def fits(self, found: Mapping[str, Any]) -> bool:
        """Whether the sizes are those of an architecture."""
        sizes = ("num_channels", "num_res_blocks", "classifier_width", "classifier_depth", "in_channels", "class_cond")
        return all(self.flags.get(name) in (None, found.get(name)) for name in (*sizes, "learn_sigma"))


def _described(source: Source) -> Stated | None:
    """The flags in a file's metadata, else those in the train.json beside it; None without either.

    Another program's train.json counts as none. Raises InputError for metadata that is no JSON object.
    """
    if "flags" in source.metadata:
        return Stated(_metadata_object(source, "flags"), f"{display_name(source.path)}: its metadata")
    record = os.path.join(os.path.dirname(source.path), "train.json")
    if "://" in source.path or not os.path.isfile(record):
        return None
    try:
        flags = read_json_object(record).get("model")
    except InputError as error:
        log.warning("%s; it is not used for %s", error, display_name(source.path))
        return None
    return Stated(flags, display_name(record), in_run=True) if isinstance(flags, dict) else None


def _scheduler_in_metadata(source: Source) -> dict[str, Any]:
    """The entries of a converted model's scheduler file for `sigma_small` and `clip_denoised`; {} without any."""
    said = _metadata_object(source, "scheduler") if "scheduler" in source.metadata else {}
    fits = {"sigma_small": bool, "clip_denoised": (bool, float)}
    return {name: said[name] for name, kind in fits.items() if isinstance(said.get(name), kind)}


def _metadata_object(source: Source, name: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(source.metadata[name])
        if isinstance(content, dict):
            return content
    raise InputError(f"{display_name(source.path)}: the entry `{name}` of its metadata is not a JSON object")


# Entries of a torch file that hold hyper-parameters, those of PyTorch Lightning first.
HYPER_PARAMETERS = ("hyper_parameters", "hparams", "args", "config", "flags")
STEPS = ("timesteps", "num_timesteps", "num_diffusion_timesteps", "num_train_timesteps")
# What a model predicts, in the words of CompVis, diffusers and denoising-diffusion-pytorch.
NOISE, X_0, VELOCITY = ("eps", "epsilon", "pred_noise"), ("x0", "sample", "pred_x0"), ("v", "v_prediction", "pred_v")
PREDICTIONS = {
    name: {"predict_xstart": name in X_0, "predict_v": name in VELOCITY} for name in (*NOISE, *X_0, *VELOCITY)
}


def _hyper_parameters(source: Source) -> dict[str, Any]:
    """The hyper-parameters that stand beside the weights of a torch file."""
    found: dict[str, Any] = {}
    for name in HYPER_PARAMETERS:
        entries = plain(source.beside.get(name))
        if isinstance(entries, Mapping):
            parts = [entries, *(plain(entries.get(part)) for part in ("diffusion", "model"))]
            for each in (each for each in parts if isinstance(each, Mapping)):
                found = {**{str(key): plain(value) for key, value in each.items()}, **found}
    return found


def _stated_beside(source: Source) -> Stated | None:
    """The flags that a torch file tells by its betas and hyper-parameters; only those that tensors cannot tell."""
    entries, file = _hyper_parameters(source), display_name(source.path)
    where = f"{file}: its list of hyper-parameters"
    simple: dict[str, Any] = {key: value for key, value in entries.items() if isinstance(value, (int, float, str))}
    flags = {name: simple[name] for name in (*UNDETECTABLE_FLAGS, *TRAINING_FLAGS) if name in simple}
    if steps := [simple[name] for name in STEPS if name in simple]:
        flags.setdefault("diffusion_steps", steps[0])
    for name in {"parameterization", "objective", "prediction_type"} & simple.keys():
        if simple[name] not in PREDICTIONS:
            raise InputError(f"{where} has {name}={shown(simple[name])}, which is not supported")
        flags |= PREDICTIONS[simple[name]]
    if {"beta_schedule", "linear_start", "beta_start"} & simple.keys() and "noise_schedule" not in simple:
        # CompVis' linear is linear in the square root; its ends have names of their own.
        renamed = {"squaredcos_cap_v2": "cosine"} | ({"linear": "scaled_linear"} if "linear_start" in simple else {})
        name = simple.get("beta_schedule", "linear")
        name = renamed.get(name, name)
        ends = [simple[end] for end in ("linear_start", "beta_start", "linear_end", "beta_end") if end in simple]
        flags["noise_schedule"] = f"{name}:{ends[0]},{ends[-1]}" if len(ends) == 2 and name != "cosine" else name
    if found := _table(source, entries):
        kind, table = found
        where = f"{file}: its entry {kind}"
        flags |= {"diffusion_steps": len(table), "noise_schedule": _named_schedule(kind, table, where)}
    return Stated(flags, where, complete=False) if flags else None


def _table(source: Source, hyper: Mapping[str, Any]) -> tuple[str, np.ndarray] | None:
    """("betas" or "alphas_cumprod", its values in float64) of an entry of this name, under any prefix."""
    places = [*source.beside.items(), *hyper.items(), *source.tensors.items()]
    for kind in ("betas", "alphas_cumprod"):
        for value in (plain(value) for name, value in places if str(name).rpartition(".")[2] == kind):
            if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
                with reading(source.path):
                    table = torch.as_tensor(value)
                if table.dim() == 1 and len(table) > 9 and table.is_floating_point():
                    return kind, table.double().numpy()
    return None


def _named_schedule(kind: str, table: np.ndarray, where: str) -> str:
    """The value of `noise_schedule` for a table: a name where one gives its values up to rounding, else all betas."""
    alpha_bars = np.cumprod(1 - table) if kind == "betas" else table
    with np.errstate(all="ignore"):
        betas = table if kind == "betas" else 1 - table / np.append(1.0, table[:-1])
    if not ((betas > 0) & (betas < 1)).all():  # NaN is neither
        raise InputError(f"{where} is no noise schedule: its betas must be above 0 and below 1")
    digits = 6 if kind == "betas" else 3  # what a difference of float32 values has
    ends = ",".join(repr(float(f"{betas[i]:.{digits}g}")) for i in (0, -1))
    for name in ("linear", "cosine", f"linear:{ends}", f"scaled_linear:{ends}"):
        with contextlib.suppress(InputError), np.errstate(all="ignore"):
            named = np.cumprod(1 - get_named_beta_schedule(name, len(betas)))
            if np.allclose(np.log(named), np.log(alpha_bars), rtol=1e-4, atol=1e-5):
                return name
    return "betas:" + ",".join(repr(float(beta)) for beta in betas)


class Published(NamedTuple):
    """One published layout: its files' names, `ModelInfo.model_type` and flags."""

    files: str
    model_type: str
    flags: dict[str, Any]


SIX, SEVEN, FIVE, FOUR = "1,1,2,2,4,4", "0.5,1,1,2,2,4,4", "1,1,2,3,4", "1,2,3,4"
LINEAR = {"noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False, "rescale_timesteps": False}
IMAGENET: dict[str, Any] = {"class_cond": True, "num_classes": 1000}
# improved-diffusion: convolutions that resample, four heads of any width.
IMPROVED: dict[str, Any] = {"resblock_updown": False, "num_head_channels": -1}
COSINE: dict[str, Any] = {"noise_schedule": "cosine"}
COSINE_4000: dict[str, Any] = {**COSINE, "diffusion_steps": 4000}
USUAL_ADM = {
    "learn_sigma": True, "class_cond": False, "use_scale_shift_norm": True, "resblock_updown": True, "in_channels": 3,
    "super_res": False, "num_heads": 4, "num_head_channels": 64, "use_new_attention_order": False, **LINEAR,
}  # fmt: skip
USUAL_DDPM = {"num_channels": 128, "num_res_blocks": 2, "learn_sigma": False, "in_channels": 3, **LINEAR}
USUAL_ENCODER = {
    "classifier_width": 128, "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True,
    "classifier_pool": "attention", "num_head_channels": 64, **LINEAR,
}  # fmt: skip


def _adm(files: str, size: int, width: int, blocks: int, mult: str, factors: tuple, **other: Any) -> Published:
    """A network of guided-diffusion; other: flags that differ from the usual ones."""
    sizes = {"image_size": size, "num_channels": width, "num_res_blocks": blocks}
    return Published(files, "ADM", {**USUAL_ADM, **sizes, "channel_mult": mult, "attention_factors": factors, **other})


def _ddpm(files: str, size: int, mult: str, factor: int) -> Published:
    sizes = {"image_size": size, "channel_mult": mult, "attention_factors": (factor,)}
    return Published(files, "DDPM", {**USUAL_DDPM, **sizes})


def _encoder(files: str, size: int, depth: int, mult: str, classes: int, head: str = "out", **other: Any) -> Published:
    sizes = {"image_size": size, "classifier_depth": depth, "channel_mult": mult, "num_class": classes, "head": head}
    factors = tuple(size // side for side in (32, 16, 8))
    return Published(files, "ENCODER", {**USUAL_ENCODER, **sizes, "attention_factors": factors, **other})


PUBLISHED = (
    _adm("ILVR's and P2's models of AFHQ", 256, 128, 2, SIX, (16,), learn_sigma=False),
    _adm("ILVR's and P2's models", 256, 128, 1, SIX, (16,)),
    _adm("256x256_diffusion_uncond.pt, lsun_*.pt", 256, 256, 2, SIX, (8, 16, 32)),
    _adm("256x256_diffusion.pt", 256, 256, 2, SIX, (8, 16, 32), **IMAGENET),
    _adm("512x512_diffusion.pt", 512, 256, 2, SEVEN, (16, 32, 64), **IMAGENET),
    _adm("128x128_diffusion.pt", 128, 256, 2, FIVE, (4, 8, 16), num_head_channels=-1, **IMAGENET),
    _adm("64x64_diffusion.pt", 64, 192, 3, FOUR, (2, 4, 8), **IMAGENET, **COSINE, use_new_attention_order=True,
         dropout=0.1),
    # Both upsamplers have the same levels; where their attention is tells them apart.
    _adm("64_256_upsampler.pt", 256, 192, 2, SIX, (8, 16, 32), **IMAGENET, num_head_channels=-1, super_res=True),
    _adm("128_512_upsampler.pt", 512, 192, 2, SIX, (16, 32), **IMAGENET, super_res=True),
    # improved-diffusion; what its README does not say has that project's defaults, rescaled timesteps among them.
    _adm("imagenet64_uncond_*.pt", 64, 128, 3, FOUR, (4, 8), **IMPROVED, **COSINE_4000, rescale_timesteps=True),
    _adm("cifar10_uncond_*.pt", 32, 128, 3, "1,2,2,2", (2, 4), **IMPROVED, **COSINE_4000, rescale_timesteps=True,
         dropout=0.3),
    _adm("imagenet64_cond_270M_250K.pt", 64, 192, 3, FOUR, (4, 8), **IMPROVED, **COSINE_4000, **IMAGENET),
    _adm("lsun_uncond_100M_*.pt", 256, 128, 2, SIX, (16,), **IMPROVED, num_heads=1, use_scale_shift_norm=False),
    _ddpm("celebahq_female_ddpm.pth and the DDPM models of 256 pixels", 256, SIX, 16),
    _ddpm("DDPM's model of CIFAR-10", 32, "1,2,2,2", 2),
    _encoder("64x64_classifier.pt", 64, 4, FOUR, 1000, **COSINE),
    _encoder("128x128_classifier.pt", 128, 2, FIVE, 1000),
    _encoder("256x256_classifier.pt", 256, 2, SIX, 1000),
    _encoder("512x512_classifier.pt", 512, 2, SEVEN, 1000),
    _encoder("EGSDE's extractors", 256, 2, SIX, 2, "I2Iout"),
)  # fmt: skip


def published(model_type: str, found: dict[str, Any]) -> Published | None:
    """The row that agrees with all that the tensors tell, with the flags that they do not; None without one."""
    for row in PUBLISHED:
        if row.model_type == model_type and all(row.flags.get(name, value) == value for name, value in found.items()):
            return row._replace(flags={name: value for name, value in row.flags.items() if name not in found})
    return None


# Models of EDM's process and consistency models in guided-diffusion's network: ImageNet of 64 pixels, LSUN of 256.
_ALIKE = {"learn_sigma": False, "resblock_updown": True, "use_scale_shift_norm": True}
EDM_LAYOUTS = (
    {"num_channels": 192, "num_res_blocks": 3, "channel_mult": FOUR, "attention_factors": (2, 4, 8), **_ALIKE},
    {"num_channels": 256, "num_res_blocks": 2, "channel_mult": SIX, "attention_factors": (8, 16, 32), **_ALIKE},
)
LATENT = re.compile(r"^first_stage_model\.|\.transformer_blocks\.")  # names of tensors
EDM_NAMES = re.compile(r"(?<![a-z])(edm2?|consistency|(cd|ct)[-_](imagenet|bedroom|cat|cifar|lsun))(?![a-z])", re.I)
EDM_FLAGS = {"sigma_data", "sigma_max", "sigma_min", "weight_schedule", "training_mode", "P_mean", "P_std"}


def _refuse_edm(source: Source, found: dict[str, Any], stated: Stated | None, given: Mapping[str, Any]) -> None:
    """Raise InputError for a network, found, whose process is EDM's or a consistency model's.

    The name of a file that states its noise schedule is no reason, and where that is given, its layout is none.
    """
    reason, flags = None, stated.flags if stated else {}
    if sigmas := EDM_FLAGS & {*_hyper_parameters(source), *source.metadata, *flags}:
        reason = f"its file has the entry {min(sigmas)}"
    elif "noise_schedule" in flags:
        return
    elif name := EDM_NAMES.search(os.path.basename(source.path)):
        reason = f"its name has {name[0]!r}"
    elif "noise_schedule" not in given and any(layout.items() <= found.items() for layout in EDM_LAYOUTS):
        reason = "it has their layout; give `noise_schedule` if it is none"
    if reason:
        what = f"is a model of EDM or a consistency model ({reason}); a model of DDPM's process is needed"
        raise InputError(f"{display_name(source.path)} {what}")


# ---- all of it together ----------------------------------------------------------------------------------------------


def refuse_latent(source: Source) -> None:
    """Raise InputError for a latent diffusion model; the UNets of some look like those of pixels."""
    if latent := next(filter(LATENT.search, source.tensors), None):
        what = f"is a latent diffusion model (it has {one_line(latent, 100)}); a model of pixels is needed"
        raise InputError(f"{display_name(source.path)} {what}")


def read_network(source: Source, kind: Kind, given: Mapping[str, Any]) -> tuple[ModelInfo, architecture.State] | None:
    """(description of the network of a kind in a file, its tensors by our names); None where there is none."""
    state, file = architecture.unwrap(source.tensors, kind.embedding), display_name(source.path)
    if state is None or (kind is ADM and not any(key.startswith("output_blocks.") for key in state)):
        return None
    refuse_latent(source)
    stated = _described(source)
    depth = given.get("classifier_depth", stated.flags.get("classifier_depth") if stated else None)
    try:
        found = kind.detector(state, depth) if kind is ENCODER else kind.detector(state)
    except KeyError as error:
        name = error.args[0]
        if name in state:
            what = f"has the tensor {name} of shape {list(state[name].shape)}, which fits no architecture"
        else:
            what = f"lacks the tensor {name}, which its architecture needs"
        raise InputError(f"{file} {what}") from None
    if stated and stated.in_run and not stated.fits(found):
        log.warning("%s is not the network that %s describes, which is not used", file, stated.where)
        stated = None
    stated = stated or _stated_beside(source)
    _refuse_edm(source, found, stated, given)
    info = reconcile(source, kind, found, given, stated)
    info.scheduler = _scheduler_in_metadata(source)
    return info, state


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
    heads = () if {"num_heads", "num_head_channels"} & told else ("num_heads", "num_head_channels")
    needed = (*heads, "image_size", "use_new_attention_order", *TRAINING_FLAGS)
    if kind is DDPM:  # without attention heads
        needed = ("image_size", *TRAINING_FLAGS)
    if stated and stated.complete:
        needed = heads if kind is not DDPM else ()
    elif stated and (from_file := [name for name in said if name in info.flags and name not in given]):
        log.info("%s: %s tells %s", file, stated.where.removeprefix(f"{file}: "), text(from_file))
    info.assumed = tuple(flag for flag in needed if flag not in told and flag in info.flags)
    if info.assumed:
        named = text(flag for flag in info.assumed if info.flags[flag] != -1)
        # A command line has flags for its model only.
        advice = "Convert it to .safetensors with" if kind is ENCODER else "Give"
        log.warning("%s does not tell everything; assumed: %s. %s what differs", file, named, advice)
