"""A codec that lets a model of small pictures make large ones: Lanczos shrinking, and a learned enlargement.

The network adds a residual to bicubic interpolation. It computes at the small size and rearranges its last channels
into pixels (Shi et al. 2016). It is trained for one diffusion model: on that model's outputs, besides true pictures.
"""

import os

import torch
from torch import nn
from torch.nn import functional as F

from resizer import Resizer

from .checkpoint.loading import Network, prepared
from .checkpoint.reading import read_file
from .checkpoint.reconcile import ModelInfo
from .errors import InputError, reading
from .runtime import memory_format

MODEL_TYPE = "UPSCALER"


class Upscaler(nn.Module):
    """Codec between large pictures and pictures `factor` times smaller, both in [-1, 1].

    channels, blocks: width and number of residual blocks. model: name of the diffusion model whose outputs `decode`
    enlarges. Without training, `decode` is bicubic interpolation.
    """

    def __init__(self, factor: int = 4, channels: int = 64, blocks: int = 10, model: str = "") -> None:
        super().__init__()
        self.factor, self.model = factor, model
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(blocks))
        self.tail = nn.Conv2d(channels, 3 * factor**2, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Shrink images [N, 3, H, W] to [N, 3, H / factor, W / factor], clipped to [-1, 1] as Pillow's are.

        Raises InputError unless `factor` divides both sides.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            reason = f"its sides must be multiples of {self.factor}"
            raise InputError(reason, parameter="images", value=f"{width}x{height} pixels")
        return Resizer(images.shape, 1 / self.factor, kernel="lanczos3")(images).clamp(-1, 1)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge images [N, 3, H, W] to [N, 3, factor H, factor W]; values may slightly leave [-1, 1]."""
        features = self.head(x)
        for block in self.blocks:
            features = block(features)
        detail = F.pixel_shuffle(self.tail(features), self.factor)
        return F.interpolate(x, scale_factor=self.factor, mode="bicubic") + detail

    forward = decode

    def metadata(self) -> dict[str, str]:
        """Entries that `load_upscaler` reads from a file of the weights."""
        return {"model_type": MODEL_TYPE, "factor": str(self.factor), "model": self.model}


class _Block(nn.Module):
    """x + conv(silu(conv(x))); the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(x)))


def load_upscaler(path: str | os.PathLike, device: str | torch.device = "cpu") -> Upscaler:
    """Upscaler of a .safetensors file, in float32 and without gradients. Raises InputError for another file.

    Width and depth are those of the tensors; `factor` and `model` come from the metadata.
    """
    source = read_file(path)
    with reading(path, "an upscaler"), torch.device("meta"):  # without memory: the file may ask for any size
        if source.metadata.get("model_type") != MODEL_TYPE:
            raise ValueError(f"its metadata lack model_type {MODEL_TYPE}")
        width = len(source.tensors["head.weight"])
        blocks = sum(name.startswith("blocks.") and name.endswith(".first.weight") for name in source.tensors)
        upscaler = Upscaler(int(source.metadata["factor"]), width, blocks, source.metadata.get("model", ""))
    network = Network(upscaler, ModelInfo(os.fspath(path), MODEL_TYPE, {}), source.tensors)
    upscaler.load_state_dict(prepared(network, "cpu"), assign=True)
    device = torch.device(device)
    return upscaler.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)  # type: ignore[call-overload]
