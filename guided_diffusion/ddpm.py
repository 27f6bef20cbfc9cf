"""The UNet of "Denoising Diffusion Probabilistic Models" (Ho et al., 2020) in the layout of its PyTorch ports.

`celebahq_female_ddpm.pth` and the checkpoints of the ddim and pesser repositories have these parameter names.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import Upsample, folded_upsampling, norm_silu, normalization, timestep_embedding, u_shaped

_norm = partial(normalization, eps=1e-6)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded on the right and at the bottom only, as TensorFlow does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them, and a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(temb_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = h + self.temb_proj(F.silu(temb)).to(h.dtype)[:, :, None, None]
        h = self.conv2(self.dropout(norm_silu(self.norm2, h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all pixels, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Model(nn.Module):
    """The DDPM UNet; arguments carry the names of the published configuration files.

    ch: base width; ch_mult: its multiple per level; num_res_blocks: blocks per level; attn_resolutions: sides (in
    pixels of the feature map, for images of `image_size`) at which attention is used.
    """

    temb: Any
    mid: Any
    down: Any
    up: Any

    def __init__(
        self, ch: int = 128, out_ch: int = 3, ch_mult: Sequence[float] = (1, 1, 2, 2, 4, 4), num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,), in_channels: int = 3, image_size: int = 256, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_size, self.in_channels, self.out_channels, self.ch = image_size, in_channels, out_ch, ch
        self.dtype = torch.float32
        block = partial(ResnetBlock, temb_channels=4 * ch, dropout=dropout)
        self.temb = nn.ModuleDict({"dense": nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])})
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)

        def level(inputs: Sequence[int], width: int, side: int) -> nn.ModuleDict:
            """One resolution: a block for each number of input channels, and the attention of each (or none)."""
            blocks, attn = nn.ModuleList(), nn.ModuleList()
            for channels in inputs:
                blocks.append(block(channels, width))
                if side in attn_resolutions:
                    attn.append(AttnBlock(width))
            return nn.ModuleDict({"block": blocks, "attn": attn})

        widths = [int(ch * mult) for mult in ch_mult]
        sides = [image_size // 2**i for i in range(len(widths))]
        channels, skips = ch, [ch]
        self.down = nn.ModuleList()
        for i, (width, side) in enumerate(zip(widths, sides)):
            self.down.append(level([channels, *[width] * (num_res_blocks - 1)], width, side))
            channels = width
            skips += [width] * num_res_blocks
            if i < len(widths) - 1:
                self.down[-1]["downsample"] = Downsample(width)
                skips.append(width)

        self.mid = nn.ModuleDict({"block_1": block(channels, channels), "attn_1": AttnBlock(channels)})
        self.mid["block_2"] = block(channels, channels)

        levels = []
        for i, (width, side) in reversed(list(enumerate(zip(widths, sides)))):
            inputs = [before + skips.pop() for before in [channels, *[width] * num_res_blocks]]
            levels.insert(0, level(inputs, width, side))
            channels = width
            if i:
                levels[0]["upsample"] = Upsample(width, use_conv=True)
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)
        self.float()  # whatever the default dtype

    def set_dtype(self, dtype: torch.dtype) -> "Model":
        """Compute in `dtype`: all convolutions but the last are stored in it; the rest stays in float32."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv_out:
                module.to(dtype)
        self.dtype = dtype
        return self

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: [N, C, H, W]; timesteps: [N] -> predicted noise [N, out_ch, H, W] in x's dtype."""
        h = u_shaped(self.stages(), x.to(self.dtype), self.embedding(timesteps))
        return self.head(h, x.dtype)

    def embedding(self, timesteps: Tensor) -> Tensor:
        """The vectors [N, 4 ch] of timesteps that all residual blocks get."""
        temb = timestep_embedding(timesteps, self.ch, sines_first=True).to(self.temb.dense[0].weight.dtype)
        return self.temb.dense[1](F.silu(self.temb.dense[0](temb)))

    def stages(self) -> tuple[Sequence[Any], Any, Sequence[Any]]:
        """The way down, the middle and the way up, all functions of (h, temb); see `unet.UNetModel.stages`."""
        down, up = [_stage(self.conv_in)], []
        for level in self.down:
            down += [_stage(block, *level.attn[i : i + 1]) for i, block in enumerate(level.block)]
            down += [_stage(level.downsample)] if "downsample" in level else []
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                last = [level.upsample] if block is level.block[-1] and "upsample" in level else []
                up.append(_stage(block, *level.attn[i : i + 1], *last))
        return down, _stage(self.mid.block_1, self.mid.attn_1, self.mid.block_2), up

    def fuse(self) -> "Model":
        """Put faster forms in place of some layers, equal up to rounding; see `unet.UNetModel.fuse`."""
        for level in self.up:
            if "upsample" in level and isinstance(level.upsample.conv, nn.Conv2d):
                level["upsample"] = folded_upsampling(level.upsample.conv)
        return self

    def head(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's output in `dtype`, of what the way up gave."""
        return self.conv_out(F.silu(self.norm_out(h)).to(dtype)).contiguous()


def _stage(*layers: nn.Module) -> Any:
    """A function of (h, temb) that applies layers one after another."""

    def run(h: Tensor, temb: Tensor) -> Tensor:
        for layer in layers:
            h = layer(h, temb) if isinstance(layer, ResnetBlock) else layer(h)
        return h

    return run
