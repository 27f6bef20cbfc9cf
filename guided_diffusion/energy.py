"""Energies: how far an image is from what the reference asks for, and the gradient of that.

An energy has `prepare(ref)`, called once per batch of references [N, C, H, W] (pixels in [-1, 1], or latents), and
`energy_and_grad(x, t, alpha_bar) -> (E, grad)`: x [N, C, H, W], t the original timestep [N], alpha_bar a float;
E [N] is per image, grad = dE/dx has x's shape. Samplers descend, so a lower energy is better.

EGSDE's own two, `dse` and `low_pass`, compare x with ref_t = sqrt(alpha_bar) ref + sqrt(1 - alpha_bar) noise, where
`prepare(ref, noise)` gives the noise, the same for all steps; `prepare(ref)`, as in SDDM, means none.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resizer import resize_matrix

from .errors import InputError, display_name
from .manifold import EPS, block_statistics, check_blocks, check_down_n, combine


class Energy(Protocol):
    """Interface of an energy; see the module's docstring."""

    def prepare(self, ref: Tensor) -> None: ...

    def energy_and_grad(self, x: Tensor, t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]: ...


def prepared(energies: Sequence[Energy], ref: Tensor) -> list[Any]:
    """Copies of energies, prepared for the references of one run; several runs can share an energy's network."""
    copies = [copy.copy(energy) for energy in energies]
    for each in copies:
        each.prepare(ref)
    return copies


# Convolutions per level of VGG-19, with their widths; level k's feature is relu{k}_1.
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256, 256), (512, 512, 512, 512), (512,))


def vgg(
    weights: str | os.PathLike | Mapping[str, Tensor], blocks: int = 16, level: int = 1, *, bf16: bool = False,
    channels_last: bool = False,
) -> Energy:  # fmt: skip
    """The release's energy: match the block statistics of VGG features of the reference.

    weights: path of AdaIN's `vgg_normalised.pth` or a state dict of it. level k takes relu{k}_1, 1 to 5. bf16,
    channels_last: see `BlockStatisticsEnergy`.
    """
    if not 1 <= level <= len(VGG_WIDTHS):
        raise InputError(f"it can be 1 to {len(VGG_WIDTHS)}, for relu1_1 to relu5_1", parameter="level", value=level)
    name = "the VGG state dict"
    if isinstance(weights, (str, os.PathLike)):
        from .checkpoint import load_state_dict  # here alone, so that the paper's modules load no reader of files

        name = display_name(os.fspath(weights))
        weights = load_state_dict(weights)
    # Only a layer's number matters: prefixes like "encoder." come and go.
    layers = [re.sub(r"^\D*", "", key) for key in weights]
    state, features = dict(zip(layers, weights.values())), _vgg_layers(level)
    for key, value in features.state_dict().items():
        shape, found = tuple(value.shape), tuple(state[key].shape) if key in state else "nothing"
        if found != shape or layers.count(key) > 1:
            several = " and there are several" if layers.count(key) > 1 else ""
            reason = f"{key} must have shape {shape} and has {found}{several}"
            raise InputError(f"{name} is not AdaIN's vgg_normalised.pth: {reason}")
    features.load_state_dict({key: state[key] for key in features.state_dict()})
    return BlockStatisticsEnergy(features, blocks, bf16=bf16, channels_last=channels_last)


