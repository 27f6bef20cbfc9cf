"""Models of diffusers: find their files, and read their configuration in our terms; without importing diffusers.

A UNet2DModel of the DDPM and ADM families is `ddpm.Model` or `unet.UNetModel` under other names (`diffusers_tensors`).
What is none of them is refused before weights are read. Fields that a configuration lacks have the library's defaults.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, display_name, one_line, shown
from .architecture import multiple
from .reading import read, read_json_object
from .reconcile import Stated

log = logging.getLogger(__name__)

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
IN_PYTHON = "in Python, SDDMPipeline takes any UNet2DModel"

# Fields of a UNet2DModel's configuration with the library's defaults.
FIELDS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# Fields that EMAModel adds to what it saves.
OF_AVERAGES = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")

# Blocks: how they resample ("" where a field decides) and whether they attend.
DOWN_BLOCKS, UP_BLOCKS = (
    {f"{way}Block2D": ("conv", False), f"Resnet{way}sampleBlock2D": ("resnet", False), f"Attn{way}Block2D": ("", True)}
    for way in ("Down", "Up")
)

# Schedulers that share DDPM's forward process.
CLIPPING = ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel")
SCHEDULERS = (
    *CLIPPING,
    *("PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LMSDiscrete"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
)
OTHER_PROCESSES = {
    r"ScoreSde|KarrasVe": "a variance-exploding model",
    r"CMStochastic|LCM|TCD": "a consistency model",
    r"FlowMatch": "a flow-matching model",
    r"EDM": "a model with EDM's preconditioning",
}
NEEDED = "a model of DDPM's process is needed"


@dataclass(frozen=True)
class Source:
    """The files of a diffusers model. path: what was asked for; folder: where the network's files are."""

    path: str
    folder: str
    config: dict[str, Any]
    config_path: str
    scheduler: dict[str, Any] | None = None
    scheduler_path: str | None = None
    index: dict[str, Any] | None = None
    index_path: str | None = None
    weights: str | None = None  # the file where one was asked for

    @property
    def name(self) -> str:
        """The path for a message."""
        return display_name(self.path)

    def relative(self, path: str) -> str:
        """The name of one of its files for a message."""
        return display_name(os.path.relpath(path, self.path if os.path.isdir(self.path) else self.folder))


@dataclass(frozen=True)
class Description:
    """What the configuration says, in our terms: see `architecture.detect` for kind and found."""

    kind: str
    found: dict[str, Any]
    stated: Stated
    scheduler: dict[str, Any]


# ---- finding the files -----------------------------------------------------------------------------------------------


def locate(path: str) -> Source | None:
    """The diffusers model at a path; None where there is none: a file of another kind, or nothing.

    A path is a folder with model_index.json (the network in unet/ or beside it), the network's own folder, a
    checkpoint-N of diffusers' training scripts (averaged weights before others), or a weights file beside config.json.
    Raises InputError for a folder that holds no such model.
    """
    if os.path.isfile(path):
        config = os.path.join(os.path.dirname(path), CONFIG)
        if not os.path.basename(path).startswith(WEIGHTS) or not os.path.isfile(config):
            return None
        return from_weights(path)
    if not os.path.isdir(path):
        return None
    file = display_name(path)
    if os.path.isfile(os.path.join(path, INDEX)):
        inner = os.path.join(path, "unet")
        return _source(path, inner if os.path.isdir(inner) else path, os.path.join(path, INDEX))
    if os.path.isfile(os.path.join(path, CONFIG)):
        return _source(path, path)
    averaged, plain = (os.path.join(path, name) for name in ("unet_ema", "unet"))
    for folder in (averaged, plain):
        if os.path.isfile(os.path.join(folder, CONFIG)):
            if folder == averaged and os.path.isdir(plain):
                log.info("%s: the averaged weights in unet_ema are taken, not those in unet", file)
            return _source(path, folder)
    held = sorted(name for name in os.listdir(path) if name.endswith((".pt", ".pth", ".ckpt", ".safetensors")))
    hint = f"; it holds {', '.join(display_name(name) for name in held[:3])}" if held else ""
    needed = "a checkpoint file or a diffusers model is needed"
    raise InputError(f"{file} is a folder without {INDEX} or {CONFIG}; {needed}{hint}")


