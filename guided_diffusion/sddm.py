"""SDDM: guided sampling on the manifolds of the reference's block statistics (Sun et al. 2023, algorithm 1).

Steps i count down from T'-1 to 0. A guided one, for i > range_t, has five parts:

1. the score g = m - x / sqrt(alpha_i) with the posterior mean m, and the drift f = (1 / sqrt(alpha_i) - 1) x;
2. its split at the manifold M_i into g_t, tangent, and g_n, normal;
3. directions e_k, the tangent parts of -grad E_k, of a length relative to that of g_t;
4. the move d, the minimum-norm point of the convex hull of g_t, e_1, ..., e_K, which harms none of them;
5. along the manifold, back to it, and on to M_{i-1}: see the variants `manifold` and `released`.

The others are plain steps of the chosen solver.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .caching import share_features
from .energy import Energy, prepared
from .errors import InputError, check_choice
from .gaussian_diffusion import GaussianDiffusion
from .manifold import MANIFOLDS, from_blocks, to_blocks
from .moo import min_norm_weights
from .registry import Registry
from .solvers import SOLVERS, Noise, State, at_step, check_references, first_state, gaussian_like, resolve_step, sampler

LAMBDA = 25.0  # length of an energy's direction, relative to the score's tangent part times beta / sqrt(alpha)
PUBLISHED_STEPS = 100  # of the schedule that LAMBDA is for
REFINEMENTS = 4  # extra updates of the `released` variant before its last guided step
MERGES = ("min_norm", "linear")

VARIANTS = Registry("variant")  # how a guided step moves: functions of (guide, x, i, noise) like `manifold`


@dataclass(frozen=True)
class Guide:
    """Computations that the guided steps of the variants share.

    denoise(x, i): the model's p(x_{i-1} | x_i), as `GaussianDiffusion.p_mean_variance` gives it. merge(directions): the
    move and the weights of `merge`. energy_factor(i): see the function. last: index of the last guided step.
    """

    diffusion: GaussianDiffusion
    denoise: Callable[[Tensor, int], dict[str, Tensor]]
    solver: Any
    manifold: Any
    energies: Sequence[Energy]
    merge: Callable[[list[Tensor]], tuple[Tensor, Tensor]]
    energy_factor: Callable[[int], float]
    last: int

    def posterior(self, x: Tensor, i: int) -> dict[str, Tensor]:
        """The solver's mean m and log-variance of x_{i-1}, and the prediction of x_0."""
        return self.solver.posterior(self.denoise(x, i), x, i)

    def restrict(self, x: Tensor, i: int) -> Tensor:
        """R_i: x on the manifold M_i; index -1 is that of the clean reference."""
        return self.manifold.restrict(x, float(self.diffusion.alphas_cumprod[i]) if i >= 0 else 1.0)

    def parts(self, x: Tensor, i: int, mean: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Parts 1 to 4 with the posterior's mean [N, C, H, W]: the move d, the rest of the step g_n + f, and a record.

        The record has `tangent` g_t, `normal` g_n, `move` d, and `weights`, those of `merge`.
        """
        alpha_bar, stretch = float(self.diffusion.alphas_cumprod[i]), float(self.diffusion.alphas[i]) ** -0.5
        tangent, normal = self.manifold.decompose(x, mean - stretch * x, alpha_bar)
        directions = [tangent]
        for energy in self.energies:
            _, grad = energy.energy_and_grad(x, self.diffusion.model_timesteps(at_step(x, i)), alpha_bar)
            descent, _ = self.manifold.decompose(x, -grad, alpha_bar)
            directions.append(rescale(descent, grad, tangent, self.energy_factor(i)))
        move, weights = self.merge(directions)
        record = {"tangent": tangent, "normal": normal, "move": move, "weights": weights}
        return move, normal + (stretch - 1) * x, record

    def advance(self, out: dict[str, Tensor], mean: Tensor, i: int, noise: Noise) -> Tensor:
        """R_{i-1}(mean + sigma_i z) with the posterior's sigma, which is 0 at i = 0."""
        x = self.diffusion.add_noise({**out, "mean": mean}, at_step(mean, i), noise(mean.shape))
        return self.restrict(x, i - 1)


Guided = tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]]]


