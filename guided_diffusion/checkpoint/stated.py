"""Flags that a file states beside its tensors: in metadata, in a train.json, by its betas and hyper-parameters."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name, reading, shown
from ..gaussian_diffusion import get_named_beta_schedule
from .reading import Contents, plain, read_json_object

log = logging.getLogger(__name__)

# Flags that shape the network but leave no trace in its tensors.
UNDETECTABLE_FLAGS = (
    *("image_size", "num_heads", "num_heads_upsample", "num_head_channels", "use_new_attention_order", "dropout"),
    *("norm_groups", "norm_eps", "sines_first", "pad_end", "middle_norm"),
)
# Flags that describe how the network was trained, and so how it must be used.
TRAINING_FLAGS = ("diffusion_steps", "noise_schedule", "predict_xstart", "rescale_timesteps", "predict_v")


@dataclass(frozen=True)
class Stated:
    """Flags that a file states beside its tensors. where: the place, the beginning of an error line about it."""

    flags: Mapping[str, Any]
    where: str
    complete: bool = True  # what is left out has its default; else it is unknown


def stated_in_file(contents: Contents, record: Stated | None, found: Mapping[str, Any] | None = None) -> Stated | None:
    """The flags that stand in a file's metadata, in the record of its training, or beside its weights; None without.

    record: of `stated_in_run`. found: the architecture, which the record must fit. The first of these places counts.
    Raises InputError for entries that cannot be understood.
    """
    if "flags" in contents.metadata:
        flags = _metadata_object(contents, "flags")
        return Stated(_not_none(flags), f"{display_name(contents.path)}: its metadata")
    sizes = ("num_channels", "num_res_blocks", "classifier_width", "classifier_depth")
    sizes += ("in_channels", "class_cond", "learn_sigma")
    if record and found and any(record.flags.get(name, found.get(name)) != found.get(name) for name in sizes):
        log.warning(
            "%s is not the network that %s describes, which is not used", display_name(contents.path), record.where
        )
        record = None
    return record or _stated_beside(contents)


def _not_none(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {flag: value for flag, value in flags.items() if value is not None}


def scheduler_in_metadata(contents: Contents) -> dict[str, Any]:
    """The entries of a converted model's scheduler file for `sigma_small` and `clip_denoised`; {} without any."""
    entries = _metadata_object(contents, "scheduler") if "scheduler" in contents.metadata else {}
    said = {"sigma_small": entries.get("sigma_small")} if isinstance(entries.get("sigma_small"), bool) else {}
    clip = entries.get("clip_denoised")
    if isinstance(clip, bool) or (isinstance(clip, (int, float)) and 0 < clip < math.inf):
        said["clip_denoised"] = clip
    return said


def _metadata_object(contents: Contents, name: str) -> dict[str, Any]:
    try:
        content = json.loads(contents.metadata[name])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        file = display_name(contents.path)
        raise InputError(f"{file}: the entry `{name}` of its metadata is not a JSON object")
    return content


def stated_in_run(path: str) -> Stated | None:
    """The flags in the train.json beside a file; None without one, and for another program's file of that name."""
    record = os.path.join(os.path.dirname(path), "train.json")
    if "://" in path or not os.path.isfile(record):
        return None
    try:
        flags = read_json_object(record).get("model")
    except InputError as error:
        log.warning("%s; it is not used for %s", error, display_name(path))
        return None
    return Stated(_not_none(flags), display_name(record)) if isinstance(flags, dict) else None


# Entries of a torch file that hold hyper-parameters, those of PyTorch Lightning first.
HYPER_PARAMETERS = ("hyper_parameters", "hparams", "args", "config", "flags")
STEPS = ("timesteps", "num_timesteps", "num_diffusion_timesteps", "num_train_timesteps")
# What a model predicts, in the words of CompVis, diffusers and denoising-diffusion-pytorch.
NOISE, X_0, VELOCITY = ("eps", "epsilon", "pred_noise"), ("x0", "sample", "pred_x0"), ("v", "v_prediction", "pred_v")
PREDICTIONS = {
    name: {"predict_xstart": name in X_0, "predict_v": name in VELOCITY} for name in (*NOISE, *X_0, *VELOCITY)
}


