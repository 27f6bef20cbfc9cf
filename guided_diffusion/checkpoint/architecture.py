"""Read a network's architecture from the names and shapes of its tensors.

All flags carry the names of `script_util`, except `attention_factors`, the downsampling factors at which there is
attention: they become sides (`attention_resolutions`) once the image size is known, which tensors cannot tell.

Every size is read from one tensor. That the others agree is checked when the network is filled.
"""

import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch

from ..errors import one_line
from .reading import is_average

State = Mapping[str, torch.Tensor]


class UnknownArchitecture(Exception):
    """The tensors fit no network of a kind; the message says what is missing or what was found."""


# Networks that are not supported, by a tensor that only they have.
OTHERS = {
    r"^first_stage_model\.|\.transformer_blocks\.": "a latent diffusion model (it has {}); a model of pixels is needed",
    r"(^|\.)(map_noise|map_layer0|emb_noise|emb_fourier|enc\.\d+x\d+_\w+)\.": (
        "a network of EDM's code (it has {}), whose noise is not that of DDPM; it is not supported"
    ),
    r"(^|\.)all_modules\.\d+\.": "a network of score_sde's code (it has {}), which is not supported",
}


def refuse_others(state: State) -> None:
    """Raise UnknownArchitecture, saying what it is, for a network that is known and not supported."""
    for key in state:
        for pattern, what in OTHERS.items():
            if re.search(pattern, key):
                raise UnknownArchitecture(f"is {what.format(one_line(key, 100))}")


def unwrap(state: State, embedding: str) -> State | None:
    """The tensors of a network without the prefixes of wrappers around it ("module."); None where there is no such one.

    embedding: a pattern for the tensors of its time embedding. Averaged weights are taken where a file has both.
    """
    pattern = re.compile(rf"(.*\.)?{embedding}\.(weight|bias)", re.DOTALL)
    prefixes = {match[1] or "" for match in map(pattern.fullmatch, state) if match}
    if not prefixes:
        return None
    prefix = min(prefixes, key=lambda p: (not is_average(p), len(p), p))
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def detect(detector: Callable[..., dict[str, Any]], state: State, **options: Any) -> dict[str, Any]:
    """The architecture by one of the detectors below, as a dict of flags.

    Flags that leave no trace in this network are left out. Raises UnknownArchitecture where tensors that tell the
    architecture are missing.
    """
    try:
        return detector(state, **options)
    except KeyError as error:
        name = error.args[0]
        if name in state:
            shape = list(state[name].shape)
            raise UnknownArchitecture(f"has the tensor {name} of shape {shape}, which fits no architecture") from None
        raise UnknownArchitecture(f"lacks the tensor {name}, which its architecture needs") from None


def multiple(width: int, base: int) -> str:
    """A short channel multiplier that gives a width: int(multiplier * base) == width."""
    texts = (f"{width / base:.{digits}g}" for digits in range(3, 18))
    return next((text for text in texts if int(float(text) * base) == width), f"{(width + 0.5) / base:g}")


def _modules(state):
    """Prefixes of the tensors' names, to the depth that networks have: "a.b.weight" gives "a" and "a.b"."""
    return {key[: dot.start()] for key in state for dot in islice(re.finditer(r"\.", key), 8)}


def _count(state, prefix):
    """Number of the modules prefix0, prefix1, …; KeyError names the first of them that is missing."""
    tails = (key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix))
    numbers = {int(tail) for tail in tails if tail.isascii() and tail.isdigit() and len(tail) < 6}
    gap = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if gap < max(len(numbers), 1):
        raise KeyError(f"{prefix}{gap}")
    return len(numbers)


def _size(state, name, axis=0):
    """Length of an axis of a tensor; KeyError, with the tensor's name, where it has none."""
    shape = state[name].shape
    if axis >= len(shape) or not shape[axis]:
        raise KeyError(name)
    return shape[axis]


def _shifts_and_scales(state):
    """Whether the time embedding gives a residual block two numbers per channel, not one."""
    return _size(state, "middle_block.0.emb_layers.1.weight") == 2 * _size(state, "middle_block.0.out_layers.3.weight")


def _channels(state, last):
    """Flags of the channels: those of the images, and whether the last layer predicts a variance beside the mean."""
    out = _size(state, f"{last}.weight")
    channels = 1 if out < 3 else 3
    return {"learn_sigma": out == 2 * channels, "in_channels": channels}