@VARIANTS.add("manifold")
def manifold(guide: Guide, x: Tensor, i: int, noise: Noise) -> Guided:
    """The method as its authors describe it: x* = R_i(x + d), then x_{i-1} = R_{i-1}(x* + g_n + f + sigma_i z).

    Returns x_{i-1}, the posterior that it was made with, and the records of `Guide.parts`.
    """
    out = guide.posterior(x, i)
    move, rest, record = guide.parts(x, i, out["mean"])
    return guide.advance(out, guide.restrict(x + move, i) + rest, i, noise), out, [record]


@VARIANTS.add("released")
def released(guide: Guide, x: Tensor, i: int, noise: Noise) -> Guided:
    """The arithmetic of the public release: x_{i-1} = R_{i-1}(x + d + g_n + f + sigma_i z).

    Four refinements x <- x + d + g_n + f precede the last guided step, which then uses the posterior of the last of
    them, found before x moved for the last time.
    """
    out, records = guide.posterior(x, i), []
    for refinement in range(REFINEMENTS if i == guide.last else 0):
        out = guide.posterior(x, i) if refinement else out
        move, rest, record = guide.parts(x, i, out["mean"])
        x = x + move + rest
        records.append(record)
    move, rest, record = guide.parts(x, i, out["mean"])
    return guide.advance(out, x + move + rest, i, noise), out, [*records, record]


@sampler
def sample(
    model: Callable,  # model(x, t), the target domain's diffusion model; t are original timesteps
    diffusion: GaussianDiffusion,  # its (respaced) process of T' steps
    ref: Tensor,  # references [N, C, H, W], pixels in [-1, 1] or latents
    *,
    blocks: int = 16,  # per side
    range_t: int | float,  # T0, the first plain step, or a share of the schedule below 1
    energies: Sequence[Energy] = (),  # see `energy`
    variant: str = "manifold",  # as its authors describe the method, or `released`, as their code computes it
    detail_merge: bool = False,  # merge directions per block instead of per channel
    moo: str = "min_norm",  # or `linear`, which adds the directions up (the paper's ablation)
    manifold: str = "badain",  # block statistics, or `low_pass`, what shrinking by down_n keeps (the paper's ablation)
    down_n: int = 32,
    clip_denoised: bool | float = True,  # predictions of x_0 to [-1, 1], or to a range; False for latents
    sampler: str = "ancestral",  # as in the paper; `ddim` and `dpmpp_2m` need fewer steps
    eta: float = 0.0,  # DDIM's share of noise
    start: int | float | None = None,  # begin at step start - 1 from the reference noised to it, not at T'-1 from noise
    cache_interval: int = 1,  # recompute deep levels only in every so many plain steps; see `caching`
    cache_guided: bool = False,  # in guided steps, too
    energy_scale: float = LAMBDA,  # see `energy_factor`
    details: int | float | None = None,  # above this step, or share, `thin_features` of the reference are kept
    noise: Noise | None = None,  # noise(shape): x_T first, then one draw per step, and a second where it keeps details
) -> Iterator[State]:
    """Translate references into the domain of the model; returns images [N, C, H, W].

    `callback` sees every step; see `solvers.sampler`. `sample.steps(...)` is the generator of the steps. Raises
    InputError where an option is unknown or does not suit the references, the schedule or an energy.
    """
    ref, noise = check_references(ref, clip_denoised), noise or gaussian_like(ref)
    guided_step, total = VARIANTS.pick(variant), diffusion.num_timesteps
    range_t = resolve_step(range_t, total, "range_t")
    check_choice("moo", moo, MERGES)
    for energy in energies:
        own = getattr(energy, "blocks", blocks)
        if own != blocks and manifold == "badain":
            raise InputError(f"an energy has {own} blocks; they must agree", parameter="blocks", value=blocks)
    merging = "linear" if moo == "linear" else "frank_wolfe" if variant == "released" else "exact"
    guided, plain = share_features(model, cache_interval, cache_guided)

    def denoise(x, i):
        return diffusion.p_mean_variance(guided if i > range_t else plain, x, at_step(x, i), clip_denoised)

    guide = Guide(
        diffusion=diffusion,
        denoise=denoise,
        solver=SOLVERS.pick(sampler)(diffusion, eta),
        manifold=MANIFOLDS.pick(manifold)(ref, blocks=blocks, down_n=down_n),
        energies=prepared(energies, ref),
        merge=partial(merge, blocks=blocks if detail_merge else None, solver=merging),
        energy_factor=partial(energy_factor, diffusion, energy_scale, variant == "released"),
        last=range_t + 1,
    )
    last_detail = total if details is None else resolve_step(details, total, "details")
    thin = None if details is None else thin_features(ref)
    steps, x = first_state(diffusion, ref, start, noise)
    if variant != "released":
        x = guide.restrict(x, steps - 1)
    solver_state = None
    for i in reversed(range(steps)):
        if i > range_t:
            x, out, records = guided_step(guide, x, i, noise)
        else:
            out, records = guide.posterior(x, i), []
            x, solver_state = guide.solver.step(denoise, x, i, out, noise(x.shape), solver_state)
        if thin is not None and i > last_detail:
            x = torch.where(thin, diffusion.q_sample(ref, at_step(ref, i - 1), noise(ref.shape)), x)
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": records}