class _VGG(nn.Sequential):
    """Layers of VGG-19, for colour pictures [N, 3, H, W] and grey ones [N, 1, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.expand(-1, 3, -1, -1))


def _vgg_layers(level):
    """The layers of `vgg_normalised.pth` up to relu{level}_1, numbered as there."""
    layers: list[nn.Module] = [nn.Conv2d(3, 3, 1)]
    channels = 3
    for i, widths in enumerate(VGG_WIDTHS[:level]):
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if i else []
        for width in widths if i < level - 1 else widths[:1]:
            layers += [nn.ReflectionPad2d(1), nn.Conv2d(channels, width, 3), nn.ReLU()]
            channels = width
    return _VGG(*layers)


def dct(blocks: int = 16) -> Energy:
    """`vgg` with fixed filters for the network: the nine 3x3 DCT-II basis filters on every channel."""
    return BlockStatisticsEnergy(_DCTFilters(), blocks)


class _DCTFilters(nn.Module):
    """The 3x3 DCT-II basis filters, applied to each of the channels that it is given."""

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        k = torch.arange(3, dtype=torch.float64)
        basis = torch.cos(math.pi / 3 * (k[None] + 0.5) * k[:, None]) * (2 / 3) ** 0.5
        basis[0] /= 2**0.5
        filters = torch.einsum("ay,bx->abyx", basis, basis).reshape(9, 1, 3, 3)
        self.register_buffer("filters", filters.float())

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.filters.to(x.dtype).repeat(channels, 1, 1, 1), groups=channels)


class BlockStatisticsEnergy:
    """E = sum (f(x) - BAdaIN(f(x), f(ref)))^2 for features f: the blocks' means and deviations of f should agree.

    With mean m, variance q (which includes 1e-5) and deviation s = sqrt(q) of a block of n feature values, the sum over
    the block is (s - s_ref)^2 (n - 1) (q - 1e-5) / q + n (m - m_ref)^2. Its gradient with respect to f is closed-form,
    and only f itself is differentiated by autograd.

    bf16: compute f and its gradient in bfloat16, the statistics in float32. channels_last: a memory format that is
    faster on CPUs and equal up to rounding; bf16 has it, too.
    """

    def __init__(self, features: nn.Module, blocks: int, *, bf16: bool = False, channels_last: bool = False) -> None:
        self.features = features.eval().requires_grad_(False)
        self.blocks = blocks
        self.bf16, self.channels_last = bf16, channels_last or bf16

    def prepare(self, ref: Tensor) -> None:
        self.features.to(ref.device)
        with torch.no_grad():
            f = self._extract(ref)
        check_blocks(f.shape[2:], self.blocks, "feature map")
        self.ref_mean, ref_var = block_statistics(f, self.blocks)
        self.ref_std = ref_var.sqrt()

    def energy_and_grad(self, x: Tensor, t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            f = self._extract(x)
        mean, var = block_statistics(f.detach(), self.blocks)
        std = var.sqrt()
        mean_error, std_error = mean - self.ref_mean, std - self.ref_std
        n = f.shape[2] * f.shape[3] // self.blocks**2
        per_block = std_error.square() * (n - 1) * (var - EPS) / var + n * mean_error.square()
        slope = std_error * (var - EPS) / (std * var) + std_error.square() * EPS / var.square()
        # 2 slope (f - mean) + 2 mean_error
        grad_f = combine(f.detach(), [2 * slope, 2 * (mean_error - slope * mean)], lambda f, a, b: f * a + b)
        (grad,) = torch.autograd.grad(f, x, grad_f)
        return per_block.flatten(1).sum(1), grad

    def _extract(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            return self.features(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.features(x).float()


def _diffuse(ref, noise, alpha_bar):
    """A reference at alpha_bar (a float); noise None stands for zeros."""
    signal = alpha_bar**0.5 * ref
    return signal if noise is None else signal + (1 - alpha_bar) ** 0.5 * noise


class NetworkEnergy:
    """Base of energies E(x, t, alpha_bar) [N] of a network, which autograd differentiates.

    timestep: for a network with a schedule of its own, alpha_bar -> its timestep of that noise level
    (`respace.matching_timestep`).
    """

    def __init__(self, network: nn.Module, timestep: Callable[[float], float] | None = None) -> None:
        self.network: Any = network.eval().requires_grad_(False)
        self.timestep = timestep

    def energy(self, x: Tensor, t: Tensor, alpha_bar: float) -> Tensor:
        raise NotImplementedError

    def energy_and_grad(self, x: Tensor, t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        if self.timestep is not None:
            t = torch.full_like(t, self.timestep(alpha_bar), dtype=torch.float32)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x, t, alpha_bar)
            (grad,) = torch.autograd.grad(energy.sum(), x)
        return energy.detach(), grad


class DomainSpecificEnergy(NetworkEnergy):
    """EGSDE's realism energy: channel-wise cosine between domain-specific features of x and of ref_t.

    network: an encoder with `middle_features(x, t)` trained to tell the source from the target domain. Descent makes x
    lose what marks the source domain.
    """

    def prepare(self, ref: Tensor, noise: Tensor | None = None) -> None:
        self.ref, self.noise = ref, noise

    def energy(self, x: Tensor, t: Tensor, alpha_bar: float) -> Tensor:
        with torch.no_grad():
            wanted = self.network.middle_features(_diffuse(self.ref, self.noise, alpha_bar), t).float()
        return F.cosine_similarity(self.network.middle_features(x, t).float(), wanted, dim=1).mean(dim=(1, 2))


class ClassifierEnergy(NetworkEnergy):
    """E = -log p(y | x, t) under a noisy-image classifier; y is a class number or a tensor [N] of them."""

    def __init__(self, model: nn.Module, y: int | Tensor, timestep: Callable[[float], float] | None = None) -> None:
        super().__init__(model, timestep)
        self.y = y

    def prepare(self, ref: Tensor) -> None:
        self.labels = torch.as_tensor(self.y, device=ref.device).long().expand(ref.shape[0])

    def energy(self, x: Tensor, t: Tensor, alpha_bar: float) -> Tensor:
        return F.cross_entropy(self.network(x, t).float(), self.labels, reduction="none")


class LowPassEnergy:
    """EGSDE's faithfulness energy: ||phi(ref_t) - phi(x)||^2 with the low-pass filter phi.

    phi shrinks by down_n and enlarges again, with the resizer's linear kernel: phi(x) = U D x D^T U^T per channel. With
    the small image s = D (x - ref_t) D^T and M = U^T U, E = <s, M s M> and its gradient is 2 D^T (M s M) D.
    """

    def __init__(self, down_n: int = 32) -> None:
        self.down_n = down_n

    def prepare(self, ref: Tensor, noise: Tensor | None = None) -> None:
        check_down_n(self.down_n, ref.shape[2:])
        self.down, self.gram = zip(*(self._axis(length, ref) for length in ref.shape[2:]))
        self.small_ref = self._shrink(ref)
        self.small_noise = None if noise is None else self._shrink(noise)

    def _axis(self, length, like):
        down = torch.from_numpy(resize_matrix(length, 1 / self.down_n, "linear"))
        up = torch.from_numpy(resize_matrix(length // self.down_n, self.down_n, "linear"))
        return down.to(like), (up.T @ up).to(like)

    def _shrink(self, x):
        return self.down[0] @ x @ self.down[1].T

    def energy_and_grad(self, x: Tensor, t: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        small = self._shrink(x) - _diffuse(self.small_ref, self.small_noise, alpha_bar)
        filtered = self.gram[0] @ small @ self.gram[1]
        energy = (small * filtered).flatten(1).sum(1)
        return energy, 2 * (self.down[0].T @ filtered @ self.down[1])


dse, low_pass, classifier = DomainSpecificEnergy, LowPassEnergy, ClassifierEnergy
