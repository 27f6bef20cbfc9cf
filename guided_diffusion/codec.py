"""Codecs: pixels [N, 3, S, S] in [-1, 1] to what a model denoises, and back."""

from typing import Any, Protocol

import torch

from .errors import InputError

OVERSHOOT = 1.1
"""Resampling kernels overshoot the range of pixels by up to a tenth; more is another range."""


class Codec(Protocol):
    """Converts between pictures [N, 3, S, S] in [-1, 1] and x_0 of a model, [N, C, S / factor, S / factor]."""

    factor: int

    def encode(self, images: torch.Tensor) -> torch.Tensor: ...

    def decode(self, x: torch.Tensor) -> torch.Tensor: ...


class Pixels:
    """The codec of models of pixels: the identity."""

    factor = 1

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def grey(images: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601, as Pillow's) of images [..., 3, H, W] as [..., 1, H, W]; uint8 stays uint8."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    luma = torch.einsum("...chw,c->...hw", images.float(), weights).unsqueeze(-3)
    return luma.round().to(torch.uint8) if images.dtype == torch.uint8 else luma


class Grey(Pixels):
    """The codec of models of one channel: luma of the pictures, and three equal channels back."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return grey(images)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x.expand(-1, 3, -1, -1)


def pixels(channels: int) -> Pixels:
    """The codec of a model of pixels with 1 or 3 channels."""
    return Grey() if channels == 1 else Pixels()


class Autoencoder:
    """The codec of latent models: a KL or VQ autoencoder, scaled and shifted to unit variance.

    network: as diffusers' AutoencoderKL (whose mode counts), AutoencoderTiny and VQModel. Latents are
    (encoded - shift) * scale.
    """

    def __init__(self, network: Any, scale: float = 1.0, shift: float = 0.0, factor: int = 8) -> None:
        self.network, self.scale, self.shift, self.factor = network, scale, shift, factor

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        encoded = self.network.encode(images.to(self.network.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents.float() - self.shift) * self.scale

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.decode((x / self.scale + self.shift).to(self.network.dtype)).sample.float()


def in_range(images: torch.Tensor, parameter: str = "ref") -> torch.Tensor:
    """Pictures clipped to [-1, 1]. Raises InputError where they have another range, such as 0 to 255."""
    low, high = (float(end) for end in images.aminmax())
    if not -OVERSHOOT <= low <= high <= OVERSHOOT:
        reason = "it must lie in [-1, 1]: image_datasets.to_tensor converts 8-bit pixels, 2 * x - 1 those from 0 to 1"
        raise InputError(reason, parameter=parameter, value=f"a tensor with values from {low:g} to {high:g}")
    return images if low >= -1 and high <= 1 else images.clamp(-1, 1)
