"""SDDM: guided sampling on the manifolds of the reference's block statistics (Sun et al. 2023, algorithm 1).

Steps count down from T'-1 to 0. Above range_t, a step splits the score at the manifold M_i, merges its tangent part with
the energies' descent directions into one that harms none of them, and moves to M_{i-1}. At and below range_t, it is the
plain ancestral step.
"""

import torch

from .manifold import BlockManifold, LowPassManifold, check_blocks, from_blocks, to_blocks
from .moo import min_norm_weights
from .solvers import create_solver

LAMBDA = 25.0  # length of an energy's direction, relative to the score's tangent part times beta / sqrt(alpha)
REFINEMENTS = 4  # extra updates of the `released` variant before its last guided step
CHOICES = {"variant": ("manifold", "released"), "moo": ("min_norm", "linear"), "manifold": ("badain", "low_pass")}


@torch.no_grad()
def sample(
    model,
    diffusion,
    ref,
    *,
    blocks=16,
    range_t,
    energies=(),
    variant="manifold",
    detail_merge=False,
    moo="min_norm",
    manifold="badain",
    down_n=32,
    clip_denoised=True,
    sampler="ancestral",
    eta=0.0,
    noise=None,
    callback=None,
    monitor=None,
):
    """Translate references into the domain of the model.

    model(x, t): the target domain's diffusion model; diffusion: its (respaced) process of T' steps. ref: [N, C, H, W] in
    [-1, 1]. blocks: the image plane is cut into blocks x blocks. range_t: T0, guidance ends there. energies: see
    `energy`. variant: `manifold`, the method as described by its authors, or `released`, the arithmetic of the public
    release. detail_merge: merge directions per block instead of per channel. noise(shape): every random draw in order,
    x_T first, then one per step. callback(i, x): the state after step i. Returns [N, C, H, W].

    sampler: `ancestral` as in the paper; `ddim`, or `dpmpp_2m` for the plain steps and ddim for the guided ones, which
    need fewer steps. Their posterior takes the place of the ancestral one; eta is DDIM's share of noise. See `solvers`.

    The paper's ablations: moo `linear` adds the directions up instead of taking their minimum-norm point; manifold
    `low_pass` is that of images with the reference's low frequencies (those that shrinking by down_n keeps).

    monitor(i, record): what a guided step at i (a refinement of `released` too) did; record has, on the model's device,
    `tangent` and `normal` [N], Euclidean norms of the score's parts, `weights` [N, 1 + energies], those of the merged
    directions (mean over channels and blocks), and `negative` [N], whether the move has a negative inner product with
    the score's tangent part.
    """
    for name, value in (("variant", variant), ("moo", moo), ("manifold", manifold)):
        if value not in CHOICES[name]:
            raise ValueError(f"{name} is {value!r}; it can be {' or '.join(CHOICES[name])}")
    check_blocks(ref.shape[2:], blocks)
    noise = noise or (lambda shape: torch.randn(shape, device=ref.device, dtype=ref.dtype))
    released = variant == "released"
    merging = "linear" if moo == "linear" else "frank_wolfe" if released else "exact"
    m = BlockManifold(ref, blocks) if manifold == "badain" else LowPassManifold(ref, down_n)
    for energy in energies:
        energy.prepare(ref)
    solver = create_solver(sampler, diffusion, eta)
    alpha_bars = [float(alpha_bar) for alpha_bar in diffusion.alphas_cumprod]

    def posterior(x, t):
        return solver.posterior(diffusion.p_mean_variance(model, x, t, clip_denoised), x, t)

    def guided_parts(x, i, t, posterior_mean):
        """The move d along the manifold, and the rest of the step: the normal part of the score and the drift."""
        stretch = float(diffusion.alphas[i]) ** -0.5
        tangent, normal = m.split(x, posterior_mean - stretch * x, alpha_bars[i])
        directions = [tangent]
        for energy in energies:
            _, grad = energy.energy_and_grad(x, diffusion.model_timesteps(t), alpha_bars[i])
            descent, _ = m.split(x, -grad, alpha_bars[i])
            directions.append(rescale(descent, grad, tangent, LAMBDA * float(diffusion.betas[i]) * stretch))
        move, weights = merge(directions, blocks if detail_merge else None, merging)
        if monitor is not None:
            monitor(i, _record(tangent, normal, move, weights))
        return move, normal + (stretch - 1) * x

    x = noise(ref.shape)
    if not released:
        x = m.restrict(x, alpha_bars[-1])
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)
        out = posterior(x, t)
        if released and i == range_t + 1:
            # The step below then uses the posterior of the last refinement, found before x moved for the last time.
            for refinement in range(REFINEMENTS):
                if refinement:
                    out = posterior(x, t)
                move, rest = guided_parts(x, i, t, out["mean"])
                x = x + move + rest
        if i > range_t:
            move, rest = guided_parts(x, i, t, out["mean"])
            moved = x + move
            if not released:
                moved = m.restrict(moved, alpha_bars[i])
            x = diffusion.add_noise({**out, "mean": moved + rest}, t, noise(ref.shape))
            x = m.restrict(x, alpha_bars[i - 1] if i else 1.0)
        else:
            x = solver.step(out, x, i, t, noise(ref.shape))
        if callback is not None:
            callback(i, x)
    return x


def rescale(direction, grad, tangent, factor):
    """Give the tangent part of a gradient the length factor * ||tangent||, per image and channel.

    What is no longer than the rounding error of the split counts as zero, and stays so.
    """
    length = direction.flatten(2).norm(dim=2)
    audible = length > 1e-6 * grad.flatten(2).norm(dim=2)
    ratio = tangent.flatten(2).norm(dim=2) / torch.where(audible, length, torch.inf)
    return direction * (factor * ratio)[:, :, None, None]


def merge(directions, blocks, solver):
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


def _record(tangent, normal, move, weights):
    """What a monitor is told of a step."""
    inner, square = (move * tangent).flatten(1).sum(1), tangent.square().flatten(1).sum(1)
    return {
        "tangent": square.sqrt(),
        "normal": normal.flatten(1).norm(dim=1),
        "weights": weights.flatten(1, -2).mean(1),
        "negative": inner < -1e-4 * square,  # a move that cancels to rounding errors has either sign
    }
