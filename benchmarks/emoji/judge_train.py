"""Train the judge: a small network in whose features scripts/evaluate.py measures realism.

examples:
  python benchmarks/emoji/judge_train.py --data_dir data/emoji --iterations 1000 \\
      --save_dir output/judge --resume auto
  python scripts/evaluate.py --features output/judge/model.safetensors \\
      --outputs output --truth truth --targets truth

It learns to tell which vendor drew a clean picture, and which code point it shows, from the folders VENDOR/train in
--data_dir. Pictures of one code point have one file name. Held-out figures are of VENDOR/test, where it exists.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), HERE]  # found from any working directory
from guided_diffusion.cli import main as command

if __name__ == "__main__":
    command.start()

import numpy as np
import torch
from judge import Judge, fill
from torch.nn import functional as F

from guided_diffusion.checkpoint import load_state_dict
from guided_diffusion.cli import training as loop
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.errors import InputError, display_name, reading
from guided_diffusion.options import Checked, option
from guided_diffusion.training import files
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.data import Batch, TrainImages, TrainReference, list_images, random_uniform
from guided_diffusion.training.losses import Loss, Terms, add_by_quarter
from guided_diffusion.training.start import Start, resume_path

USE = "python scripts/evaluate.py --features {path} --outputs DIR --truth DIR --targets DIR"
DEFAULTS = {"save_dir": "output/judge", "iterations": 1000, "lr": 2e-3, "batch_size": 64, "ema_rate": "0.99"}
WITHOUT = ["sample_interval", "schedule_sampler", "sigma_mean", "sigma_std", "microbatch"]
SHIFT = 3
"""Pixels by which pictures are moved at most. Moves and mirroring change no colour and no sharpness."""


@dataclass(frozen=True)
class JudgeOptions(Checked):
    """Data and size of the judge."""

    data_dir: str | None = option(
        None, "what datasets/prepare_emoji.py wrote: VENDOR/train and VENDOR/test, pictures named by code point",
        metavar="DIR",
    )  # fmt: skip
    vendors: str = option("twitter,google,fluent3d", "folders in `data_dir`, the target last", metavar="NAMES")
    image_size: int = option(64, "side of the pictures, a multiple of 16", least=16, most=512)
    width: int = option(32, "channels of the first level, a multiple of 8", least=8, most=256)
    temperature: float = option(0.1, "of the contrast between code points", above=0, most=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, multiple in (("image_size", 16), ("width", 8)):
            if getattr(self, name) % multiple:
                raise InputError(f"it must be a multiple of {multiple}", parameter=name, value=getattr(self, name))
        names = self.vendor_names()
        if len(names) < 2 or len(set(names)) < len(names):
            reason = "it must be two different folders or more, the target last, like twitter,fluent3d"
            raise InputError(reason, parameter="vendors", value=self.vendors)

    def vendor_names(self) -> list[str]:
        """The vendors, the target last."""
        return [name.strip() for name in self.vendors.split(",") if name.strip()]


class JudgeImages(TrainImages):
    """Pictures of the code points that all vendors have; sample n is one code point.

    parts: the pictures of each vendor, in one order. An image tensor has the vendors' pictures one after another in its
    channels, [3 V, H, W], mirrored and moved together.
    """

    def __init__(self, parts: Sequence[Sequence[TrainReference]], image_size: int, seed: int = 0) -> None:
        super().__init__(parts[0], image_size, seed=seed)
        self.parts = [TrainImages(part, image_size, random_flip=True, cache="memory", seed=seed) for part in parts]

    def batches(self, numbers: Iterator[np.ndarray], device: str | torch.device) -> Iterator[Batch]:
        """Batches for an iterator over arrays of sample numbers: (numbers [N], images [N, 3 V, H, W], None)."""
        for current in numbers:
            images = torch.cat([next(part.batches(iter([current]), device))[1] for part in self.parts], 1)
            yield current, self._moved(images, current), None

    def ordered_batches(
        self, batch_size: int, device: str | torch.device, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """One pass in order, unaugmented, shared among ranks: yields (positions [N], images [N, 3 V, H, W], None)."""
        for parts in zip(*(part.ordered_batches(batch_size, device, rank, world_size) for part in self.parts)):
            yield parts[0][0], torch.cat([images for _, images, _ in parts], 1), None

    def _moved(self, images: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
        """Images moved by whole pixels, the same for all vendors of a code point; the edge fills what comes in."""
        seed, size = self.seed, self.image_size
        padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
        tops, lefts = ((random_uniform(seed, axis, numbers) * (2 * SHIFT + 1)).astype(int) for axis in ("top", "left"))
        return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(padded, tops, lefts)])


def judge_images(options: JudgeOptions, split: str, seed: int = 0) -> JudgeImages:
    """The pictures of a split, "train" or "test", of the code points that all vendors have.

    Raises InputError where there are none.
    """
    wrong = {"parameter": "data_dir", "value": options.data_dir}
    if not options.data_dir:
        raise InputError("give what datasets/prepare_emoji.py wrote", **wrong)
    folders = [os.path.join(options.data_dir, vendor, split) for vendor in options.vendor_names()]
    found: list[dict[str, TrainReference]] = []
    for folder in folders:
        if not os.path.isdir(folder):
            raise InputError(f"there is no folder {display_name(folder)}", **wrong)
        found.append({reference.stem: reference for reference in list_images(folder)})
    common = [stem for stem in sorted(found[0]) if all(stem in each for each in found)]
    if len(common) < 2:
        raise InputError(
            f"its vendors have {len(common)} names in common in {split}; pictures of one code point need one name",
            **wrong,
        )
    return JudgeImages([[each[stem] for stem in common] for each in found], options.image_size, seed)


def held_out_images(options: JudgeOptions) -> JudgeImages | None:
    """The pictures of the test split; None where no vendor has one."""
    folders = [os.path.join(str(options.data_dir), vendor, "test") for vendor in options.vendor_names()]
    return judge_images(options, "test") if any(map(os.path.isdir, folders)) else None


def by_vendor(images: torch.Tensor) -> torch.Tensor:
    """[N, 3 V, H, W] as [V N, 3, H, W], vendor by vendor."""
    return torch.cat(images.split(3, dim=1))


def judge_loss(vendors: int, temperature: float) -> Loss:
    """Cross-entropy of the vendor, plus InfoNCE between every two vendors' pictures of a batch's code points.

    The contrast is symmetric: each picture finds its partner among all pictures of the other vendor in the batch, by
    cosine similarity over the temperature (Oord et al. 2018; Radford et al. 2021).
    """

    def losses(
        model: Judge, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, y: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        logits, embeddings = model(by_vendor(x))
        labels = torch.arange(vendors, device=x.device).repeat_interleave(len(x))
        vendor = F.cross_entropy(logits.float(), labels, reduction="none").view(vendors, len(x)).mean(0)
        accuracy = (logits.detach().argmax(1) == labels).float().view(vendors, len(x)).mean(0)
        embeddings, own = embeddings.view(vendors, len(x), -1).float(), torch.arange(len(x), device=x.device)
        contrast, found = [], []
        for a in range(vendors):
            for b in range(vendors):
                if a != b:
                    similarity = embeddings[a] @ embeddings[b].T / temperature
                    contrast.append(F.cross_entropy(similarity, own, reduction="none"))
                    found.append((similarity.detach().argmax(1) == own).float())
        contrasts = torch.stack(contrast).mean(0)
        return {
            "loss": vendor + contrasts, "vendor": vendor, "contrast": contrasts, "acc": accuracy,
            "retrieval": torch.stack(found).mean(0),
        }  # fmt: skip

    return losses


@torch.no_grad()
def held_out(model: Judge, images: JudgeImages, device: str | torch.device, batch_size: int = 64) -> Terms:
    """Accuracy of the vendor, and the share of pictures whose nearest by another vendor shows their code point.

    Over all code points of `images` at once: totals as `losses.evaluate` gives them, of `acc` and `retrieval`.
    """
    vendors, found = len(images.parts), []
    for _, x, _ in images.ordered_batches(batch_size, device):
        logits, embeddings = model(by_vendor(x))
        found.append((logits.argmax(1).view(vendors, -1), embeddings.view(vendors, len(x), -1)))
    named, embeddings = (torch.cat(parts, 1) for parts in zip(*found))
    accuracy = (named == torch.arange(vendors, device=named.device)[:, None]).float()
    own = torch.arange(len(images), device=named.device)
    nearest = [(embeddings[a] @ embeddings[b].T).argmax(1) for a in range(vendors) for b in range(vendors) if a != b]
    totals: Terms = {}
    for name, value in (("acc", accuracy.mean(0)), ("retrieval", (torch.stack(nearest) == own).float().mean(0))):
        add_by_quarter(totals, {name: value}, torch.zeros(len(value), dtype=torch.long, device=value.device), 1)
    return totals


def description(judge: Judge) -> dict[str, Any]:
    """A judge's size and vendors, as a run records them."""
    return {**judge.flags, "vendors": ",".join(judge.vendors)}


