"""SDDM: guided sampling on the manifolds of the reference's block statistics (Sun et al. 2023, algorithm 1).

Steps count down from T'-1 to 0. Above range_t, a step splits the score at the manifold M_i, merges its tangent part with
the energies' descent directions into one that harms none of them, and moves to M_{i-1}. At and below range_t, it is the
plain ancestral step.
"""

import torch

from .manifold import block_adain, block_statistics, check_blocks, diffuse_statistics, from_blocks, split, to_blocks
from .moo import min_norm_point

LAMBDA = 25.0  # length of an energy's direction, relative to the score's tangent part times beta / sqrt(alpha)
REFINEMENTS = 4  # extra updates of the `released` variant before its last guided step


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
    clip_denoised=True,
    noise=None,
    callback=None,
):
    """Translate references into the domain of the model.

    model(x, t): the target domain's diffusion model; diffusion: its (respaced) process of T' steps. ref: [N, C, H, W] in
    [-1, 1]. blocks: the image plane is cut into blocks x blocks. range_t: T0, guidance ends there. energies: see
    `energy`. variant: `manifold`, the method as described by its authors, or `released`, the arithmetic of the public
    release. detail_merge: merge directions per block instead of per channel. noise(shape): every random draw in order,
    x_T first, then one per step. callback(i, x): the state after step i. Returns [N, C, H, W].
    """
    if variant not in ("manifold", "released"):
        raise ValueError(f"variant is {variant!r}; it can be manifold or released")
    check_blocks(ref.shape[2:], blocks)
    noise = noise or (lambda shape: torch.randn(shape, device=ref.device, dtype=ref.dtype))
    released = variant == "released"
    solver = "frank_wolfe" if released else "exact"
    ref_mean, ref_var = block_statistics(ref, blocks)
    for energy in energies:
        energy.prepare(ref)

    def statistics(alpha_bar):
        return diffuse_statistics(ref_mean, ref_var, float(alpha_bar))

    def guided_parts(x, i, t, posterior_mean):
        """The move d along the manifold, and the rest of the step: the normal part of the score and the drift."""
        mean, _ = statistics(diffusion.alphas_cumprod[i])
        stretch = float(diffusion.alphas[i]) ** -0.5
        tangent, normal = split(x, posterior_mean - stretch * x, mean)
        directions = [tangent]
        for energy in energies:
            _, grad = energy.energy_and_grad(x, diffusion.model_timesteps(t), float(diffusion.alphas_cumprod[i]))
            descent, _ = split(x, -grad, mean)
            directions.append(rescale(descent, tangent, LAMBDA * float(diffusion.betas[i]) * stretch))
        return merge(directions, blocks if detail_merge else None, solver), normal + (stretch - 1) * x

    x = noise(ref.shape)
    if not released:
        x = block_adain(x, *statistics(diffusion.alphas_cumprod[-1]))
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)
        out = diffusion.p_mean_variance(model, x, t, clip_denoised)
        if released and i == range_t + 1:
            # The step below then uses the posterior of the last refinement, found before x moved for the last time.
            for refinement in range(REFINEMENTS):
                if refinement:
                    out = diffusion.p_mean_variance(model, x, t, clip_denoised)
                move, rest = guided_parts(x, i, t, out["mean"])
                x = x + move + rest
        if i > range_t:
            move, rest = guided_parts(x, i, t, out["mean"])
            moved = x + move
            if not released:
                moved = block_adain(moved, *statistics(diffusion.alphas_cumprod[i]))
            x = diffusion.add_noise({**out, "mean": moved + rest}, t, noise(ref.shape))
            x = block_adain(x, *statistics(diffusion.alphas_cumprod_prev[i]))
        else:
            x = diffusion.add_noise(out, t, noise(ref.shape))
        if callback is not None:
            callback(i, x)
    return x


def rescale(direction, tangent, factor):
    """Give a direction the length factor * ||tangent||, per image and channel; a zero direction stays zero."""
    length = direction.flatten(2).norm(dim=2)
    ratio = tangent.flatten(2).norm(dim=2) / torch.where(length > 0, length, 1)
    return direction * (factor * ratio)[:, :, None, None]


def merge(directions, blocks, solver):
    """Minimum-norm point of directions [N, C, H, W], per image and channel, or per block where `blocks` is given."""
    if len(directions) == 1:
        return directions[0]
    if blocks is None:
        return min_norm_point(torch.stack(directions, dim=2), 2, solver)
    stacked = torch.stack([to_blocks(direction, blocks) for direction in directions], dim=4)
    return from_blocks(min_norm_point(stacked, 4, solver))
