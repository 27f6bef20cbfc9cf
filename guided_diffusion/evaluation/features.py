"""Feature networks for distances, features of images, and statistics files."""

import contextlib
import io
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open

from ..codec import pixels
from ..errors import InputError, display_name, first_line, library, one_line, reading, shown
from ..image_datasets import Reference
from ..registry import Registry
from ..run import files
from ..run import record as run_record
from . import efficientnet
from .distances import Gaussian, root_of_covariance
from .images import Progress, in_batches, open_npz

FEATURE_TIMESTEP = 50  # of the 1000 of training: nearly clean images, whose middle features describe content
NAMED = ("inception", "efficientnet")  # values of `features` that are no file
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
STATISTICS = "statistics of images (arrays mu [D] and sigma [D, D])"

NETWORKS = Registry("features")
"""Kinds of feature networks in .safetensors files, by the entry `model_type` of the file's metadata: a function
(path, device) -> `Extractor`. Files of other kinds are read as models of this project."""


@dataclass(frozen=True)
class Extractor:
    """A feature network.

    name: kind and, of a file, its `digest`. extract: images [N, 3, H, W] float32 in [0, 1] -> features [N, D], or a
    dict of "features" and further tensors [N, ...] for metrics of features. image_size: side that images must have.
    """

    name: str
    extract: Callable[[torch.Tensor], Any]
    image_size: int | None = None


def feature_extractor(
    features: str = "inception", *, device: str | torch.device = "cpu", inception_path: str | None = None,
    trust_features: bool = False,
) -> Extractor:  # fmt: skip
    """Load a feature network; raises InputError where it is missing or does not fit.

    "inception": pytorch-fid's, 2048 features. "efficientnet": EfficientNet-Lite0, 1280 features. FILE.pt: a TorchScript
    module. FILE.safetensors: a network of a kind in `NETWORKS`, or a diffusion model or encoder of this project; its
    features are then the spatial mean of the middle block at t = 50 of images without noise.
    """
    if features == "inception":
        return _inception(inception_path, device)
    wrong: dict[str, Any] = {"parameter": "features", "value": features}
    if inception_path is not None:
        reason = f"it has no effect where `features` is {shown(features)}; leave it out"
        raise InputError(reason, parameter="inception_path", value=inception_path)
    if features == "efficientnet":
        model = efficientnet.load(device)
        return Extractor("efficientnet-lite0 (ImageNet, 1280-d)", model.features, efficientnet.IMAGE_SIZE)
    path = Path(features)
    if path.suffix not in (".pt", ".safetensors"):
        raise InputError("it can be inception, efficientnet, a TorchScript FILE.pt or a FILE.safetensors", **wrong)
    if not path.is_file():
        raise InputError("no such file", **wrong)
    if path.suffix == ".pt":
        return _torchscript(path, device, trust_features)
    kind = ""
    with contextlib.suppress(Exception), safe_open(features, framework="pt") as file:
        kind = (file.metadata() or {}).get("model_type", "")  # of a damaged file, the loader says what is wrong
    return NETWORKS.get(kind, _diffusion_features)(path, device)


def _inception(path: str | None, device: str | torch.device) -> Extractor:
    pytorch_fid = library("pytorch_fid.inception", "pytorch-fid", "the Inception network")
    load = pytorch_fid.load_state_dict_from_url
    if path is not None:  # pytorch-fid has no argument for a file: its one call that fetches the weights reads ours
        load = lambda *_, **__: torch.load(path, map_location="cpu", weights_only=True)  # noqa: E731
    try:
        with quiet_download(), mock.patch.object(pytorch_fid, "load_state_dict_from_url", load):
            model = pytorch_fid.InceptionV3([pytorch_fid.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).to(device).eval()
    except Exception as error:  # a file that does not fit fails in many ways
        if path is not None:
            fitting = f"these are not the weights of pytorch-fid's Inception ({reason(error)}); {WEIGHTS} is needed"
            raise InputError(fitting, parameter="inception_path", value=path) from None
        fitting = f"({reason(error)}); give `inception_path` {WEIGHTS}, or a file of other `features`"
        fitting = f"its weights could not be downloaded {fitting}"
        raise InputError(fitting, parameter="features", value="inception") from None
    return Extractor("inception (pytorch-fid, 2048-d)", lambda images: model(images)[0].flatten(1))


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Hide a library's progress (standard output is the result's), and wait 20 seconds at most for a host."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: BaseException) -> str:
    """One line of an error's text: the first sentence, or the last line of the traceback in a TorchScript error."""
    text = str(error).strip()
    line = text.rpartition("\n")[2] if "Traceback" in text else first_line(error)
    return one_line(line.split(". ")[0].strip(" .<>"))