def from_weights(path: str) -> Source:
    """The model that a weights file belongs to, whatever the file's name is; config.json is beside it."""
    return _source(path, os.path.dirname(path) or ".", weights=path)


def _source(path: str, folder: str, index_path: str | None = None, weights: str | None = None) -> Source:
    config_path = os.path.join(folder, CONFIG)
    if not os.path.isfile(config_path):
        raise InputError(f"{display_name(path)}: {display_name(config_path)} is missing")
    above = os.path.dirname(os.path.abspath(folder))
    if index_path is None and os.path.basename(os.path.abspath(folder)) in ("unet", "unet_ema"):
        index_path = next((p for p in (os.path.join(above, INDEX),) if os.path.isfile(p)), None)
    start = os.path.dirname(index_path) if index_path else folder
    places = (os.path.join(start, "scheduler"), start, os.path.join(above, "scheduler"), folder)
    # A training's checkpoint-N has its scheduler one folder higher.
    for checkpoint in (start, above):
        if os.path.basename(os.path.abspath(checkpoint)).startswith("checkpoint-"):
            places += (os.path.join(os.path.dirname(os.path.abspath(checkpoint)), "scheduler"),)
    scheduler_path = next((p for p in (os.path.join(f, SCHEDULER) for f in places) if os.path.isfile(p)), None)
    return Source(
        path,
        folder,
        read_json_object(config_path),
        config_path,
        read_json_object(scheduler_path) if scheduler_path else None,
        scheduler_path,
        read_json_object(index_path) if index_path else None,
        index_path,
        weights,
    )


def weight_files(source: Source) -> list[str]:
    """The files of the weights: full precision before half, safetensors before pickles. Raises InputError."""
    if source.weights:
        return [source.weights]
    folder = source.folder
    for variant in ("", ".fp16"):
        for suffix in ("safetensors", "bin"):
            whole = os.path.join(folder, f"{WEIGHTS}{variant}.{suffix}")
            # With a variant, shards and their index are named model.safetensors.index.fp16.json.
            index = os.path.join(folder, f"{WEIGHTS}.{suffix}.index{variant}.json")
            if os.path.isfile(whole):
                files = [whole]
            elif os.path.isfile(index):
                files = _shards(source, index)
            else:
                continue
            if variant:
                log.info("%s: only half-precision weights are available (%s)", source.name, source.relative(files[0]))
            return files
    where = source.relative(source.config_path)
    raise InputError(f"{source.name}: {where} has no {WEIGHTS}.safetensors or .bin beside it")


def _shards(source: Source, index: str) -> list[str]:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{source.name}: {source.relative(index)} has no `weight_map` of file names")
    files = []
    for name in sorted(set(names.values())):
        if name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name or "\0" in name:
            what = f"{shown(name)}, which is no file of its folder"
            raise InputError(f"{source.name}: {source.relative(index)} names {what}")
        files.append(os.path.join(source.folder, name))
        if not os.path.isfile(files[-1]):
            raise InputError(f"{source.name}: {display_name(name)}, which {source.relative(index)} names, is missing")
    return files


def read_weights(source: Source) -> dict[str, torch.Tensor]:
    """All tensors of the network under diffusers' names, today's spelling of the attention layers."""
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(source):
        state |= read(file)[0]
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(\.)")

    def today(key: str) -> str:
        return pattern.sub(lambda match: match[1] + renamed[match[2]] + match[3], key)

    return {today(key): value for key, value in state.items()}


