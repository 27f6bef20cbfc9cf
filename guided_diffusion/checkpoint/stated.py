"""Flags that a file states beside its tensors: in metadata, in a train.json, by its betas and hyper-parameters."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name, reading, shown
from ..gaussian_diffusion import get_named_beta_schedule
from .reading import Source, plain, read_json_object

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
    """Flags that a file states beside its tensors; those that are None count as not stated.

    where: the place, the beginning of an error line about it. complete: what is left out has its default. in_run: the
    place is a train.json, which may be another network's.
    """

    flags: Mapping[str, Any]
    where: str
    complete: bool = True
    in_run: bool = False

    def fits(self, found: Mapping[str, Any]) -> bool:
        """Whether the sizes are those of an architecture."""
        sizes = ("num_channels", "num_res_blocks", "classifier_width", "classifier_depth", "in_channels", "class_cond")
        return all(self.flags.get(name) in (None, found.get(name)) for name in (*sizes, "learn_sigma"))


def described(source: Source) -> Stated | None:
    """The flags in a file's metadata, else those in the train.json beside it; None without either.

    Another program's train.json counts as none. Raises InputError for metadata that is no JSON object.
    """
    if "flags" in source.metadata:
        return Stated(_metadata_object(source, "flags"), f"{display_name(source.path)}: its metadata")
    record = os.path.join(os.path.dirname(source.path), "train.json")
    if "://" in source.path or not os.path.isfile(record):
        return None
    try:
        flags = read_json_object(record).get("model")
    except InputError as error:
        log.warning("%s; it is not used for %s", error, display_name(source.path))
        return None
    return Stated(flags, display_name(record), in_run=True) if isinstance(flags, dict) else None


def scheduler_in_metadata(source: Source) -> dict[str, Any]:
    """The entries of a converted model's scheduler file for `sigma_small` and `clip_denoised`; {} without any."""
    said = _metadata_object(source, "scheduler") if "scheduler" in source.metadata else {}
    fits = {"sigma_small": bool, "clip_denoised": (bool, float)}
    return {name: said[name] for name, kind in fits.items() if isinstance(said.get(name), kind)}


def _metadata_object(source: Source, name: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(source.metadata[name])
        if isinstance(content, dict):
            return content
    raise InputError(f"{display_name(source.path)}: the entry `{name}` of its metadata is not a JSON object")


# Entries of a torch file that hold hyper-parameters, those of PyTorch Lightning first.
HYPER_PARAMETERS = ("hyper_parameters", "hparams", "args", "config", "flags")
STEPS = ("timesteps", "num_timesteps", "num_diffusion_timesteps", "num_train_timesteps")
# What a model predicts, in the words of CompVis, diffusers and denoising-diffusion-pytorch.
NOISE, X_0, VELOCITY = ("eps", "epsilon", "pred_noise"), ("x0", "sample", "pred_x0"), ("v", "v_prediction", "pred_v")
PREDICTIONS = {
    name: {"predict_xstart": name in X_0, "predict_v": name in VELOCITY} for name in (*NOISE, *X_0, *VELOCITY)
}


def hyper_parameters(source: Source) -> dict[str, Any]:
    """The hyper-parameters that stand beside the weights of a torch file."""
    found: dict[str, Any] = {}
    for name in HYPER_PARAMETERS:
        entries = plain(source.beside.get(name))
        if isinstance(entries, Mapping):
            parts = [entries, *(plain(entries.get(part)) for part in ("diffusion", "model"))]
            for each in (each for each in parts if isinstance(each, Mapping)):
                found = {**{str(key): plain(value) for key, value in each.items()}, **found}
    return found


def stated_beside(source: Source) -> Stated | None:
    """The flags that a torch file tells by its betas and hyper-parameters; only those that tensors cannot tell."""
    entries, file = hyper_parameters(source), display_name(source.path)
    where = f"{file}: its list of hyper-parameters"
    simple: dict[str, Any] = {key: value for key, value in entries.items() if isinstance(value, (int, float, str))}
    flags = {name: simple[name] for name in (*UNDETECTABLE_FLAGS, *TRAINING_FLAGS) if name in simple}
    if steps := [simple[name] for name in STEPS if name in simple]:
        flags.setdefault("diffusion_steps", steps[0])
    for name in {"parameterization", "objective", "prediction_type"} & simple.keys():
        if simple[name] not in PREDICTIONS:
            raise InputError(f"{where} has {name}={shown(simple[name])}, which is not supported")
        flags |= PREDICTIONS[simple[name]]
    if {"beta_schedule", "linear_start", "beta_start"} & simple.keys() and "noise_schedule" not in simple:
        # CompVis' linear is linear in the square root; its ends have names of their own.
        renamed = {"squaredcos_cap_v2": "cosine"} | ({"linear": "scaled_linear"} if "linear_start" in simple else {})
        name = simple.get("beta_schedule", "linear")
        name = renamed.get(name, name)
        ends = [simple[end] for end in ("linear_start", "beta_start", "linear_end", "beta_end") if end in simple]
        flags["noise_schedule"] = f"{name}:{ends[0]},{ends[-1]}" if len(ends) == 2 and name != "cosine" else name
    for kind, table in islice(_tables(source, entries), 1):
        where = f"{file}: its entry {kind}"
        flags |= {"diffusion_steps": len(table), "noise_schedule": _named_schedule(kind, table, where)}
    return Stated(flags, where, complete=False) if flags else None


def _tables(source: Source, hyper: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(betas or alphas_cumprod, its values in float64) for each entry of these names, under any prefix."""
    places = [*source.beside.items(), *hyper.items(), *source.tensors.items()]
    for kind in ("betas", "alphas_cumprod"):
        for value in (plain(value) for name, value in places if str(name).rpartition(".")[2] == kind):
            if isinstance(value, (torch.Tensor, np.ndarray, list, tuple)):
                with reading(source.path):
                    table = torch.as_tensor(value)
                if table.dim() == 1 and len(table) > 9 and table.is_floating_point():
                    yield kind, table.double().numpy()


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
