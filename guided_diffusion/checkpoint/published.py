"""Flags of the published models that their tensors cannot tell.

A row applies only to a network that has all of the row's `tensors`; it then adds `flags`. Sources: the
README files of guided-diffusion, improved-diffusion, ILVR, P2-weighting, EGSDE and the DDPM ports.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import InputError, display_name


class Published(NamedTuple):
    """One published layout: its files' names, what its tensors have, and the flags that leave no trace in them."""

    files: str
    model_type: str
    tensors: dict[str, Any]
    flags: dict[str, Any]


LINEAR: dict[str, Any] = {
    "noise_schedule": "linear", "diffusion_steps": 1000, "predict_xstart": False, "rescale_timesteps": False,
}  # fmt: skip
COSINE: dict[str, Any] = {**LINEAR, "noise_schedule": "cosine"}
COSINE_4000: dict[str, Any] = {**COSINE, "diffusion_steps": 4000}
IMPROVED: dict[str, Any] = {"resblock_updown": False, "num_head_channels": -1}
"""Networks of improved-diffusion: convolutions that resample, four heads of any width."""

SIX, SEVEN, FIVE, FOUR = "1,1,2,2,4,4", "0.5,1,1,2,2,4,4", "1,1,2,3,4", "1,2,3,4"
ADM_TENSORS: dict[str, Any] = {
    "learn_sigma": True, "class_cond": False, "use_scale_shift_norm": True, "resblock_updown": True, "in_channels": 3,
}  # fmt: skip
ADM_FLAGS: dict[str, Any] = {"num_heads": 4, "num_head_channels": 64, "use_new_attention_order": False}


def _adm(
    files: str, size: int, width: int, blocks: int, mult: str, factors: tuple[int, ...], process: dict = LINEAR,
    **other: Any,
) -> Published:  # fmt: skip
    """A network of guided-diffusion; other: tensors or flags that differ from the usual ones."""
    told = {name: other.pop(name) for name in [*ADM_TENSORS, "super_res"] if name in other}
    sizes = {"num_channels": width, "num_res_blocks": blocks, "channel_mult": mult, "attention_factors": factors}
    tensors = {**sizes, **ADM_TENSORS, **told, **({"num_classes": 1000} if told.get("class_cond") else {})}
    return Published(files, "ADM", tensors, {"image_size": size, **ADM_FLAGS, **process, **other})


def _ddpm(files: str, size: int, mult: str, factor: int) -> Published:
    tensors = {
        "num_channels": 128, "num_res_blocks": 2, "channel_mult": mult, "attention_factors": (factor,),
        "learn_sigma": False, "in_channels": 3,
    }  # fmt: skip
    return Published(files, "DDPM", tensors, {"image_size": size, **LINEAR})


def _encoder(files: str, size: int, depth: int, mult: str, classes: int, head: str = "out", **flags: Any) -> Published:
    tensors = {
        "classifier_width": 128, "classifier_depth": depth, "channel_mult": mult,
        "attention_factors": tuple(size // side for side in (32, 16, 8)), "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True, "classifier_pool": "attention", "image_size": size, "num_class": classes,
        "head": head,
    }  # fmt: skip
    return Published(files, "ENCODER", tensors, {"num_head_channels": 64, **LINEAR, **flags})


PUBLISHED = (
    _adm("ILVR's and P2's models of AFHQ", 256, 128, 2, SIX, (16,), learn_sigma=False),
    _adm("ILVR's and P2's models", 256, 128, 1, SIX, (16,)),
    _adm("256x256_diffusion_uncond.pt, lsun_*.pt", 256, 256, 2, SIX, (8, 16, 32)),
    _adm("256x256_diffusion.pt", 256, 256, 2, SIX, (8, 16, 32), class_cond=True),
    _adm("512x512_diffusion.pt", 512, 256, 2, SEVEN, (16, 32, 64), class_cond=True),
    _adm("128x128_diffusion.pt", 128, 256, 2, FIVE, (4, 8, 16), num_head_channels=-1, class_cond=True),
    _adm("64x64_diffusion.pt", 64, 192, 3, FOUR, (2, 4, 8), COSINE, use_new_attention_order=True, dropout=0.1,
         class_cond=True),
    # Both upsamplers have the same levels; where their attention is tells them apart.
    _adm("64_256_upsampler.pt", 256, 192, 2, SIX, (8, 16, 32), num_head_channels=-1, class_cond=True, super_res=True),
    _adm("128_512_upsampler.pt", 512, 192, 2, SIX, (16, 32), class_cond=True, super_res=True),
    # improved-diffusion; what its README does not say has that project's defaults, rescaled timesteps among them.
    _adm("imagenet64_uncond_*.pt", 64, 128, 3, FOUR, (4, 8), COSINE_4000, rescale_timesteps=True, **IMPROVED),
    _adm("cifar10_uncond_*.pt", 32, 128, 3, "1,2,2,2", (2, 4), COSINE_4000, rescale_timesteps=True, dropout=0.3,
         **IMPROVED),
    _adm("imagenet64_cond_270M_250K.pt", 64, 192, 3, FOUR, (4, 8), COSINE_4000, class_cond=True, **IMPROVED),
    _adm("lsun_uncond_100M_*.pt", 256, 128, 2, SIX, (16,), num_heads=1, use_scale_shift_norm=False, **IMPROVED),
    _ddpm("celebahq_female_ddpm.pth and the DDPM models of 256 pixels", 256, SIX, 16),
    _ddpm("DDPM's model of CIFAR-10", 32, "1,2,2,2", 2),
    _encoder("64x64_classifier.pt", 64, 4, FOUR, 1000, noise_schedule="cosine"),
    _encoder("128x128_classifier.pt", 128, 2, FIVE, 1000),
    _encoder("256x256_classifier.pt", 256, 2, SIX, 1000),
    _encoder("512x512_classifier.pt", 512, 2, SEVEN, 1000),
    _encoder("EGSDE's extractors", 256, 2, SIX, 2, "I2Iout"),
)  # fmt: skip


def published(model_type: str, found: dict[str, Any]) -> Published | None:
    """The row that has all that the tensors tell (`architecture.detect`'s dict), or None."""
    rows = (row for row in PUBLISHED if row.model_type == model_type and row.tensors.items() <= found.items())
    return next(rows, None)


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
