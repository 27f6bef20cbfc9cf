"""The two training losses, and how well a classifier does on held-out images.

A loss is a function (model, x, t, noise, y) of clean images x [N, 3, H, W], steps t [N] of the diffusion process, noise
of x's shape and labels y [N] or None; it returns a dict of per-image values [N], of which `loss` is to be minimised.
"""

import torch
from torch.nn import functional as F

from ..errors import UserError
from ..gaussian_diffusion import LossType, ModelMeanType
from .data import random_uniform, sample_noise


def loss_weights(diffusion, p2_gamma=0.0, p2_k=1.0, min_snr_gamma=0.0):
    """Weight of the squared error at every step, float32 [T], or None where all are 1.

    SNR = alpha_bar / (1 - alpha_bar).
    p2_gamma > 0: 1 / (p2_k + SNR)^p2_gamma (P2 weighting, Choi et al. 2022).
    min_snr_gamma > 0: min(SNR, min_snr_gamma) in terms of the error of x_0, that is divided by SNR for a model that
    predicts the noise (Hang et al. 2023).
    """
    for flag, value in (("p2_gamma", p2_gamma), ("min_snr_gamma", min_snr_gamma)):
        if not value >= 0:
            raise UserError(f"--{flag} is {value}; it must be positive, or 0 for no weighting")
    if not p2_gamma and not min_snr_gamma:
        return None
    if p2_gamma and min_snr_gamma:
        raise UserError(
            f"--p2_gamma {p2_gamma} and --min_snr_gamma {min_snr_gamma} exclude each other; give one of them"
        )
    given = "--p2_gamma" if p2_gamma else "--min_snr_gamma"
    if diffusion.loss_type in (LossType.KL, LossType.RESCALED_KL):
        raise UserError(f"{given} weights a squared error, and --use_kl True has none; leave one of them out")
    snr = torch.from_numpy(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    if p2_gamma:
        if diffusion.model_mean_type is not ModelMeanType.EPSILON:
            raise UserError("--p2_gamma is defined for models that predict the noise; leave out --predict_xstart True")
        if not p2_k > 0:
            raise UserError(f"--p2_k is {p2_k}; it must be positive")
        return (1 / (p2_k + snr) ** p2_gamma).float()
    capped = snr.clamp(max=min_snr_gamma)
    # The error of what the model predicts, per error of x_0: 1, SNR, or SNR + 1 for the velocity.
    ratio = {ModelMeanType.START_X: 1.0, ModelMeanType.VELOCITY: snr + 1}.get(diffusion.model_mean_type, snr)
    return (capped / ratio).float()


def diffusion_loss(diffusion, weights=None):
    """The diffusion model's loss: `GaussianDiffusion.training_losses`, its squared error weighted by weights[t]."""

    def losses(model, x, t, noise, y):
        def in_float32(*args, **kwargs):
            return model(*args, **kwargs).float()

        kwargs = {} if y is None else {"y": y}
        terms = diffusion.training_losses(in_float32, x, t, model_kwargs=kwargs, noise=noise)
        if weights is not None:
            terms["loss"] = terms["loss"] + (weights.to(x.device)[t] - 1) * terms["mse"]
        return terms

    return losses


def classifier_loss(diffusion, noised=True):
    """Cross-entropy of a classifier of noised images (of clean ones at t = 0 if not `noised`), with its accuracy."""

    def losses(model, x, t, noise, y):
        x = diffusion.q_sample(x, t, noise=noise) if noised else x
        steps = diffusion.model_timesteps(t) if noised else torch.zeros_like(t)
        logits = model(x, steps).float()
        accuracy = (logits.detach().argmax(dim=1) == y).float()
        return {"loss": F.cross_entropy(logits, y, reduction="none"), "acc": accuracy}

    return losses


@torch.no_grad()
def evaluate(model, losses, images, num_timesteps, *, device, batch_size=64, seed=0, rank=0, world_size=1):
    """Sums of the loss terms over a held-out set by quarter of the timesteps: dict of [4, 2], (sum, count).

    The timestep and noise of an image depend on the seed and its place in the set only, so that figures compare
    between evaluations. Each rank takes its share of the images; the sums are to be added up over ranks.
    """
    totals = {}
    for positions, x, y in images.ordered_batches(batch_size, device, rank, world_size):
        t = torch.from_numpy((random_uniform(seed, "held-out timestep", positions) * num_timesteps).astype(int)).to(
            device
        )
        noise = sample_noise(f"{seed}/held-out", positions, x.shape[1:], device)
        terms = losses(model, x, t, noise, y)
        add_by_quarter(totals, terms, t, num_timesteps)
    return totals


def add_by_quarter(totals, terms, t, num_timesteps):
    """Add per-image terms [N] to totals[name] [4, 2]: the sum and the number of finite values in each quarter of t."""
    quarter = (4 * t // num_timesteps == torch.arange(4, device=t.device)[:, None]).float()
    for name, values in terms.items():
        values = values.detach().float()
        finite = values.isfinite()
        table = quarter @ torch.stack([values.where(finite, 0.0), finite.float()], dim=1)
        totals[name] = totals[name] + table if name in totals else table


def means_by_quarter(totals, prefix=""):
    """The totals of `add_by_quarter` as means: {name: over all, name_q0: ..., name_q3: ...}, without empty quarters."""
    means = {}
    for name, table in totals.items():
        sums, counts = table.double().cpu().unbind(1)
        if counts.sum() > 0:
            means[prefix + name] = (sums.sum() / counts.sum()).item()
        for q in range(4):
            if counts[q] > 0:
                means[f"{prefix}{name}_q{q}"] = (sums[q] / counts[q]).item()
    return means
