"""The ADM UNet of "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal & Nichol, 2021) and its encoder.

Parameter names and shapes are those of the published checkpoints; the encoder serves as noisy-image classifier
(head `out`) and as EGSDE's domain-specific extractor (head `I2Iout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .errors import InputError
from .nn import Upsample, folded_upsampling, hooked, norm_silu, normalization, timestep_embedding, u_shaped, zero_module


class Downsample(nn.Module):
    """Downsampling by 2: a strided 3x3 convolution if `use_conv`, else average pooling.

    pad_end: the convolution's input is padded on the right and at the bottom only, as in the DDPM networks.
    """

    def __init__(self, channels: int, use_conv: bool, pad_end: bool = False) -> None:
        super().__init__()
        self.pad_end = use_conv and pad_end
        padding = 0 if self.pad_end else 1
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


@dataclass(frozen=True)
class _Layers:
    """How the layers of a network are made; the fields are `UNetModel`'s arguments of these names."""

    embed_dim: int
    dropout: float
    conv_resample: bool
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    norm_groups: int = 32
    norm_eps: float = 1e-5
    sines_first: bool = False
    pad_end: bool = False
    middle_norm: bool = True

    def norm(self, channels: int) -> nn.Module:
        return normalization(channels, self.norm_groups, self.norm_eps)

    def downsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return ResBlock(self, channels, channels, Downsample(channels, use_conv=False))
        return Downsample(channels, self.conv_resample, self.pad_end)

    def upsample(self, channels: int) -> nn.Module:
        if self.resblock_updown:
            return ResBlock(self, channels, channels, Upsample(channels, use_conv=False))
        return Upsample(channels, self.conv_resample)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, with a skip connection.

    resample: resizes by 2 inside of the block, on both branches. With `use_scale_shift_norm` the embedding scales and
    shifts the second normalisation's output, otherwise it is added before it.
    """

    def __init__(self, layers: _Layers, channels: int, out_channels: int, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.use_scale_shift_norm, self.use_checkpoint = layers.use_scale_shift_norm, layers.use_checkpoint
        conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(layers.norm(channels), nn.SiLU(), conv_in)
        self.resample = resample or nn.Identity()
        emb_channels = (2 if self.use_scale_shift_norm else 1) * out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(layers.embed_dim, emb_channels))
        conv_out = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(layers.norm(out_channels), nn.SiLU(), nn.Dropout(layers.dropout), conv_out)
        same = out_channels == channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_in, silu_in, conv_in = self.in_layers
        norm_out, silu_out, dropout, conv_out = self.out_layers
        if hooked(self.in_layers) and isinstance(self.resample, nn.Identity):
            h = self.in_layers(x)
        else:
            h = norm_silu(norm_in, x, silu=silu_in)  # type: ignore[arg-type]
            h = conv_in(h if isinstance(conv_in, nn.ConvTranspose2d) else self.resample(h))
        emb = self.emb_layers(emb)[:, :, None, None]
        scale = shift = None
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
        else:
            h = h + emb.to(h.dtype)
        if hooked(self.out_layers) and scale is None:
            h = self.out_layers(h)
        else:
            h = conv_out(dropout(norm_silu(norm_out, h, scale, shift, silu_out)))  # type: ignore[arg-type]
        return self.skip_connection(self.resample(x)) + h


def multi_head_attention(qkv: Tensor, num_heads: int, new_order: bool, fused: bool | None = None) -> Tensor:
    """Scaled dot-product attention over packed projections: qkv [N, 3 * C, L] -> [N, C, L].

    The published checkpoints pack them in two ways: the new order is q, k, v each with all heads; the legacy order is,
    head by head, q, k, v. fused: by the fused kernel of CPUs, too; None: in half precision without gradients.
    """
    n, width, length = qkv.shape
    channels = width // (3 * num_heads)
    if new_order:
        q, k, v = qkv.reshape(n, 3, num_heads, channels, length).transpose(3, 4).unbind(1)
    else:
        q, k, v = qkv.reshape(n, num_heads, 3, channels, length).transpose(3, 4).unbind(2)
    if (qkv.dtype != torch.float32 and not qkv.requires_grad) if fused is None else fused:
        # On CPUs the fused kernel wants rows in memory order; its backward pass is slower than that of the plain one.
        # In float32 it would differ from the published numbers by rounding, which the last steps amplify past 1e-4.
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, width // 3, length)


def _number_of_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
    """The heads of an attention layer; num_head_channels: the width of one, -1 for any."""
    name, value = ("num_heads", num_heads) if num_head_channels == -1 else ("num_head_channels", num_head_channels)
    if value < 1 or channels % value:
        raise InputError(f"it must divide the {channels} channels of an attention layer", parameter=name, value=value)
    return value if name == "num_heads" else channels // value


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, residual. normed: normalise the input."""

    def __init__(self, layers: _Layers, channels: int, num_heads: int, normed: bool = True) -> None:
        super().__init__()
        self.num_heads = _number_of_heads(channels, num_heads, layers.num_head_channels)
        self.use_checkpoint = layers.use_checkpoint
        self.use_new_attention_order = layers.use_new_attention_order
        self.fused: bool | None = None
        self.norm = layers.norm(channels) if normed else nn.Identity()
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.qkv(self.norm(x).flatten(2))
        h = multi_head_attention(h, self.num_heads, self.use_new_attention_order, self.fused)
        return x + self.proj_out(h).reshape(x.shape)


