"""Recognise the kind of a checkpoint, build its network and fill it; and save one that describes itself.

`CHECKPOINTS` has the kinds of checkpoints. A kind is a function: it gets what stands at a path, and returns None for
another kind of checkpoint, or the network with its tensors. `load_model` checks the tensors and fills the network::

    @CHECKPOINTS.add("toy")
    def toy(source, flags):
        if "toy.weight" not in source.tensors:
            return None
        size = flags.get("image_size", 64)
        info = ModelInfo(source.path, "TOY", {"image_size": size, **diffusion_defaults()})
        return Network(Toy(size), info, source.tensors)
"""

import inspect
import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..errors import InputError, display_name, first_line, log, one_line
from ..registry import Registry
from ..run.files import write_bytes, write_json, write_text
from ..script_util import attention_factors, channel_multipliers, create_classifier, create_model
from . import diffusers, remote
from .architecture import State
from .reading import Source, hash_file, read_file
from .reconcile import ADM, DDPM, ENCODER, FLAGS, Kind, ModelInfo, read_network, reconcile, refuse_latent

CHECKPOINTS = Registry("kind of checkpoint")
"""Kinds of checkpoints by name: functions (source, flags) -> Network or None. The last one added is asked first."""


@dataclass(frozen=True)
class Network:
    """A checkpoint that was recognised: its network, what is known of it, and its tensors under the network's names.

    model: may be on the device "meta". names: the file's name of a tensor, where that is another. fingerprint: of the
    files that were read, where it is not that of the source.
    """

    model: torch.nn.Module
    info: ModelInfo
    state: State
    names: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str | None = None


LOADED: dict[str, str] = {}
"""By path, the fingerprint of what this process read from it last."""


def load_model(
    path: str | os.PathLike, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, **flags: Any
) -> tuple[torch.nn.Module, ModelInfo]:
    """Build the model that a checkpoint holds and load it: (model in eval mode, ModelInfo).

    flags: known settings, with the names of `script_util`; None counts as not given. dtype: torch.float16 or bfloat16
    for half-precision inference, default float32 (or float16 with use_fp16=True). Raises InputError with one line for a
    file that cannot be used and for a flag that contradicts it. The file is not needed any more afterwards.
    """
    source, identity = _open(path)
    network = recognise(source, flags)
    LOADED[os.fspath(path)] = identity or network.fingerprint or source.fingerprint
    model, info = network.model, network.info
    model.load_state_dict(prepared(network, device), assign=True)
    if dtype is None and (info.flags.get("use_fp16") or info.flags.get("classifier_use_fp16")):
        dtype = torch.float16
    if dtype not in (None, torch.float32):
        model.set_dtype(dtype)  # type: ignore[operator]
    return model.eval().requires_grad_(False), info


