"""Flags of the published models that their tensors cannot tell.

A row applies only to a network that has all that the row says of its tensors. Sources: the README files of
guided-diffusion, improved-diffusion, ILVR, P2-weighting, EGSDE and the DDPM ports.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError, display_name


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
ADM = {
    "learn_sigma": True, "class_cond": False, "use_scale_shift_norm": True, "resblock_updown": True, "in_channels": 3,
    "super_res": False, "num_heads": 4, "num_head_channels": 64, "use_new_attention_order": False, **LINEAR,
}  # fmt: skip
DDPM = {"num_channels": 128, "num_res_blocks": 2, "learn_sigma": False, "in_channels": 3, **LINEAR}
ENCODER = {
    "classifier_width": 128, "classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True,
    "classifier_pool": "attention", "num_head_channels": 64, **LINEAR,
}  # fmt: skip


def _adm(files: str, size: int, width: int, blocks: int, mult: str, factors: tuple, **other: Any) -> Published:
    """A network of guided-diffusion; other: flags that differ from the usual ones."""
    sizes = {"image_size": size, "num_channels": width, "num_res_blocks": blocks}
    return Published(files, "ADM", {**ADM, **sizes, "channel_mult": mult, "attention_factors": factors, **other})


def _ddpm(files: str, size: int, mult: str, factor: int) -> Published:
    sizes = {"image_size": size, "channel_mult": mult, "attention_factors": (factor,)}
    return Published(files, "DDPM", {**DDPM, **sizes})


def _encoder(files: str, size: int, depth: int, mult: str, classes: int, head: str = "out", **other: Any) -> Published:
    sizes = {"image_size": size, "classifier_depth": depth, "channel_mult": mult, "num_class": classes, "head": head}
    factors = tuple(size // side for side in (32, 16, 8))
    return Published(files, "ENCODER", {**ENCODER, **sizes, "attention_factors": factors, **other})


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
EDM_NAMES = re.compile(r"(?<![a-z])(edm2?|consistency|(cd|ct)[-_](imagenet|bedroom|cat|cifar|lsun))(?![a-z])", re.I)
EDM_FLAGS = {"sigma_data", "sigma_max", "sigma_min", "weight_schedule", "training_mode", "P_mean", "P_std"}


def refuse_edm(
    path: str, found: dict[str, Any], entries: Iterable[str], described: bool, given: Mapping[str, Any]
) -> None:
    """Raise InputError for a network whose process is EDM's or a consistency model's.

    found: the architecture. entries: names of hyper-parameters and metadata. described: whether the file states its
    noise schedule; then its name and layout are no reason. given: flags of the caller, whose noise schedule counts
    against the layout.
    """
    reason = None
    if sigmas := EDM_FLAGS & {*entries}:
        reason = f"its file has the entry {min(sigmas)}"
    elif described:
        return
    elif name := EDM_NAMES.search(os.path.basename(path)):
        reason = f"its name has {name[0]!r}"
    elif "noise_schedule" not in given and any(layout.items() <= found.items() for layout in EDM_LAYOUTS):
        reason = "it has their layout; give `noise_schedule` if it is none"
    if reason:
        what = f"is a model of EDM or a consistency model ({reason}); a model of DDPM's process is needed"
        raise InputError(f"{display_name(path)} {what}")