def adm(state: State) -> dict[str, Any]:
    """Architecture of an ADM UNet, or of a super-resolution model."""
    modules = _modules(state)
    base = _size(state, "time_embed.0.weight", 1)
    blocks = _count(state, "output_blocks.")
    # The last output block of every level but the finest ends with an upsampling layer, which ends its list.
    parts = ("in_layers", "out_layers", "conv")
    ups = sum(any(f"output_blocks.{i}.{j}.{part}" in modules for j in (1, 2) for part in parts) for i in range(blocks))
    levels = ups + 1
    per_level = blocks // levels
    if blocks % levels or per_level < 2:
        raise KeyError(f"output_blocks.{blocks}")
    widths, factors = [], []
    for level in reversed(range(levels)):
        first = f"output_blocks.{(levels - 1 - level) * per_level}"
        widths.insert(0, _size(state, f"{first}.0.out_layers.3.weight"))
        if f"{first}.1.qkv" in modules or f"{first}.1.proj_out" in modules:
            factors.insert(0, 2**level)
    flags = {
        "num_channels": base,
        "num_res_blocks": per_level - 1,
        "channel_mult": ",".join(multiple(width, base) for width in widths),
        "attention_factors": tuple(factors),
        **_channels(state, "out.2"),
        "class_cond": "label_emb.weight" in state,
        "use_scale_shift_norm": _shifts_and_scales(state),
    }
    if levels > 1:
        flags["resblock_updown"] = not any(name.endswith(".0.op") for name in modules)
    if flags["class_cond"]:
        flags["num_classes"] = _size(state, "label_emb.weight")
    if _size(state, "input_blocks.0.0.weight", 1) == 2 * flags["in_channels"]:
        flags["super_res"] = True  # the small image beside the noisy one
    return flags


def ddpm(state: State) -> dict[str, Any]:
    """Architecture of a DDPM UNet, in the ADM UNet's flag names."""
    modules = _modules(state)
    base = _size(state, "temb.dense.0.weight", 1)
    levels = range(_count(state, "down."))
    widths = [_size(state, f"down.{i}.block.0.conv2.weight") for i in levels]
    return {
        "num_channels": base, "num_res_blocks": _count(state, "down.0.block."),
        "channel_mult": ",".join(multiple(width, base) for width in widths),
        "attention_factors": tuple(2**i for i in levels if f"down.{i}.attn" in modules), **_channels(state, "conv_out"),
        "class_cond": False,
    }  # fmt: skip


def encoder(state: State, depth: int | None = None) -> dict[str, Any]:
    """Architecture of an encoder, in the flag names of the classifier.

    depth: the supposed classifier_depth, which counts where the tensors allow several.
    """
    modules = _modules(state)
    base = _size(state, "time_embed.0.weight", 1)
    head = "I2Iout" if "I2Iout" in modules else "out"
    if head not in modules:
        raise KeyError("out.0.weight")
    blocks = _count(state, "input_blocks.")
    convolved = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op" in modules]
    per_level = convolved[0] if convolved else _level_length(modules, blocks, depth)
    starts = range(1, blocks, per_level)
    widths = [_size(state, f"input_blocks.{i}.0.out_layers.3.weight") for i in starts]
    flags = {
        "classifier_width": base,
        "classifier_depth": per_level - 1,
        "channel_mult": ",".join(multiple(width, base) for width in widths),
        "attention_factors": tuple(2**level for level, i in enumerate(starts) if _attends(modules, i)),
        "classifier_use_scale_shift_norm": _shifts_and_scales(state),
        "head": head,
    }
    if len(widths) > 1:
        flags["classifier_resblock_updown"] = not convolved
    if f"{head}.2.qkv_proj" in modules:
        last = f"{head}.2.c_proj"
        positions = _size(state, f"{head}.2.positional_embedding", 1)
        flags["image_size"] = round(max(positions - 1, 1) ** 0.5) * 2 ** (len(widths) - 1)
        flags["classifier_pool"] = "attention"
    elif f"{head}.1" in modules:
        last, flags["classifier_pool"] = f"{head}.3", "spatial_v2"
    elif f"{head}.3" in modules:
        last, flags["classifier_pool"] = f"{head}.3", "adaptive"
    else:
        last, flags["classifier_pool"] = f"{head}.2", "spatial"
    flags["num_class"] = _size(state, f"{last}.weight")
    return flags


def _attends(modules, i):
    return f"input_blocks.{i}.1.qkv" in modules or f"input_blocks.{i}.1.proj_out" in modules


def _level_length(modules, blocks, depth):
    """Input blocks per level of an encoder whose residual blocks downsample.

    Block k * length is the k-th downsampling; it looks like any other residual block that keeps the width.
    """

    def fits(length):
        for i in range(1, blocks):
            widens = f"input_blocks.{i}.0.skip_connection" in modules
            first = i - i % length + 1
            # Only the first block of a level changes the width; a level attends in all of its blocks or in none, and
            # a downsampling block never does.
            if (i % length == 0 and (_attends(modules, i) or widens)) or (i % length > 1 and widens):
                return False
            if i % length and _attends(modules, i) != _attends(modules, first):
                return False
        return True

    lengths = [length for length in range(2, blocks + 1) if blocks % length == 0 and fits(length)]
    if not lengths:
        raise KeyError(f"input_blocks.{blocks}")
    # The supposed depth first, then the usual ones.
    return min(lengths, key=lambda length: (length - 1 != depth, abs(length - 3), length))