def hyper_parameters(contents: Contents) -> dict[str, Any]:
    """The hyper-parameters that stand beside the weights of a torch file."""
    found: dict[str, Any] = {}
    for name in HYPER_PARAMETERS:
        entries = plain(contents.beside.get(name))
        if isinstance(entries, Mapping):
            inner = [plain(entries[part]) for part in ("diffusion", "model") if part in entries]
            for each in (entries, *(each for each in inner if isinstance(each, Mapping))):
                found = {**{str(key): plain(value) for key, value in each.items()}, **found}
    return found


def _stated_beside(contents: Contents) -> Stated | None:
    """The flags that a torch file tells by its betas and hyper-parameters; only those that tensors cannot tell."""
    entries, file = hyper_parameters(contents), display_name(contents.path)
    where = f"{file}: its list of hyper-parameters"
    simple: dict[str, Any] = {
        name: value for name, value in entries.items() if isinstance(value, (bool, int, float, str))
    }
    flags = {name: simple[name] for name in (*UNDETECTABLE_FLAGS, *TRAINING_FLAGS) if name in simple}
    if steps := [simple[name] for name in STEPS if name in simple]:
        flags.setdefault("diffusion_steps", steps[0])
    for name in {"parameterization", "objective", "prediction_type"} & simple.keys():
        if simple[name] not in PREDICTIONS:
            raise InputError(f"{where} has {name}={shown(simple[name])}, which is not supported")
        flags |= PREDICTIONS[simple[name]]
    if {"beta_schedule", "linear_start", "beta_start"} & simple.keys() and "noise_schedule" not in simple:
        name = simple.get("beta_schedule", "linear")
        name = "cosine" if name == "squaredcos_cap_v2" else name
        # CompVis' linear is linear in the square root; its ends have names of their own.
        name = "scaled_linear" if name == "linear" and "linear_start" in simple else name
        ends = [simple[end] for end in ("linear_start", "beta_start", "linear_end", "beta_end") if end in simple]
        flags["noise_schedule"] = f"{name}:{ends[0]},{ends[-1]}" if len(ends) == 2 and name != "cosine" else name
    for source in (contents.beside, entries, contents.tensors):
        with reading(contents.path):
            table = _schedule_table(source)
        if table is not None:
            where = f"{file}: its entry {table[0]}"
            flags |= {"diffusion_steps": len(table[1]), "noise_schedule": _named_schedule(*table, where)}
            break
    return Stated(flags, where, complete=False) if flags else None


def _schedule_table(source: Mapping[str, Any]) -> tuple[str, np.ndarray] | None:
    """(betas or alphas_cumprod, its values in float64) where a mapping has one, under any prefix."""
    for kind in ("betas", "alphas_cumprod"):
        for name, value in source.items():
            value = plain(value) if str(name).rpartition(".")[2] == kind else None
            if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
                table = torch.as_tensor(value)
                if table.dim() == 1 and len(table) > 9 and table.is_floating_point():
                    return kind, table.double().cpu().numpy()
    return None


def _named_schedule(kind: str, table: np.ndarray, where: str) -> str:
    """The value of `noise_schedule` for a table: a name where one gives its values up to rounding, else all betas."""
    alpha_bars = np.cumprod(1 - table) if kind == "betas" else table
    with np.errstate(all="ignore"):
        betas = table if kind == "betas" else 1 - table / np.append(1.0, table[:-1])
    if not ((betas > 0) & (betas < 1)).all():  # NaN is neither
        raise InputError(f"{where} is no noise schedule: its betas must be above 0 and below 1")
    digits = 6 if kind == "betas" else 3  # what a difference of float32 values has
    ends = ",".join(repr(float(f"{betas[i]:.{digits}g}")) for i in (0, -1))
    for name in ("linear", "cosine", f"linear:{ends}", f"scaled_linear:{ends}"):
        with contextlib.suppress(InputError), np.errstate(all="ignore"):
            named = np.cumprod(1 - get_named_beta_schedule(name, len(betas)))
            if np.allclose(np.log(named), np.log(alpha_bars), rtol=1e-4, atol=1e-5):
                return name
    return "betas:" + ",".join(repr(float(beta)) for beta in betas)
