"""Models of diffusers, in and out, without importing diffusers: their files, configurations and tensors.

A UNet2DModel of the DDPM and ADM families is `ddpm.Model` or `unet.UNetModel` under other names. Others are refused
before weights are read. Fields that a configuration lacks have the library's defaults.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError, display_name, log, one_line, reading, shown
from ..gaussian_diffusion import get_named_beta_schedule
from ..script_util import attention_factors, channel_multipliers
from .architecture import multiple
from .reading import hash_file, read_file, read_json_object
from .reconcile import ADM, DDPM, EXTENSIONS, Kind, ModelInfo, Stated

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"


def side_of(size: Any) -> Any:
    """The side of a square `sample_size`, which is a number or [side, side]; other values as they are."""
    return size[0] if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1] else size


# Values that a field may have: a list of them, or (words, test). Where the default is null, null is one of them.
WHOLE = f"a whole number from 1 to {1 << 16}", lambda v: type(v) is int and 1 <= v <= 1 << 16
PART = "a number above 0 and below 1", lambda v: type(v) in (int, float) and 0 < v < 1
POSITIVE = "a number above 0", lambda v: type(v) in (int, float) and 0 < v < math.inf
DROPOUT = "a number from 0 on and below 1", lambda v: v == 0 or PART[1](v)
HEAD = f"null or {WHOLE[0]}", lambda v: v is None or WHOLE[1](v)
SIDE = "the side of a square in pixels", lambda v: WHOLE[1](side_of(v))
WIDTHS = "a list of widths", lambda v: isinstance(v, list) and v and all(map(WHOLE[1], v))
BETAS = "a list of numbers above 0 and below 1", lambda v: isinstance(v, list) and v and all(map(PART[1], v))
BLOCKS = "a list of blocks", lambda v: isinstance(v, list)

# Fields of a UNet2DModel's configuration: the library's default, and the values that have a meaning here.
UNET: dict[str, tuple[Any, Any]] = {
    "sample_size": (None, SIDE), "in_channels": (3, [1, 3]), "out_channels": (3, [1, 2, 3, 6]),
    "center_input_sample": (False, [False]), "time_embedding_type": ("positional", ["positional"]),
    "time_embedding_dim": (None, WHOLE), "freq_shift": (0, [0, 1]), "flip_sin_to_cos": (True, [True, False]),
    "down_block_types": (["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"], BLOCKS),
    "mid_block_type": ("UNetMidBlock2D", ["UNetMidBlock2D"]),
    "up_block_types": (["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"], BLOCKS),
    "block_out_channels": ([224, 448, 672, 896], WIDTHS), "layers_per_block": (2, WHOLE),
    "mid_block_scale_factor": (1, [1]), "downsample_padding": (1, [0, 1]),
    "downsample_type": ("conv", ["conv", "resnet"]), "upsample_type": ("conv", ["conv", "resnet"]),
    "dropout": (0.0, DROPOUT), "act_fn": ("silu", ["silu", "swish"]), "attention_head_dim": (8, HEAD),
    "norm_num_groups": (32, WHOLE), "attn_norm_num_groups": (None, WHOLE), "norm_eps": (1e-5, PART),
    "resnet_time_scale_shift": ("default", ["default", "scale_shift"]), "add_attention": (True, [True]),
    "class_embed_type": (None, []), "num_class_embeds": (None, WHOLE),
}  # fmt: skip
FIELDS = {name: default for name, (default, _) in UNET.items()}
# Further fields without a meaning here: of EMAModel, and of embeddings of other kinds.
UNUSED = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
UNUSED += ("num_train_timesteps",)

# Fields of a scheduler's configuration.
PROCESS: dict[str, tuple[Any, Any]] = {
    "num_train_timesteps": (1000, WHOLE), "beta_start": (0.0001, PART), "beta_end": (0.02, PART),
    "beta_schedule": ("linear", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]),
    "trained_betas": (None, BETAS), "prediction_type": ("epsilon", ["epsilon", "sample", "v_prediction"]),
    "variance_type": (None, ["fixed_small", "fixed_large", "fixed_small_log", "fixed_large_log", "learned_range"]),
    "clip_sample": (None, [True, False]), "clip_sample_range": (1.0, POSITIVE), "thresholding": (None, [False]),
    "rescale_betas_zero_snr": (None, [False]), "use_flow_sigmas": (None, [False]),
}  # fmt: skip

# Schedulers that share DDPM's forward process, and the models of others.
CLIPPING = ("DDPM", "DDPMParallel", "DDIM", "DDIMParallel")
SCHEDULERS = (
    *CLIPPING,
    *("PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LMSDiscrete"),
    *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
)
OTHER_PROCESSES = {
    "ScoreSde|KarrasVe": "a variance-exploding model", "CMStochastic|LCM|TCD": "a consistency model",
    "FlowMatch": "a flow-matching model", "EDM": "a model with EDM's preconditioning",
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """The files of a diffusers model.

    path: as given; place: the folder of the network's files; weights: the file, where one was given. files, json: paths
    and contents of the parts index, config and scheduler; no path and {} for a missing one.
    """

    path: str
    place: str
    weights: str | None
    files: dict[str, str]
    json: dict[str, dict[str, Any]]

    def relative(self, path: str) -> str:
        """The name of one of its files for a message."""
        return display_name(os.path.relpath(path, self.path if os.path.isdir(self.path) else self.place))

    def about(self, path: str) -> str:
        """The model and one of its files, the beginning of a message."""
        return f"{display_name(self.path)}: {self.relative(path)}"

    def fingerprint(self, hashes: Mapping[str, str]) -> str:
        """The identity of the model in a run's record; hashes: of the weights' files, by path."""
        digest = hashlib.sha256()
        for path, value in {**{path: hash_file(path) for path in self.files.values()}, **hashes}.items():
            digest.update(f"{self.relative(path)}\0{value}\n".encode("utf-8", "surrogateescape"))
        return f"sha256 {digest.hexdigest()}"


# ---- finding the files -----------------------------------------------------------------------------------------------


def locate(path: str) -> Folder | None:
    """The diffusers model at a path; None where there is none: a file of another kind, or nothing.

    A path is a folder with model_index.json (the network in unet/ or beside it), the network's own folder, a
    checkpoint-N of diffusers' training scripts (averaged weights before others), or a weights file beside config.json.
    Raises InputError for a folder that holds no such model.
    """
    if os.path.isfile(path):
        beside = os.path.isfile(os.path.join(os.path.dirname(path), CONFIG))
        return from_weights(path) if beside and os.path.basename(path).startswith(WEIGHTS) else None
    if not os.path.isdir(path):
        return None
    averaged, plain = (os.path.join(path, name) for name in ("unet_ema", "unet"))
    for place in (plain, path) if os.path.isfile(os.path.join(path, INDEX)) else (path, averaged, plain):
        if os.path.isfile(os.path.join(place, CONFIG)):
            if place == averaged and os.path.isdir(plain):
                log.info("%s: the averaged weights in unet_ema are taken, not those in unet", display_name(path))
            return _read(path, place)
    held = sorted(name for name in os.listdir(path) if name.endswith((".pt", ".pth", ".ckpt", ".safetensors")))
    hint = f"; it holds {', '.join(map(display_name, held[:3]))}" if held else ""
    needed = f"a checkpoint file or a diffusers model is needed{hint}"
    raise InputError(f"{display_name(path)} is a folder without {CONFIG}; {needed}")


def from_weights(path: str) -> Folder:
    """The model that a weights file of any name belongs to; config.json must be beside it."""
    place = os.path.dirname(path) or "."
    if "://" in path or not os.path.isfile(os.path.join(place, CONFIG)):
        needed = f"its {CONFIG} is needed beside it"
        raise InputError(f"{display_name(path)} has the tensors of a diffusers model; {needed}")
    return _read(path, place, path)


def _read(path: str, place: str, weights: str | None = None) -> Folder:
    """Read the configuration files; place: the network's folder."""
    whole = os.path.abspath(place)
    above = os.path.dirname(whole)
    root = above if os.path.basename(whole) in ("unet", "unet_ema") else whole
    # A training's checkpoint-N has its scheduler one folder higher.
    training = [os.path.dirname(each) for each in (root, above) if os.path.basename(each).startswith("checkpoint-")]
    schedulers = [*(os.path.join(each, "scheduler") for each in (root, above, *training)), root, whole]
    places = {
        "index": [os.path.join(root, INDEX)],
        "config": [os.path.join(place, CONFIG)],
        "scheduler": [os.path.join(each, SCHEDULER) for each in schedulers],
    }
    found = {part: next(filter(os.path.isfile, paths), "") for part, paths in places.items()}
    contents = {part: read_json_object(file) if file else {} for part, file in found.items()}
    return Folder(path, place, weights, {part: file for part, file in found.items() if file}, contents)


