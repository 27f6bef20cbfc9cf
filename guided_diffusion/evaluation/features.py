"""What distances are measured in: the extractors, features of images, and statistics files."""

import contextlib
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from ..errors import InputError, display_name, shown
from ..image_datasets import Reference
from ..run import files
from ..run import record as run_record
from .images import Progress, in_batches, npz_names, size_words
from .judge import DEFAULT_PATH, Judge, is_judge, load_judge
from .packages import library, quiet_download, reason

FEATURE_TIMESTEP = 50  # of the 1000 of training: nearly clean images, where middle features describe content
LARGEST_STATISTICS = 2**30  # bytes of the arrays of a statistics file; the covariance of 2048 features has 2**25


@dataclass(frozen=True)
class Extractor:
    """What FID and KID are measured in.

    name: kind and, for a file, the beginning of its sha256, so that two results can be told apart. extract: images
    [N, 3, H, W] float32 in [0, 1] -> features [N, D]. image_size: the side that images must have, None for any. judge:
    the network, where the features are a judge's.
    """

    name: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    image_size: int | None = None
    judge: Judge | None = None


def feature_extractor(
    features: str = "inception",
    *,
    device: str | torch.device = "cpu",
    inception_path: str | None = None,
    trust_features: bool = False,
) -> Extractor:
    """Load the extractor that `features` names; raises InputError where it is missing or does not fit.

    "inception": the TF-ported Inception of pytorch-fid, 2048 features, weights from `inception_path` or pytorch-fid's
    own download. FILE.pt: a TorchScript module that maps images [N, 3, H, W] in [0, 1] to [N, D]; it is a program, and
    runs only with `trust_features`. FILE.safetensors: a diffusion model or encoder of this project; its features are
    the spatial mean of the middle block at t = 50 of images at the model's size, fed in [-1, 1] without noise. "judge",
    or the FILE.safetensors of a judge: the features before its heads, of images at its size; "judge" is the one in
    models/.
    """
    if features == "inception":
        return _inception(inception_path, device)
    if inception_path is not None:
        raise InputError(
            f"it has no effect where `features` is {shown(features)}; leave it out",
            parameter="inception_path",
            value=inception_path,
        )
    path = Path(features_file(features) or features)
    if path.suffix not in (".pt", ".safetensors"):
        fitting = "it can be inception, judge, a TorchScript FILE.pt or a FILE.safetensors"
        raise InputError(fitting, parameter="features", value=features)
    _require_file(path, "features")
    if path.suffix == ".safetensors":
        return _judge_features(path, device) if names_judge(features) else _diffusion_features(path, device)
    if is_torchscript(path) and not trust_features:
        fitting = (
            "a TorchScript file is a program that can do whatever you can; give `trust_features` True if you trust it"
        )
        raise InputError(fitting, parameter="features", value=features)
    return _torchscript(path, device)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, by its entries; nothing of it runs."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())
    except Exception:  # no archive, or a damaged one
        return False


