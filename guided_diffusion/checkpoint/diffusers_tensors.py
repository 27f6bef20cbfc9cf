"""Tensors and configurations between our networks and diffusers' UNet2DModel: one table of names, read both ways."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import InputError, display_name
from ..script_util import attention_factors, channel_multipliers
from .diffusers import FIELDS, Description
from .reconcile import DDPM, EXTENSIONS, ModelInfo

RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
NAMES = {
    "DDPM": {
        "resnet": ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"),
        "ends": ("temb.dense.0", "temb.dense.1", "conv_in", "norm_out", "conv_out"),
        "middle": ("mid.block_1", "mid.attn_1", "mid.block_2"),
    },
    "ADM": {
        "resnet": ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
        "ends": ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"),
        "middle": ("middle_block.0", "middle_block.1", "middle_block.2"),
    },
}
ENDS = ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_norm_out", "conv_out")
QKV = ("to_q", "to_k", "to_v")


def _modules(kind: str, found: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
    """(our module, their module, None or the parts that ours packs) of every layer that has parameters."""
    names, levels, n = NAMES[kind], found["channel_mult"].count(",") + 1, found["num_res_blocks"]
    attends = [2**level in found["attention_factors"] for level in range(levels)]
    residual = bool(found.get("resblock_updown"))
    yield from ((ours, theirs, None) for ours, theirs in zip(names["ends"], ENDS))

    def resnet(ours: str, theirs: str) -> Iterator[tuple[str, str, None]]:
        return ((f"{ours}.{a}", f"{theirs}.{b}", None) for a, b in zip(names["resnet"], RESNET))

    def attention(ours: str, theirs: str) -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
        yield f"{ours}.norm", f"{theirs}.group_norm", None
        yield f"{ours}.proj_out", f"{theirs}.to_out.0", None
        if kind == "ADM":
            yield f"{ours}.qkv", theirs, QKV
        else:
            yield from ((f"{ours}.{part[-1]}", f"{theirs}.{part}", None) for part in QKV)

    for i in range(levels):
        for down, blocks in ((True, n), (False, n + 1)):
            side = "down" if down else "up"
            theirs, put = f"{side}_blocks.{i}", "input" if down else "output"
            level = i if down else levels - 1 - i  # diffusers counts the expanding half from the coarsest level
            start = i * (n + 1) + down  # of ADM's list of blocks
            for j in range(blocks):
                ours, attn = f"{put}_blocks.{start + j}.0", f"{put}_blocks.{start + j}.1"
                if kind == "DDPM":
                    ours, attn = f"{side}.{level}.block.{j}", f"{side}.{level}.attn.{j}"
                yield from resnet(ours, f"{theirs}.resnets.{j}")
                if attends[level]:
                    yield from attention(attn, f"{theirs}.attentions.{j}")
            if i == levels - 1:
                continue
            sampler = f"{theirs}.{side}samplers.0"
            if kind == "DDPM":
                ours, conv = f"{side}.{level}.{side}sample", ".conv"
            elif down:
                ours, conv = f"input_blocks.{start + n}.0", ".op"
            else:
                ours, conv = f"output_blocks.{start + n}.{2 if attends[level] else 1}", ".conv"
            yield from resnet(ours, sampler) if residual else iter([(f"{ours}{conv}", f"{sampler}.conv", None)])
    first, attn, second = names["middle"]
    yield from resnet(first, "mid_block.resnets.0")
    yield from attention(attn, "mid_block.attentions.0")
    yield from resnet(second, "mid_block.resnets.1")
    if found.get("class_cond"):
        yield "label_emb", "class_embedding", None


def to_ours(
    state: Mapping[str, torch.Tensor], description: Description
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors under our names, their name by ours). Tensors of no module keep their names."""
    rest, ours, names, kind = dict(state), {}, {}, description.kind.name
    for module, theirs, parts in _modules(kind, description.found):
        for end in ("weight", "bias"):
            sources = [f"{theirs}.{part}.{end}" for part in parts] if parts else [f"{theirs}.{end}"]
            name = f"{module}.{end}"
            names[name] = next((source for source in sources if source not in rest), sources[0])
            if names[name] not in rest:
                continue
            values = [rest.pop(source) for source in sources]
            value = values[0]  # also where shapes differ, which the check of shapes reports
            if parts and value.ndim and len({value.shape for value in values}) == 1:
                value = torch.cat(values)
            if value.ndim == 2 and (module.rsplit(".", 1)[-1] in ("qkv", "proj_out") or theirs.endswith(QKV)):
                value = value[:, :, None] if kind == "ADM" else value[:, :, None, None]
            ours[name] = value
    return {**ours, **rest}, names


# ---- ours to theirs --------------------------------------------------------------------------------------------------