def weight_files(folder: Folder) -> list[str]:
    """The files of the weights, as diffusers chooses them: shards before a whole file, safetensors before pickles.

    Half precision only where nothing else is available. Raises InputError.
    """
    if folder.weights:
        return [folder.weights]
    for variant in ("safetensors", "bin", "fp16.safetensors", "fp16.bin"):
        path = os.path.join(folder.place, f"{WEIGHTS}.{variant}")
        if os.path.isfile(f"{path}.index.json"):
            return _shards(folder, f"{path}.index.json")
        if os.path.isfile(path):
            if variant.startswith("fp16"):
                log.info("%s: only half-precision weights are available", folder.about(path))
            return [path]
    raise InputError(f"{folder.about(folder.files['config'])} has no {WEIGHTS}.safetensors or .bin beside it")


def _shards(folder: Folder, index: str) -> list[str]:
    with reading(index, "an index of shards"):
        names = sorted(set(read_json_object(index)["weight_map"].values()))
        for name in names:
            if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder.place, name)):
                raise ValueError(f"{shown(name)} is no file of its folder")
    return [os.path.join(folder.place, name) for name in names]


def read_weights(folder: Folder) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(the network's tensors under diffusers' present names, hashes of the files by path)."""
    state: dict[str, torch.Tensor] = {}
    hashes = {}
    for file in weight_files(folder):
        contents = read_file(file)
        state |= contents.tensors
        hashes[file] = contents.sha256
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    pattern = re.compile(r"(\.attentions\.\d+\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda m: m[1] + renamed[m[2]], key): value for key, value in state.items()}, hashes


# ---- configuration to flags ------------------------------------------------------------------------------------------


def describe(folder: Folder) -> tuple[Kind, dict[str, Any], Stated, dict[str, Any]]:
    """The network and process of a diffusers model in our terms. Raises InputError for others.

    Returns the arguments of `reconcile`, and the entries of the scheduler for `sigma_small` and `clip_denoised`.
    """
    name, network = display_name(folder.path), _class(folder.json["config"], "UNet2DModel")
    # [null, null] is no part.
    parts = {part for part, kind in folder.json["index"].items() if not isinstance(kind, list) or any(kind)}
    if network == "UNet2DConditionModel" or "text_encoder" in parts:
        raise InputError(f"{name} is a text-conditional model (its network is a {network}), which is not supported")
    whole = os.path.abspath(folder.place)
    beside = os.listdir(os.path.dirname(whole)) if os.path.basename(whole) == "unet" else ()
    if latent := [part for part in ("vqvae", "vae", "movq") if part in parts or part in beside]:
        needed = "and one of pixels is needed; in Python, SDDMPipeline takes it"
        raise InputError(f"{name} is a latent diffusion model (it has {latent[0]}), {needed}")
    if network != "UNet2DModel":
        raise InputError(f"{name}: its network is a {network}; a UNet2DModel is needed")
    refuse_other_processes(name, folder.json["scheduler"])
    files = {part: folder.about(folder.files[part]) for part in folder.files}
    process = process_flags(folder.json["scheduler"], files.get("scheduler", SCHEDULER))
    learned = process.pop("learn_sigma", False)
    scheduler = {name: process.pop(name) for name in ("clip_denoised", "sigma_small") if name in process}
    hint = "; in Python, SDDMPipeline takes any UNet2DModel"
    config = _Fields(files["config"], UNET, folder.json["config"], hint)
    for name, value in config.items():
        if not (name in UNET or name in UNUSED or name.startswith("_") or value is None or value is False):
            raise config.wrong(name, "this field is not known here")
    kind, found, flags = _network(config, learned)
    return kind, found, Stated(flags | process, files["config"], bool(process)), scheduler


class _Fields(dict[str, Any]):
    """The fields of a JSON file with a schema's defaults, checked. hint: the end of error lines."""

    def __init__(self, file: str, schema: Mapping[str, Any], given: Mapping[str, Any], hint: str = "") -> None:
        super().__init__({**{name: default for name, (default, _) in schema.items()}, **given})
        self.file, self.hint = file, hint
        for name, (default, fits) in schema.items():
            if self[name] is not None or default is not None:
                self.expect(name, fits)

    def wrong(self, name: str, reason: str) -> InputError:
        """An error that names a field, its value, and what would fit."""
        text = one_line(json.dumps(self[name], default=str), 100)
        return InputError(f"{self.file} has {one_line(name, 60)}={text}; {reason}{self.hint}")

    def expect(self, name: str, fits: Any) -> None:
        """Raise unless a field's value is one of a list, or passes the test of a pair (words, test)."""
        value = self[name]
        if not isinstance(fits, list):
            words, fit = fits[0], fits[1](value)
        else:
            words = " or ".join(map(json.dumps, fits or [None]))
            fit = any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in fits)
        if not fit:
            raise self.wrong(name, f"it must be {words}")


