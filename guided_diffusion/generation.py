"""guided-diffusion's other jobs as functions of tensors: sampling guided by a classifier, and super-resolution.

model(x, t, ...): the diffusion model, t original timesteps; diffusion: its (respaced) process. noise(shape): every
random draw in order, x_T first, then one per step. callback and the generators `steps`: see `solvers.sampler`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .baselines import from_noise
from .gaussian_diffusion import GaussianDiffusion
from .solvers import Noise, State, sampler


@sampler
def classifier_guided(
    model: Callable[..., torch.Tensor], diffusion: GaussianDiffusion, ref: torch.Tensor, *, classifier: torch.nn.Module,
    labels: torch.Tensor, scale: float = 1.0, class_cond: bool = False, use_ddim: bool = False,
    clip_denoised: bool | float = True, noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """Images of classes `labels` [N], guided by a classifier of noisy images (Dhariwal & Nichol 2021, section 4).

    Only the shape, type and device of ref [N, C, H, W] are used. scale: factor of the gradient of the log-probability.
    class_cond: the model takes the labels, too. use_ddim: DDIM, which conditions the score, instead of ancestral
    steps, whose mean moves.
    """

    def gradient(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(x, t).float(), dim=-1).gather(1, labels[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0] * scale

    def conditional(x, t):
        return model(x, t, labels) if class_cond else model(x, t)

    step = partial(diffusion.ddim_sample if use_ddim else diffusion.p_sample, conditional, cond_fn=gradient)
    yield from from_noise(step, diffusion, ref, clip_denoised, noise)


@sampler
def super_resolution(
    model: Callable[..., torch.Tensor], diffusion: GaussianDiffusion, ref: torch.Tensor, *, large_size: int,
    labels: torch.Tensor | None = None, use_ddim: bool = False, clip_denoised: bool | float = True,
    noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """Images of side large_size of small ones, ref [N, 3, h, w]; model: a `SuperResModel`; labels [N]: its classes."""

    def enlarging(x, t):
        return model(x, t, low_res=ref, **({} if labels is None else {"y": labels}))

    like = ref.new_empty(()).expand(*ref.shape[:2], large_size, large_size)
    step = partial(diffusion.ddim_sample if use_ddim else diffusion.p_sample, enlarging)
    yield from from_noise(step, diffusion, like, clip_denoised, noise)


def draw_labels(noise: Any, count: int, num_classes: int, device: torch.device) -> torch.Tensor:
    """Random classes, long [count]: each image's own generator draws its class, before any noise.

    noise: has `generators` (`run.noise.ImageNoise`), else the default generator draws.
    """
    generators = getattr(noise, "generators", [None] * count)
    drawn = [torch.randint(num_classes, (), generator=generator) for generator in generators]
    return torch.stack(drawn).to(device)