def thin_features(ref: Tensor) -> Tensor:
    """Where pictures [N, C, H, W] in [-1, 1] have eyes, mouths, stripes: a mask [N, 1, H, W] of features without bulk.

    These are what a closing or an opening with a square of 5 pixels (of 64; larger as the picture is) changes in some
    channel by 0.3 or more (the black-hat and white-hat transforms, Serra 1982), and the pixels around it. `sample`
    keeps them: x_i <- m q(ref, i) + (1 - m) x_i (Lugmayr et al. 2022, equation 8; Levin and Fried 2023).
    """

    def highest(x: Tensor, reach: int) -> Tensor:
        return F.max_pool2d(x, 2 * reach + 1, 1, reach)

    reach = max(1, round(ref.shape[-1] / 32))
    closed, opened = -highest(-highest(ref, reach), reach), highest(-highest(-ref, reach), reach)
    thin = torch.maximum(closed - ref, ref - opened).amax(1, keepdim=True) > 0.3
    return highest(thin.to(ref.dtype), max(1, reach // 2)) > 0


def energy_factor(diffusion: GaussianDiffusion, energy_scale: float, released: bool, i: int) -> float:
    """Length of an energy's direction at step i, relative to the score's tangent part.

    The release has lambda beta_i / sqrt(alpha_i), which grows as steps are left out; the minimum-norm point takes less
    of longer directions. Otherwise the length is that of 100 steps: alpha_i^(T'/100) in place of alpha_i, since
    -log alpha is what a step covers of the integral of beta.
    """
    alpha = float(diffusion.alphas[i])
    if not released:
        alpha **= diffusion.num_timesteps / PUBLISHED_STEPS
    return energy_scale * (1 - alpha) / alpha**0.5


def rescale(direction: Tensor, grad: Tensor, tangent: Tensor, factor: float) -> Tensor:
    """Give the tangent part of a gradient the length factor * ||tangent||, per image and channel.

    Directions shorter than the split's rounding error are set to zero.
    """
    length = direction.flatten(2).norm(dim=2)
    significant = length > 1e-6 * grad.flatten(2).norm(dim=2)
    ratio = tangent.flatten(2).norm(dim=2) / torch.where(significant, length, torch.inf)
    return direction * (factor * ratio)[:, :, None, None]


def merge(directions: list[Tensor], blocks: int | None, solver: str) -> tuple[Tensor, Tensor]:
    """One direction of several [N, C, H, W], per image and channel, or per block where `blocks` is given.

    solver: `exact` or `frank_wolfe` for the minimum-norm point, `linear` for the sum. Returns it with the weights
    [N, C, K], or [N, C, B, B, K] per block.
    """
    if len(directions) == 1:
        return directions[0], directions[0].new_ones(*directions[0].shape[:2], 1)
    if blocks is not None:
        directions = [to_blocks(direction, blocks) for direction in directions]
    dim = directions[0].ndim - 2  # the directions of one problem come before its two axes of pixels
    stacked = torch.stack(directions, dim)
    if solver == "linear":
        weights = stacked.new_ones(stacked.shape[: dim + 1])
    else:
        weights = min_norm_weights(stacked, dim, solver)
    merged = (weights[..., None, None] * stacked).sum(dim)
    return (merged if blocks is None else from_blocks(merged)), weights