def _class(content: Mapping[str, Any], otherwise: str) -> str:
    return one_line(content.get("_class_name") or otherwise, 60)


def refuse_other_processes(name: str, config: Mapping[str, Any]) -> None:
    """Raise InputError for a scheduler that is not of DDPM's process. config: its configuration."""
    scheduler = _class(config, "DDPMScheduler")
    what = next((what for pattern, what in OTHER_PROCESSES.items() if re.match(pattern, scheduler)), "")
    if what or scheduler.removesuffix("Scheduler") not in SCHEDULERS:
        what = f" is {what} (its scheduler is a {scheduler})" if what else f": its scheduler is a {scheduler}"
        raise InputError(f"{name}{what}; a model of DDPM's process is needed")


def process_flags(config: Mapping[str, Any], file: str = SCHEDULER) -> dict[str, Any]:
    """The flags of a scheduler's process; sigma_small, learn_sigma and clip_denoised only where it tells them.

    config: its configuration, {} without one. file: its name for messages. Raises InputError.
    """
    if not config:
        return {}
    name = _class(config, "DDPMScheduler").removesuffix("Scheduler")
    usual: dict[str, Any] = {"clip_sample": name in CLIPPING}
    if name.startswith("DDPM"):
        usual["variance_type"] = "fixed_small"
    # Two fields had other names in 2022.
    if "timesteps" in config:
        usual["num_train_timesteps"] = config["timesteps"]
    if config.get("predict_epsilon") is False:
        usual["prediction_type"] = "sample"
    fields = _Fields(file, PROCESS, {**usual, **config})
    betas, predicted, steps = (fields[name] for name in ("trained_betas", "prediction_type", "num_train_timesteps"))
    variance, limit = fields["variance_type"] or "", fields["clip_sample_range"]
    schedule, start, end = fields["beta_schedule"], float(fields["beta_start"]), float(fields["beta_end"])
    if betas is not None:
        steps, schedule = len(betas), "betas:" + ",".join(repr(float(beta)) for beta in betas)
    elif schedule == "squaredcos_cap_v2":
        schedule = "cosine"
    elif schedule != "laplace":  # our linear schedule's ends depend on its length
        ours = schedule == "linear" and math.isclose(start, 0.1 / steps) and math.isclose(end, 20 / steps)
        schedule = "linear" if ours else f"{schedule}:{start!r},{end!r}"
    process = {
        "diffusion_steps": steps, "noise_schedule": schedule, "rescale_timesteps": False,
        "predict_xstart": predicted == "sample", "predict_v": predicted == "v_prediction",
    }  # fmt: skip
    try:
        get_named_beta_schedule(schedule, steps)
    except InputError as error:
        raise fields.wrong("beta_start" if betas is None else "trained_betas", error.reason) from None
    if variance:
        process |= {"learn_sigma": True} if variance == "learned_range" else {"sigma_small": "small" in variance}
    if name in (*CLIPPING, "HeunDiscrete"):
        process["clip_denoised"] = bool(fields["clip_sample"]) and (True if limit == 1 else float(limit))
    return process


