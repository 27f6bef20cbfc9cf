"""The target domain's model as a method sees it, and the batches that it translates.

    target = Target(model, diffusion, Pixels(), (3, 64, 64), 64, clip_denoised=True, device=torch.device("cpu"))

`checkpoint.targets.load_target` makes one of a checkpoint, `checkpoint.pipelines` of a diffusers pipeline.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from .codec import Codec
from .gaussian_diffusion import GaussianDiffusion


@dataclass(frozen=True)
class Batch:
    """Pictures to translate together.

    ref: [N, 3, S, S] in [-1, 1]. names: their relative paths. labels: a class for each, long [N], or None.
    """

    ref: torch.Tensor
    names: tuple[str, ...]
    labels: torch.Tensor | None = None


@dataclass(frozen=True)
class Target:
    """A diffusion model that is ready to sample: everything that a method needs to know about it.

    model: model(x, t) -> prediction [N, C or 2C, H, W], with class and prompt applied and evaluations counted;
    condition(batch) gives it where these differ. diffusion: always variance preserving. codec: pixels to what the model
    denoises, of shape (C, H, W), and back to pictures of side image_size. info, options: the checkpoint's `ModelInfo`,
    and how it was loaded.
    """

    model: Callable[..., torch.Tensor]
    diffusion: GaussianDiffusion
    codec: Codec
    shape: tuple[int, int, int]
    image_size: int
    clip_denoised: bool | float
    device: torch.device
    condition: Callable[[Batch], Callable[..., torch.Tensor]] | None = None
    info: Any = None
    options: Any = None
    precision: str = "fp32"
    sigma_small: bool = True
    fuse: bool = False

    def conditioned(self, batch: Batch) -> "Target":
        """The target for the classes or prompts of a batch; itself where all pictures share them."""
        return self if self.condition is None else dataclasses.replace(self, model=self.condition(batch))


@dataclass
class Evaluations:
    """Evaluations of networks, one for every image of a call."""

    total: int = 0


_counts: ContextVar[tuple[Evaluations, ...]] = ContextVar("evaluations", default=())


@contextlib.contextmanager
def count_evaluations() -> Iterator[Evaluations]:
    """Count the evaluations of every target's model within the block, in this thread."""
    counted = Evaluations()
    token = _counts.set((*_counts.get(), counted))
    try:
        yield counted
    finally:
        _counts.reset(token)


@dataclass(frozen=True)
class Counted:
    """A network whose evaluations count; see `count_evaluations`."""

    model: Callable[..., torch.Tensor]

    def __call__(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        for counted in _counts.get():
            counted.total += x.shape[0]
        return self.model(x, *arguments, **options)


@dataclass(frozen=True)
class WithClass:
    """A class-conditional model as model(x, t). labels: one class for all images, or those of a batch, long [N]."""

    model: Callable[..., torch.Tensor]
    labels: int | torch.Tensor = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.model(x, t, torch.as_tensor(self.labels, device=x.device).expand(x.shape[0]))
