"""The judge: a small network that no method uses, trained on clean pictures, in whose features realism is measured.

It was trained (judge_train.py) to tell which of several vendors drew an emoji, and by contrast which code point it
shows. Its features come before both heads. This file registers the network as a kind of feature network, and two
metrics of its outputs, with `guided_diffusion.evaluation`. scripts/evaluate.py and scripts/benchmark.py load it, so
that `--features models/emoji_judge_64.safetensors` works. In Python:

    judge = load_judge()
    features, embeddings, vendors = judge.judge(images)  # images [N, 3, 64, 64] in [0, 1]
"""

import json
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from guided_diffusion.checkpoint import read
from guided_diffusion.errors import reading
from guided_diffusion.evaluation import NETWORKS, Extractor, feature_metric
from guided_diffusion.evaluation.features import digest

MODEL_TYPE = "JUDGE"
DEFAULT_PATH = Path(__file__).resolve().parent.parent.parent / "models" / "emoji_judge_64.safetensors"
SKIN_TONE = re.compile(r"1f3f[b-f]")
"""In the names of variants of a code point, which most tables leave out."""
MULTIPLES = (1, 2, 4, 6)  # widths of the four levels, in units of `width`


class Judged(NamedTuple):
    """A judge's outputs for N images: features [N, D], embeddings [N, E] of length 1, vendors' probabilities [N, V]."""

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
        """Judge images [N, 3, image_size, image_size] in [0, 1], without gradients.

        Features are scaled to root mean square 1: a few pictures have large ones, and would dominate every distance.
        """
        features = self._before_heads(images * 2 - 1)
        logits, embeddings = self._heads(features)
        scaled = F.normalize(features, dim=1) * features.shape[1] ** 0.5
        return Judged(scaled, embeddings, logits.softmax(1))

    def metadata(self) -> dict[str, str]:
        """Metadata for a file of its weights."""
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


def load_judge(path: str | os.PathLike = DEFAULT_PATH, device: str | torch.device = "cpu") -> Judge:
    """Load the judge in a .safetensors file, by default the repository's, in float32 and evaluation mode.

    Nothing in the file is run. Raises InputError where it is no judge or does not fit its own metadata.
    """
    with reading(path, "a judge"):
        state, metadata = read(path)
        if metadata.get("model_type") != MODEL_TYPE:
            raise ValueError(f"its metadata lack model_type {MODEL_TYPE}")
        with torch.device("meta"):  # whatever size the metadata claim
            judge = Judge(json.loads(metadata["vendors"]), **json.loads(metadata["flags"]))
        fill(judge, state)
    return judge.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]


def judged(judge: Judge, images: torch.Tensor, batch: int = 40) -> dict[str, np.ndarray]:
    """A judge's outputs by name, float64 arrays, for images [N, 3, image_size, image_size] in [0, 1]."""
    parts = [judge.judge(part) for part in images.split(batch)]
    return {name: torch.cat([getattr(part, name) for part in parts]).double().numpy() for name in Judged._fields}


def fill(judge: Judge, state: Mapping[str, torch.Tensor]) -> None:
    """Replace a judge's weights; raises ValueError unless the tensors are exactly its own."""
    own = judge.state_dict()
    wrong = [n for n in {**own, **state} if n not in own or n not in state or own[n].shape != state[n].shape]
    wrong += [name for name, value in state.items() if not value.is_floating_point() or not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{wrong[0]} is not this judge's")
    judge.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)


@NETWORKS.add(MODEL_TYPE)
def judge_features(path: Path, device: str | torch.device) -> Extractor:
    """The judge as a feature network, which also returns embeddings and vendors."""
    judge = load_judge(path, device)
    name = f"judge of {', '.join(judge.vendors)} {digest(path)}"
    return Extractor(name, lambda images: judge.judge(images)._asdict(), judge.image_size)


@feature_metric(
    "content", "content found again", lower_is_better=False, needs=("embeddings",),
    how="the nearest, by cosine similarity, of all images in the truth folder is the output's own",
)  # fmt: skip
def content(outputs: Mapping[str, np.ndarray], truths: Mapping[str, np.ndarray], own: np.ndarray) -> np.ndarray:
    """Whether an output's nearest truth by cosine similarity, among all of the folder, is its own: 0 or 1, [N]."""
    return (outputs["embeddings"] @ truths["embeddings"].T).argmax(1) == own


@feature_metric("target_vendor", "taken for the target", lower_is_better=False, needs=("vendors",), needs_truth=False)
def target_vendor(outputs: Mapping[str, np.ndarray], truths: object = None, own: object = None) -> np.ndarray:
    """Whether the last of the vendors, the target, is an output's most probable one: 0 or 1, [N]."""
    return outputs["vendors"].argmax(1) == outputs["vendors"].shape[1] - 1