def _network(config: _Fields, learned: bool) -> tuple[Kind, dict[str, Any], dict[str, Any]]:
    """(kind, flags that tensors tell, flags that they do not); learned: whether the scheduler expects variances."""
    channels = config["in_channels"]
    out = channels * (2 if learned else 1)
    words = f"{out} where variance_type is {'' if learned else 'not '}learned_range"
    config.expect("out_channels", (words, lambda value: value == out))
    widths, groups, head = (config[name] for name in ("block_out_channels", "norm_num_groups", "attention_head_dim"))
    sines_first = not config["flip_sin_to_cos"]
    config.expect("time_embedding_dim", [None, 4 * widths[0]])
    config.expect("freq_shift", [int(sines_first)])
    config.expect("attn_norm_num_groups", [None, groups])
    attends, resampling = _levels(config, len(widths))
    attended = [width for width, at in zip(widths, attends) if at] + widths[-1:]
    for name, value, divided in (("norm_num_groups", groups, widths), ("attention_head_dim", head or 1, attended)):
        if any(width % value for width in divided):
            raise config.wrong(name, f"it must divide {', '.join(map(str, sorted(set(divided))))}")
    shifts, classes, size = (config[n] for n in ("resnet_time_scale_shift", "num_class_embeds", "sample_size"))
    found: dict[str, Any] = {
        "num_channels": widths[0], "num_res_blocks": config["layers_per_block"],
        "channel_mult": ",".join(multiple(width, widths[0]) for width in widths),
        "attention_factors": tuple(2**level for level, at in enumerate(attends) if at),
        "class_cond": classes is not None, "use_scale_shift_norm": shifts == "scale_shift",
        "learn_sigma": learned, "in_channels": channels,
        **({"num_classes": classes} if classes is not None else {}),
    }  # fmt: skip
    flags: dict[str, Any] = {
        "num_heads": 1 if head is None else 4, "num_head_channels": -1 if head is None else head,
        "num_heads_upsample": -1, "use_new_attention_order": True, "dropout": float(config["dropout"]),
        "norm_groups": groups, "norm_eps": float(config["norm_eps"]), "sines_first": sines_first,
        "middle_norm": shifts != "scale_shift" or config["attn_norm_num_groups"] is not None,
        **({"image_size": side_of(size)} if size is not None else {}),
    }  # fmt: skip
    if len(widths) > 1:  # otherwise nothing resamples
        found["resblock_updown"] = resampling == "resnet"
        flags["pad_end"] = config["downsample_padding"] == 0 and resampling == "conv"
    # A DDPM UNet has these flags by itself.
    fixed = {**DDPM.fixed, "num_head_channels": -1, "use_scale_shift_norm": False, "resblock_updown": False}
    if classes is not None or "." in found["channel_mult"] or not fixed.items() <= {**fixed, **found, **flags}.items():
        return ADM, found, flags
    dropped = {*fixed, "num_heads", "num_heads_upsample", "use_new_attention_order"}
    found, flags = ({name: each[name] for name in each if name not in dropped} for each in (found, flags))
    return DDPM, found, flags


