"""Metrics of image pairs: L2, MSE, PSNR, SSIM, MS-SSIM and LPIPS; and which images are pairs."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError, display_name, library
from ..references import Reference, natural
from .features import quiet_download, reason
from .table import METRICS, Metric, paired_metric

MIN_SSIM_SIZE, MIN_MSSSIM_SIZE = 11, 161  # one window; one window after four halvings


@torch.no_grad()
def measure(name: str, compute: Callable[..., Any], *images: torch.Tensor) -> torch.Tensor:
    """Values compute(*images) of a metric, float64 [N] on the CPU; raises InputError where it returns anything else."""
    value = compute(*images)
    if not torch.is_tensor(value) or value.shape != images[0].shape[:1]:
        found = list(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise InputError(f"the metric {name} returns {found} for {len(images[0])} images; a tensor [N] is needed")
    return value.cpu().double()  # in this order: not every device has float64


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b in float64 on the CPU, [N, values]."""
    return (a.cpu().double() - b.cpu().double()).flatten(1)


@paired_metric("ssim", "SSIM", lower_is_better=False)
def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2004 with an 11-tap Gaussian window (sigma 1.5) and no padding, mean over channels."""
    return _structural("ssim", a, b)


@paired_metric("l2", "L2", format=".2f", lower_is_better=True)
def l2(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean norm of the difference of two images with values in [0, 1]."""
    return _difference(a, b).norm(dim=1)


@paired_metric("mse", "MSE", lower_is_better=True, hidden=True)
def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean square over all values."""
    return _difference(a, b).square().mean(dim=1)


@paired_metric("psnr", "PSNR", unit="dB", format=".2f", lower_is_better=False)
def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """-10 log10(mse) in dB, infinite for equal images."""
    return -10 * mse(a, b).log10()


@paired_metric("msssim", "MS-SSIM", lower_is_better=False)
def msssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Wang et al. 2003 with five scales, which needs H and W above 160; NaN below."""
    if min(a.shape[-2:]) < MIN_MSSSIM_SIZE:
        return torch.full((len(a),), math.nan)
    return _structural("ms_ssim", a, b)


def _structural(function: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    module = library("pytorch_msssim", "pytorch-msssim", "SSIM")
    # In float32, as published: float64 takes twice as long and differs by 1e-6. TF32, which a GPU's convolutions use by
    # default, is too coarse for variances.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return getattr(module, function)(a, b, data_range=1.0, size_average=False)


def load_lpips(net: str = "alex", *, device: str | torch.device = "cpu") -> Callable[..., torch.Tensor]:
    """LPIPS v0.1 (Zhang et al. 2018): a function of two batches [N, 3, H, W] in [0, 1] that returns distances [N].

    Raises InputError where the package, or the weights of the backbone (from torchvision) are missing.
    """
    lpips = library("lpips", "lpips", "LPIPS")
    try:
        with quiet_download(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by arguments that it deprecates
            model = lpips.LPIPS(net=net, verbose=False).to(device).eval()
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        fitting = f"({reason(error)}); put torchvision's file into {folder}"
        fitting = f"the weights of the backbone '{net}' could not be loaded {fitting}"
        raise InputError(fitting, parameter="lpips_net", value=net) from None
    return lambda a, b: model(a.float(), b.float(), normalize=True).flatten()


METRICS.add("lpips")(
    Metric(
        "paired", "lpips", "LPIPS", lower_is_better=True,
        load=lambda options, device: None if options.lpips == "False" else load_lpips(options.lpips_net, device=device),
    )
)  # fmt: skip


# Which images are pairs


def pair(
    outputs: Sequence[Reference], others: Sequence[Reference], *, parameter: str, partial: bool = False
) -> tuple[list[tuple[Reference, Reference]], str]:
    """Pair references by relative name without suffix, or in their order where no name matches at all.

    Where names do not all match, numbers in them compare as numbers: 1 is 001, and 2 comes before 10. Returns (pairs,
    "stem", "number" or "order"). Raises InputError for images without a partner, unless `partial`.
    """
    a, b = _by_stem(outputs, "outputs"), _by_stem(others, parameter)
    common, alone = [stem for stem in a if stem in b], [stem for stem in [*a, *b] if not (stem in a and stem in b)]
    if alone:
        numbered = [{natural(stem): found[stem] for stem in found} for found in (a, b)]
        if numbered[0].keys() == numbered[1].keys() and list(map(len, numbered)) == [len(a), len(b)]:
            return [(numbered[0][name], numbered[1][name]) for name in numbered[0]], "number"
    if not common:
        if len(outputs) != len(others):
            counts = f"the counts differ ({len(outputs)} and {len(others)} images)"
            raise InputError(f"no file name in `outputs` occurs in `{parameter}` and {counts}: nothing can be paired")
        return list(zip(*([found[stem] for stem in sorted(found, key=natural)] for found in (a, b)))), "order"
    if alone and not partial:
        first = f"{len(alone)} have no partner of the same name, the first is {display_name(alone[0])!r}"
        counts = f"`outputs` has {len(outputs)} images and `{parameter}` {len(others)}"
        raise InputError(f"{counts}, but {first}; with `partial` True the {len(common)} pairs are measured")
    return [(a[stem], b[stem]) for stem in common], "stem"


def _by_stem(references: Sequence[Reference], parameter: str) -> dict[str, Reference]:
    by_stem: dict[str, Reference] = {}
    for reference in references:
        first = by_stem.setdefault(reference.stem, reference)
        if first is not reference:
            names = [display_name(each.path) for each in (first, reference)]
            raise InputError(f"in `{parameter}`, {names[0]} and {names[1]} share one name; keep one")
    return by_stem