def files(source: Source) -> list[str]:
    """All files that determine what the model is."""
    described = (source.index_path, source.config_path, source.scheduler_path)
    return [path for path in described if path] + weight_files(source)


# ---- configuration to flags ------------------------------------------------------------------------------------------


def describe(source: Source) -> Description:
    """The network and process of a diffusers model in our terms. Raises InputError for what they cannot be."""
    _refuse_other_kinds(source)
    config = _Fields(source, source.config_path, FIELDS, source.config)
    config.refuse_unknown()
    process = process_flags(source)
    found, flags = _network(config)
    variance = process.pop("variance_type")
    config.expect("in_channels", (3,))
    if config["out_channels"] == 6 and variance != "learned_range":
        where = source.relative(source.scheduler_path) if source.scheduler_path else "no scheduler file"
        raise config.wrong("out_channels", f"6 channels need variance_type learned_range ({where} has {variance})")
    config.expect("out_channels", (6,) if variance == "learned_range" else (3,))
    found["learn_sigma"] = variance == "learned_range"
    clip = process.pop("clip_denoised", None)
    scheduler = {} if clip is None else {"clip_denoised": clip}
    if variance in ("fixed_small", "fixed_large"):
        scheduler["sigma_small"] = variance == "fixed_small"
    flags |= process
    kind = _kind(found, flags)
    return Description(kind, found, Stated(flags, f"{source.name}: {source.relative(source.config_path)}"), scheduler)


def report(source: Source, description: Description) -> None:
    """One log line on what the scheduler file said, or on what is assumed without one."""
    if source.scheduler is None:
        assumed = "noise_schedule=linear, diffusion_steps=1000, the prediction of noise"
        log.warning("%s has no scheduler file; assumed: %s. Give what differs", source.name, assumed)
        return
    names = ("diffusion_steps", "noise_schedule", "predict_xstart", "predict_v")
    said = {name: description.stated.flags[name] for name in names if description.stated.flags[name] is not False}
    said |= description.scheduler
    text = ", ".join(f"{name}={one_line(value, 40)}" for name, value in said.items())
    log.info("%s: from its scheduler file: %s", source.name, text)


class _Fields:
    """The fields of a JSON file with the library's defaults, and errors that name them."""

    def __init__(self, source: Source, path: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        self.source, self.file, self.defaults, self.given = source, source.relative(path), defaults, given

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, self.defaults[name])

    def wrong(self, name: str, reason: str | None = None) -> InputError:
        """An error that names a field, its value, and what would fit."""
        value = self[name] if name in self.defaults else self.given[name]
        reason = f"; {reason}" if reason else ", which is not supported"
        reason += f"; {IN_PYTHON}" if self.defaults is FIELDS else ""
        text = one_line(json.dumps(value, default=str), 100)
        return InputError(f"{self.source.name}: {self.file} has {name}={text}{reason}")

    def expect(self, name: str, values: tuple[Any, ...]) -> None:
        """Raise unless the field has one of these values."""
        if not any(self[name] == value and isinstance(self[name], bool) == isinstance(value, bool) for value in values):
            raise self.wrong(name, f"it must be {' or '.join(json.dumps(value) for value in values)}")

    def number(self, name: str, least: int = 1) -> int:
        """A whole number within bounds."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1 << 16:
            raise self.wrong(name, f"it must be a whole number from {least} to {1 << 16}")
        return value

    def real(self, name: str) -> float:
        """A number above 0 and below 1."""
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise self.wrong(name, "it must be a number above 0 and below 1")
        return float(value)

    def refuse_unknown(self) -> None:
        """Raise for a field that is not known and says something."""
        for name, value in self.given.items():
            known = name in self.defaults or name.startswith("_") or name in OF_AVERAGES
            if not known and value is not None and value is not False:
                raise InputError(
                    f"{self.source.name}: {self.file} has {one_line(name, 60)}={one_line(json.dumps(value), 60)}, "
                    f"a field that is not known here; {IN_PYTHON}"
                )


def _class(content: Mapping[str, Any] | None, otherwise: str) -> str:
    name = (content or {}).get("_class_name") or otherwise
    return name if isinstance(name, str) else one_line(json.dumps(name), 60)


def _refuse_other_kinds(source: Source) -> None:
    """Raise InputError, saying what it is, for what is no model of pixels in DDPM's process."""
    name, index = source.name, source.index or {}
    network = one_line(_class(source.config, "UNet2DModel"), 60)
    parts = {part for part, kind in index.items() if not isinstance(kind, list) or any(kind)}  # [null, null] is no part
    if network == "UNet2DConditionModel" or "text_encoder" in parts:
        raise InputError(f"{name} is a text-conditional model (its network is a {network}), which is not supported")
    above = os.path.dirname(os.path.abspath(source.folder))
    inside = os.path.basename(os.path.abspath(source.folder)) == "unet"
    for part in ("vqvae", "vae", "movq"):
        if part in parts or (inside and os.path.isdir(os.path.join(above, part))):
            raise InputError(
                f"{name} is a latent diffusion model (it has {part}), and one of pixels is needed; "
                "in Python, SDDMPipeline takes it"
            )
    if network != "UNet2DModel":
        raise InputError(f"{name}: its network is a {network}; a UNet2DModel is needed")
    refuse_other_processes(name, source.scheduler)