def to_diffusers(
    state: Mapping[str, torch.Tensor], info: ModelInfo
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(tensors, unet configuration, scheduler configuration, index) of a diffusers model that computes the same.

    Raises InputError for a model that diffusers cannot express.
    """
    flags, kind, file = info.flags, info.model_type, display_name(info.path)
    if kind == "ENCODER":
        raise InputError(f"{file} is a classifier or extractor, for which diffusers has no class")
    if flags.get("super_res"):
        raise InputError(f"{file} is a super-resolution model, for which diffusers has no pipeline")
    size, base, channels = flags["image_size"], flags["num_channels"], flags.get("in_channels", 3)
    mults = channel_multipliers(flags["channel_mult"], size)
    widths = [int(mult * base) for mult in mults]
    if widths[0] != base:
        raise InputError(f"{file}: its first level is {widths[0]} wide, its base {base}; in diffusers both are one")
    if flags["rescale_timesteps"] and flags["diffusion_steps"] != 1000:
        raise InputError(f"{file}: its timesteps are rescaled (rescale_timesteps), which diffusers cannot do")
    factors = attention_factors(flags["attention_resolutions"], size)
    attends = [2**level in factors for level in range(len(widths))]
    adm = kind == "ADM"
    head = _head_width(file, flags, widths, attends) if adm else None
    residual, scale_shift = adm and flags["resblock_updown"], adm and flags["use_scale_shift_norm"]
    found = {
        **flags, "channel_mult": ",".join(map(str, mults)), "attention_factors": factors, "resblock_updown": residual,
    }  # fmt: skip
    fixed = {name: flags.get(name, value) for name, value in (EXTENSIONS if adm else DDPM.fixed).items()}
    if not fixed["middle_norm"] and not scale_shift:
        raise InputError(f"{file}: without middle_norm, diffusers needs use_scale_shift_norm")
    plain = "Resnet{}sampleBlock2D" if residual else "{}Block2D"
    config = {
        **FIELDS, "_class_name": "UNet2DModel", "sample_size": size, "in_channels": channels,
        "out_channels": channels * (2 if flags["learn_sigma"] else 1), "freq_shift": int(fixed["sines_first"]),
        "flip_sin_to_cos": not fixed["sines_first"],
        "down_block_types": ["AttnDownBlock2D" if at else plain.format("Down") for at in attends],
        "up_block_types": ["AttnUpBlock2D" if at else plain.format("Up") for at in reversed(attends)],
        "block_out_channels": widths, "layers_per_block": flags["num_res_blocks"],
        "downsample_padding": 0 if fixed["pad_end"] else 1, "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv", "dropout": flags["dropout"], "attention_head_dim": head,
        "norm_num_groups": fixed["norm_groups"],
        "attn_norm_num_groups": fixed["norm_groups"] if fixed["middle_norm"] and adm else None,
        "norm_eps": fixed["norm_eps"], "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "num_class_embeds": flags.get("num_classes") if flags["class_cond"] else None,
    }  # fmt: skip
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.21.0", **parts}
    return _their_tensors(state, info, found, head), config, _their_scheduler(info), index


def _head_width(file: str, flags: Mapping[str, Any], widths: list[int], attends: list[bool]) -> int | None:
    """The one width that all attention heads have; None for one head."""
    attended = {width for width, at in zip(widths, attends) if at} | {widths[-1]}
    if flags["num_head_channels"] != -1:
        return flags["num_head_channels"]
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise InputError(f"{file}: its halves differ in heads (num_heads_upsample), which diffusers cannot express")
    if flags["num_heads"] == 1:
        return None
    if len(attended) > 1:
        text = ", ".join(map(str, sorted(attended)))
        heads = f"num_heads={flags['num_heads']} in layers of {text} channels"
        raise InputError(f"{file}: it has {heads}; in diffusers all heads are equally wide")
    return attended.pop() // flags["num_heads"]


def _their_tensors(
    state: Mapping[str, torch.Tensor], info: ModelInfo, found: Mapping[str, Any], head: int | None
) -> dict[str, torch.Tensor]:
    theirs: dict[str, torch.Tensor] = {}
    for module, target, parts in _modules(info.model_type, found):
        for end in ("weight", "bias"):
            name = f"{module}.{end}"
            if name not in state:
                continue  # a shortcut where the width stays, the bias of a table of classes, a norm that is left out
            value = state[name]
            if parts:
                value = value.reshape(value.shape[0], -1) if end == "weight" else value
                if not info.flags["use_new_attention_order"] and head is not None:
                    # Head by head q, k, v, each of `head` rows, become q, k, v of all heads.
                    rows = value.reshape(-1, 3, head, *value.shape[1:]).transpose(0, 1)
                    value = rows.reshape(value.shape)
                theirs |= {f"{target}.{part}.{end}": chunk for part, chunk in zip(parts, value.chunk(3))}
                continue
            if end == "weight" and (module.endswith("proj_out") or target.endswith(QKV)):
                value = value.reshape(value.shape[0], -1)
            theirs[f"{target}.{end}"] = value
    return theirs


def _their_scheduler(info: ModelInfo) -> dict[str, Any]:
    """The configuration of a DDPMScheduler for the model's process; its "N" steps are linspace, as ours."""
    flags = info.flags
    steps, schedule = flags["diffusion_steps"], flags["noise_schedule"]
    name, _, text = schedule.partition(":")
    betas: dict[str, Any] = {"beta_schedule": name, "beta_start": 0.0001, "beta_end": 0.02, "trained_betas": None}
    if schedule == "linear":
        betas |= {"beta_start": 0.1 / steps, "beta_end": 20 / steps}
    elif schedule == "cosine":
        betas["beta_schedule"] = "squaredcos_cap_v2"
    elif name == "betas":
        betas |= {"beta_schedule": "linear", "trained_betas": [float(beta) for beta in text.split(",")]}
    elif text:
        betas["beta_start"], betas["beta_end"] = (float(part) for part in text.split(","))
    clip = info.choose("clip_denoised")
    fixed = "fixed_small" if info.choose("sigma_small") else "fixed_large"
    predictions = {"predict_xstart": "sample", "predict_v": "v_prediction"}
    return {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.21.0", "num_train_timesteps": steps, **betas,
        "prediction_type": next((text for flag, text in predictions.items() if flags.get(flag)), "epsilon"),
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed, "clip_sample": bool(clip),
        "clip_sample_range": float(clip) if clip else 1.0, "thresholding": False, "timestep_spacing": "linspace",
        "steps_offset": 0, "rescale_betas_zero_snr": False,
    }  # fmt: skip