def _levels(config: _Fields, levels: int) -> tuple[list[bool], str]:
    """Which levels attend, and how all of them resample: "conv" or "resnet"."""
    attends, kinds = {}, set()
    for way in ("down", "up"):
        name, title = f"{way}_block_types", way.title()
        # How a block resamples, and whether it attends.
        known = {
            f"{title}Block2D": ("conv", False),
            f"Resnet{title}sampleBlock2D": ("resnet", False),
            f"Attn{title}Block2D": (config[f"{way}sample_type"], True),
        }
        blocks = config[name]
        if len(blocks) != levels or not all(isinstance(block, str) and block in known for block in blocks):
            raise config.wrong(name, f"it must be a list of {levels} of {', '.join(known)}")
        attends[way] = [known[block][1] for block in blocks]
        kinds |= {known[block][0] for block in blocks[:-1]}  # the last block of a list does not resample
    if attends["up"] != attends["down"][::-1]:
        raise config.wrong("up_block_types", "it must mirror down_block_types")
    if len(kinds) > 1:
        one = "all levels must resample in one way, by a convolution or in a residual block (see upsample_type)"
        raise config.wrong("up_block_types", one)
    return attends["down"], next(iter(kinds), "conv")


# ---- tensors ---------------------------------------------------------------------------------------------------------