def refuse_other_processes(name: str, config: Mapping[str, Any] | None) -> None:
    """Raise InputError for a scheduler that is not of DDPM's process. config: its configuration."""
    scheduler = one_line(_class(config, "DDPMScheduler"), 60)
    for pattern, what in OTHER_PROCESSES.items():
        if re.match(pattern, scheduler):
            raise InputError(f"{name} is {what} (its scheduler is a {scheduler}); {NEEDED}")
    if scheduler.removesuffix("Scheduler") not in SCHEDULERS:
        raise InputError(f"{name}: its scheduler is a {scheduler}, which is not supported; {NEEDED}")


def process_flags(source: Source) -> dict[str, Any]:
    """The flags of the diffusion process, with `variance_type` and perhaps `clip_denoised`."""
    given = dict(source.scheduler or {})
    name = _class(given, "DDPMScheduler").removesuffix("Scheduler")
    if "timesteps" in given and "num_train_timesteps" not in given:  # so in 2022
        given["num_train_timesteps"] = given["timesteps"]
    if given.get("predict_epsilon") is False and "prediction_type" not in given:  # so in 2022
        given["prediction_type"] = "sample"
    defaults = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small" if name.startswith("DDPM") else None,
        "clip_sample": name in CLIPPING,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
        "use_flow_sigmas": False,
    }
    fields = _Fields(source, source.scheduler_path or SCHEDULER, defaults, given)
    if fields["rescale_betas_zero_snr"] not in (False, None):
        raise fields.wrong("rescale_betas_zero_snr", "its alpha_bar ends at 0, where x_0 is undefined")
    for field in ("thresholding", "use_flow_sigmas"):
        fields.expect(field, (False, None))
    fields.expect("prediction_type", ("epsilon", "sample", "v_prediction"))
    if name.startswith("DDPM"):
        fixed = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")
        fields.expect("variance_type", (*fixed, "learned_range"))
    elif fields["variance_type"] not in ("fixed_small", "fixed_large", "learned_range"):
        fields.expect("variance_type", (None,))
    if source.scheduler is None:
        return {"variance_type": None}
    process = {
        "diffusion_steps": fields.number("num_train_timesteps"),
        "noise_schedule": _schedule(fields),
        "predict_xstart": fields["prediction_type"] == "sample",
        "predict_v": fields["prediction_type"] == "v_prediction",
        "rescale_timesteps": False,
        "variance_type": (fields["variance_type"] or "").removesuffix("_log") or None,
    }
    if fields["trained_betas"] is not None:
        process["diffusion_steps"] = len(fields["trained_betas"])
    if name in CLIPPING:
        process["clip_denoised"] = _clipping(fields)
    return process


