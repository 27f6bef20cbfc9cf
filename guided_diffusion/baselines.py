"""The methods that SDDM is compared with, each as published: ILVR, SDEdit and EGSDE; and sampling without a reference.

All take and give what `sddm.sample` does. model(x, t): the target domain's diffusion model, t original timesteps;
diffusion: its (respaced) process of T' steps; ref: references [N, C, H, W] in [-1, 1]. noise(shape): every random draw
in order. callback(i, x): the state after step i. Returns [N, C, H, W].
"""

import copy

import torch

from resizer import low_pass_filter

from .energy import dse, low_pass
from .errors import UserError
from .gaussian_diffusion import ModelVarType

VARIANCES = {"fixed_small": ModelVarType.FIXED_SMALL, "fixed_large": ModelVarType.FIXED_LARGE}


@torch.no_grad()
def ilvr(model, diffusion, ref, *, down_n, range_t, noise=None, callback=None, clip_denoised=True):
    """Iterative latent variable refinement (Choi et al. 2021, algorithm 1).

    Steps i = T'-1 … 0; while i > range_t, the step's result takes its low frequencies from the reference noised to i:
    x + phi(ref_i - x), where phi shrinks by down_n and enlarges again with a cubic kernel. Draws: x_T; then in every
    step one for the step itself, and one for ref_i while i > range_t.
    """
    try:
        phi = low_pass_filter(ref.shape[2:], down_n, "cubic")
    except ValueError:
        size = "x".join(map(str, ref.shape[2:]))
        raise UserError(f"--down_N is {down_n}; it must be at least 1 and divide the image size {size}") from None
    noise = noise or _gaussian_like(ref)
    x = noise(ref.shape)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)
        x = diffusion.p_sample(model, x, t, clip_denoised, noise=noise(ref.shape))["sample"]
        if i > range_t:
            # As released, the reference has the noise of step i although x has just moved on to i-1.
            x = x + phi(diffusion.q_sample(ref, t, noise(ref.shape)) - x)
        if callback is not None:
            callback(i, x)
    return x


def sdedit(model, diffusion, ref, *, start, variance="fixed_small", noise=None, callback=None):
    """SDEdit (Meng et al. 2022): noise the reference by `start` steps, then denoise it; `egsde` without energies.

    See `egsde` for start, variance and the draws.
    """
    return egsde(
        model,
        diffusion,
        ref,
        start=start,
        ls=0,
        li=0,
        encoder=None,
        down_n=None,
        variance=variance,
        noise=noise,
        callback=callback,
    )


@torch.no_grad()
def egsde(
    model,
    diffusion,
    ref,
    *,
    start,
    ls,
    li,
    encoder,
    down_n,
    variance="fixed_small",
    noise=None,
    callback=None,
):
    """Energy-guided SDE (Zhao et al. 2022, algorithm 1); published runs use the full 1000-step linear schedule.

    start: M, the number of steps from the noised reference ref_{M-1} to the image, 1 to T'. In step i, the posterior
    mean descends by beta_i (ls grad E_dse(x, ref_i) + li grad E_low_pass(x, ref_i)); see `energy.dse(encoder)` and
    `energy.low_pass(down_n)`. An energy with weight 0 is not evaluated and needs no encoder or down_n. Few steps make
    beta_i large, and large weights then overshoot. The predicted x_0 is not clipped. variance: fixed_small, the
    posterior's, or fixed_large, beta; a variance that the model gives, in channels after the first C, is ignored.
    Draws: e, the noise of every ref_i; then one per step.
    """
    check_start(start, diffusion.num_timesteps)
    if variance not in VARIANCES:
        raise ValueError(f"variance is {variance!r}; it can be {' or '.join(VARIANCES)}")
    diffusion = copy.copy(diffusion)
    diffusion.model_var_type = VARIANCES[variance]
    noise = noise or _gaussian_like(ref)

    e = noise(ref.shape)
    weighted = (ls, dse, encoder), (li, low_pass, down_n)
    guidance = [(weight, make(option)) for weight, make, option in weighted if weight]
    for _, energy in guidance:
        energy.prepare(ref, e)

    x = diffusion.q_sample(ref, torch.full((ref.shape[0],), start - 1, device=ref.device), e)
    for i in reversed(range(start)):
        t = torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)
        original_t = diffusion.model_timesteps(t)
        prediction = model(x, original_t)[:, : ref.shape[1]]
        out = diffusion.p_mean_variance_from(prediction, x, t, clip_denoised=False)
        for weight, energy in guidance:
            _, grad = energy.energy_and_grad(x, original_t, float(diffusion.alphas_cumprod[i]))
            out["mean"] = out["mean"] - weight * float(diffusion.betas[i]) * grad
        x = diffusion.add_noise(out, t, noise(ref.shape))
        if callback is not None:
            callback(i, x)
    return x


def check_start(start, steps):
    """Raise UserError unless a schedule of that many steps has the step `start` to start at."""
    if not 1 <= start <= steps:
        raise UserError(f"--t is {start}; it can be 1 to {steps}, the number of steps of the schedule")


@torch.no_grad()
def unconditional(model, diffusion, ref, *, use_ddim=False, eta=0.0, noise=None, callback=None, clip_denoised=True):
    """Images of the model's own: of ref only shape, type and device count.

    Ancestral sampling, or with use_ddim DDIM (Song et al. 2021), eta its share of noise. Draws: x_T; then one per step.
    """
    noise = noise or _gaussian_like(ref)
    x = noise(ref.shape)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)
        draw = noise(ref.shape)
        if use_ddim:
            x = diffusion.ddim_sample(model, x, t, clip_denoised, eta=eta, noise=draw)["sample"]
        else:
            x = diffusion.p_sample(model, x, t, clip_denoised, noise=draw)["sample"]
        if callback is not None:
            callback(i, x)
    return x


def _gaussian_like(ref):
    return lambda shape: torch.randn(shape, device=ref.device, dtype=ref.dtype)
