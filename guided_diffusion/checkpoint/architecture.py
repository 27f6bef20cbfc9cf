"""Read a network's architecture from the names and shapes of its tensors.

All flags carry the names of `script_util`, except `attention_factors`, the downsampling factors at which there is
attention: they become sides (`attention_resolutions`) once the image size is known, which tensors cannot tell.

Every size is read from one tensor. That the others agree is checked when the network is filled. Flags that leave no
trace in a network are left out. A detector raises KeyError for a tensor that it needs and that is missing, or whose
shape fits no architecture.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch

from .reading import is_average

State = Mapping[str, torch.Tensor]


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


def adm(state: State) -> dict[str, Any]:
    """Architecture of an ADM UNet, or of a super-resolution model."""
    modules = _modules(state)
    blocks = _count(state, "output_blocks.")
    # The last output block of every level but the finest ends with an upsampling layer, which ends its list.
    parts = ("in_layers", "out_layers", "conv")
    ups = sum(any(f"output_blocks.{i}.{j}.{part}" in modules for j in (1, 2) for part in parts) for i in range(blocks))
    length = blocks // (ups + 1)
    if blocks % (ups + 1) or length < 2:
        raise KeyError(f"output_blocks.{blocks}")
    firsts = [f"output_blocks.{i}" for i in reversed(range(0, blocks, length))]
    flags = {
        **_flags(state, "num_channels", "num_res_blocks", length, firsts),
        **_channels(state, "out.2"),
        "class_cond": "label_emb.weight" in state,
        "use_scale_shift_norm": _shifts_and_scales(state),
    }
    if ups:
        flags["resblock_updown"] = not any(name.endswith(".0.op") for name in modules)
    if flags["class_cond"]:
        flags["num_classes"] = _size(state, "label_emb.weight")
    if _size(state, "input_blocks.0.0.weight", 1) == 2 * flags["in_channels"]:
        flags["super_res"] = True  # the small image beside the noisy one
    return flags


def ddpm(state: State) -> dict[str, Any]:
    """Architecture of a DDPM UNet, in the ADM UNet's flag names."""
    modules, base = _modules(state), _size(state, "temb.dense.0.weight", 1)
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
    head = "I2Iout" if "I2Iout" in modules else "out"
    if head not in modules:
        raise KeyError("out.0.weight")
    blocks = _count(state, "input_blocks.")
    strided = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op" in modules]
    length = strided[0] if strided else _level_length(modules, blocks, depth)
    firsts = [f"input_blocks.{i}" for i in range(1, blocks, length)]
    flags = {
        **_flags(state, "classifier_width", "classifier_depth", length, firsts),
        "classifier_use_scale_shift_norm": _shifts_and_scales(state),
        "head": head,
    }
    if len(firsts) > 1:
        flags["classifier_resblock_updown"] = not strided
    last = f"{head}.3"
    if f"{head}.2.qkv_proj" in modules:
        last, flags["classifier_pool"] = f"{head}.2.c_proj", "attention"
        positions = _size(state, f"{head}.2.positional_embedding", 1)
        flags["image_size"] = round(max(positions - 1, 1) ** 0.5) * 2 ** (len(firsts) - 1)
    elif f"{head}.1" in modules:
        flags["classifier_pool"] = "spatial_v2"
    elif f"{head}.3" in modules:
        flags["classifier_pool"] = "adaptive"
    else:
        last, flags["classifier_pool"] = f"{head}.2", "spatial"
    flags["num_class"] = _size(state, f"{last}.weight")
    return flags


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


def _flags(state, width, depth, length, firsts):
    """Flags of an ADM network's levels. length: blocks per level; firsts: the first block of each, from the finest."""
    base = _size(state, "time_embed.0.weight", 1)
    widths = [_size(state, f"{first}.0.out_layers.3.weight") for first in firsts]
    attending = tuple(2**level for level, first in enumerate(firsts) if _attends(_modules(state), first))
    mult = ",".join(multiple(width, base) for width in widths)
    return {width: base, depth: length - 1, "channel_mult": mult, "attention_factors": attending}


def _shifts_and_scales(state):
    """Whether the time embedding gives a residual block two numbers per channel, not one."""
    return _size(state, "middle_block.0.emb_layers.1.weight") == 2 * _size(state, "middle_block.0.out_layers.3.weight")


def _channels(state, last):
    """Flags of the channels: those of the images, and whether the last layer predicts a variance beside the mean."""
    out = _size(state, f"{last}.weight")
    channels = 1 if out < 3 else 3
    return {"learn_sigma": out == 2 * channels, "in_channels": channels}


def _attends(modules, block):
    return f"{block}.1.qkv" in modules or f"{block}.1.proj_out" in modules


def _level_length(modules, blocks, depth):
    """Blocks per level of an encoder whose residual blocks downsample: the last block of a level does, without a trace.

    Of the lengths that fit, the one of the supposed depth is taken, else the most usual.
    """
    attends = [_attends(modules, f"input_blocks.{i}") for i in range(blocks)]
    widens = [f"input_blocks.{i}.0.skip_connection" in modules for i in range(blocks)]

    def fits(length):
        levels = [range(first, first + length - 1) for first in range(1, blocks, length)]
        return (
            blocks % length == 0
            and not any(attends[i] or widens[i] for i in range(length, blocks, length))
            and not any(widens[i] for level in levels for i in level[1:])
            and all(len({attends[i] for i in level}) == 1 for level in levels)
        )

    lengths = [length for length in range(2, blocks + 1) if fits(length)]
    if not lengths:
        raise KeyError(f"input_blocks.{blocks}")
    return min(lengths, key=lambda length: (length - 1 != depth, abs(length - 3), length))