# Modules of both networks under diffusers' names: outside of blocks, in the middle, and parts of blocks (those that
# have the same name there are left out).
ENDS = {
    "temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2", "conv_in": "conv_in",
    "norm_out": "conv_norm_out", "conv_out": "conv_out", "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out",
    "out.2": "conv_out", "label_emb": "class_embedding",
}  # fmt: skip
MIDDLE = {
    "block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1",
    "0": "resnets.0", "1": "attentions.0", "2": "resnets.1",
}  # fmt: skip
PARTS = {
    "temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut", "in_layers.0": "norm1", "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut", "norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v",
    "proj_out": "to_out.0", "op": "conv",
}  # fmt: skip


def _their_names(name: str, levels: int, blocks: int) -> list[str]:
    """diffusers' name of a tensor of ours, or the names of the three that ours packs; blocks: per level."""
    module, _, end = name.rpartition(".")
    if module in ENDS:
        return [f"{ENDS[module]}.{end}"]
    place, part = re.fullmatch(r"(.+?)\.(\w+_layers\.\d|\w+)", module).groups()  # type: ignore[union-attr]
    half, first, *rest = place.split(".")
    if half in ("mid", "middle_block"):
        theirs = f"mid_block.{MIDDLE[first]}"
    elif half in ("down", "up"):
        # diffusers counts the levels of the upper half from the coarsest one.
        i = int(first) if half == "down" else levels - 1 - int(first)
        kind = {"block": "resnets", "attn": "attentions"}.get(rest[0])
        theirs = f"{half}_blocks.{i}." + (f"{kind}.{rest[1]}" if kind else f"{half}samplers.0")
    else:
        half = "down" if half == "input_blocks" else "up"
        i, j = divmod(int(first) - (half == "down"), blocks + 1)
        resamples = j == blocks if half == "down" else rest[0] != "0"
        attends = part in ("norm", "qkv", "proj_out")
        inner = f"attentions.{j}" if attends else f"{half}samplers.0" if resamples else f"resnets.{j}"
        theirs = f"{half}_blocks.{i}.{inner}"
    parts = ("to_q", "to_k", "to_v") if part == "qkv" else (PARTS.get(part, part),)
    return [f"{theirs}.{each}.{end}" for each in parts]


