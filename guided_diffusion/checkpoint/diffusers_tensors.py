"""Tensors and configurations between our networks and diffusers' UNet2DModel: one table of names, read both ways."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, display_name
from ..script_util import attention_factors, channel_multipliers
from .diffusers import FIELDS
from .reconcile import DDPM, EXTENSIONS, ModelInfo

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


# ---- ours to theirs --------------------------------------------------------------------------------------------------


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
    head = _head_width(file, flags, widths, attends) if adm else None
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


def _head_width(file: str, flags: Mapping[str, Any], widths: list[int], attends: list[bool]) -> int | None:
    """The one width that all attention heads have; None for one head."""
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise InputError(f"{file}: its halves differ in heads (num_heads_upsample), which diffusers cannot express")
    if flags["num_heads"] == 1:
        return None
    attended = sorted({width for width, at in zip(widths, attends) if at} | {widths[-1]})
    if len(attended) > 1:
        heads = f"num_heads={flags['num_heads']} in layers of {', '.join(map(str, attended))} channels"
        raise InputError(f"{file}: it has {heads}; in diffusers all heads are equally wide")
    return attended[0] // flags["num_heads"]


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