def _clipping(fields: _Fields) -> bool | float:
    fields.expect("clip_sample", (True, False, None))
    limit = fields["clip_sample_range"]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise fields.wrong("clip_sample_range", "it must be a number above 0")
    if not fields["clip_sample"]:
        return False
    return True if limit == 1 else float(limit)


def _schedule(fields: _Fields) -> str:
    """The value of `noise_schedule` for a scheduler's betas."""
    betas = fields["trained_betas"]
    if betas is not None:
        numbers = isinstance(betas, list) and all(type(beta) in (int, float) and 0 < beta < 1 for beta in betas)
        if not betas or not numbers:
            raise fields.wrong("trained_betas", "it must be a list of numbers above 0 and below 1")
        return "betas:" + ",".join(repr(float(beta)) for beta in betas)
    fields.expect("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"))
    name = fields["beta_schedule"]
    if name == "squaredcos_cap_v2":
        return "cosine"
    if name == "laplace":
        return name
    start, end, steps = fields.real("beta_start"), fields.real("beta_end"), fields.number("num_train_timesteps")
    ours = math.isclose(start, 0.1 / steps, rel_tol=1e-12) and math.isclose(end, 20 / steps, rel_tol=1e-12)
    if name == "linear" and ours:
        return "linear"
    return f"{name}:{start!r},{end!r}"