def to_ours(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], flags: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors under our names, their name by ours). Tensors of no module keep their names.

    wanted, flags: the state dict and the flags of the network that they are for.
    """
    rest, ours, names = dict(state), {}, {}
    levels = len(channel_multipliers(flags["channel_mult"], flags["image_size"]))
    for name, like in wanted.items():
        sources = _their_names(name, levels, flags["num_res_blocks"])
        names[name] = next((source for source in sources if source not in rest), sources[0])
        if names[name] in rest:
            values = [rest.pop(source) for source in sources]
            # Where shapes differ, the first is kept for the check of shapes to report.
            value = torch.cat(values) if values[0].ndim and len({each.shape for each in values}) == 1 else values[0]
            ours[name] = value.reshape(*value.shape, *[1] * (like.ndim - 2)) if value.ndim == 2 else value
    return {**ours, **rest}, names


def to_diffusers(
    state: Mapping[str, torch.Tensor], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(tensors, unet configuration, scheduler configuration, index) of a diffusers model that computes the same.

    Raises InputError for a model that diffusers cannot express.
    """
    flags, adm, file = info.flags, info.model_type == "ADM", display_name(info.path)
    if info.model_type == "ENCODER":
        raise InputError(f"{file} is a classifier or extractor, for which diffusers has no class")
    if flags.get("super_res"):
        raise InputError(f"{file} is a super-resolution model, for which diffusers has no pipeline")
    size, base, channels = flags["image_size"], flags["num_channels"], flags.get("in_channels", 3)
    widths = [int(mult * base) for mult in channel_multipliers(flags["channel_mult"], size)]
    if widths[0] != base:
        raise InputError(f"{file}: its first level is {widths[0]} wide, its base {base}; in diffusers both are one")
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        raise InputError(f"{file}: its timesteps are rescaled (rescale_timesteps), which diffusers cannot do")
    factors = attention_factors(flags["attention_resolutions"], size)
    attends = [2**level in factors for level in range(len(widths))]
    attended = sorted({width for width, at in zip(widths, attends) if at} | {widths[-1]})
    head = _head_width(file, flags, attended) if adm else None
    residual, scale_shift = adm and flags["resblock_updown"], adm and flags["use_scale_shift_norm"]
    fixed = {name: flags.get(name, value) for name, value in (EXTENSIONS if adm else DDPM.fixed).items()}
    if not fixed["middle_norm"] and not scale_shift:
        raise InputError(f"{file}: without middle_norm, diffusers needs use_scale_shift_norm")
    plain, resampling = ("Resnet{}sampleBlock2D", "resnet") if residual else ("{}Block2D", "conv")
    config = {
        **FIELDS, "_class_name": "UNet2DModel", "sample_size": size, "in_channels": channels,
        "out_channels": channels * (2 if flags["learn_sigma"] else 1), "freq_shift": int(fixed["sines_first"]),
        "flip_sin_to_cos": not fixed["sines_first"],
        "down_block_types": ["AttnDownBlock2D" if at else plain.format("Down") for at in attends],
        "up_block_types": ["AttnUpBlock2D" if at else plain.format("Up") for at in reversed(attends)],
        "block_out_channels": widths, "layers_per_block": flags["num_res_blocks"],
        "downsample_padding": 0 if fixed["pad_end"] else 1, "downsample_type": resampling,
        "upsample_type": resampling, "dropout": flags["dropout"], "attention_head_dim": head,
        "norm_num_groups": fixed["norm_groups"],
        "attn_norm_num_groups": fixed["norm_groups"] if fixed["middle_norm"] and adm else None,
        "norm_eps": fixed["norm_eps"], "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": flags.get("num_classes") if flags["class_cond"] else None,
    }  # fmt: skip
    theirs: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        names = _their_names(name, len(widths), flags["num_res_blocks"])
        if ".attentions." in names[0] and value.ndim > 2:
            value = value.flatten(1)
        if len(names) == 3 and head is not None and not flags["use_new_attention_order"]:
            # Head by head q, k, v, each of `head` rows, become q, k, v of all heads.
            value = value.unflatten(0, (-1, 3, head)).transpose(0, 1).flatten(0, 2)
        theirs |= zip(names, value.chunk(len(names)))
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.21.0", **parts}
    return theirs, config, _their_scheduler(info), index


def _head_width(file: str, flags: Mapping[str, Any], attended: list[int]) -> int | None:
    """The one width that all attention heads have, None for one head; attended: widths of layers with attention."""
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise InputError(f"{file}: its halves differ in heads (num_heads_upsample), which diffusers cannot express")
    if flags["num_heads"] > 1 and len(attended) > 1:
        heads = f"num_heads={flags['num_heads']} in layers of {', '.join(map(str, attended))} channels"
        raise InputError(f"{file}: it has {heads}; in diffusers all heads are equally wide")
    return None if flags["num_heads"] == 1 else attended[0] // flags["num_heads"]


def _their_scheduler(info: ModelInfo) -> dict[str, Any]:
    """The configuration of a DDPMScheduler for the model's process; its "N" steps are linspace, as ours."""
    flags, steps, clip = info.flags, info.flags["diffusion_steps"], info.choose("clip_denoised")
    name, _, text = flags["noise_schedule"].partition(":")
    betas: dict[str, Any] = {"beta_schedule": name, "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None}
    if name == "cosine":
        betas["beta_schedule"] = "squaredcos_cap_v2"
    elif name == "betas":
        betas |= {"beta_schedule": "linear", "trained_betas": [float(beta) for beta in text.split(",")]}
    elif text:
        betas["beta_start"], betas["beta_end"] = (float(part) for part in text.split(","))
    elif name == "linear":
        betas |= {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
    fixed = "fixed_small" if info.choose("sigma_small") else "fixed_large"
    predicted = "sample" if flags.get("predict_xstart") else "v_prediction" if flags.get("predict_v") else "epsilon"
    return {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.21.0", "num_train_timesteps": steps, **betas,
        "prediction_type": predicted, "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "clip_sample": bool(clip), "clip_sample_range": float(clip) if clip else 1.0, "thresholding": False,
        "timestep_spacing": "linspace", "steps_offset": 0, "rescale_betas_zero_snr": False,
    }  # fmt: skip