def load_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, as they are in it but for nesting (`ema`, `model`, …).

    Those of a diffusers model have our names. Raises InputError where a weight or bias is not a plain floating-point
    tensor of finite values.
    """
    source, identity = _open(path)
    network = diffusers_model(source, {}) if diffusers.locate(source.path) else None
    state = network.state if network else source.tensors
    LOADED[os.fspath(path)] = identity or (network and network.fingerprint) or source.fingerprint
    check_values(source.path, state)
    return dict(state)


def _open(path: str | os.PathLike) -> tuple[Source, str | None]:
    """(what stands at a path, owner/name@commit of a model of the Hugging Face hub)."""
    place, identity = remote.resolve(os.fspath(path))
    in_parts = os.path.isdir(place) or diffusers.locate(place)  # whose weights are read once it is known to be ours
    return Source(place) if in_parts else read_file(place), identity


def fingerprint(path: str | os.PathLike) -> str:
    """The identity of a checkpoint in a run's record: of the bytes that this process loaded last from the path, if any.

    "sha256 …" of a file's bytes, or of a diffusers model's files (names and contents); owner/name@commit for a model of
    the Hugging Face hub; any other path as it is.
    """
    path = os.fspath(path)
    if path in LOADED:
        return LOADED[path]
    place, identity = remote.resolve(path)
    if identity is None and (folder := diffusers.locate(place)):
        return folder.fingerprint({name: hash_file(name) for name in diffusers.weight_files(folder)})
    return identity or (f"sha256 {hash_file(place)}" if os.path.isfile(place) else path)


def recognise(source: Source, flags: Mapping[str, Any]) -> Network:
    """The network at a path, by the first kind that knows it, not yet filled; flags as in `load_model`."""
    if unknown := flags.keys() - FLAGS:
        raise TypeError(f"there is no flag {min(unknown)}")
    given = {name: value for name, value in flags.items() if value is not None}
    for kind in reversed(list(CHECKPOINTS.values())):
        if network := kind(source, given):
            return network
    refuse_latent(source)
    begin = ", ".join(one_line(key, 60) for key in list(source.tensors)[:3])
    what = f"is no network that is known here ({', '.join(CHECKPOINTS)}): its tensors begin with {begin}"
    raise InputError(f"{display_name(source.path)} {what}")


def _network(kind: Kind, source: Source, given: Mapping[str, Any]) -> Network | None:
    """A network of one of our kinds in one file."""
    known = read_network(source, kind, given)
    return known and Network(build(known[0], given), *known)


CHECKPOINTS.add("encoder")(partial(_network, ENCODER))  # guided-diffusion's classifiers, EGSDE's extractors
CHECKPOINTS.add("ADM")(partial(_network, ADM))  # guided-diffusion's UNets, also those for super-resolution
CHECKPOINTS.add("DDPM")(partial(_network, DDPM))  # the UNet of DDPM's ports to PyTorch


@CHECKPOINTS.add("diffusers")
def diffusers_model(source: Source, given: Mapping[str, Any]) -> Network | None:
    """A UNet2DModel of diffusers: a folder, or a weights file with its config.json beside it."""
    folder = diffusers.locate(source.path)
    if folder is None and "time_embedding.linear_1.weight" in source.tensors:
        folder = diffusers.from_weights(source.path)
    if folder is None:
        return None
    kind, found, stated, scheduler = diffusers.describe(folder)
    info = reconcile(source, kind, found, given, stated)
    info.scheduler = scheduler
    model = build(info, given)
    tensors, hashes = diffusers.read_weights(folder)
    state, names = diffusers.to_ours(tensors, model.state_dict(), info.flags)
    return Network(model, info, state, names, folder.fingerprint(hashes))


def build(info: ModelInfo, given: Collection[str] = ()) -> torch.nn.Module:
    """The network that a ModelInfo describes, without memory for its parameters (on the device "meta").

    given: names of the flags that the caller gave, for errors.
    """
    create = {ADM.name: create_model, DDPM.name: _create_ddpm, ENCODER.name: create_classifier}[info.model_type]
    # Half precision is set once the weights are there.
    names = set(inspect.signature(create).parameters) - {"use_fp16", "classifier_use_fp16"}
    try:
        with torch.device("meta"):
            return create(**{name: info.flags[name] for name in names if name in info.flags})
    except Exception as error:  # whatever the layers raise for sizes that do not fit together
        file = display_name(info.path)
        if isinstance(error, InputError) and error.parameter in given:
            raise InputError(f"{error.reason} of {file}", parameter=error.parameter, value=error.value) from None
        raise InputError(f"{file} describes a network that cannot be built: {first_line(error)}") from None


def _create_ddpm(
    image_size: int, num_channels: int, num_res_blocks: int, channel_mult: str, attention_resolutions: str,
    learn_sigma: bool, dropout: float, in_channels: int = 3,
) -> torch.nn.Module:  # fmt: skip
    from ..ddpm import Model

    return Model(
        ch=num_channels, in_channels=in_channels, out_ch=in_channels * (2 if learn_sigma else 1),
        ch_mult=channel_multipliers(channel_mult, image_size), num_res_blocks=num_res_blocks,
        attn_resolutions=[image_size // factor for factor in attention_factors(attention_resolutions, image_size)],
        image_size=image_size, dropout=dropout,
    )  # fmt: skip


def prepared(network: Network, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The tensors that a network needs, checked, in float32 on a device, each contiguous in memory of its own."""
    path, state, wanted = network.info.path, network.state, network.model.state_dict()
    file = display_name(path)
    _check_tensors(file, state, wanted, network.names)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    stored, needed = sum(storages.values()), sum(4 * like.numel() for like in wanted.values())
    if needed > 4 * stored + (1 << 30):  # views that overlap are small in a file
        raise InputError(f"{file} is refused: its {stored} bytes of tensors describe a network of {needed} bytes")
    check_values(path, {key: state[key] for key in wanted}, network.names)
    tensors: dict[str, torch.Tensor] = {}
    places = set()
    try:
        for key, like in wanted.items():
            value = state[key].detach().to(device, torch.float32)
            storage = value.untyped_storage()
            alone = storage.nbytes() == value.nbytes and storage.data_ptr() not in places
            # Libraries choose their kernels, and so the last bits of results, by strides and alignment.
            if not alone or value.stride() != like.stride() or value.data_ptr() % 64:
                value = value.clone(memory_format=torch.contiguous_format)
            places.add(value.untyped_storage().data_ptr())
            tensors[key] = value
    except RuntimeError as error:
        raise InputError(f"{file} does not fit into the memory of {device}: {first_line(error)}") from None
    return tensors


