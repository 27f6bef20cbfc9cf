"""Deep features shared by neighbouring evaluations of a run, as in DeepCache (Ma et al. 2024).

Every N-th evaluation computes all levels of the network. Those between compute the first level alone: its way down and
its way up, which takes the features of the deeper levels from the last full evaluation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import ddpm
from .errors import InputError
from .runtime import CompiledModel
from .unet import SuperResModel, UNetModel


class CachedModel:
    """A `UNetModel` or `ddpm.Model` that computes all levels in the first of every `interval` evaluations of a run, and
    for a batch of another shape; see `cached`."""

    def __init__(self, network: Any, interval: int) -> None:
        self.network, self.interval = network, interval
        self.calls = self.shallow = 0  # evaluations since the last full one; stages of the first level on either way
        self.deep: Any = None
        self.shape: torch.Size | None = None

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        network = self.network
        down, middle, up = network.stages()
        full = self.calls % self.interval == 0 or self.shape != x.shape
        self.calls = 1 if full else self.calls + 1
        self.shape = x.shape
        emb = network.embedding(timesteps, *labels)
        h, skips = x.to(network.dtype), []
        for stage in down if full else down[: self.shallow]:
            h = stage(h, emb)
            skips.append(h)
        if full:
            self.shallow = sum(skip.shape[2:] == x.shape[2:] for skip in skips)
        h = middle(h, emb) if full else self.deep
        for stage in up[-len(skips) :]:
            if len(skips) == self.shallow:
                self.deep = h
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return network.head(h, x.dtype)


def cached(model: Callable, interval: int) -> Any:
    """Return a model that shares deep features among the evaluations of one run; the model itself if interval is 1.

    model: a network, or a dataclass around one in its field `model`, as `WithClass`. Raises InputError for others.
    """
    if interval == 1:
        return model
    if interval < 1:
        raise InputError("it must be at least 1", parameter="cache_interval", value=interval)
    if isinstance(model, (UNetModel, ddpm.Model)) and not isinstance(model, SuperResModel):
        return CachedModel(model, interval)
    if dataclasses.is_dataclass(model) and hasattr(model, "model"):
        return dataclasses.replace(model, model=cached(model.model, interval))  # type: ignore[type-var]
    reason = "a compiled network computes all levels; give `compile` False, or 1"
    if not isinstance(model, CompiledModel):
        reason = f"it is for this project's networks, and the model is a {type(model).__name__}"
    raise InputError(reason, parameter="cache_interval", value=interval)


def share_features(model: Callable, interval: int, in_guided: bool) -> tuple[Any, Any]:
    """Return the models of one run's guided and plain steps; in_guided: both share features, or only the plain ones."""
    plain = cached(model, interval)
    return (plain if in_guided else model), plain