class AttentionPool2d(nn.Module):
    """Pool a [N, C, H, W] map to [N, out] by attention from its mean (CLIP's pooling)."""

    def __init__(self, side: int, channels: int, num_head_channels: int, out_channels: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(channels, side * side + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)
        self.num_heads = _number_of_heads(channels, 1, num_head_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x.dtype)
        x = multi_head_attention(self.qkv_proj(x), self.num_heads, new_order=True)
        return self.c_proj(x)[:, :, 0]


class TimestepEmbedSequential(nn.Sequential):
    """A sequence whose residual blocks also get the time embedding.

    Layers with `use_checkpoint` are computed again in the backward pass, which saves memory.
    """

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            inputs = (x, emb) if isinstance(layer, ResBlock) else (x,)
            again = getattr(layer, "use_checkpoint", False) and torch.is_grad_enabled()
            x = checkpoint(layer, *inputs, use_reentrant=False) if again else layer(*inputs)  # type: ignore[assignment]
        return x


class _UNetEncoder(nn.Module):
    """The contracting half and the middle, which the UNet and the encoder have in common."""

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, num_res_blocks: int,
        attention_resolutions: Sequence[int], channel_mult: Sequence[float], layers: _Layers,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_size, self.in_channels, self.model_channels = image_size, in_channels, model_channels
        self.dtype, width = torch.float32, layers.embed_dim
        self._layers = layers
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width))

        channels = int(channel_mult[0] * model_channels)
        blocks = [TimestepEmbedSequential(nn.Conv2d(in_channels, channels, 3, padding=1))]
        self._skip_channels = [channels]
        downsampling = 1
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                block: list[nn.Module] = [ResBlock(layers, channels, int(mult * model_channels))]
                channels = int(mult * model_channels)
                if downsampling in attention_resolutions:
                    block.append(AttentionBlock(layers, channels, layers.num_heads))
                blocks.append(TimestepEmbedSequential(*block))
                self._skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                blocks.append(TimestepEmbedSequential(layers.downsample(channels)))
                self._skip_channels.append(channels)
                downsampling *= 2
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(layers, channels, channels),
            AttentionBlock(layers, channels, layers.num_heads, layers.middle_norm),
            ResBlock(layers, channels, channels),
        )
        self._channels, self._downsampling = channels, downsampling

    def _embed(self, timesteps):
        embedding = timestep_embedding(timesteps, self.model_channels, sines_first=self._layers.sines_first)
        return self.time_embed(embedding.to(self.time_embed[0].weight.dtype))  # type: ignore[arg-type, call-overload]

    def _encode(self, x, emb):
        """All skip tensors, the last of them the input of the middle block; grey x [N, 1, H, W] has equal channels."""
        h = x.to(self.dtype).expand(-1, self.in_channels, -1, -1)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        return skips

    def middle_features(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Features of the middle block: x [N, C, H, W] in [-1, 1], original timesteps [N] -> [N, C', H', W']."""
        emb = self._embed(timesteps)
        return self.middle_block(self._encode(x, emb)[-1], emb)

    def set_dtype(self, dtype: torch.dtype) -> "_UNetEncoder":
        """Compute in `dtype`: convolution weights between the first and the last layer are stored in it.

        Normalisations, the time embedding and the head stay in float32, as in the published half-precision models.
        """
        for name, module in self.named_modules():
            if "_block" in name and isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.to(dtype)
        self.dtype = dtype
        return self

    def convert_to_fp16(self) -> None:
        """guided-diffusion's name for `set_dtype(torch.float16)`."""
        self.set_dtype(torch.float16)

    def convert_to_fp32(self) -> None:
        """guided-diffusion's name for `set_dtype(torch.float32)`."""
        self.set_dtype(torch.float32)


class UNetModel(_UNetEncoder):
    """The full UNet, for images of any side that its downsampling divides.

    model_channels: base width; channel_mult: its multiple at every level; num_res_blocks: blocks per level.
    attention_resolutions: downsampling factors (not sides) at which attention is used. num_head_channels: width of a
    head, or -1 for `num_heads` heads; num_heads_upsample: heads of the expanding half.

    Only networks of diffusers have other values of the last five: norm_groups, norm_eps: of the normalisations;
    sines_first: DDPM's time embedding; pad_end: strided convolutions are padded on the right and at the bottom only;
    middle_norm: whether the middle block's attention normalises its input.
    """

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Sequence[int], dropout: float = 0.0, channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True, num_classes: int | None = None, use_checkpoint: bool = False,
        use_fp16: bool = False, num_heads: int = 1, num_head_channels: int = -1, num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False, resblock_updown: bool = False, use_new_attention_order: bool = False,
        norm_groups: int = 32, norm_eps: float = 1e-5, sines_first: bool = False, pad_end: bool = False,
        middle_norm: bool = True,
    ) -> None:  # fmt: skip
        layers = _Layers(
            4 * model_channels, dropout, conv_resample, use_checkpoint, num_heads, num_head_channels,
            use_scale_shift_norm, resblock_updown, use_new_attention_order, norm_groups, norm_eps, sines_first, pad_end,
            middle_norm,
        )  # fmt: skip
        shape = image_size, in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult
        super().__init__(*shape, layers)
        self.out_channels, self.num_classes = out_channels, num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, layers.embed_dim)

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        channels, downsampling = self._channels, self._downsampling
        skip_channels = list(self._skip_channels)
        blocks = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                block: list[nn.Module] = [ResBlock(layers, channels + skip_channels.pop(), int(mult * model_channels))]
                channels = int(mult * model_channels)
                if downsampling in attention_resolutions:
                    block.append(AttentionBlock(layers, channels, heads_up))
                if level and i == num_res_blocks:
                    block.append(layers.upsample(channels))
                    downsampling //= 2
                blocks.append(TimestepEmbedSequential(*block))
        self.output_blocks = nn.ModuleList(blocks)
        last = zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        self.out = nn.Sequential(layers.norm(channels), nn.SiLU(), last)
        self.float()  # whatever the default dtype
        if use_fp16:
            self.convert_to_fp16()

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; timesteps: [N], original (unrespaced) units; y: class labels [N] iff class-conditional.

        Returns [N, out_channels, H, W] in x's dtype.
        """
        h = u_shaped(self.stages(), x.to(self.dtype), self.embedding(timesteps, y))
        return self.head(h, x.dtype)

    def embedding(self, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """The vectors [N, embed_dim] of timesteps and classes that all residual blocks get."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("class labels y are needed by a class-conditional model, and only by it")
        emb = self._embed(timesteps)
        return emb if y is None else emb + self.label_emb(y)

    def stages(self) -> tuple[Sequence[Any], Any, Sequence[Any]]:
        """The way down, the middle and the way up, all functions of (h, emb); see `caching`.

        The k-th stage up takes the output of the one before it, joined with that of the k-th last stage down.
        """
        return list(self.input_blocks), self.middle_block, list(self.output_blocks)

    def fuse(self) -> "UNetModel":
        """Put faster forms in place of some layers, equal up to rounding; for sampling, after the weights are there.

        Upsampling and the convolution after it become one, and attention takes the fused kernel in float32, too.
        """
        for module in self.modules():
            if isinstance(module, AttentionBlock):
                module.fused = True
            elif isinstance(module, ResBlock) and isinstance(module.resample, Upsample):
                module.in_layers[2] = folded_upsampling(module.in_layers[2])  # type: ignore[arg-type]
        for block in self.output_blocks:
            if isinstance(block[-1], Upsample) and isinstance(block[-1].conv, nn.Conv2d):  # type: ignore[index]
                block[-1] = folded_upsampling(block[-1].conv)  # type: ignore[index, operator]
        return self

    def head(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's output in `dtype`, of what the way up gave."""
        return self.out(h.to(dtype)).contiguous()


class SuperResModel(UNetModel):
    """The UNet that makes a large image of a small one: it sees the small one, enlarged, beside x.

    Arguments are UNetModel's; in_channels: those of the images, the network takes twice as many.
    """

    def __init__(self, image_size: int, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)

    def forward(self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; low_res: [N, C, h, w] in [-1, 1], of any size; the others and the output as UNetModel's."""
        if low_res is None:
            raise InputError("the network is one of super-resolution: give the images to enlarge", parameter="low_res")
        upsampled = F.interpolate(low_res.to(x.dtype), x.shape[2:], mode="bilinear")
        return super().forward(torch.cat([x, upsampled], dim=1), timesteps, y)


class EncoderUNetModel(_UNetEncoder):
    """The contracting half with a pooling head: noisy-image classifier and domain-specific extractor.

    pool: `adaptive` (global average), `attention` (CLIP's), `spatial` and `spatial_v2` (an MLP on the means of all
    levels). head: name of the head's parameters, `out` in guided-diffusion's classifiers, `I2Iout` in EGSDE's
    extractors. The other arguments are UNetModel's.
    """

    def __init__(
        self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
        attention_resolutions: Sequence[int], dropout: float = 0.0, channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True, use_checkpoint: bool = False, use_fp16: bool = False, num_heads: int = 1,
        num_head_channels: int = -1, use_scale_shift_norm: bool = False, resblock_updown: bool = False,
        use_new_attention_order: bool = False, pool: str = "adaptive", head: str = "out",
    ) -> None:  # fmt: skip
        layers = _Layers(
            4 * model_channels, dropout, conv_resample, use_checkpoint, num_heads, num_head_channels,
            use_scale_shift_norm, resblock_updown, use_new_attention_order,
        )  # fmt: skip
        shape = image_size, in_channels, model_channels, num_res_blocks, attention_resolutions, channel_mult
        super().__init__(*shape, layers)
        self.out_channels, self.pool, self.head = out_channels, pool, head
        channels = self._channels
        normed = [normalization(channels), nn.SiLU()]
        if pool == "adaptive":
            last = zero_module(nn.Conv2d(channels, out_channels, 1))
            network = [*normed, nn.AdaptiveAvgPool2d((1, 1)), last, nn.Flatten()]
        elif pool == "attention" and num_head_channels != -1:
            side = image_size // self._downsampling
            network = [*normed, AttentionPool2d(side, channels, num_head_channels, out_channels)]
        elif pool in ("spatial", "spatial_v2"):
            middle = [nn.ReLU()] if pool == "spatial" else [normalization(2048), nn.SiLU()]
            network = [nn.Linear(sum(self._skip_channels) + channels, 2048), *middle, nn.Linear(2048, out_channels)]
        else:
            fitting = "adaptive, attention (with num_head_channels), spatial or spatial_v2"
            raise ValueError(f"pool is {pool!r}; it can be {fitting}")
        self.add_module(head, nn.Sequential(*network))
        self.float()  # whatever the default dtype
        if use_fp16:
            self.convert_to_fp16()

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """x: [N, C, H, W]; timesteps: [N] -> logits [N, out_channels]."""
        emb = self._embed(timesteps)
        skips = self._encode(x, emb)
        h = self.middle_block(skips[-1], emb).to(x.dtype)
        head = getattr(self, self.head)
        if self.pool.startswith("spatial"):
            return head(torch.cat([s.to(x.dtype).mean(dim=(2, 3)) for s in [*skips, h]], dim=1))
        return head(h)
