"""Training of an upscaler: pairs of a small crop, somewhat degraded, and the large crop that it should become."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..checkpoint import load_state_dict
from ..errors import InputError, reading
from ..image_datasets import normalise, to_uint8
from ..options import option
from ..upscaler import MODEL_TYPE, Upscaler
from .config import Checked, TrainConfig
from .data import Batch, TrainImages, TrainReference, list_images, random_uniform
from .losses import Loss
from .start import Start, resume_path


@dataclass(frozen=True)
class UpscalerOptions(Checked):
    """Pictures to learn from, their degradation, and the size of the network."""

    data_dir: str | None = option(None, "folder of large training images, searched recursively", metavar="DIR")
    copies: str = option(
        "",
        "comma-separated folders of the model's small copies of the images, by the same names: half of the inputs",
        metavar="DIRS",
    )
    large_size: int = option(256, "height and width of the large images", least=2, most=1 << 13)
    factor: int = option(4, "factor by which images are enlarged", least=2, most=16)
    crop: int = option(32, "height and width of the small training crops", least=4, most=1 << 10)
    blur: float = option(0.5, "maximum strength of the 3x3 binomial blur of inputs", least=0, most=1)
    noise: float = option(0.04, "maximum standard deviation of the noise of inputs", least=0, most=2)
    channels: int = option(64, "number of channels", least=1, most=1 << 10)
    depth: int = option(10, "number of residual blocks", least=0, most=64)
    model: str = option("", "name of the diffusion model it belongs to, for its metadata", metavar="NAME")

    def __post_init__(self) -> None:
        super().__post_init__()
        small_side = self.large_size // self.factor
        if self.large_size % self.factor:
            reason = f"it must be a multiple of the factor, {self.factor}"
            raise InputError(reason, parameter="large_size", value=self.large_size)
        if self.crop > small_side:
            raise InputError(f"it can be at most the small side, {small_side}", parameter="crop", value=self.crop)


class _Images(TrainImages):
    """Images that must all be readable: in a pair, none can stand for another."""

    REPAIR = "repair it or take it out of the folder"


class UpscalerImages(_Images):
    """Random crops of images, each in two sizes; sample n is one crop.

    A batch is [N, 3 + 3 f^2, S, S] for a factor f: the small crops, and the large ones rearranged by `pixel_unshuffle`.
    Small images are Lanczos-shrunk large ones or, in half of the samples, copies made by the model.
    """

    def __init__(self, references: Sequence[TrainReference], options: UpscalerOptions, seed: int = 0) -> None:
        super().__init__(references, options.large_size, random_flip=True, cache="memory", seed=seed)
        self.options, side = options, options.large_size // options.factor
        self._copies: list[_Images] = []
        for folder in filter(None, options.copies.split(",")):
            names = {reference.name for reference in references}
            found = [copy for copy in list_images(folder, "copies") if copy.name in names]
            if not found:
                reason = "it has no image under the name of one in `data_dir`"
                raise InputError(reason, parameter="copies", value=folder)
            self._copies.append(_Images(found, side, cache="memory"))
        self._small: list[list[torch.Tensor]] = []  # for every image its shrunk self, then its copies

    def batches(self, numbers: Iterator[np.ndarray], device: str | torch.device) -> Iterator[Batch]:
        """Batches for an iterator over arrays of sample numbers."""
        large = self._decoded("cpu")
        self._small = self._small or self._read_small(large)
        options, seed = self.options, self.seed
        size, side = options.crop, options.large_size // options.factor
        for current in numbers:
            tops, lefts = ((random_uniform(seed, a, current) * (side - size + 1)).astype(int) for a in ("top", "left"))
            which, strength, flip = (random_uniform(seed, a, current) for a in ("copy", "blur", "flip"))
            pairs = []
            for i, y, x, u, flipped in zip(self.indices(current), tops, lefts, which, flip < 0.5):
                shrunk, *copies = self._small[i]
                small = copies[int((2 * u - 1) * len(copies))] if copies and u >= 0.5 else shrunk
                small = small[:, y : y + size, x : x + size]
                y, x, length = (options.factor * place for place in (y, x, size))
                pair = small, large[i, :, y : y + length, x : x + length]
                pairs.append([part.flip(-1) if flipped else part for part in pair])
            small, detailed = (normalise(torch.stack(part)) for part in zip(*pairs))
            share = torch.from_numpy(options.blur * strength**2).float()[:, None, None, None]
            small = small.lerp(binomial_blur(small), share)
            yield current, torch.cat([small, F.pixel_unshuffle(detailed, options.factor)], 1).to(device), None

    def _read_small(self, large: torch.Tensor) -> list[list[torch.Tensor]]:
        codec = Upscaler(self.options.factor, 1, 0)
        shrunk = (to_uint8(codec.encode(normalise(image[None])))[0] for image in large)
        images = (torch.from_numpy(array).permute(2, 0, 1) for array in shrunk)
        small = {reference.name: [image] for reference, image in zip(self.references, images)}
        for part in self._copies:
            for image, copy in zip(part.references, part._decoded("cpu")):
                small[image.name].append(copy)
        return list(small.values())


def binomial_blur(images: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] under the kernel (1 2 1) / 4 along both axes; the edge is repeated."""
    kernel = torch.tensor([1.0, 2.0, 1.0]).to(images) / 4
    weight = torch.outer(kernel, kernel).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), weight, groups=3)


def upscaler_loss(options: UpscalerOptions) -> Loss:
    """Absolute error of the pixels, plus that of the differences between neighbours along both axes."""

    def losses(
        model: Upscaler, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        small, large = x[:, :3], F.pixel_shuffle(x[:, 3:], options.factor)
        # Like the blur's share, the noise's level is most often small; it follows from the noise itself.
        level = options.noise * (0.5 + 0.5 * torch.erf(noise[:, 3, 0, 0] / 2**0.5)) ** 2
        error = model(small + level[:, None, None, None] * noise[:, :3]).float() - large
        pixels = error.abs().mean((1, 2, 3))
        differences = sum(error.diff(dim=axis).abs().mean((1, 2, 3)) for axis in (2, 3))
        return {"loss": pixels + differences, "l1": pixels, "mse": error.square().mean((1, 2, 3))}

    return losses


def begin(config: TrainConfig, options: UpscalerOptions) -> Start:
    """Network of a run in float32 on the CPU. Raises InputError where its checkpoint is of another network."""
    checkpoint = resume_path(config)
    torch.manual_seed(config.seed)
    upscaler = Upscaler(options.factor, options.channels, options.depth, options.model)
    if checkpoint:
        what = f"an upscaler of {options.channels} channels, {options.depth} blocks and factor {options.factor}"
        with reading(checkpoint, what):
            upscaler.load_state_dict(load_state_dict(checkpoint))
    return Start(upscaler, MODEL_TYPE, {}, checkpoint, texts=upscaler.metadata())
