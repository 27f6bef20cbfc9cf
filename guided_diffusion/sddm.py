"""SDDM: guided sampling on the manifolds of the reference's block statistics (Sun et al. 2023, algorithm 1).

Steps count down from T'-1 to 0. Above range_t, a step splits the score at the manifold M_i, merges its tangent part
with the energies' descent directions into one that harms none of them, and moves to M_{i-1}. At and below range_t, it
is the plain step of the chosen solver.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .caching import GuidedCacheOptions, share_features
from .energy import Energy
from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion
from .manifold import MANIFOLDS, from_blocks, to_blocks
from .moo import min_norm_weights
from .options import Registry, check, option
from .solvers import (
    SOLVERS,
    Noise,
    State,
    at_step,
    bind,
    check_references,
    create_solver,
    gaussian_like,
    resolve_step,
    sampler,
)

LAMBDA = 25.0  # length of an energy's direction, relative to the score's tangent part times beta / sqrt(alpha)
REFINEMENTS = 4  # extra updates of the `released` variant before its last guided step
MERGES = ("min_norm", "linear")

METHODS = Registry("method")
"""What turns references into images, by name: an options dataclass like `SDDM`."""

VARIANTS = Registry("variant")
"""How guided steps move: a generator of states of (guide, ref, range_t, noise)."""


class Guide:
    """What a run of SDDM computes at a step: the model's posterior, the score's parts, and the merged move.

    model: the one that evaluates step i, model(i)(x, t).
    """

    def __init__(
        self,
        model: Callable[[int], Callable],
        diffusion: GaussianDiffusion,
        ref: torch.Tensor,
        energies: Sequence[Energy],
        manifold: Any,
        solver: Any,
        merge: Callable,
        clip_denoised: bool | float,
    ) -> None:
        self.model, self.diffusion, self.energies = model, diffusion, energies
        self.manifold, self.solver, self.merge, self.clip_denoised = manifold, solver, merge, clip_denoised
        self.alpha_bars = [float(alpha_bar) for alpha_bar in diffusion.alphas_cumprod]
        self.device = ref.device
        for energy in energies:
            energy.prepare(ref)

    def posterior(self, x: torch.Tensor, i: int) -> dict[str, torch.Tensor]:
        """The solver's mean and log-variance of x_{i-1}, and the prediction of x_0."""
        t = at_step(x, i)
        out = self.diffusion.p_mean_variance(self.model(i), x, t, self.clip_denoised)
        return self.solver.posterior(out, x, t)

    def parts(self, x: torch.Tensor, i: int, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The move d along the manifold, the rest of the step (the score's normal part and the drift), and a record.

        mean [N, C, H, W]: of the posterior. The record has tensors `tangent` and `normal`, the score's parts, `move`,
        and `weights` [N, C, K] or [N, C, B, B, K] of the score and the energies.
        """
        stretch = float(self.diffusion.alphas[i]) ** -0.5
        tangent, normal = self.manifold.decompose(x, mean - stretch * x, self.alpha_bars[i])
        directions = [tangent]
        for energy in self.energies:
            t = self.diffusion.model_timesteps(at_step(x, i))
            _, grad = energy.energy_and_grad(x, t, self.alpha_bars[i])
            descent, _ = self.manifold.decompose(x, -grad, self.alpha_bars[i])
            directions.append(rescale(descent, grad, tangent, LAMBDA * float(self.diffusion.betas[i]) * stretch))
        move, weights = self.merge(directions)
        record = {"tangent": tangent, "normal": normal, "move": move, "weights": weights}
        return move, normal + (stretch - 1) * x, record

    def restrict(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """x on the manifold M_i; index -1 is that of the clean reference."""
        return self.manifold.restrict(x, self.alpha_bars[i] if i >= 0 else 1.0)

    def add_noise(self, out: dict[str, torch.Tensor], mean: torch.Tensor, i: int, noise: torch.Tensor) -> torch.Tensor:
        """mean + sigma_i noise with the posterior's sigma, without noise at i = 0."""
        return self.diffusion.add_noise({**out, "mean": mean}, at_step(mean, i), noise)

    def plain_step(self, out: dict[str, torch.Tensor], x: torch.Tensor, i: int, noise: torch.Tensor) -> torch.Tensor:
        """The solver's step without guidance."""
        return self.solver.step(out, x, i, at_step(x, i), noise)


@VARIANTS.add("manifold")
def manifold(guide: Guide, x: torch.Tensor, start: int, range_t: int, noise: Noise) -> Iterator[State]:
    """The method as its authors describe it: x* = R_i(x + d), then x_{i-1} = R_{i-1}(x* + g_n + f + sigma_i z).

    x: noise or the noised reference at index start - 1. Yields the state after each step.
    """
    x = guide.restrict(x, start - 1)
    for i in reversed(range(start)):
        out = guide.posterior(x, i)
        guided = []
        if i > range_t:
            move, rest, record = guide.parts(x, i, out["mean"])
            moved = guide.restrict(x + move, i)
            x = guide.restrict(guide.add_noise(out, moved + rest, i, noise(x.shape)), i - 1)
            guided.append(record)
        else:
            x = guide.plain_step(out, x, i, noise(x.shape))
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": guided}


@VARIANTS.add("released")
def released(guide: Guide, x: torch.Tensor, start: int, range_t: int, noise: Noise) -> Iterator[State]:
    """The arithmetic of the public release: x_{i-1} = R_{i-1}(x + d + g_n + f + sigma_i z), x_T not restricted.

    Four refinements x <- x + d + g_n + f precede the last guided step, which then uses the posterior of the last of
    them, found before x moved for the last time. x and the states are those of `manifold`.
    """
    for i in reversed(range(start)):
        out = guide.posterior(x, i)
        guided = []
        for refinement in range(REFINEMENTS if i == range_t + 1 else 0):
            out = guide.posterior(x, i) if refinement else out
            move, rest, record = guide.parts(x, i, out["mean"])
            x = x + move + rest
            guided.append(record)
        if i > range_t:
            move, rest, record = guide.parts(x, i, out["mean"])
            x = guide.restrict(guide.add_noise(out, x + move + rest, i, noise(x.shape)), i - 1)
            guided.append(record)
        else:
            x = guide.plain_step(out, x, i, noise(x.shape))
        yield {"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": guided}


@sampler
def sample(
    model: Callable,
    diffusion: GaussianDiffusion,
    ref: torch.Tensor,
    *,
    blocks: int = 16,
    range_t: int | float,
    energies: Sequence[Energy] = (),
    variant: str = "manifold",
    detail_merge: bool = False,
    moo: str = "min_norm",
    manifold: str = "badain",
    down_n: int = 32,
    clip_denoised: bool | float = True,
    sampler: str = "ancestral",
    eta: float = 0.0,
    start: int | float | None = None,
    cache_interval: int = 1,
    cache_guided: bool = False,
    noise: Noise | None = None,
) -> Iterator[State]:
    """Translate references into the domain of the model; returns images [N, C, H, W].

    Args:
        model: model(x, t), the target domain's diffusion model; t are original timesteps.
        diffusion: its (respaced) process of T' steps.
        ref: references [N, C, H, W] in [-1, 1].
        blocks: the image plane is cut into blocks x blocks.
        range_t: T0, guidance ends there: a step of the respaced schedule, or a share of it below 1.
        energies: see `energy`.
        variant: `manifold`, the method as its authors describe it, or `released`, the arithmetic of the public release.
        detail_merge: merge directions per block instead of per channel.
        moo: `min_norm`, or `linear`, which adds the directions up (the paper's ablation).
        manifold: `badain`, block statistics, or `low_pass`, the reference's low frequencies (the paper's ablation).
        down_n: the low-pass manifold keeps what shrinking by down_n keeps.
        clip_denoised: clip the prediction of x_0 to [-1, 1].
        sampler: a solver's name: `ancestral` as in the paper; `ddim`, or `dpmpp_2m` for the plain steps and ddim for
            the guided ones, which need fewer steps. Their posterior takes the place of the ancestral one.
        eta: DDIM's share of noise.
        start: late start: begin at step start - 1 from the reference noised to it, instead of at T'-1 from noise.
        cache_interval: compute the network's deep levels in every so many plain evaluations alone; 1: in all.
        cache_guided: count and share those of guided steps, too. See `caching`.
        noise: noise(shape), every random draw in order: x_T (or the noise of a late start) first, then one per step.
        callback: sees every step; see `solvers.sampler`. `sample.steps(...)` is the generator of the steps.

    Raises:
        InputError: an option is unknown or does not suit the references, the schedule or an energy.
    """
    check_references(ref)
    generator, steps = VARIANTS.pick(variant), diffusion.num_timesteps
    first = steps if start is None else resolve_step(start, steps, "start", 1, steps)
    last_guided = resolve_step(range_t, steps, "range_t")
    if moo not in MERGES:
        raise InputError(f"it can be {' or '.join(MERGES)}", parameter="moo", value=moo)
    constraint = MANIFOLDS.pick(manifold)(ref, blocks=blocks, down_n=down_n)
    for energy in energies:
        own = getattr(energy, "blocks", blocks)
        if own != blocks and manifold == "badain":
            raise InputError(f"an energy has {own} blocks; they must agree", parameter="blocks", value=blocks)
    merging = "linear" if moo == "linear" else "frank_wolfe" if variant == "released" else "exact"
    guided, plain = share_features(model, cache_interval, cache_guided)
    guide = Guide(
        lambda i: guided if i > last_guided else plain,
        diffusion,
        ref,
        energies,
        constraint,
        create_solver(sampler, diffusion, eta),
        partial(merge, blocks=blocks if detail_merge else None, solver=merging),
        clip_denoised,
    )
    noise = noise or gaussian_like(ref)
    x = noise(ref.shape)
    if start is not None:
        x = diffusion.q_sample(ref, at_step(ref, first - 1), x)
    yield from generator(guide, x, first, last_guided, noise)


def rescale(direction: torch.Tensor, grad: torch.Tensor, tangent: torch.Tensor, factor: float) -> torch.Tensor:
    """Give the tangent part of a gradient the length factor * ||tangent||, per image and channel.

    Directions shorter than the split's rounding error are set to zero.
    """
    length = direction.flatten(2).norm(dim=2)
    significant = length > 1e-6 * grad.flatten(2).norm(dim=2)
    ratio = tangent.flatten(2).norm(dim=2) / torch.where(significant, length, torch.inf)
    return direction * (factor * ratio)[:, :, None, None]


def merge(directions: list[torch.Tensor], blocks: int | None, solver: str) -> tuple[torch.Tensor, torch.Tensor]:
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


@METHODS.add("sddm")
@dataclass(frozen=True)
class SDDM(GuidedCacheOptions):
    """SDDM's options: guided above step T0, the plain diffusion model below it."""

    range_t: int | float = option(
        0,
        "T0: guidance ends at this step of the respaced schedule, or share of it as 0.3",
        least=0,
        metavar="STEP",
    )
    blocks: int = option(16, "cut the image into so many blocks a side", least=1)
    variant: str = option(
        "manifold", "the method as described, or the arithmetic of the public release", choices=VARIANTS
    )
    start: int | float | None = option(
        None, "late start: from the reference noised to this step, or share of the schedule", metavar="STEP"
    )
    detail_merge: bool = option(False, "merge directions per block instead of per channel")
    moo: str = option(
        "min_norm", "ablation: merge directions by their minimum-norm point, or add them up", choices=MERGES
    )
    manifold: str = option(
        "badain", "images with the reference's block statistics, or low frequencies", choices=MANIFOLDS
    )
    down_n: int = option(32, "low_pass, energy or manifold, keeps 1/N of the resolution", least=1)
    sampler: str = option("ancestral", "how steps are taken; ddim and dpmpp_2m need fewer", choices=SOLVERS)
    eta: float = option(0.0, "noise of ddim's steps, 0 for none, 1 for as much as ancestral", least=0, most=1)

    def __post_init__(self) -> None:
        check(self)
        if self.eta and not getattr(SOLVERS.pick(self.sampler), "takes_eta", True):
            raise InputError(f"`sampler` {self.sampler} has none", parameter="eta", value=self.eta)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        unused = set() if getattr(SOLVERS.pick(self.sampler), "takes_eta", True) else {"eta"}
        unused |= super().ignored()
        return unused | (set() if self.manifold == "low_pass" else {"down_n"})

    def check_fit(self, image_size: int | None, steps: int | None) -> None:
        """Raise InputError where the options do not suit an image size and a number of steps; None: not known yet."""
        if image_size is not None:
            MANIFOLDS.pick(self.manifold)(
                torch.zeros(1, 3, image_size, image_size), blocks=self.blocks, down_n=self.down_n
            )
        if steps is not None:
            resolve_step(self.range_t, steps, "range_t")
            self.steps(steps)

    def steps(self, total: int) -> int:
        """How many steps of a schedule of `total` steps are taken."""
        return total if self.start is None else resolve_step(self.start, total, "start", 1, total)

    def bind(self, *, energies: Sequence[Energy] = (), clip_denoised: Any = True, **context: Any) -> Callable:
        """`sample` with these options: a function of (model, diffusion, ref, noise=, callback=)."""
        return bind(sample, energies=energies, clip_denoised=clip_denoised, **vars(self))
