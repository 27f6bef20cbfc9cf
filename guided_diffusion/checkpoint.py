"""Find out what a checkpoint is, and load it safely.

Files are read as published: guided-diffusion, ILVR and P2-weighting `.pt`, DDPM `.pth`, classifiers and domain-specific
extractors, and `.safetensors` of any of them. Nothing in a file is executed. The architecture is read from names and
shapes of its tensors; what these cannot tell comes from flags, from metadata, or from a table of published models.
"""

import inspect
import json
import logging
import os
import pickle
import warnings
from dataclasses import dataclass, field

import torch

from .architecture import PUBLISHED, UnknownArchitecture, detect, unwrap
from .errors import UserError
from .script_util import (
    CHANNEL_MULT,
    attention_factors,
    channel_multipliers,
    classifier_defaults,
    create_classifier,
    create_model,
    diffusion_defaults,
    model_and_diffusion_defaults,
)

log = logging.getLogger(__name__)

# Where training code nests the weights, best first: averaged weights are what one samples with.
NESTS = ("ema", "model_ema", "ema_model", "ema_state_dict", "params_ema", "state_dict", "model", "model_state_dict", "net")

# Flags that shape the network but leave no trace in its tensors.
UNTOLD = ("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "dropout")
# Flags that describe how the network was trained, and so how it must be used.
USAGE = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps")
# Flags that concern one use of a model only, so that any value fits any file.
FREE = ("use_checkpoint", "use_fp16", "timestep_respacing", "use_kl", "rescale_learned_sigmas", "dropout", "sigma_small")


@dataclass
class ModelInfo:
    """What was found out about a checkpoint.

    model_type: "ADM", "DDPM" or "ENCODER". flags: the architecture with the flag names of `script_util`, and the
    diffusion flags that it was trained with. assumed: flags that nothing told, and that have their default.
    """

    path: str
    model_type: str
    flags: dict
    metadata: dict = field(default_factory=dict)
    assumed: tuple = ()


def load_model(path, *, device="cpu", dtype=None, **flags):
    """Build the model that a checkpoint holds and load it: (model in eval mode, ModelInfo).

    flags: known settings, with the names of `script_util`; None counts as not given. dtype: torch.float16 or bfloat16
    for half-precision inference, default float32 (or float16 with use_fp16=True). Raises UserError with one line for a
    file that cannot be used and for a flag that contradicts it.
    """
    path = os.fspath(path)
    flags = {name: value for name, value in flags.items() if value is not None}
    state, metadata = read(path)
    try:
        kind, state = unwrap(state)
        found = detect(kind, state)
    except UnknownArchitecture as error:
        raise UserError(f"{path} {error}") from None
    info = _complete(path, kind, found, metadata, flags)
    with torch.device("meta"):
        model = _build(info)
    _check_tensors(path, state, model.state_dict())
    model.load_state_dict({key: value.to(device, torch.float32, copy=True) for key, value in state.items()}, assign=True)
    if dtype is None and (info.flags.get("use_fp16") or info.flags.get("classifier_use_fp16")):
        dtype = torch.float16
    if dtype not in (None, torch.float32):
        model.set_dtype(dtype)
    return model.eval().requires_grad_(False), info


def load_state_dict(path):
    """The tensors of a checkpoint file by name, as they are in it but for one level of nesting (`ema`, `model`, …)."""
    return read(os.fspath(path))[0]


def read(path):
    """(tensors by name, metadata) of a .safetensors or torch file; metadata is {} for the latter."""
    source, head = _open(path)
    if head[8:9] == b"{" or path.endswith(".safetensors"):
        return _read_safetensors(path, source)
    if not head.startswith((b"PK", b"\x80")):
        raise UserError(f"{path} is not a checkpoint: {_looks_like(head)}")
    try:
        mapped = isinstance(source, str) and head.startswith(b"PK")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the file's format, which is no concern of the reader's
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "Unsupported global" in reason or "GLOBAL" in reason or "Unsupported operand" in reason or "class" in reason:
            raise UserError(
                f"{path} holds more than tensors, and loading that could run code: refused. Save its state dict alone"
            ) from None
        raise UserError(f"{path} is damaged or not a torch checkpoint: {_first_line(error)}") from None
    except Exception as error:
        raise UserError(f"{path} is truncated or damaged: {_first_line(error)}") from None
    return _tensors(path, content), {}


def _open(path):
    """(what to read from: the path, or a buffer for a URL; its first bytes)."""
    if "://" in path:
        import io

        import blobfile

        with blobfile.BlobFile(path, "rb") as file:
            data = file.read()
        return io.BytesIO(data), data[:64]
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; a checkpoint file is needed")
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; models/README.md says where checkpoints are to be had") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise UserError(f"{path} is empty (0 bytes)")
    return path, head


def _read_safetensors(path, source):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load

    try:
        if not isinstance(source, str):
            data = source.getvalue()
            length = int.from_bytes(data[:8], "little")
            return load(data), json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        with safe_open(source, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {_first_line(error)}") from None


def _first_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _looks_like(head):
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if head.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or head.lstrip()[:5].lower() == b"<html":
        return "it is a web page, probably of a download that needs a click"
    return f"it begins with {head[:16]!r}"


def _is_state(value):
    return isinstance(value, dict) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _tensors(path, content):
    """The dictionary of tensors in what torch.load gave."""
    if _is_state(content):
        return content
    if isinstance(content, (list, tuple)):
        # The ddim repository saves [model, optimizer, epoch, step, averaged model].
        states = [item for item in content if _is_state(item)]
        if states:
            return states[-1]
    if isinstance(content, dict):
        for name in NESTS:
            if _is_state(content.get(name)):
                return content[name]
        # Counters beside the weights do no harm.
        tensors = {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors
        raise UserError(f"{path} holds no weights: its entries are {', '.join(map(str, list(content)[:8])) or 'none'}")
    raise UserError(f"{path} holds no weights but a {type(content).__name__}")


def _complete(path, kind, found, metadata, given):
    """Join what tensors, metadata, the table of published models, flags and defaults say, and check the flags."""
    factors = found.pop("attention_factors")
    stated = _stated_flags(path, metadata)
    known = {}
    if kind != "ENCODER":
        signature = (found["num_channels"], found["num_res_blocks"], found["channel_mult"])
        known = PUBLISHED.get(signature, {})
        defaults = model_and_diffusion_defaults()
    else:
        defaults = {**classifier_defaults(), "num_head_channels": 64, **diffusion_defaults()}
    told = {**known, **{k: v for k, v in stated.items() if k in UNTOLD + USAGE}, **found}
    if "image_size" not in told and "image_size" not in given:
        size = _usual_image_size(found["channel_mult"])
        if size is None:
            raise UserError(f"{path}: its tensors do not tell the image size; give --image_size")
        told["image_size"] = size
    image_size = int(given.get("image_size", told.get("image_size")))
    if "image_size" in given and "image_size" in (found if kind == "ENCODER" else stated) and told["image_size"] != image_size:
        raise UserError(f"--image_size {image_size} does not fit {path}: it was trained at {told['image_size']}")
    sides = "classifier_attention_resolutions" if kind == "ENCODER" else "attention_resolutions"
    told[sides] = ",".join(str(image_size // factor) for factor in factors)
    told["image_size"] = image_size

    for flag, value in given.items():
        if flag in FREE or flag == "image_size" or kind == "DDPM" and flag not in found and flag != sides:
            continue
        if flag in found or flag == sides or flag in stated and flag in UNTOLD + USAGE:
            if not _agree(flag, value, told[flag], image_size, len(found["channel_mult"].split(","))):
                raise UserError(f"--{flag} {value} does not fit {path}: it has {flag}={told[flag]}")
    flags = {**defaults, **told, **{k: v for k, v in given.items() if k in defaults and k not in found and k != sides}}
    assumed = ()
    if kind == "ADM" and not {"num_heads", "num_head_channels"} & {*given, *known, *stated} and factors:
        assumed = ("num_heads", "num_head_channels")
        log.warning(
            "%s: its tensors do not tell the width of attention heads; num_heads=%s is assumed, "
            "give --num_head_channels or --num_heads to be sure",
            path,
            flags["num_heads"],
        )
    return ModelInfo(path, kind, flags, dict(metadata), assumed)


def _stated_flags(path, metadata):
    """The flags that a .safetensors file's metadata states."""
    try:
        return dict(json.loads(metadata.get("flags", "{}")))
    except (TypeError, ValueError):
        raise UserError(f"{path}: the entry `flags` of its metadata is not a JSON object") from None


def _usual_image_size(channel_mult):
    return next((size for size, mult in CHANNEL_MULT.items() if ",".join(f"{m:g}" for m in mult) == channel_mult), None)


def _agree(flag, value, fits, image_size, levels):
    """Whether a given flag means what the file has."""
    if flag == "channel_mult":
        return channel_multipliers(value, image_size) == channel_multipliers(fits, image_size)
    if flag.endswith("attention_resolutions"):
        # Sides at which the network has no level, or sides that do not divide the image, never had an effect.
        reached = {2**level for level in range(levels)}
        return set(attention_factors(value, image_size)) & reached == set(attention_factors(fits, image_size))
    return type(fits)(value) == fits


def _build(info):
    flags = info.flags
    if info.model_type != "DDPM":
        create = create_model if info.model_type == "ADM" else create_classifier
        # Half precision is set once the weights are there.
        names = set(inspect.signature(create).parameters) - {"use_fp16", "classifier_use_fp16"}
        return create(**{name: flags[name] for name in names if name in flags})
    from .ddpm import Model

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


def _check_tensors(path, state, wanted):
    """Raise UserError unless the tensors are those that the architecture needs."""
    missing = [key for key in wanted if key not in state]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{path} lacks the tensor {missing[0]}{more}, which its architecture needs")
    extra = [key for key in state if key not in wanted]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{path} has the tensor {extra[0]}{more}, which its architecture does not have")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            raise UserError(f"{path}: {key} has shape {list(state[key].shape)}, its architecture needs {list(value.shape)}")
