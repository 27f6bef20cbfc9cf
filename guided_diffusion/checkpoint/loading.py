"""Build the network that a checkpoint holds and fill it, and save one that describes itself."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, display_name, first_line, one_line
from ..run.files import write_bytes
from ..script_util import attention_factors, channel_multipliers, create_classifier, create_model
from . import diffusers_format, hub
from .architecture import UnknownArchitecture, detect, unwrap
from .diffusers_tensors import to_ours
from .reading import read
from .reconcile import (
    FLAGS,
    MODEL_TYPES,
    ModelInfo,
    Stated,
    belongs,
    reconcile,
    scheduler_in_metadata,
    stated_in_metadata,
    stated_in_run,
)

log = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]

ROOM = 1 << 30
"""Bytes that a network may take beyond four times what was read: views that overlap are small in a file."""


def load_model(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **flags: Any,
) -> tuple[torch.nn.Module, ModelInfo]:
    """Build the model that a checkpoint holds and load it: (model in eval mode, ModelInfo).

    flags: known settings, with the names of `script_util`; None counts as not given. dtype: torch.float16 or bfloat16
    for half-precision inference, default float32 (or float16 with use_fp16=True). Raises InputError with one line for a
    file that cannot be used and for a flag that contradicts it. The file is not needed any more afterwards.
    """
    path = hub.resolve(os.fspath(path))
    state, info, names = _load(path, flags)
    model = build(info)
    wanted = model.state_dict()
    _check_tensors(path, state, wanted, names)
    model.load_state_dict(_prepared(path, state, wanted, device), assign=True)
    if dtype is None and (info.flags.get("use_fp16") or info.flags.get("classifier_use_fp16")):
        dtype = torch.float16
    if dtype not in (None, torch.float32):
        model.set_dtype(dtype)  # type: ignore[operator]
    return model.eval().requires_grad_(False), info


def load_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file by name, as they are in it but for nesting (`ema`, `model`, …).

    Those of a diffusers model have our names.
    """
    path = hub.resolve(os.fspath(path))
    source = diffusers_format.locate(path)
    if source is None:
        return read(path)[0]
    description = diffusers_format.describe(source)
    return to_ours(diffusers_format.read_weights(source), description.kind, description.found)[0]


def _load(path: str, flags: Mapping[str, Any]) -> tuple[State, ModelInfo, dict[str, str]]:
    """(tensors under our names, what they are, the file's name of a tensor where it differs)."""
    source = diffusers_format.locate(path)
    if source is None:
        state, metadata = read(path)
        source = _renamed_source(path, state)
    if source is None:
        state, info = identify(path, state, metadata, **flags)
        return state, info, {}
    given = _given(flags)
    description = diffusers_format.describe(source)
    info = reconcile(path, description.kind, description.found, given, stated=description.stated)
    info.scheduler = description.scheduler
    state, names = to_ours(diffusers_format.read_weights(source), description.kind, description.found)
    diffusers_format.report(source, description)
    return state, info, names


def _renamed_source(path: str, state: State) -> diffusers_format.Source | None:
    """The diffusers model that a weights file of any name is part of."""
    if "time_embedding.linear_1.weight" not in state:
        return None
    file, folder = display_name(path), os.path.dirname(path)
    if "://" in path or not os.path.isfile(os.path.join(folder, diffusers_format.CONFIG)):
        needed = f"its {diffusers_format.CONFIG} is needed beside it"
        raise InputError(f"{file} has the tensors of a diffusers model; {needed}")
    return diffusers_format.from_weights(path)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    unknown = flags.keys() - FLAGS
    if unknown:
        raise TypeError(f"there is no flag {min(unknown)}")
    return {name: value for name, value in flags.items() if value is not None}


