"""The methods that SDDM is compared with: ILVR, SDEdit and EGSDE, as published, and guided-diffusion's own sampling.

Model, diffusion, ref, noise, callback, cache_interval and cache_guided are those of `sddm.sample`.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resizer import low_pass_filter

from .caching import cached, share_features
from .energy import dse, low_pass
from .errors import InputError, check_choice
from .gaussian_diffusion import GaussianDiffusion, ModelVarType
from .manifold import check_down_n
from .solvers import Noise, State, at_step, check_references, first_state, gaussian_like, resolve_step, sampler

VARIANCES = {"fixed_small": ModelVarType.FIXED_SMALL, "fixed_large": ModelVarType.FIXED_LARGE}


@sampler
def ilvr(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, down_n: int, range_t: int | float,
    start: int | float | None = None, cache_interval: int = 1, cache_guided: bool = False, noise: Noise | None = None,
    clip_denoised: bool | float = True,
) -> Iterator[State]:  # fmt: skip
    """Iterative latent variable refinement (Choi et al. 2021, algorithm 1).

    While i > range_t, the step's result takes its low frequencies from the reference noised to i: x + phi(ref_i - x),
    where phi shrinks by down_n and enlarges again with a cubic kernel. start: late start. Draws: x_T; then in every
    step one for the step itself, and one for ref_i while i > range_t.
    """
    ref, noise = check_references(ref, clip_denoised), noise or gaussian_like(ref)
    check_down_n(down_n, ref.shape[2:])
    phi = low_pass_filter(ref.shape[2:], down_n, "cubic")
    range_t = resolve_step(range_t, diffusion.num_timesteps, "range_t")
    steps, x = first_state(diffusion, ref, start, noise)
    guided, plain = share_features(model, cache_interval, cache_guided)
    for i in reversed(range(steps)):
        t = at_step(ref, i)
        out = diffusion.p_sample(guided if i > range_t else plain, x, t, clip_denoised, noise=noise(ref.shape))
        x = out["sample"]
        if i > range_t:
            # As released, the reference has the noise of step i although x has just moved on to i-1.
            x = x + phi(diffusion.q_sample(ref, t, noise(ref.shape)) - x)
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": []}


@sampler
def sdedit(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, start: int | float,
    variance: str = "fixed_small", cache_interval: int = 1, noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """SDEdit (Meng et al. 2022): noise the reference by `start` steps, then denoise it; `egsde` without energies."""
    yield from egsde.steps(  # type: ignore[attr-defined]
        model, diffusion, ref, start=start, ls=0, li=0, encoder=None, down_n=None, variance=variance,
        cache_interval=cache_interval, noise=noise,
    )  # fmt: skip


@sampler
def egsde(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, start: int | float, ls: float, li: float,
    encoder: torch.nn.Module | None, down_n: int | None, variance: str = "fixed_small",
    timestep: Callable[[float], float] | None = None, cache_interval: int = 1, cache_guided: bool = False,
    noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """Energy-guided SDE (Zhao et al. 2022, algorithm 1); published runs use the full 1000-step linear schedule.

    start: M, the number of steps from the noised reference ref_{M-1} to the image, 1 to T'. In step i, the posterior
    mean descends by beta_i (ls grad E_dse(x, ref_i) + li grad E_low_pass(x, ref_i)); see `energy.dse(encoder)` and
    `energy.low_pass(down_n)`. An energy with weight 0 is not evaluated and needs no encoder or down_n. The predicted
    x_0 is not clipped. variance: fixed_small, the posterior's, or fixed_large, beta; a variance that the model gives,
    in channels after the first C, is ignored. Draws: e, the noise of every ref_i; then one per step.
    """
    ref, noise = check_references(ref), noise or gaussian_like(ref)
    start = resolve_step(start, diffusion.num_timesteps, "start", 1, diffusion.num_timesteps)
    check_choice("variance", variance, VARIANCES)
    if ls and encoder is None:
        raise InputError(f"`ls` {ls:g} needs it; `ls` 0 does without the realism energy", parameter="encoder")
    if li and down_n is None:
        raise InputError(f"`li` {li:g} needs it; `li` 0 does without the faithfulness energy", parameter="down_n")
    guided, plain = share_features(model, cache_interval, cache_guided)
    model = guided if ls or li else plain
    diffusion = copy.copy(diffusion)
    diffusion.model_var_type = VARIANCES[variance]
    e = noise(ref.shape)
    guidance: list[tuple[float, Any]] = [(ls, dse(encoder, timestep))] if ls else []  # type: ignore[arg-type]
    guidance += [(li, low_pass(down_n))] if li else []  # type: ignore[arg-type]
    for _, energy in guidance:
        energy.prepare(ref, e)

    def mean_channels(x, t):
        return model(x, t)[:, : x.shape[1]]

    x = diffusion.q_sample(ref, at_step(ref, start - 1), e)
    for i in reversed(range(start)):
        t = at_step(ref, i)
        original_t = diffusion.model_timesteps(t)
        out = diffusion.p_mean_variance(mean_channels, x, t, clip_denoised=False)
        for weight, energy in guidance:
            _, grad = energy.energy_and_grad(x, original_t, float(diffusion.alphas_cumprod[i]))
            out["mean"] = out["mean"] - weight * float(diffusion.betas[i]) * grad
        x = diffusion.add_noise(out, t, noise(ref.shape))
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": []}


@sampler
def unconditional(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, use_ddim: bool = False, eta: float = 0.0,
    cache_interval: int = 1, noise: Noise | None = None, clip_denoised: bool | float = True,
) -> Iterator[State]:  # fmt: skip
    """Generate images without references; only the shape, type and device of ref are used.

    Ancestral sampling, or with use_ddim DDIM (Song et al. 2021), eta its share of noise. Draws: x_T; then one per step.
    """
    options = {"eta": eta} if use_ddim else {}
    yield from _from_noise(cached(model, cache_interval), diffusion, ref, use_ddim, clip_denoised, noise, **options)


def _from_noise(model, diffusion, like, use_ddim, clip_denoised, noise, **options):
    """Images of like's shape from noise; options are those of the process's steps."""
    step = diffusion.ddim_sample if use_ddim else diffusion.p_sample
    noise = noise or gaussian_like(like)
    x = noise(like.shape)
    for i in reversed(range(diffusion.num_timesteps)):
        out = step(model, x, at_step(like, i), clip_denoised, noise=noise(like.shape), **options)
        x = out["sample"]
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": []}


@sampler
def classifier_guided(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, classifier: torch.nn.Module,
    labels: Tensor, scale: float = 1.0, use_ddim: bool = False, clip_denoised: bool | float = True,
    noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """Images of classes `labels` [N], guided by a classifier of noisy images (Dhariwal & Nichol 2021, section 4).

    Only the shape, type and device of ref [N, C, H, W] are used. scale: factor of the gradient of the log-probability.
    use_ddim: DDIM, which conditions the score, instead of ancestral steps, whose mean moves.
    """

    def gradient(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(x, t).float(), dim=-1).gather(1, labels[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0] * scale

    yield from _from_noise(model, diffusion, ref, use_ddim, clip_denoised, noise, cond_fn=gradient)


@sampler
def super_resolution(
    model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *, large_size: int,
    labels: Tensor | None = None, use_ddim: bool = False, clip_denoised: bool | float = True,
    noise: Noise | None = None,
) -> Iterator[State]:  # fmt: skip
    """Images of side large_size of small ones, ref [N, 3, h, w]; model: a `SuperResModel`; labels [N]: its classes."""

    def enlarging(x, t):
        return model(x, t, low_res=ref, **({} if labels is None else {"y": labels}))

    like = ref.new_empty(()).expand(*ref.shape[:2], large_size, large_size)
    yield from _from_noise(enlarging, diffusion, like, use_ddim, clip_denoised, noise)
