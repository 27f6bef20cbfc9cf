"""The two training losses, and how well a classifier does on held-out images.

A loss is a function (model, x, t, noise, y) of clean images x [N, 3, H, W], steps t [N] of the diffusion process, noise
of x's shape and labels y [N] or None; it returns a dict of per-image values [N], of which `loss` is to be minimised.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from ..dist_util import Ranks
from ..errors import InputError
from ..gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType
from .config import LossOptions, TrainConfig
from .data import TrainImages, random_uniform, sample_noise

Terms = dict[str, torch.Tensor]
Loss = Callable[..., Terms]


def loss_weights(
    diffusion: GaussianDiffusion, p2_gamma: float = 0.0, p2_k: float = 1.0, min_snr_gamma: float = 0.0
) -> torch.Tensor | None:
    """Weight of the squared error at every step, float32 [T], or None where all are 1.

    SNR = alpha_bar / (1 - alpha_bar).
    p2_gamma > 0: 1 / (p2_k + SNR)^p2_gamma on the error of the noise (P2 weighting, Choi et al. 2022).
    min_snr_gamma > 0: min(SNR, min_snr_gamma) on the error of x_0 (Hang et al. 2023).
    For a network that predicts something else the weight is converted: squared errors of the noise, of x_0 and of the
    velocity are to each other as SNR : 1 : SNR + 1. Raises InputError for weights that do not go together.
    """
    LossOptions(p2_gamma, p2_k, min_snr_gamma)
    if not p2_gamma and not min_snr_gamma:
        return None
    snr = torch.from_numpy(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    of_x_0 = snr / (p2_k + snr) ** p2_gamma if p2_gamma else snr.clamp(max=min_snr_gamma)
    scale = {ModelMeanType.EPSILON: snr, ModelMeanType.START_X: 1, ModelMeanType.VELOCITY: snr + 1}
    weights = (of_x_0 / scale[diffusion.model_mean_type]).float()
    if p2_gamma and min_snr_gamma:
        reason = f"it excludes `min_snr_gamma` {min_snr_gamma}; give one of them"
    elif diffusion.loss_type is LossType.RESCALED_KL:
        reason = "it weights a squared error, and `use_kl` True has none; leave one of them out"
    elif p2_gamma and diffusion.model_mean_type is ModelMeanType.START_X:
        reason = "it is defined for networks that predict the noise; leave out `predict_xstart` True"
    elif not (weights > 0).any():
        reason = "all weights of the loss are 0, so that nothing would be trained"
    else:
        return weights
    name, value = ("p2_gamma", p2_gamma) if p2_gamma else ("min_snr_gamma", min_snr_gamma)
    raise InputError(reason, parameter=name, value=value)


def in_float32(model: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The model with float32 outputs, whatever autocast makes of them."""
    return lambda *args, **kwargs: model(*args, **kwargs).float()


def diffusion_loss(diffusion: GaussianDiffusion, weights: torch.Tensor | None = None) -> Loss:
    """The diffusion model's loss: `GaussianDiffusion.training_losses`, its squared error weighted by weights[t]."""

    def losses(model, x, t, noise, y):
        kwargs = {} if y is None else {"y": y}
        terms = diffusion.training_losses(in_float32(model), x, t, model_kwargs=kwargs, noise=noise)
        if weights is not None:
            terms["loss"] = terms["loss"] + (weights.to(x.device)[t] - 1) * terms["mse"]
        return terms

    return losses


def super_res_loss(diffusion: GaussianDiffusion, small_size: int) -> Loss:
    """The loss of a model that enlarges images of side small_size, made by area averaging."""
    plain = diffusion_loss(diffusion)

    def losses(model, x, t, noise, y):
        low_res = F.interpolate(x, small_size, mode="area")
        return plain(lambda *args, **kwargs: model(*args, low_res=low_res, **kwargs), x, t, noise, y)

    return losses


def classifier_loss(diffusion: GaussianDiffusion, noised: bool = True) -> Loss:
    """Cross-entropy of a classifier of noised images (of clean ones at t = 0 if not `noised`), with its accuracy."""

    def losses(model, x, t, noise, y):
        x = diffusion.q_sample(x, t, noise=noise) if noised else x
        steps = diffusion.model_timesteps(t) if noised else torch.zeros_like(t)
        logits = model(x, steps).float()
        accuracy = (logits.detach().argmax(dim=1) == y).float()
        return {"loss": F.cross_entropy(logits, y, reduction="none"), "acc": accuracy}

    return losses


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, losses: Loss, images: TrainImages, num_timesteps: int,
    device: str | torch.device, config: TrainConfig, ranks: Ranks,
) -> Terms:  # fmt: skip
    """Sums of the loss terms over a rank's share of a held-out set by quarter of the timesteps, see `add_by_quarter`.

    Timestep and noise of an image depend on the seed and its place in the set alone, so evaluations compare.
    """
    totals, seed = {}, config.seed
    for positions, x, y in images.ordered_batches(config.batch_size, device, ranks.rank, ranks.world_size):
        steps = (random_uniform(seed, "held-out timestep", positions) * num_timesteps).astype(int)
        t, noise = torch.from_numpy(steps).to(device), sample_noise(f"{seed}/held-out", positions, x.shape[1:], device)
        add_by_quarter(totals, losses(model, x, t, noise, y), t, num_timesteps)
    return totals


def add_by_quarter(totals: Terms, terms: Terms, t: torch.Tensor, num_timesteps: int) -> None:
    """Add per-image terms [N] to totals[name] [4, 2]: the sum and the number of finite values in each quarter of t."""
    quarter = (4 * t // num_timesteps == torch.arange(4, device=t.device)[:, None]).float()
    for name, values in terms.items():
        values = values.detach().float()
        finite = values.isfinite()
        table = quarter @ torch.stack([values.where(finite, 0.0), finite.float()], dim=1)
        totals[name] = totals[name] + table if name in totals else table


def means_by_quarter(totals: Terms, prefix: str = "") -> dict[str, float]:
    """The totals of `add_by_quarter` as means: {name: over all, name_q0: ..., name_q3: ...}, without empty quarters."""
    means = {}
    # Not every device has float64 (Apple's has not): sums go to the CPU first.
    for name, table in totals.items():
        sums, counts = table.cpu().double().unbind(1)
        if counts.sum() > 0:
            means[prefix + name] = (sums.sum() / counts.sum()).item()
        for q in range(4):
            if counts[q] > 0:
                means[f"{prefix}{name}_q{q}"] = (sums[q] / counts[q]).item()
    return means