def _check_tensors(file: str, state: State, wanted: State, names: Mapping[str, str]) -> None:
    """Raise InputError unless the tensors are the network's. names: those of the file, where they differ."""
    for key, like in wanted.items():
        name = names.get(key, key)
        if key not in state:
            raise InputError(f"{file} lacks the tensor {name}, which its architecture needs")
        shape, needed = list(state[key].shape), list(like.shape)
        if shape != needed:
            raise InputError(f"{file}: {name} has shape {shape}, its architecture needs {needed}")
    for key, value in state.items():
        # Counters and tables that training code keeps beside the weights are no part of any network.
        beside = value.numel() == 1 or not value.is_floating_point() or ("." not in key and value.dim() == 1)
        if key not in wanted and not beside:
            what = f"the tensor {one_line(names.get(key, key), 100)}, which its architecture does not have"
            raise InputError(f"{file} has {what}")


def check_values(path: str, state: State, names: Mapping[str, str] | None = None) -> None:
    """Raise InputError for a weight or bias that is no floating-point tensor, and for values that are not finite."""
    for key, value in state.items():
        tensor = f"{display_name(path)}: the tensor {one_line((names or {}).get(key, key), 100)}"
        if value.is_floating_point():
            if value.itemsize > 1 and not value.isfinite().all():
                raise InputError(f"{tensor} has values that are NaN or infinite; the file is damaged")
        elif key.endswith(("weight", "bias")):
            kind = str(value.dtype).removeprefix("torch.")
            raise InputError(f"{tensor} is {kind}; a floating-point tensor is needed")