def fingerprint(path: str | os.PathLike) -> str:
    """What tells one checkpoint from another in a run's record.

    "sha256 …" of a file's bytes, or of a diffusers model's files (names and contents); owner/name@commit for a model of
    the Hugging Face hub; any other path as it is.
    """
    path = os.fspath(path)
    if hub.is_id(path):
        return hub.identity(path)
    source = diffusers_format.locate(path) if os.path.exists(path) else None
    if source is not None:
        digest = hashlib.sha256()
        for file in diffusers_format.files(source):
            digest.update(f"{source.relative(file)}\0{_sha256(file)}\n".encode("utf-8", "surrogateescape"))
        return f"sha256 {digest.hexdigest()}"
    return f"sha256 {_sha256(path)}" if os.path.isfile(path) else path


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_model(
    path: str | os.PathLike,
    model_or_state: torch.nn.Module | State,
    *,
    model_type: str,
    flags: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file that `load_model` reads without flags; a reader sees the old file or the new one.

    model_or_state: a module or its state dict. model_type: "ADM", "DDPM" or "ENCODER". flags: with the names of
    `script_util`, at least those that tensors cannot tell; they must fit the tensors. dtype: type in which
    floating-point tensors are stored, default their own. metadata: more texts by name, such as a licence. Raises
    InputError for what could not be loaded again, and where the file cannot be written.
    """
    path = os.fspath(path)
    if model_type not in MODEL_TYPES:
        raise InputError(f"it can be {', '.join(MODEL_TYPES)}", parameter="model_type", value=model_type)
    if not path.endswith(".safetensors"):
        raise InputError(f"{display_name(path)} cannot be written: a name that ends with .safetensors is needed")
    state = contiguous(model_or_state, dtype)
    entries = {**(metadata or {}), "format": "pt", "model_type": model_type, "flags": json.dumps(dict(flags))}
    refuse_not_finite(path, state)
    identify(path, state, entries)
    write_safetensors(path, state, entries)


def contiguous(model_or_state: torch.nn.Module | State, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A state dict on the CPU in which every tensor has memory of its own; dtype: for its floating-point tensors."""
    state = model_or_state.state_dict() if isinstance(model_or_state, torch.nn.Module) else model_or_state
    return {
        name: value.detach()
        .to("cpu", dtype if value.is_floating_point() else None)
        .clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


def write_safetensors(path: str, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file that appears whole or not at all."""
    from safetensors.torch import save

    try:
        data = save(state, metadata=metadata)
    except Exception as error:  # the library's errors have types of their own
        raise InputError(f"{display_name(path)} cannot be written: {first_line(error)}") from None
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise InputError(f"{display_name(path)} cannot be written: its folder does not exist")
    write_bytes(path, data)


def identify(
    path: str | os.PathLike, state: State, metadata: Mapping[str, str], *, stated: Stated | None = None, **flags: Any
) -> tuple[State, ModelInfo]:
    """(tensors without wrappers' prefixes, ModelInfo) of what `read` gave; flags as in `load_model`.

    stated: flags that stand elsewhere than in the metadata, in a diffusers folder's configuration for example.
    """
    path = os.fspath(path)
    given = _given(flags)
    stated = stated or stated_in_metadata(path, metadata)
    run = stated_in_run(path) if stated is None else None
    stated = stated or run
    depth = given.get("classifier_depth", stated.flags.get("classifier_depth") if stated else None)
    try:
        kind, state = unwrap(state)
        found = detect(kind, state, depth)
    except UnknownArchitecture as error:
        raise InputError(f"{display_name(path)} {error}") from None
    if run is not None and not belongs(run, found):
        log.warning("%s is not the network that %s describes, which is not used", display_name(path), run.where)
        stated = None
    info = reconcile(path, kind, found, given, metadata=metadata, stated=stated)
    info.scheduler = scheduler_in_metadata(path, metadata)
    return state, info


def build(info: ModelInfo) -> torch.nn.Module:
    """The network that a ModelInfo describes, without memory for its parameters (on the device "meta")."""
    try:
        with torch.device("meta"):
            return _create(info)
    except (ValueError, TypeError, RuntimeError, AssertionError, OverflowError, ZeroDivisionError) as error:
        raise InputError(
            f"{display_name(info.path)} describes a network that cannot be built: {first_line(error)}"
        ) from None


def _create(info: ModelInfo) -> torch.nn.Module:
    flags = info.flags
    if info.model_type != "DDPM":
        create = create_model if info.model_type == "ADM" else create_classifier
        # Half precision is set once the weights are there.
        names = set(inspect.signature(create).parameters) - {"use_fp16", "classifier_use_fp16"}
        return create(**{name: flags[name] for name in names if name in flags})
    from ..ddpm import Model

    size = flags["image_size"]
    return Model(
        ch=flags["num_channels"],
        out_ch=6 if flags["learn_sigma"] else 3,
        ch_mult=channel_multipliers(flags["channel_mult"], size),
        num_res_blocks=flags["num_res_blocks"],
        attn_resolutions=[size // factor for factor in attention_factors(flags["attention_resolutions"], size)],
        image_size=size,
        dropout=flags["dropout"],
    )


def _check_tensors(path: str, state: State, wanted: State, names: Mapping[str, str]) -> None:
    """Raise InputError unless the tensors are those that the architecture needs.

    names: what the file calls a tensor, where that is something else.
    """
    file = display_name(path)
    missing = [key for key in wanted if key not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        name = names.get(missing[0], missing[0])
        raise InputError(f"{file} lacks the tensor {name}{more}, which its architecture needs")
    # Counters that training code keeps beside the weights are no part of any network.
    extra = [k for k, value in state.items() if k not in wanted and value.is_floating_point() and value.numel() != 1]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise InputError(f"{file} has the tensor {one_line(extra[0], 100)}{more}, which its architecture does not have")
    for key, like in wanted.items():
        value = state[key]
        if value.shape != like.shape:
            key = names.get(key, key)
            raise InputError(f"{file}: {key} has shape {list(value.shape)}, its architecture needs {list(like.shape)}")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            what = "meta, without values" if value.is_meta else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise InputError(f"{file}: {names.get(key, key)} is {what}; a plain floating-point tensor is needed")


def _prepared(path: str, state: State, wanted: State, device: str | torch.device) -> dict[str, torch.Tensor]:
    """The wanted tensors in float32 on a device, each with memory of its own and nothing but finite values.

    A tensor is copied only where that is needed. Its strides count too: convolutions choose their method by them.
    """
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in state.values()}
    needed = sum(4 * like.numel() for like in wanted.values())
    if needed > 4 * sum(held.values()) + ROOM:
        file = display_name(path)
        raise InputError(
            f"{file} is refused: its {sum(held.values())} bytes of tensors describe a network of {needed} bytes"
        )
    prepared, places = {}, set()
    try:
        for key, like in wanted.items():
            value = state[key].detach().to(device, torch.float32)
            storage = value.untyped_storage()
            alone = storage.nbytes() == value.nbytes and storage.data_ptr() not in places
            if not alone or value.stride() != like.stride():
                value = value.clone(memory_format=torch.contiguous_format)
            places.add(value.untyped_storage().data_ptr())
            prepared[key] = value
    except RuntimeError as error:
        raise InputError(
            f"{display_name(path)} does not fit into the memory of {device}: {first_line(error)}"
        ) from None
    refuse_not_finite(path, prepared)
    return prepared


def refuse_not_finite(path: str, state: State) -> None:
    """Raise InputError for the first tensor that has NaN or infinite values."""
    floats = {key: value for key, value in state.items() if value.is_floating_point() and value.itemsize > 1}
    # A sum is several times as fast as a look at every value, and finite unless a value is not, or an overflow.
    sums = [value.sum(dtype=torch.float32) for value in floats.values()]
    if sums and not torch.stack(sums).isfinite().all():
        for key, value in floats.items():
            if not value.isfinite().all():
                name = one_line(key, 100)
                raise InputError(
                    f"{display_name(path)}: the tensor {name} has values that are NaN or infinite; the file is damaged"
                )


__all__ = ["build", "fingerprint", "identify", "load_model", "load_state_dict", "save_model"]
