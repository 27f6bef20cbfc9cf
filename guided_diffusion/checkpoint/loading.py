"""Find out what a checkpoint is, load it safely, and save one that says itself what it is.

Files are read as published: guided-diffusion, ILVR and P2-weighting `.pt`, DDPM `.pth`, classifiers and domain-specific
extractors, and `.safetensors` of any of them. Nothing in a file is executed. The architecture is read from names and
shapes of its tensors; what these cannot tell comes from flags, from metadata, or from a table of published models.
"""

import argparse
import inspect
import io
import json
import logging
import math
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field

import torch

from .architecture import PUBLISHED, PUBLISHED_ENCODERS, UnknownArchitecture, detect, is_average, unwrap
from ..errors import UserError
from ..script_util import (
    CHANNEL_MULT,
    attention_factors,
    channel_multipliers,
    classifier_defaults,
    create_classifier,
    create_model,
    diffusion_defaults,
    model_and_diffusion_defaults,
    str2bool,
)

log = logging.getLogger(__name__)

# Where training code nests the weights, after entries whose name says that they are averaged: these one samples with.
NESTS = ("state_dict", "model_state_dict", "model", "net", "module")

# Flags that shape the network but leave no trace in its tensors.
UNTOLD = ("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "dropout")
# Flags that describe how the network was trained, and so how it must be used.
USAGE = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps")
# Flags that concern one use of a model only, so that any value fits any file.
FREE = (
    "use_checkpoint",
    "use_fp16",
    "timestep_respacing",
    "use_kl",
    "rescale_learned_sigmas",
    "dropout",
    "sigma_small",
)

MODEL_TYPES = ("ADM", "DDPM", "ENCODER")

FLAGS = {*model_and_diffusion_defaults(), *classifier_defaults(), *FREE, "num_classes", "num_class", "head"}


@dataclass
class ModelInfo:
    """What was found out about a checkpoint.

    model_type: "ADM", "DDPM" or "ENCODER". flags: the architecture with the flag names of `script_util`, and the
    diffusion flags that it was trained with. assumed: the flags of attention heads, where nothing told them.
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
    file that cannot be used and for a flag that contradicts it. The file is not needed any more afterwards.
    """
    path = os.fspath(path)
    state, metadata = read(path)
    state, info = identify(path, state, metadata, **flags)
    try:
        with torch.device("meta"):
            model = _build(info)
    except (ValueError, TypeError, RuntimeError, AssertionError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"{path} describes a network that cannot be built: {_first_line(error)}") from None
    wanted = model.state_dict()
    _check_tensors(path, state, wanted)
    model.load_state_dict(_prepared(path, state, wanted, device), assign=True)
    if dtype is None and (info.flags.get("use_fp16") or info.flags.get("classifier_use_fp16")):
        dtype = torch.float16
    if dtype not in (None, torch.float32):
        model.set_dtype(dtype)
    return model.eval().requires_grad_(False), info


def load_state_dict(path):
    """The tensors of a checkpoint file by name, as they are in it but for nesting (`ema`, `model`, …)."""
    return read(os.fspath(path))[0]


def save_model(path, model_or_state, *, model_type, flags, dtype=None, metadata=None):
    """Write a .safetensors file that `load_model` reads without flags; a reader sees the old file or the new one.

    model_or_state: a module or its state dict. model_type: "ADM", "DDPM" or "ENCODER". flags: with the names of
    `script_util`, at least those that tensors cannot tell; they must fit the tensors. dtype: type in which
    floating-point tensors are stored, default their own. metadata: more texts by name, such as a licence. Raises
    UserError for what could not be loaded again, and where the file cannot be written.
    """
    from safetensors.torch import save_file

    path = os.fspath(path)
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type is {model_type!r}; it can be {', '.join(MODEL_TYPES)}")
    if not path.endswith(".safetensors"):
        raise UserError(f"{path} cannot be written: a name that ends with .safetensors is needed")
    state = model_or_state.state_dict() if isinstance(model_or_state, torch.nn.Module) else model_or_state
    state = {
        name: value.detach()
        .to("cpu", dtype if value.is_floating_point() else None)
        .clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    entries = {**(metadata or {}), "format": "pt", "model_type": model_type, "flags": json.dumps(flags)}
    _refuse_not_finite(path, state)
    identify(path, state, entries)
    partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.partial")
    try:
        save_file(state, partial, metadata=entries)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        raise UserError(f"{path} cannot be written: {_first_line(error)}") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def identify(path, state, metadata, **flags):
    """(tensors without wrappers' prefixes, ModelInfo) of what `read` gave; flags as in `load_model`."""
    unknown = flags.keys() - FLAGS
    if unknown:
        raise TypeError(f"there is no flag {min(unknown)}")
    try:
        kind, state = unwrap(state)
        depth = flags.get("classifier_depth")
        found = detect(kind, state, _stated_flags(path, metadata).get("classifier_depth") if depth is None else depth)
    except UnknownArchitecture as error:
        raise UserError(f"{path} {error}") from None
    given = {name: value for name, value in flags.items() if value is not None}
    return state, _complete(path, kind, found, metadata, given)


# ---- reading a file --------------------------------------------------------------------------------------------------


def read(path):
    """(tensors by name, metadata) of a .safetensors or torch file; metadata is {} for the latter.

    The tensors are in memory: what becomes of the file afterwards does not change them.
    """
    source, head = _open(path)
    if head[8:9] == b"{" or path.endswith(".safetensors") and not head.startswith(b"PK"):
        return _read_safetensors(path, source, head)
    if not head.startswith((b"PK", b"\x80")):
        raise UserError(f"{path} is not a checkpoint: {_looks_like(head)}")
    if path.endswith(".safetensors") and isinstance(source, str):
        # torch.load believes the name.
        with open(path, "rb") as file:
            source = io.BytesIO(file.read())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of the file's format, which is no concern of the reader's
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} {_why_not_loaded(error, source)}") from None
    state = _find_state(content)
    if state is None:
        entries = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else ""
        what = f"its entries are {entries[:200]}" if entries else f"it is a {type(content).__name__}"
        raise UserError(f"{path} holds no weights: {what}")
    return state, {}


def _open(path):
    """(what to read from: the path, or a buffer for a URL; its first bytes)."""
    if "://" in path:
        return _download(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; a checkpoint file is needed")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a regular file; a checkpoint file is needed")
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; models/README.md says where checkpoints are to be had") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not head:
        raise UserError(f"{path} is empty (0 bytes)")
    return path, head


def _download(url):
    try:
        import blobfile

        with blobfile.BlobFile(url, "rb") as file:
            data = file.read()
    except ImportError:
        raise UserError(f"{url} cannot be read: the package blobfile is not installed") from None
    except Exception as error:  # blobfile raises types of its own, of several storage services and of urllib3
        raise UserError(f"{url} cannot be read: {_first_line(error)}") from None
    if not data:
        raise UserError(f"{url} is empty (0 bytes)")
    return io.BytesIO(data), data[:64]


def _read_safetensors(path, source, head):
    from safetensors import safe_open
    from safetensors.torch import load

    if head[8:9] != b"{":
        raise UserError(f"{path} is not a safetensors file: {_looks_like(head)}")
    try:
        if not isinstance(source, str):
            data = source.getvalue()
            length = int.from_bytes(data[:8], "little")
            return load(data), json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        with safe_open(source, framework="pt") as file:
            # The tensors are windows on the file, which may change.
            return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata() or {}
    except Exception as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {_first_line(error)}") from None


def _first_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _why_not_loaded(error, source):
    """What an error of torch.load says about a file, as the rest of a sentence that begins with the file's name."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return (
            f"holds more than tensors ({refused[1][:100]}), and loading that could run code: refused. "
            "Save its state dict alone"
        )
    if "TorchScript" in text:
        return "is a TorchScript program, which would be run: refused. Save its state dict alone"
    if isinstance(error, pickle.UnpicklingError):
        operand = re.search(r"Unsupported operand (\d+)", text)
        if operand:
            return (
                f"is damaged or was not written with torch.save's own pickle protocol, 2: it has the instruction "
                f"{operand[1]}, which is not known to be safe"
            )
        reason = re.search(r"WeightsUnpickler error: *(.+)", text)
        return f"is damaged or no torch checkpoint: {reason[1][:200] if reason else _first_line(error)}"
    try:
        with zipfile.ZipFile(source) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is a zip archive, but not one of torch.save"
    except Exception:  # zipfile raises many types for a damaged archive, and what torch.load said is told below
        pass
    return f"is truncated or damaged: {_first_line(error)}"


def _looks_like(head):
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably of a download that needs a click"
    return f"it begins with {head[:16]!r}"


def _find_state(content, levels=4):
    """The dictionary of tensors in what torch.load gave, averaged weights first; None where there is none.

    Counters and the like beside the weights do no harm; optimizer states, which are tensors too, are passed over.
    """
    if isinstance(content, (list, tuple)) and levels:
        # The ddim repository saves [model, optimizer, epoch, step, averaged model].
        states = (_find_state(item, levels - 1) for item in reversed(content))
        return next((state for state in states if state), None)
    if not isinstance(content, dict):
        return None
    names = [name for name in content if isinstance(name, str)]
    averaged = [name for name in names if is_average(name) and not name.startswith("opt")]
    for name in [*averaged, *NESTS] if levels else ():
        if isinstance(content.get(name), dict):
            state = _find_state(content[name], levels - 1)
            if state:
                return state
    tensors = {name: content[name] for name in names if isinstance(content[name], torch.Tensor)}
    return tensors if any(value.ndim for value in tensors.values()) else None


# ---- what the tensors, the metadata and the flags say ----------------------------------------------------------------


def _complete(path, kind, found, metadata, given):
    """Join what tensors, metadata, the table of published models, flags and defaults say, and check the flags."""
    encoder = kind == "ENCODER"
    sides = "classifier_attention_resolutions" if encoder else "attention_resolutions"
    if encoder:
        defaults = {**classifier_defaults(), "num_head_channels": 64, **diffusion_defaults()}
        known = PUBLISHED_ENCODERS.get(found["classifier_width"], {})
    else:
        defaults = model_and_diffusion_defaults()
        known = PUBLISHED.get((found["num_channels"], found["num_res_blocks"], found["channel_mult"]), {})
    stated = _stated_flags(path, metadata)
    if metadata.get("model_type", kind) != kind:
        raise UserError(f"{path}: its metadata has model_type={metadata['model_type']}, its tensors are of type {kind}")
    likes = {**defaults, **found}
    stated, given = (
        {flag: _of_type(source, flag, value, likes[flag]) for flag, value in flags.items() if flag in likes}
        for flags, source in ((stated, f"{path}: in its metadata "), (given, "--"))
    )

    usual = next((size for size, mult in CHANNEL_MULT.items() if _text(mult) == found["channel_mult"]), None)
    image_size = next(
        (source["image_size"] for source in (given, found, stated, known) if "image_size" in source), usual
    )
    factors = found.pop("attention_factors")
    multiple = 2 ** found["channel_mult"].count(",")
    if image_size is None:
        raise UserError(f"{path}: its tensors do not tell the image size; give --image_size, a multiple of {multiple}")
    if image_size < 1 or image_size % multiple:
        raise UserError(f"--image_size {image_size} does not fit {path}: it needs a multiple of {multiple}")
    found[sides] = ",".join(str(image_size // factor) for factor in factors)

    untold = {flag: value for flag, value in stated.items() if flag in UNTOLD + USAGE}
    for flag, value in given.items():
        if flag not in FREE and value != untold.get(flag, value):
            raise UserError(f"--{flag} {value} does not fit {path}: it was trained with {flag}={untold[flag]}")
    for flag, value in [*given.items(), *stated.items()]:
        if flag in found and not _agree(flag, value, found, image_size):
            shown, fits = _shown(flag, value, image_size), f"{flag}={found[flag] if found[flag] != '' else 'none'}"
            if flag in given:
                raise UserError(f"--{flag} {shown} does not fit {path}: it has {fits}")
            raise UserError(f"{path}: its metadata has {flag}={shown}, but its tensors have {fits}")
    flags = {**defaults, **known, **untold, **{k: v for k, v in given.items() if k in defaults}, **found}
    flags["image_size"] = image_size
    if "num_heads" in given and "num_head_channels" not in {*given, *untold}:
        # Who says how many heads there are does not want the published width of a head.
        flags["num_head_channels"] = -1
    info = ModelInfo(path, kind, flags, dict(metadata))
    if kind != "DDPM":
        _check_heads(info, factors, given)
        if not {"num_heads", "num_head_channels"} & {*given, *known, *untold}:
            info.assumed = ("num_head_channels",) if encoder else ("num_heads", "num_head_channels")
            log.warning(
                "%s: its tensors do not tell the width of attention heads; %s=%s is assumed, "
                "give --num_head_channels or --num_heads to be sure",
                path,
                info.assumed[0],
                flags[info.assumed[0]],
            )
    return info


def _stated_flags(path, metadata):
    """The flags that a .safetensors file's metadata states."""
    try:
        flags = json.loads(metadata.get("flags", "{}"))
    except (ValueError, RecursionError):
        flags = None
    if not isinstance(flags, dict):
        raise UserError(f"{path}: the entry `flags` of its metadata is not a JSON object")
    return {flag: value for flag, value in flags.items() if value is not None}


def _of_type(source, flag, value, like):
    """A flag's value in the type of another value of it; source: who gave it, for the error."""
    try:
        if isinstance(like, bool):
            return str2bool(value if isinstance(value, bool) else str(value))
        converted = type(like)(value)
        if isinstance(like, str) or converted == float(value):
            return converted
    except (ValueError, TypeError, OverflowError, argparse.ArgumentTypeError):
        pass
    fits = {bool: "True or False", int: "a whole number", float: "a number"}[type(like)]
    raise UserError(f"{source}{flag} is {value!r}; it must be {fits}")


def _text(multipliers):
    return ",".join(f"{m:g}" for m in multipliers)


def _shown(flag, value, image_size):
    """A flag's value for an error line."""
    if value != "":
        return value
    return f'"" ({_text(CHANNEL_MULT[image_size])}, the usual one)' if flag == "channel_mult" else '""'


def _agree(flag, value, found, image_size):
    """Whether a flag's value means what the tensors have."""
    fits = found[flag]
    if flag == "channel_mult":
        if value == "" and image_size not in CHANNEL_MULT:
            return True
        base = found.get("num_channels") or found.get("classifier_width")
        try:
            widths, fitting = ([int(m * base) for m in channel_multipliers(v, image_size)] for v in (value, fits))
        except OverflowError:  # 1e308 times the base
            return False
        return widths == fitting
    if flag.endswith("attention_resolutions"):
        # Sides at which the network has no level never had an effect.
        reached = {2**level for level in range(found["channel_mult"].count(",") + 1)}
        return set(attention_factors(value, image_size)) & reached == set(attention_factors(fits, image_size))
    return value == fits


def _check_heads(info, factors, given):
    """Raise UserError where the channels of an attention layer cannot be shared among its heads."""
    flags = info.flags
    base = flags.get("num_channels") or flags.get("classifier_width")
    mults = channel_multipliers(flags["channel_mult"], flags["image_size"])
    outer = {int(mult * base) for level, mult in enumerate(mults) if 2**level in factors}
    inner = {*outer, int(mults[-1] * base)}
    if info.model_type == "ENCODER" or flags["num_head_channels"] != -1:
        checks = [("num_head_channels", inner)]
    else:
        checks = [("num_heads", inner)]
        if flags["num_heads_upsample"] != -1:
            checks.append(("num_heads_upsample", outer))
    for flag, widths in checks:
        value, shared = flags[flag], math.gcd(*widths)
        if shared and (value < 1 or shared % value):
            if flag in given:
                complaint = f"--{flag} {value} does not fit {info.path}"
            else:
                complaint = f"{info.path}: {flag}={value}, which its tensors do not tell, does not fit; give --{flag}"
            channels = ", ".join(map(str, sorted(widths)))
            raise UserError(f"{complaint}: its attention layers have {channels} channels, it must divide {shared}")


# ---- building --------------------------------------------------------------------------------------------------------


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
    # Counters that training code keeps beside the weights are no part of any network.
    extra = [k for k, value in state.items() if k not in wanted and value.is_floating_point() and value.numel() != 1]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(f"{path} has the tensor {extra[0]}{more}, which its architecture does not have")
    for key, like in wanted.items():
        value = state[key]
        if value.shape != like.shape:
            raise UserError(f"{path}: {key} has shape {list(value.shape)}, its architecture needs {list(like.shape)}")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            what = "meta, without values" if value.is_meta else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"{path}: {key} is {what}; a plain floating-point tensor is needed")


def _prepared(path, state, wanted, device):
    """The wanted tensors in float32 on a device, each with memory of its own and nothing but finite values.

    A tensor is copied only where that is needed. Its strides count too: convolutions choose their method by them.
    """
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
        raise UserError(f"{path} does not fit into the memory of {device}: {_first_line(error)}") from None
    _refuse_not_finite(path, prepared)
    return prepared


def _refuse_not_finite(path, state):
    """Raise UserError for the first tensor that has NaN or infinite values."""
    floats = {key: value for key, value in state.items() if value.is_floating_point() and value.itemsize > 1}
    # A sum is several times as fast as a look at every value, and finite unless a value is not, or an overflow.
    sums = [value.sum(dtype=torch.float32) for value in floats.values()]
    if sums and not torch.stack(sums).isfinite().all():
        for key, value in floats.items():
            if not value.isfinite().all():
                raise UserError(f"{path}: the tensor {key} has values that are NaN or infinite; the file is damaged")