def begin(config: TrainConfig, options: JudgeOptions, code_points: int) -> Start:
    """The judge of a run in float32 on the CPU; code_points: their number in the training pictures.

    Raises InputError where the checkpoint or the run's record has other vendors or another size.
    """
    checkpoint = resume_path(config)
    torch.manual_seed(config.seed)
    judge = Judge(options.vendor_names(), options.image_size, options.width)
    if checkpoint:
        recorded = files.read_run(os.path.dirname(checkpoint)).model
        for name, value in description(judge).items():
            if recorded and recorded.get(name) != value:
                where = f"the run of {display_name(checkpoint)}"
                raise InputError(f"{where} has {name} {recorded.get(name)}, and now it is {value}")
        with reading(checkpoint, "this judge"):
            fill(judge, load_state_dict(checkpoint))
    texts = {**judge.metadata(), "data": json.dumps({"code_points": code_points, "split": "train"})}
    return Start(judge, texts["model_type"], description(judge), checkpoint, texts=texts)


def create_parser() -> Parser:
    parser = Parser(__doc__, defaults=DEFAULTS)
    parser.usage = "python benchmarks/emoji/%(prog)s --data_dir DIR --save_dir DIR [flags]"
    parser.add(JudgeOptions, title="pictures and network")
    loop.add_loop(parser, without=WITHOUT)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    options, run = given.options(JudgeOptions), loop.Run(given, ranks)
    images, tests = judge_images(options, "train", run.config.seed), held_out_images(options)
    measure = functools.partial(held_out, images=tests, device=run.device) if tests else None
    with run.folder():
        start = begin(run.config, options, len(images))
        losses = judge_loss(len(options.vendor_names()), options.temperature)
        return run.train(start, images, losses, None, [options], USE, evaluate=measure)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
