"""Metrics of translated images: FID and KID between sets, L2, PSNR, SSIM, MS-SSIM and LPIPS between pairs.

`evaluation.evaluate` measures a folder with them by a named protocol. Distances between distributions are computed in
float64 from features [N, D]; paired metrics from float32 images in [0, 1].
"""

import contextlib
import importlib
import io
import math
import os
import re
import socket
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from .. import image_datasets
from ..run import record as run_record
from ..errors import UserError

PAIRED_METRICS = ("l2", "mse", "psnr", "ssim", "msssim", "lpips")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURE_TIMESTEP = 50  # of the 1000 of training: nearly clean images, where middle features describe content
OVERVIEWS = r"grid\.png|trajectory/.*"  # what a sampling script adds to its outputs
KERNEL_ROWS = 512  # rows of a kernel matrix held in memory at once
MIN_SSIM_SIZE, MIN_MSSSIM_SIZE = 11, 161  # one window; one window after four halvings


# Distances between two sets of features


def frechet_distance(mean1, cov1, mean2, cov2):
    """Fréchet distance |mean1 - mean2|² + Tr(cov1 + cov2 - 2 (cov1 cov2)^½) of two Gaussians (Heusel et al. 2017).

    mean [D], cov [D, D] float64, cov symmetric and positive semidefinite -> float >= 0. The trace of the square root is
    the nuclear norm of R1 R2ᵀ for cov = RᵀR. It needs no matrix square root, so singular covariances are no special
    case; where pytorch-fid's square root converges, the two agree to about 1e-6 relative.
    """
    return frechet_of_roots(mean1, root_of_covariance(cov1), mean2, root_of_covariance(cov2))


def frechet_of_roots(mean1, root1, mean2, root2):
    """`frechet_distance` of Gaussians that are given as mean [D] and root R [R, D] with RᵀR the covariance."""
    overlap = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.sum(root1**2) + np.sum(root2**2) - 2 * overlap
    return max(float(distance), 0.0)


def root_of_covariance(cov):
    """R [D, D] with RᵀR = cov, for a symmetric positive semidefinite cov [D, D]."""
    values, vectors = np.linalg.eigh(cov)
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T


def gaussian_of_features(features):
    """Mean [D] and R [min(N, D), D] with RᵀR the unbiased covariance of features [N, D], N >= 2."""
    mean = features.mean(axis=0)
    root = (features - mean) / math.sqrt(len(features) - 1)
    return mean, np.linalg.qr(root, mode="r") if len(features) > features.shape[1] else root


def kernel_distance(x, y, *, subset_size=1000, subsets=100, seed=0):
    """Kernel Inception distance: unbiased MMD² with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, equation 4).

    x [N, D], y [M, D] float64, N and M >= 2 -> (mean, standard deviation) over `subsets` random subsets drawn without
    replacement. A set no larger than `subset_size` is used whole; if both are, there is one value and the standard
    deviation is NaN. Unbiased: it can be negative.
    """
    size_x, size_y = min(subset_size, len(x)), min(subset_size, len(y))
    if size_x == len(x) and size_y == len(y):
        return float(_mmd2(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0]), math.nan
    rng = np.random.default_rng(seed)
    counts_x, counts_y = np.zeros((subsets, len(x))), np.zeros((subsets, len(y)))
    for row in range(subsets):
        counts_x[row, rng.choice(len(x), size_x, replace=False)] = 1
        counts_y[row, rng.choice(len(y), size_y, replace=False)] = 1
    values = _mmd2(x, y, counts_x, counts_y)
    return float(values.mean()), float(values.std(ddof=1)) if subsets > 1 else math.nan