def _inception(path: str | None, device: str | torch.device) -> Extractor:
    pytorch_fid = library("pytorch_fid.inception", "pytorch-fid", "the Inception network")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet_download())
            if path is not None:
                _require_file(path, "inception_path")
                weights = torch.load(path, map_location="cpu", weights_only=True)
                # pytorch-fid has no argument for a file: its one call that fetches the weights is answered from ours
                stack.enter_context(mock.patch.object(pytorch_fid, "load_state_dict_from_url", lambda *a, **k: weights))
            model = pytorch_fid.InceptionV3([pytorch_fid.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except InputError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise many types for a file that does not fit
        if path is not None:
            raise InputError(
                f"these are not the weights of pytorch-fid's Inception ({reason(error)}); "
                "pt_inception-2015-12-05-6726825d.pth is needed",
                parameter="inception_path",
                value=path,
            ) from None
        raise InputError(
            f"its weights could not be downloaded ({reason(error)}); give `inception_path` "
            "pt_inception-2015-12-05-6726825d.pth, or a file of other `features`",
            parameter="features",
            value="inception",
        ) from None
    model = model.to(device).eval()
    return Extractor("inception (pytorch-fid, 2048-d)", lambda images: model(images)[0].flatten(1))


def _torchscript(path: Path, device: str | torch.device) -> Extractor:
    try:
        if not is_torchscript(path):
            raise RuntimeError("it has no code")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated from torch 2.9 on, and still the format asked for
            model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise InputError(
            f"it is not a TorchScript module ({reason(error)}); save one with torch.jit.save, or give a checkpoint of "
            "this project as .safetensors",
            parameter="features",
            value=path,
        ) from None
    return Extractor(f"torchscript {_digest(path)}", model)


def _diffusion_features(path: Path, device: str | torch.device) -> Extractor:
    from ..checkpoint import load_model

    model, info = load_model(str(path), device=str(device), dtype=torch.float32)
    if not hasattr(model, "middle_features"):
        fitting = f"{type(model).__name__} has no features to read; an ADM model is needed"
        raise InputError(fitting, parameter="features", value=path)
    model.eval()

    def extract(images: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(images),), FEATURE_TIMESTEP, device=images.device)
        features: Any = model.middle_features
        return features(images * 2 - 1, timesteps).mean(dim=(2, 3))

    name = f"middle block of {type(model).__name__} {_digest(path)} at t = {FEATURE_TIMESTEP}"
    return Extractor(name, extract, image_size=int(info.flags["image_size"]))


def features_file(features: str) -> str | None:
    """The file that `features` means; None for "inception", which pytorch-fid finds by itself."""
    return {"inception": None, "judge": str(DEFAULT_PATH)}.get(features, features)


def names_judge(features: str) -> bool:
    """Whether `features` means a judge: "judge", or a .safetensors file that says so."""
    return features == "judge" or (features.endswith(".safetensors") and is_judge(features))


def _judge_features(path: Path, device: str | torch.device) -> Extractor:
    try:
        judge = load_judge(path, device)
    except InputError as error:
        raise InputError(error.reason, parameter="features", value=path) from None
    name = f"judge of {', '.join(judge.vendors)} {_digest(path)}"
    return Extractor(name, lambda images: judge.judge(images).features, judge.image_size, judge)


def _digest(path: Path) -> str:
    return str(run_record.sha256(path))[:12]


def extract_features(
    references: Sequence[Reference],
    extractor: Extractor,
    read: Callable[[Reference], torch.Tensor],
    *,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> np.ndarray:
    """Features [N, D], float64, of the images that `read` makes of each reference ([3, H, W] in [0, 1]).

    Images pass through in batches; only the features stay. Raises InputError where images differ in size, or the
    extractor fails or returns anything but finite numbers [N, D].
    """
    rows, shape, width = [], None, None
    for batch in in_batches(references, batch_size, progress, "features"):
        images = [read(reference) for reference in batch]
        shape = shape or images[0].shape
        for reference, image in zip(batch, images):
            if image.shape != shape:
                paths = [display_name(each.path) for each in (reference, references[0])]
                raise InputError(
                    f"{paths[0]} is {size_words(image.shape)} and {paths[1]} is {size_words(shape)}: at native size "
                    "all images of a folder must have one size; without `native_size` they are resized"
                )
        try:
            with torch.no_grad():
                features = extractor.extract(torch.stack(images).to(device))
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _unfit(extractor, f"fails on images of {size_words(shape)}: {reason(error)}") from None
        if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
            found = list(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise _unfit(extractor, f"returns {found} for {len(images)} images; [N, D] is needed")
        if not features.isfinite().all():
            raise _unfit(extractor, f"returns NaN or infinity for {display_name(batch[0].path)} or its batch")
        width = width or features.shape[1]
        if features.shape[1] != width:
            raise _unfit(extractor, f"returns {features.shape[1]} features for one batch and {width} for another")
        rows.append(features.cpu().double().numpy())  # in this order: not every device has float64
    return np.concatenate(rows)


def _unfit(extractor: Extractor, what: str) -> InputError:
    return InputError(f"it {what}", parameter="features", value=extractor.name)


# Statistics files


def save_statistics(path: str | Path, features: np.ndarray, description: str) -> None:
    """Write mean and unbiased covariance of features [N, D] as pytorch-fid does (`mu`, `sigma`).

    Beside them, `count` (N) and `features` (the description of extractor and input) are kept: they guard against a
    comparison of features that are not the same. The file appears whole or not at all.
    """
    arrays: dict[str, Any] = {"mu": features.mean(axis=0), "sigma": np.atleast_2d(np.cov(features, rowvar=False))}
    arrays |= {"count": len(features), "features": description}
    files.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_statistics(path: str | Path, description: str) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Read a statistics file -> (mu [D], sigma [D, D], number of images or None); InputError where it does not fit."""
    wrong: dict[str, Any] = {"parameter": "targets", "value": path}
    if not {"mu", "sigma"} <= npz_names(path, "targets"):
        raise InputError("it is not a statistics file; arrays mu [D] and sigma [D, D] are needed", **wrong)
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_STATISTICS:
                raise ValueError("its arrays are too large")
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
            count = int(file["count"]) if "count" in file else None
            recorded = str(file["features"]) if "features" in file else description
    except Exception as error:  # damaged archives and arrays raise many types
        unfit = f"it is not a statistics file ({reason(error)}); arrays mu [D] and sigma [D, D] are needed"
        raise InputError(unfit, **wrong) from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        shapes = f"mu {list(mu.shape)} and sigma {list(sigma.shape)}"
        raise InputError(f"{shapes} do not fit; finite [D] and [D, D] are needed", **wrong)
    if recorded != description:
        raise InputError(f"it was made with {shown(recorded)}, but this run uses {shown(description)}", **wrong)
    return mu, sigma, count


def _require_file(path: str | Path, parameter: str) -> None:
    if not Path(path).is_file():
        raise InputError("no such file", parameter=parameter, value=path)