def save_model(
    path: str | os.PathLike, model_or_state: torch.nn.Module | State, *, model_type: str, flags: Mapping[str, Any],
    dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a .safetensors file that `load_model` reads without flags; a reader sees the old file or the new one.

    model_or_state: a module or its state dict. model_type: "ADM", "DDPM" or "ENCODER". flags: with the names of
    `script_util`, at least those that tensors cannot tell. dtype: for floating-point tensors, default their own.
    metadata: more texts by name, such as a licence. Raises InputError for what could not be loaded again.
    """
    path = os.fspath(path)
    if model_type not in (ADM.name, DDPM.name, ENCODER.name):
        raise InputError("it can be ADM, DDPM or ENCODER", parameter="model_type", value=model_type)
    if not path.endswith(".safetensors"):
        raise InputError(f"{display_name(path)} cannot be written: a name that ends with .safetensors is needed")
    state = contiguous(model_or_state, dtype)
    entries = {**(metadata or {}), "format": "pt", "model_type": model_type, "flags": json.dumps(dict(flags))}
    check_values(path, state)
    recognise(Source(path, state, entries), {})
    write_safetensors(path, state, entries)


def contiguous(model_or_state: torch.nn.Module | State, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A state dict on the CPU in which every tensor has memory of its own; dtype: for its floating-point tensors."""
    state = model_or_state.state_dict() if isinstance(model_or_state, torch.nn.Module) else model_or_state
    layout = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return {
        name: value.detach().to(dtype=dtype if dtype and value.is_floating_point() else value.dtype, **layout)
        for name, value in state.items()
    }


def write_safetensors(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file that appears whole or not at all; the same content gives the same bytes."""
    from safetensors.torch import save

    try:
        data = save(state, metadata=metadata)
    except Exception as error:  # the library's errors have types of their own
        raise InputError(f"{display_name(path)} cannot be written: {first_line(error)}") from None
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InputError(f"{display_name(path)} cannot be written: its folder does not exist")
    # The library writes metadata in random order.
    end = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:end]), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    write_bytes(path, len(text).to_bytes(8, "little") + text + data[end:])


# ---- other formats ---------------------------------------------------------------------------------------------------

TOLERANCE = 2e-5
"""How far the written model's output may be from the original's, relative to the larger of 1 and the largest value."""

README = """---
library_name: diffusers
tags: [unconditional-image-generation, diffusers]
{licence}---

# {title}

Written by SDDM's `scripts/convert.py` from `{source}`. {variance}

```python
from diffusers import DDPMPipeline

image = DDPMPipeline.from_pretrained("{title}")().images[0]
```
"""


def convert(
    model_path: str | os.PathLike, save_dir: str | os.PathLike, *, drop_variance: bool = False, **flags: Any
) -> ModelInfo:
    """Write a model as a diffusers folder, or as our format where `save_dir` ends with .safetensors.

    drop_variance: keep the mean's channels of a model that learned variances. flags: as for `load_model`. The result
    is read back and compared for one input before it gets its name. Raises InputError, also where `save_dir` exists.
    """
    target = os.path.normpath(os.fspath(save_dir))
    parent = os.path.dirname(target) or "."
    if os.path.lexists(target):
        raise InputError("it exists; give another name", parameter="save_dir", value=target)
    if not os.path.isdir(parent):
        raise InputError(f"there is no folder {display_name(parent)}", parameter="save_dir", value=target)
    model, info = load_model(model_path, **flags)
    state, written, channels = dict(model.state_dict()), info, info.flags.get("in_channels", 3)
    if drop_variance and info.flags.get("learn_sigma"):
        last = "out.2" if info.model_type == "ADM" else "conv_out"
        state |= {f"{last}.{end}": state[f"{last}.{end}"][:channels] for end in ("weight", "bias")}
        written = replace(info, flags={**info.flags, "learn_sigma": False})
    elif drop_variance:
        log.info("%s has learned no variance; there is nothing to drop", display_name(info.path))
    texts = {name: text for name, text in info.metadata.items() if name not in ("format", "flags", "model_type")}
    texts |= {"scheduler": json.dumps(info.scheduler)} if info.scheduler else {}
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=parent) as beside:
            partial = os.path.join(beside, os.path.basename(target))
            if target.endswith(".safetensors"):
                save_model(partial, state, model_type=info.model_type, flags=written.flags, metadata=texts)
            else:
                _write_folder(partial, state, written, dropped=written is not info)
            _compare(partial, target, model, info, channels)
            os.rename(partial, target)
    except OSError as error:
        raise InputError(f"it cannot be written: {error.strerror}", parameter="save_dir", value=target) from None
    return info


def _write_folder(folder: str, state: Mapping[str, torch.Tensor], info: ModelInfo, dropped: bool) -> None:
    tensors, config, scheduler, index = diffusers.to_diffusers(state, info)
    write_json(os.path.join(folder, diffusers.INDEX), index)
    write_json(os.path.join(folder, "unet", diffusers.CONFIG), config)
    write_json(os.path.join(folder, "scheduler", diffusers.SCHEDULER), scheduler)
    write_safetensors(
        os.path.join(folder, "unet", f"{diffusers.WEIGHTS}.safetensors"), contiguous(tensors), {"format": "pt"}
    )
    licence = info.metadata.get("license") or info.metadata.get("licence")
    text = README.format(
        licence=f"license: {json.dumps(one_line(licence))}\n" if licence else "",
        title=one_line(os.path.basename(folder)),
        source=one_line(os.path.basename(os.path.normpath(info.path))),
        variance="The variance that it learned was dropped." if dropped else "",
    )
    write_text(os.path.join(folder, "README.md"), text)


def _compare(written: str, target: str, model: torch.nn.Module, info: ModelInfo, channels: int) -> None:
    """Raise InputError unless the written model computes what the original does."""
    if info.model_type == "ENCODER":
        return
    again, _ = load_model(written)
    side = info.flags["image_size"]
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([info.flags["diffusion_steps"] // 2])
    extra = {"y": torch.zeros(1, dtype=torch.long)} if info.flags["class_cond"] else {}
    extra |= {"low_res": x} if info.flags.get("super_res") else {}
    with torch.no_grad():
        before, after = model(x, t, **extra)[:, :channels], again(x, t, **extra)[:, :channels]
    difference = float((after - before).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(before.abs().max())):
        what = f"would differ from the original by {difference:.1e}; it was not written"
        raise InputError(f"{display_name(target)} {what}")
    log.info("%s: read back, it differs from the original by at most %.1e", display_name(target), difference)