def _mmd2(x, y, counts_x, counts_y):
    """Unbiased MMD² of R resamplings at once: counts [R, N] and [R, M] say how often each row is taken -> [R]."""
    size_x, size_y = counts_x.sum(axis=1), counts_y.sum(axis=1)
    within_x = (_kernel_form(x, x, counts_x, counts_x) - counts_x @ _kernel_diagonal(x)) / (size_x * (size_x - 1))
    within_y = (_kernel_form(y, y, counts_y, counts_y) - counts_y @ _kernel_diagonal(y)) / (size_y * (size_y - 1))
    return within_x + within_y - 2 * _kernel_form(x, y, counts_x, counts_y) / (size_x * size_y)


def _kernel_form(x, y, counts_x, counts_y):
    total = np.zeros(len(counts_x))
    for start in range(0, len(x), KERNEL_ROWS):
        rows = slice(start, start + KERNEL_ROWS)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        total += ((counts_x[:, rows] @ kernel) * counts_y).sum(axis=1)
    return total


def _kernel_diagonal(x):
    return (np.sum(x**2, axis=1) / x.shape[1] + 1) ** 3


# Confidence


def bootstrap_mean(values, *, replicates, confidence=0.95, seed=0):
    """Percentile bootstrap interval (low, high) of the mean of finite values [N] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(replicates)]
    return _quantiles(means, confidence)


def bootstrap_frechet(x, target, estimate, *, replicates, confidence=0.95, seed=0):
    """Bootstrap interval (low, high) of the Fréchet distance between x [N, D] and `target`.

    `target` is features [M, D], resampled as well, or a pair (mean [D], root [R, D]) that is taken as known. A resample
    repeats images, which inflates the distance; the replicates are therefore shifted to have `estimate` as their mean.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(replicates):
        resampled = x[rng.integers(len(x), size=len(x))]
        other = target if isinstance(target, tuple) else gaussian_of_features(
            target[rng.integers(len(target), size=len(target))]
        )
        values.append(frechet_of_roots(*gaussian_of_features(resampled), *other))
    low, high = _quantiles(np.array(values) - np.mean(values) + estimate, confidence)
    return max(low, 0.0), high


def bootstrap_kernel(x, y, estimate, *, replicates, confidence=0.95, seed=0):
    """Bootstrap interval (low, high) of the kernel distance, both sets resampled; shifted as in `bootstrap_frechet`."""
    rng = np.random.default_rng(seed)
    counts_x, counts_y = (
        rng.multinomial(len(z), np.full(len(z), 1 / len(z)), size=replicates).astype(np.float64) for z in (x, y)
    )
    values = _mmd2(x, y, counts_x, counts_y)
    return _quantiles(values - values.mean() + estimate, confidence)


def _quantiles(values, confidence):
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# Paired metrics


def paired_metrics(a, b):
    """L2, MSE, PSNR, SSIM and MS-SSIM of image pairs, each as the EGSDE evaluation computes it.

    a, b: float32 [N, C, H, W] in [0, 1], H and W at least 11 -> a dict of float64 tensors [N]. l2: Euclidean norm of
    the difference of the two images; mse: mean square over all values; psnr: -10 log10(mse) in dB, infinite for equal
    images; ssim: Wang et al. 2004 with an 11-tap Gaussian window (sigma 1.5) and no padding, mean over channels;
    msssim: Wang et al. 2003 with five scales, which needs H and W above 160 and is NaN below.
    """
    library = _library("pytorch_msssim", "pytorch-msssim", "SSIM")
    difference = (a.double() - b.double()).flatten(1)
    mse = difference.square().mean(dim=1)
    # SSIM in float32, as published: float64 takes twice as long and differs by 1e-6. TF32, which a GPU's convolutions
    # use by default, is too coarse for variances.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        options = {"data_range": 1.0, "size_average": False}
        ssim = library.ssim(a, b, **options)
        large = min(a.shape[-2:]) >= MIN_MSSSIM_SIZE
        msssim = library.ms_ssim(a, b, **options) if large else torch.full_like(ssim, math.nan)
    l2, psnr = difference.norm(dim=1), -10 * mse.log10()
    return {"l2": l2, "mse": mse, "psnr": psnr, "ssim": ssim.double(), "msssim": msssim.double()}