def _torchscript(path: Path, device: str | torch.device, trusted: bool) -> Extractor:
    if not trusted:
        fitting = (
            "a TorchScript file is a program, and runs with your rights; give `trust_features` True if you trust it"
        )
        raise InputError(fitting, parameter="features", value=path)
    with reading(path, "a TorchScript module"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated from torch 2.9 on, and still in use
        return Extractor(f"torchscript {digest(path)}", torch.jit.load(str(path), map_location=device).eval())


def _diffusion_features(path: Path, device: str | torch.device) -> Extractor:
    from ..checkpoint import load_model

    model, info = load_model(str(path), device=str(device), dtype=torch.float32)
    features: Any = getattr(model.eval(), "middle_features", None)
    if features is None:
        fitting = f"{type(model).__name__} has no features to read; an ADM model is needed"
        raise InputError(fitting, parameter="features", value=path)
    codec = pixels(info.flags.get("in_channels", 3))

    def extract(images: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(images),), FEATURE_TIMESTEP, device=images.device)
        return features(codec.encode(images * 2 - 1), timesteps).mean(dim=(2, 3))

    name = f"middle block of {type(model).__name__} {digest(path)} at t = {FEATURE_TIMESTEP}"
    return Extractor(name, extract, image_size=int(info.flags["image_size"]))


def digest(path: Path) -> str:
    """The first 12 digits of a file's sha256."""
    return str(run_record.sha256(path))[:12]


def extract_features(
    references: Sequence[Reference], extractor: Extractor, read: Callable[[Reference], torch.Tensor], *,
    batch_size: int = 16, device: str | torch.device = "cpu", progress: Progress | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Apply the network to images, read as [3, H, W] in [0, 1]; raises InputError where they differ in size.

    Returns "features" [N, D], and further arrays [N, ...] that the network returns, in float64.
    """
    parts: list[dict[str, np.ndarray]] = []
    first: Any = None
    for batch in in_batches(references, batch_size, progress, "features"):
        images = [read(reference) for reference in batch]
        first = images[0] if first is None else first
        for reference, image in zip(batch, images):
            if image.shape != first.shape:
                pair = (reference, image), (references[0], first)
                here, there = (f"{display_name(each.path)} is {x.shape[2]}x{x.shape[1]}" for each, x in pair)
                reason = "all images of a folder must have one size; without `native_size` they are resized"
                raise InputError(f"{here} and {there}: at native size {reason}")
        parts.append(_arrays(extractor, torch.stack(images).to(device), display_name(batch[0].path)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _arrays(extractor: Extractor, images: torch.Tensor, first: str) -> dict[str, np.ndarray]:
    """Apply the network to a batch and check its result; first: name of the batch's first image."""
    try:
        with torch.no_grad():
            found = extractor.extract(images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:
        problem = f"it fails on images {list(images.shape)}: {reason(error)}"
        raise InputError(problem, parameter="features", value=extractor.name) from None
    tensors = found if isinstance(found, Mapping) else {"features": found}
    features, problem = tensors.get("features"), ""
    arrays = {name: value.cpu().double().numpy() for name, value in tensors.items()}  # not every device has float64
    if features is None or features.ndim != 2 or len(features) != len(images):
        shape = None if features is None else list(features.shape)
        problem = f"it returns {shape} for {len(images)} images; [N, D] is needed"
    elif not all(np.isfinite(value).all() for value in arrays.values()):
        problem = f"it returns NaN or infinity for {first} or its batch"
    if problem:
        raise InputError(problem, parameter="features", value=extractor.name)
    return arrays


# Statistics files


def save_statistics(path: str | Path, features: np.ndarray, description: str) -> None:
    """Write mean and unbiased covariance of features [N, D] as pytorch-fid does (`mu`, `sigma`), N, a description."""
    arrays: dict[str, Any] = {"mu": features.mean(axis=0), "sigma": np.atleast_2d(np.cov(features, rowvar=False))}
    arrays |= {"count": len(features), "features": description}
    files.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_statistics(path: str | Path, description: str) -> tuple[Gaussian, int | None]:
    """The Gaussian in a statistics file, and the number of images where it has that.

    Raises InputError where no images can have these statistics, or those of other features are needed.
    """
    with open_npz(path, STATISTICS) as file:
        mean, sigma = (file[name].astype(np.float64, casting="same_kind") for name in ("mu", "sigma"))
        if mean.ndim != 1 or not len(mean) or sigma.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {list(mean.shape)} and sigma {list(sigma.shape)} do not fit")
        if not np.isfinite([mean, *sigma]).all():
            raise ValueError("mu or sigma has values that are not finite")
        root, count = root_of_covariance(sigma), int(file["count"]) if "count" in file else None
        if count is not None and count < 2:
            raise ValueError(f"its count is {count}, not 2 images or more")
        recorded = str(file.get("features", description))
    if recorded != description:
        reason = f"it was made with {shown(recorded)}, but this run uses {shown(description)}"
        raise InputError(reason, parameter="targets", value=path)
    return (mean, root), count
