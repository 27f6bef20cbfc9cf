"""The judge: a small network that no method uses, trained on clean pictures, in whose features realism is measured.

It was trained (`training.judge`) to tell which of several vendors drew an emoji, and by contrast which code point it
shows. Its features come before both heads. In Python:

    judge = load_judge()
    features, embeddings, vendors = judge.judge(images)  # images [N, 3, 64, 64] in [0, 1]
"""

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..checkpoint.reading import read
from ..errors import InputError, display_name, shown
from .table import judged_metric

MODEL_TYPE = "JUDGE"
DEFAULT_PATH = Path(__file__).resolve().parent.parent.parent / "models" / "emoji_judge_64.safetensors"
MULTIPLES = (1, 2, 4, 6)  # widths of the four levels, in units of `width`
LARGEST = {"image_size": 512, "width": 256, "features": 2048, "embedding": 2048}
MOST_VENDORS = 64


class Judged(NamedTuple):
    """What a judge says of N images: features [N, D], embeddings [N, E] of length 1, vendors' probabilities [N, V]."""

    features: torch.Tensor
    embeddings: torch.Tensor
    vendors: torch.Tensor


class Judge(nn.Module):
    """A residual network of four levels, and two linear heads on its features.

    vendors: their names, the target last. image_size: a multiple of 16. width: channels of the first level. features,
    embedding: numbers of features and of the contrastive head's outputs.
    """

    def __init__(
        self, vendors: list[str], image_size: int = 64, width: int = 32, features: int = 192, embedding: int = 128
    ) -> None:
        super().__init__()
        self.vendors, self.image_size = list(vendors), image_size
        self.flags = {"image_size": image_size, "width": width, "features": features, "embedding": embedding}
        widths = [width * multiple for multiple in MULTIPLES]
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.levels = nn.ModuleList(
            nn.Sequential(*(_Block(channels) for _ in range(blocks))) for channels, blocks in zip(widths, (1, 2, 2, 1))
        )
        # Means of every level: blur and noise show in the fine ones, content in the coarse.
        self.features = nn.Linear(sum(widths), features)
        self.vendor = nn.Linear(features, len(self.vendors))
        self.content = nn.Linear(features, embedding)

    def _before_heads(self, images: torch.Tensor) -> torch.Tensor:
        """Features [N, D] of images [N, 3, image_size, image_size] in [-1, 1], not scaled."""
        x, means = self.stem(images), []
        for i, level in enumerate(self.levels):
            x = level(x if i == 0 else self.downs[i - 1](x))
            means.append(F.silu(x).mean((2, 3)))
        return self.features(torch.cat(means, 1))

    def _heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = F.silu(features)
        return self.vendor(seen).float(), F.normalize(self.content(seen).float(), dim=1)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N, V] of the vendors and embeddings [N, E] of length 1, of images in [-1, 1]."""
        return self._heads(self._before_heads(images))

    @torch.no_grad()
    def judge(self, images: torch.Tensor) -> Judged:
        """What it says of images [N, 3, image_size, image_size] in [0, 1], without gradients.

        Features are scaled to root mean square 1: a few pictures have large ones, and would decide every distance.
        """
        features = self._before_heads(images * 2 - 1)
        logits, embeddings = self._heads(features)
        scaled = F.normalize(features, dim=1) * features.shape[1] ** 0.5
        return Judged(scaled, embeddings, logits.softmax(1))

    def metadata(self) -> dict[str, str]:
        """What a file of its weights says of itself."""
        return {
            "model_type": MODEL_TYPE,
            "what": "tells the vendor and the code point of clean emoji pictures; not for guiding a method",
            "vendors": json.dumps(self.vendors),
            "target": self.vendors[-1],
            "flags": json.dumps(self.flags),
        }


class _Block(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))): the skip path keeps absolute levels, which a norm alone would remove."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


def is_judge(path: str | os.PathLike) -> bool:
    """Whether a .safetensors file says that it is a judge; False for whatever cannot be read."""
    from safetensors import safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return (file.metadata() or {}).get("model_type") == MODEL_TYPE
    except Exception:  # the library's errors have types of their own
        return False


def load_judge(path: str | os.PathLike | None = None, device: str | torch.device = "cpu") -> Judge:
    """The judge in a .safetensors file, by default the repository's, in float32 and evaluation mode.

    Nothing in the file is run. Raises InputError where it is no judge or does not fit its own description.
    """
    path = DEFAULT_PATH if path is None else path
    state, metadata = read(path)
    judge = described(metadata, path)
    fill(judge, state, path)
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def described(metadata: Mapping[str, str], path: str | os.PathLike) -> Judge:
    """An untrained judge of the kind that a file's metadata describes; raises InputError, naming the file."""
    where = display_name(os.fspath(path))
    if metadata.get("model_type") != MODEL_TYPE:
        raise InputError(f"{where} is not a judge: its metadata lack model_type {MODEL_TYPE}")
    try:
        flags, vendors = json.loads(metadata.get("flags", "")), json.loads(metadata.get("vendors", ""))
    except (ValueError, RecursionError):
        raise InputError(f"{where} is damaged: its metadata flags and vendors are not JSON") from None
    names = isinstance(vendors, list) and all(isinstance(name, str) and name for name in vendors)
    if not names or not 2 <= len(vendors) <= MOST_VENDORS or len(set(vendors)) < len(vendors):
        raise InputError(f"{where} does not name 2 to {MOST_VENDORS} different vendors in its metadata")
    if metadata.get("target") != vendors[-1]:
        raise InputError(f"{where}: its target is {shown(metadata.get('target'))}, not the last of its vendors")
    if not isinstance(flags, dict) or set(flags) != set(LARGEST):
        raise InputError(f"{where}: its metadata flags must be {', '.join(LARGEST)}")
    for name, value in flags.items():
        multiple = {"image_size": 16, "width": 8}.get(name, 1)
        fits = isinstance(value, int) and not isinstance(value, bool) and multiple <= value <= LARGEST[name]
        if not fits or value % multiple:
            words = f"a multiple of {multiple}" if multiple > 1 else "a whole number"
            raise InputError(f"{where}: its {name} is {shown(value)}; {words} up to {LARGEST[name]} is needed")
    return Judge(vendors, **flags)