def load_lpips(net="alex", *, device="cpu"):
    """LPIPS v0.1 (Zhang et al. 2018): a function of two batches [N, 3, H, W] in [0, 1] that returns distances [N].

    net: "alex", "vgg" or "squeeze". The backbone's weights come from torchvision: from its cache, or downloaded. Raises
    UserError if the package or the weights cannot be had.
    """
    lpips = _library("lpips", "lpips", "LPIPS")
    try:
        with _quiet_download(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by arguments that it deprecates
            model = lpips.LPIPS(net=net, verbose=False).to(device).eval()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"LPIPS: the weights of its backbone '{net}' could not be loaded ({_reason(error)}); put torchvision's "
            f"file into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from None
    return lambda a, b: model(a.float(), b.float(), normalize=True).flatten()


# Features


@dataclass(frozen=True)
class Extractor:
    """What FID and KID are measured in.

    name: kind and, for a file, the beginning of its sha256, so that two results can be told apart. extract: images
    [N, 3, H, W] float32 in [0, 1] -> features [N, D]. image_size: the side that images must have, None for any.
    """

    name: str
    extract: Callable
    image_size: int | None = None


def feature_extractor(features="inception", *, device="cpu", inception_path=None):
    """Load the extractor that `features` names; raises UserError if it cannot be had.

    "inception": the TF-ported Inception of pytorch-fid, 2048 features, weights from `inception_path` or pytorch-fid's
    own download. FILE.pt: a TorchScript module that maps images [N, 3, H, W] in [0, 1] to [N, D]. FILE.safetensors: a
    diffusion model or encoder of this project; its features are the spatial mean of the middle block at t = 50 of
    images at the model's size, fed in [-1, 1] without noise.
    """
    if features == "inception":
        return _inception(inception_path, device)
    if inception_path is not None:
        raise UserError(f"--inception_path {inception_path} has no effect with --features {features}; leave it out")
    path = Path(features)
    if path.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--features {features}: 'inception', a TorchScript FILE.pt or a FILE.safetensors is needed")
    _require_file(path, "--features")
    load = _torchscript if path.suffix == ".pt" else _diffusion_features
    return load(path, device)


def _inception(path, device):
    pytorch_fid = _library("pytorch_fid.inception", "pytorch-fid", "--features inception")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet_download())
            if path is not None:
                _require_file(path, "--inception_path")
                weights = torch.load(path, map_location="cpu", weights_only=True)
                # pytorch-fid has no argument for a file: its one call that fetches the weights is answered from ours
                stack.enter_context(mock.patch.object(pytorch_fid, "load_state_dict_from_url", lambda *a, **k: weights))
            model = pytorch_fid.InceptionV3([pytorch_fid.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except UserError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise many types for a file that does not fit
        if path is not None:
            raise UserError(
                f"--inception_path {path}: not the weights of pytorch-fid's Inception ({_reason(error)}); "
                "pt_inception-2015-12-05-6726825d.pth is needed"
            ) from None
        raise UserError(
            f"--features inception: its weights could not be downloaded ({_reason(error)}); give --inception_path "
            "pt_inception-2015-12-05-6726825d.pth, or --features FILE"
        ) from None
    model = model.to(device).eval()
    return Extractor("inception (pytorch-fid, 2048-d)", lambda images: model(images)[0].flatten(1))


def _torchscript(path, device):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated from torch 2.9 on, and still the format asked for
            model = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(
            f"--features {path}: not a TorchScript module ({_reason(error)}); save one with torch.jit.save, or give a "
            "checkpoint of this project as .safetensors"
        ) from None
    return Extractor(f"torchscript {run_record.sha256(path)[:12]}", model)


def _diffusion_features(path, device):
    from ..checkpoint import load_model

    model, info = load_model(str(path), device=device, dtype=torch.float32)
    if not hasattr(model, "middle_features"):
        raise UserError(f"--features {path}: {type(model).__name__} has no features to read; an ADM model is needed")
    model.eval()

    def extract(images):
        timesteps = torch.full((len(images),), FEATURE_TIMESTEP, device=images.device)
        return model.middle_features(images * 2 - 1, timesteps).mean(dim=(2, 3))

    return Extractor(
        f"middle block of {type(model).__name__} {run_record.sha256(path)[:12]} at t = {FEATURE_TIMESTEP}",
        extract,
        image_size=int(info.flags["image_size"]),
    )


def extract_features(references, extractor, read, *, batch_size=16, device="cpu", progress=None):
    """Features [N, D], float64, of the images that `read` makes of each reference's path ([3, H, W] in [0, 1]).

    Images pass through in batches; only the features stay. Raises UserError if images differ in size, or
    the extractor fails or returns anything but finite numbers [N, D].
    """
    rows, shape = [], None
    for batch in in_batches(references, batch_size, progress, "features"):
        images = [read(reference.path) for reference in batch]
        shape = shape or images[0].shape
        for reference, image in zip(batch, images):
            if image.shape != shape:
                raise UserError(
                    f"{reference.path} is {size_words(image.shape)} and {references[0].path} is {size_words(shape)}: at native "
                    "size all images of a folder must have one size; leave out --native_size True to resize them"
                )
        try:
            with torch.no_grad():
                features = extractor.extract(torch.stack(images).to(device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"--features: {extractor.name} fails on images of {size_words(shape)}: {_reason(error)}"
            ) from None
        if not torch.is_tensor(features) or features.ndim != 2 or len(features) != len(images):
            found = list(features.shape) if torch.is_tensor(features) else type(features).__name__
            raise UserError(f"--features: {extractor.name} returns {found} for {len(images)} images; [N, D] is needed")
        if not features.isfinite().all():
            raise UserError(f"--features: {extractor.name} returns NaN or infinity for {batch[0].path} or its batch")
        rows.append(features.double().cpu().numpy())
    return np.concatenate(rows)


# Statistics files


def save_statistics(path, features, description):
    """Write mean and unbiased covariance of features [N, D] as pytorch-fid does (`mu`, `sigma`).

    Beside them, `count` (N) and `features` (the description of extractor and input) are kept: they guard against a
    comparison of features that are not the same.
    """
    arrays = {"mu": features.mean(axis=0), "sigma": np.atleast_2d(np.cov(features, rowvar=False))}
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays, count=len(features), features=description)
    except OSError as error:
        raise UserError(f"--save_stats {path}: cannot be written ({_reason(error)})") from None


def load_statistics(path, description):
    """Read a statistics file -> (mu [D], sigma [D, D], number of images or None); UserError if it does not fit."""
    _require_file(path, "--targets")
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = np.float64(file["mu"]), np.float64(file["sigma"])
            count = int(file["count"]) if "count" in file else None
            recorded = str(file["features"]) if "features" in file else description
    except (AttributeError, EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile):
        raise UserError(f"--targets {path}: not a statistics file; arrays mu [D] and sigma [D, D] are needed") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(
            f"--targets {path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} do not fit; finite [D] and [D, D] "
            "are needed"
        )
    if recorded != description:
        raise UserError(f"--targets {path}: made with '{recorded}', but this run uses '{description}'")
    return mu, sigma, count


# Images and pairs


def list_images(folder, flag, *, sampled=False):
    """References of the images in `folder`, sorted by name; raises UserError that names `--flag` where there are
    none.

    sampled: in a folder that a sampling script wrote (it has a run.json), the overviews that the script adds are left
    out.
    """
    if os.path.isfile(folder):
        raise UserError(f"--{flag} {folder}: a file; a folder of images is needed")
    found = image_datasets.list_references(str(folder), flag=f"--{flag}")
    if sampled and (Path(folder) / run_record.NAME).is_file():
        found = [reference for reference in found if not re.fullmatch(OVERVIEWS, reference.name)]
    if not found:
        raise UserError(f"--{flag} {folder}: no image in this folder but the run's own overviews")
    return found


def read_image(path, size=None, resize="crop", seen=None):
    """An image file as a float32 tensor [3, H, W] in [0, 1], transparent parts over white.

    size: the side wanted; None leaves the image as it is. A square image of another size is resized by PIL's bicubic
    filter, any other as the sampling scripts do it (`resize`: "crop", "pad" or "stretch"). The file's own (width,
    height) is added to the set `seen`. Raises UserError that names a file which cannot be read.
    """
    from PIL import Image

    with _naming(path):
        image = _decoded(path, seen)
        if size is None or image.size == (size, size):
            return _to_tensor(image)
        if image.width == image.height:
            return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
        return _to_tensor(image_datasets.load_image(path, size, resize=resize))


def read_male2female(path, seen=None):
    """An image as EGSDE's male2female evaluation feeds it to Inception: float32 [3, 299, 299], ImageNet-normalised."""
    from PIL import Image

    with _naming(path):
        image = _decoded(path, seen)
    for side in (256, 299):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return (_to_tensor(image) - mean) / std


def _decoded(path, seen):
    image = image_datasets.decode_image(path)
    if seen is not None:
        seen.add(image.size)
    return image


@contextlib.contextmanager
def _naming(path):
    try:
        yield
    except image_datasets.ImageError as error:
        raise UserError(f"{image_datasets.display_name(str(path))}: {error}") from None


def _to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def pair(outputs, others, *, flag, partial=False):
    """Pairs of references: by relative stem, or by order of names where no stem matches at all.

    Returns (pairs, "stem" or "order"). Raises UserError for images without a partner, unless `partial`, and for two
    files of one stem. `flag` names the other folder in messages.
    """
    by_stem, other_by_stem = _by_stem(outputs, "outputs"), _by_stem(others, flag)
    common = [stem for stem in by_stem if stem in other_by_stem]
    if not common:
        if len(outputs) != len(others):
            raise UserError(
                f"no file name in --outputs occurs in --{flag} and the counts differ ({len(outputs)} and {len(others)} "
                "images): they can be paired neither by name nor by order"
            )
        return list(zip(outputs, others)), "order"
    alone = [stem for stem in by_stem if stem not in other_by_stem] + [s for s in other_by_stem if s not in by_stem]
    if alone and not partial:
        raise UserError(
            f"--outputs has {len(outputs)} images and --{flag} {len(others)}, but {len(alone)} have no partner of the "
            f"same name, the first is '{alone[0]}'; --partial True measures the {len(common)} pairs that there are"
        )
    return [(by_stem[stem], other_by_stem[stem]) for stem in common], "stem"


def _by_stem(references, flag):
    by_stem = {}
    for reference in references:
        if reference.stem in by_stem:
            raise UserError(f"--{flag}: {by_stem[reference.stem].path} and {reference.path} share one name; keep one")
        by_stem[reference.stem] = reference
    return by_stem


# Helpers


def _library(module, package, purpose):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {package} ({_reason(error)}): pip install {package}") from None


@contextlib.contextmanager
def _quiet_download():
    """Nothing of a library's progress is printed, and a host that does not answer is given up after 20 s."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def in_batches(items, batch_size, progress, description):
    """Lists of at most `batch_size` items; progress, a function (iterable, description) -> iterable, sees them pass."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    return batches if progress is None else progress(batches, description)


def _require_file(path, flag):
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: no such file")


def _reason(error):
    """One line of an error's text: the first sentence, or what the traceback inside a TorchScript error ends with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1] if any("Traceback" in line for line in lines) else lines[0]
    return line.split(". ")[0].strip(" .<>")


def size_words(shape):
    """WIDTHxHEIGHT of an image tensor's shape."""
    return f"{shape[-1]}x{shape[-2]}"