def _network(config: _Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what tensors tell, what they do not) of the network."""
    config.expect("time_embedding_type", ("positional",))
    config.expect("act_fn", ("silu", "swish"))
    config.expect("mid_block_type", ("UNetMidBlock2D",))
    config.expect("add_attention", (True,))
    config.expect("mid_block_scale_factor", (1,))
    config.expect("center_input_sample", (False,))
    config.expect("class_embed_type", (None,))
    config.expect("resnet_time_scale_shift", ("default", "scale_shift"))
    config.expect("downsample_padding", (0, 1))
    widths = config["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(type(w) is int and 0 < w <= 1 << 16 for w in widths):
        raise config.wrong("block_out_channels", "it must be a list of widths")
    config.expect("time_embedding_dim", (None, 4 * widths[0]))
    order = config["flip_sin_to_cos"], config["freq_shift"]
    if order not in ((True, 0), (False, 1)):
        raise config.wrong("freq_shift", f"with flip_sin_to_cos={order[0]} it must be {0 if order[0] else 1}")
    attends, resampling = _levels(config, len(widths))
    blocks = config.number("layers_per_block")
    groups = _groups(config, widths, blocks)
    head = config["attention_head_dim"]
    if head is not None:
        head = config.number("attention_head_dim")
        attended = [w for w, at in zip(widths, attends) if at] + widths[-1:]
        if any(width % head for width in attended):
            raise config.wrong("attention_head_dim", f"it must divide {', '.join(map(str, sorted(set(attended))))}")
    shifts = config["resnet_time_scale_shift"] == "scale_shift"
    dropout = config["dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise config.wrong("dropout", "it must be a number from 0 on and below 1")
    classes = None if config["num_class_embeds"] is None else config.number("num_class_embeds")
    found = {
        "num_channels": widths[0],
        "num_res_blocks": blocks,
        "channel_mult": ",".join(multiple(width, widths[0]) for width in widths),
        "attention_factors": tuple(2**level for level, at in enumerate(attends) if at),
        "class_cond": classes is not None,
        "use_scale_shift_norm": shifts,
    }
    if len(widths) > 1:
        found["resblock_updown"] = resampling == "resnet"
    if classes is not None:
        found["num_classes"] = classes
    flags = {
        "num_heads": 1 if head is None else 4,
        "num_head_channels": -1 if head is None else head,
        "num_heads_upsample": -1,
        "use_new_attention_order": True,
        "dropout": float(dropout),
        "norm_groups": groups,
        "norm_eps": config.real("norm_eps"),
        "sines_first": not order[0],
        "pad_end": config["downsample_padding"] == 0 and resampling == "conv",
        "middle_norm": not (shifts and config["attn_norm_num_groups"] is None),
    }
    size = config["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if size is not None:
        if type(size) is not int or not 1 <= size <= 1 << 16:
            raise config.wrong("sample_size", "it must be the side of a square in pixels")
        flags["image_size"] = size
    return found, flags


def _levels(config: _Fields, levels: int) -> tuple[list[bool], str]:
    """Which levels attend, and how all of them resample: "conv" or "resnet"."""
    attends: dict[str, list[bool]] = {}
    kinds = {}
    for name, known, field in (
        ("down_block_types", DOWN_BLOCKS, "downsample_type"),
        ("up_block_types", UP_BLOCKS, "upsample_type"),
    ):
        blocks = config[name]
        if not isinstance(blocks, list) or len(blocks) != levels:
            raise config.wrong(name, f"it must be a list of {levels} blocks")
        for block in blocks:
            if not isinstance(block, str) or block not in known:
                raise config.wrong(name, f"{one_line(block, 40)} is not supported")
        attends[name] = [known[block][1] for block in blocks]
        # The last block of a list does not resample.
        for block in blocks[:-1]:
            kind = known[block][0] or config[field]
            if kind not in ("conv", "resnet"):
                raise config.wrong(field, 'it must be "conv" or "resnet"')
            kinds.setdefault(kind, name if known[block][0] else field)
    if attends["up_block_types"] != attends["down_block_types"][::-1]:
        raise config.wrong("up_block_types", "it must mirror down_block_types")
    if len(kinds) > 1:
        field = list(kinds.values())[1]
        raise config.wrong(field, "all levels must resample in one way, by a convolution or in a residual block")
    return attends["down_block_types"], next(iter(kinds), "conv")


def _groups(config: _Fields, widths: list[int], blocks: int) -> int:
    """The groups of all normalisations; raises where they do not divide a width, or differ in the middle."""
    groups = config.number("norm_num_groups")
    skips = [widths[0]]
    for level, width in enumerate(widths):
        skips += [width] * blocks + ([width] if level < len(widths) - 1 else [])
    normalised, inner = [*widths], widths[-1]
    for width in reversed(widths):
        for _ in range(blocks + 1):
            normalised.append(inner + skips.pop())
            inner = width
    wrong = sorted({width for width in normalised if width % groups})
    if wrong:
        raise config.wrong("norm_num_groups", f"it must divide {', '.join(map(str, wrong[:4]))}")
    config.expect("attn_norm_num_groups", (None, groups))
    return groups


def _kind(found: Mapping[str, Any], flags: dict[str, Any]) -> str:
    """Whether the network is a DDPM UNet; flags lose what says nothing then."""
    is_ddpm = (
        flags["sines_first"]
        and flags["norm_eps"] == 1e-6
        and flags["norm_groups"] == 32
        and (flags["pad_end"] or "resblock_updown" not in found)
        and not found.get("resblock_updown")
        and flags["num_head_channels"] == -1
        and not found["use_scale_shift_norm"]
        and not found["class_cond"]
        and flags["middle_norm"]
        and "." not in found["channel_mult"]
    )
    if is_ddpm:
        for name in ("num_heads", "num_head_channels", "num_heads_upsample", "use_new_attention_order"):
            del flags[name]
        for name in ("norm_groups", "norm_eps", "sines_first", "pad_end", "middle_norm"):
            del flags[name]
        for name in ("use_scale_shift_norm", "resblock_updown"):
            found.pop(name, None)  # type: ignore[attr-defined]
    return "DDPM" if is_ddpm else "ADM"