def fill(judge: Judge, state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Put the tensors of a file into a judge; InputError, naming the file, unless they are exactly its own."""
    where, own = display_name(os.fspath(path)), judge.state_dict()
    for name in [*own, *state]:
        if name not in state or name not in own:
            raise InputError(f"{where} is not this judge: {shown(name)} is {'unknown' if name in state else 'missing'}")
        if state[name].shape != own[name].shape or not state[name].is_floating_point():
            kind = f"{str(state[name].dtype).removeprefix('torch.')} {list(state[name].shape)}"
            raise InputError(f"{where} is not this judge: {name} is {kind}, {list(own[name].shape)} is needed")
        if not state[name].isfinite().all():
            raise InputError(f"{where} is damaged: {name} has values that are NaN or infinite")
    judge.load_state_dict({name: value.float() for name, value in state.items()})


@judged_metric("content", "content found again", lower_is_better=False, column=1)
def content(outputs: Judged, truths: Judged, own: torch.Tensor) -> torch.Tensor:
    """Whether an output's nearest truth by cosine similarity, among all of the folder, is its own: 0 or 1, [N]."""
    return ((outputs.embeddings @ truths.embeddings.T).argmax(1) == own).float()


@judged_metric("target_vendor", "taken for the target", lower_is_better=False, column=2, needs_truth=False)
def target_vendor(outputs: Judged, truths: Judged | None, own: torch.Tensor | None) -> torch.Tensor:
    """Whether the last of the vendors, the target, is an output's most probable one: 0 or 1, [N]."""
    return (outputs.vendors.argmax(1) == outputs.vendors.shape[1] - 1).float()


__all__ = ["DEFAULT_PATH", "Judge", "Judged", "is_judge", "load_judge"]
