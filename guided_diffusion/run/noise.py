"""Random draws of a run: each image has a generator of its own, so that its draws depend on nothing else."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class ImageNoise:
    """Random draws for a batch, on the CPU so that every device sees the same.

    names: one string per image, which determines its draws. Calling with the batch's shape gives the next draw. On a
    GPU the draw after it is prepared meanwhile.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        digests = [hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
        # 63-bit seeds, the same on every machine.
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "big") >> 1) for d in digests]
        self.device = device
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next: Future | None = None

    def __call__(self, shape: Sequence[int]) -> torch.Tensor:
        if self._pool is None:
            return self._draw(shape).to(self.device)
        draw = self._next.result() if self._next is not None else self._draw(shape)
        self._next = self._pool.submit(self._draw, shape)
        return draw.to(self.device, non_blocking=True)

    def labels(self, classes: int) -> torch.Tensor:
        """Random classes, long [N]; they are drawn before any noise."""
        drawn = [torch.randint(classes, (), generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)

    def _draw(self, shape: Sequence[int]) -> torch.Tensor:
        draw = torch.empty(tuple(shape), dtype=torch.float32, pin_memory=self._pool is not None)
        for row, generator in zip(draw, self.generators):
            torch.randn(tuple(shape[1:]), generator=generator, out=row)
        return draw


def image_key(seed: int, name: str, sample: int = 0) -> str:
    """The text that determines an image's draws, of the run's seed, its relative path and the sample's number."""
    return f"{seed}/{name}#{sample}"
