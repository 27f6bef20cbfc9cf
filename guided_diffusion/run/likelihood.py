"""The likelihood of a folder of images under a model, in bits per dimension: image by image, resumable, over any ranks.

Every image's terms are a file of their own in `terms/`, which appears whole: a killed run resumes when started again.
An image's noise depends on the seed and its relative path alone. At the end rank 0 writes guided-diffusion's files
(vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz, means over images by step, from the last to the first) and
bpd.csv, a row per image.
"""

import csv
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..dist_util import Peers
from ..errors import InputError, display_name
from ..gaussian_diffusion import GaussianDiffusion
from ..image_datasets import ImageError, Reference, class_names, list_references, load_image, to_tensor
from ..options import check, option
from . import files, record
from .noise import ImageNoise, image_key
from .sources import npz_bytes

SUMS = ("vb", "mse", "xstart_mse")


@dataclass(frozen=True)
class LikelihoodOptions:
    """Which images, and where the results go."""

    data_dir: str | None = option(None, "folder of images (searched recursively), or one image", metavar="PATH")
    save_dir: str = option("output/nll", "folder for the results", runtime=True, metavar="DIR")
    num_samples: int = option(1000, "evaluate only the first so many images", least=1)
    batch_size: int = option(1, "images at once", least=1, runtime=True)
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")
    seed: int = option(0, "with an image's relative path, determines its noise")
    overwrite: bool = option(False, "start over where the save folder holds another run", runtime=True)

    def __post_init__(self) -> None:
        check(self)
        if self.data_dir is None:
            raise InputError("give a folder of images", parameter="data_dir")


class Likelihood:
    """A folder of images and their likelihoods, checked before a model is loaded. `prepare`, then `run`.

    labels: whether the images have classes, named as for training.
    """

    def __init__(self, options: LikelihoodOptions, peers: Peers) -> None:
        self.options, self.peers = options, peers
        files.make_folder(os.path.join(options.save_dir, "terms"), "save_dir")
        if peers.rank == 0:
            found = _listed(options)
            peers.publish("images", [(reference.path, reference.name) for reference in found])
        else:
            found = [Reference(*entry) for entry in peers.wait_for("images")]
        self.references = found
        self.failed: dict[str, str] = {}

    def labels(self) -> dict[str, int]:
        """The class of every image by name."""
        names = class_names(self.references)
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        return {reference.name: numbers[name] for reference, name in zip(self.references, names)}

    def _path(self, reference: Reference) -> str:
        return os.path.join(self.options.save_dir, "terms", *f"{reference.name}.npz".split("/"))

    def prepare(self, settings: dict[str, Any]) -> None:
        """Check the save folder against run.json and write the record; settings: all that determines the results."""
        if self.peers.rank:
            self.missing = set(self.peers.wait_for("missing"))
            return
        folder = self.options.save_dir
        self._lock = files.lock(folder)
        path = os.path.join(folder, record.NAME)
        if self.options.overwrite:
            for reference in self.references:
                if os.path.exists(self._path(reference)):
                    os.remove(self._path(reference))
        elif os.path.exists(path):
            record.check_same(folder, files.read_json(path).get("settings", {}), settings)
        self.record = {"format": record.FORMAT, "settings": settings, "versions": record.versions(), "finished": None}
        files.write_json(path, self.record)
        self.missing = {reference.name for reference in self.references if not os.path.exists(self._path(reference))}
        self.peers.publish("missing", sorted(self.missing))

    def run(
        self,
        model: Callable[..., torch.Tensor],
        diffusion: GaussianDiffusion,
        image_size: int,
        device: torch.device,
        *,
        labels: dict[str, int] | None = None,
        progress: Callable[[int], None] = lambda images: None,
    ) -> float | None:
        """Evaluate what is missing; on rank 0 write the results and return the mean in bits per dimension.

        progress(images): called on rank 0 with the images done in this run, over all ranks. None on other ranks.
        """
        size = self.options.batch_size
        batches = [self.references[i : i + size] for i in range(0, len(self.references), size)]
        # Where one image of a batch is missing, the batch is evaluated as before: its size decides the rounding.
        batches = [batch for batch in batches if any(reference.name in self.missing for reference in batch)]
        while (index := self.peers.count("claimed") - 1) < len(batches):
            self._evaluate(batches[index], model, diffusion, image_size, device, labels)
            wanted = sum(reference.name in self.missing for reference in batches[index])
            progress(self.peers.count("evaluated", wanted))
            self.peers.watch()
        if self.peers.rank:
            self.peers.publish(f"failed/{self.peers.rank}", self.failed)
            self.peers.count("finished")
            return None
        while self.peers.count("finished", 0) < self.peers.world_size - 1:
            time.sleep(0.1)
            self.peers.watch()
        for rank in range(1, self.peers.world_size):
            self.failed |= self.peers.wait_for(f"failed/{rank}")
        return self._finish()

    def _evaluate(self, batch, model, diffusion, image_size, device, labels):
        readable = []
        for reference in batch:
            try:
                readable.append((reference, load_image(reference, image_size)))
            except ImageError as error:
                self.failed[reference.name] = str(error)
        if not readable:
            return
        names = [reference.name for reference, _ in readable]
        noise = ImageNoise([image_key(self.options.seed, name) for name in names], device)
        kwargs = {} if labels is None else {"y": torch.tensor([labels[name] for name in names], device=device)}
        x = to_tensor([image for _, image in readable]).to(device)
        terms = diffusion.calc_bpd_loop(model, x, self.options.clip_denoised, kwargs, noise=noise)
        arrays = {name: values.double().cpu().numpy() for name, values in terms.items()}
        for n, (reference, _) in enumerate(readable):
            if reference.name not in self.missing:
                continue
            path = self._path(reference)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            files.write_bytes(path, npz_bytes(**{name: values[n] for name, values in arrays.items()}))

    def _finish(self):
        """Write the results of all images, and release the folder."""
        folder, rows, tables = self.options.save_dir, [], {name: [] for name in SUMS}
        for reference in self.references:
            if reference.name in self.failed:
                continue
            with np.load(self._path(reference), allow_pickle=False) as terms:
                rows.append([reference.name, float(terms["total_bpd"]), float(terms["prior_bpd"])])
                for name in SUMS:
                    tables[name].append(terms[name])
        if not rows:
            name, reason = next(iter(self.failed.items()))
            raise InputError(f"none of the images can be read; the first: {display_name(name)}: {reason}")
        for name, values in tables.items():
            means = np.mean(values, axis=0).astype(np.float32)
            files.write_bytes(os.path.join(folder, f"{name}_terms.npz"), npz_bytes(means))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["name", "total_bpd", "prior_bpd"], *rows])
        files.write_text(os.path.join(folder, "bpd.csv"), text.getvalue())
        mean = float(np.mean([row[1] for row in rows]))
        self.record |= {"finished": True, "images": len(rows), "failed": self.failed, "bits_per_dimension": mean}
        files.write_json(os.path.join(folder, record.NAME), self.record)
        if self._lock is not None:
            os.close(self._lock)
        return mean


def _listed(options: LikelihoodOptions) -> list[Reference]:
    try:
        return list_references(str(options.data_dir))[: options.num_samples]
    except InputError as error:
        reason = error.reason if error.parameter else str(error)
        raise InputError(reason, parameter="data_dir", value=options.data_dir) from None
