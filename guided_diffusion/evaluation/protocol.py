"""One evaluation: a folder of translated images, measured by a named protocol.

`evaluate` returns plain numbers together with everything that a reader needs to compare them: protocol, feature
extractor, pairing, counts and warnings.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
import torch

from ..run import record as run_record
from ..errors import UserError
from ..image_datasets import Reference
from .metrics import (
    MIN_MSSSIM_SIZE,
    MIN_SSIM_SIZE,
    PAIRED_METRICS,
    Extractor,
    bootstrap_frechet,
    bootstrap_kernel,
    bootstrap_mean,
    extract_features,
    feature_extractor,
    frechet_of_roots,
    gaussian_of_features,
    in_batches,
    kernel_distance,
    list_images,
    load_lpips,
    load_statistics,
    pair,
    paired_metrics,
    read_image,
    read_male2female,
    root_of_covariance,
    save_statistics,
)

PROTOCOLS = {
    "egsde": "EGSDE/CUT protocol: features of images in [0, 1]",
    "egsde-male2female": "EGSDE protocol for male2female: images stretched to 256x256, then to 299x299 (PIL bilinear), "
    "normalised with ImageNet's mean and std before the network, whose own scaling stays",
}
FLAGS = {"source": "sources", "truth": "truth"}  # what outputs are paired with, and the flag that names its folder


def reader(extractor, protocol="egsde", image_size=256, native_size=False, resize="crop"):
    """How images reach the extractor -> (a function of a path and a set of sizes seen, a description of it and the
    extractor).

    Raises UserError for options that do not go together.
    """
    if protocol == "egsde-male2female":
        if not extractor.name.startswith("inception") or native_size:
            raise UserError(f"--protocol {protocol} needs --features inception and --native_size False")
        return read_male2female, f"{extractor.name}; {PROTOCOLS[protocol]}"
    if native_size and extractor.image_size is not None:
        raise UserError(f"--native_size True: {extractor.name} needs images of {extractor.image_size}; leave it out")
    size = None if native_size else extractor.image_size or image_size
    read = functools.partial(read_image, size=size, resize=resize)
    return read, f"{extractor.name}; {_size_words(size, resize)}"


def target_statistics(
    targets,
    path,
    *,
    features="inception",
    inception_path=None,
    protocol="egsde",
    native_size=False,
    image_size=256,
    resize="crop",
    batch_size=16,
    device="cpu",
    progress=None,
):
    """Write the statistics file `path` of the images in the folder `targets`, for `evaluate` to take in its place."""
    references = list_images(targets, "targets")
    extractor = _loaded(features, device, inception_path)
    read, description = reader(extractor, protocol, image_size, native_size, resize)
    x, _ = _features_of(references, "targets", extractor, read, batch_size, device, progress)
    save_statistics(path, x, description)


def evaluate(
    outputs,
    *,
    sources=None,
    targets=None,
    truth=None,
    features="inception",
    inception_path=None,
    protocol="egsde",
    native_size=False,
    image_size=256,
    resize="crop",
    partial=False,
    lpips="auto",
    lpips_net="alex",
    kid_subsets=100,
    kid_subset_size=1000,
    bootstrap=0,
    confidence=0.95,
    seed=0,
    batch_size=16,
    device="cpu",
    progress=None,
    cache=None,
):
    """Measure the images in the folder `outputs` -> (result, images).

    sources, truth: folders that are paired with the outputs. targets: a folder, or a statistics file `.npz`, for FID
    and KID. features: what `feature_extractor` takes, or an Extractor. native_size: the extractor sees the files' own
    pixels, as with the pytorch-fid command, instead of images of `image_size`. lpips: True, False, "auto", which
    leaves it out with a warning if it cannot be had, or what `load_lpips` gave. bootstrap: replicates for confidence
    intervals, 0 for none. progress: a function (iterable, description) -> iterable that sees the batches pass. cache: a
    dict in which calls with the same targets, extractor and protocol find the targets' features.

    Where a sampling script wrote several translations of every source (folders sample_0, sample_1, ...), each is paired
    with its source, paired values are means over all, and FID and KID are measured for each set and averaged.

    `result` can be written as JSON, except that a PSNR can be infinite. `metrics` holds every value by name (fid,
    kid, source_l2, ..., truth_lpips, negative_impact; None where there is none), `std` the standard deviation over
    images (of kid: over subsets; of fid and kid of several translations: over these), `intervals` confidence intervals, beside `counts`, `sizes`, `pairing`, `protocol`
    and `warnings`. `images` has one dict per output with its paired metrics. Raises UserError for folders, files and
    options that do not fit.
    """
    if sources is None and targets is None and truth is None:
        raise UserError("--sources, --targets or --truth is needed: there is nothing to compare --outputs with")
    if image_size < MIN_SSIM_SIZE:
        raise UserError(f"--image_size {image_size}: SSIM's window needs {MIN_SSIM_SIZE} or more")
    result = {
        "outputs": str(outputs),
        "sources": None if sources is None else str(sources),
        "targets": None if targets is None else str(targets),
        "truth": None if truth is None else str(truth),
        "protocol": {"name": protocol},
        "counts": {},
        "sizes": {},
        "pairing": {},
        "metrics": {"fid": None, "kid": None},
        "std": {},
        "intervals": {},
        "warnings": [],
    }
    for role in FLAGS:
        result["metrics"] |= {f"{role}_{name}": None for name in PAIRED_METRICS}
    if bootstrap:
        result["protocol"]["intervals"] = f"bootstrap, {bootstrap} replicates, confidence {confidence:g}, seed {seed}"
    record = _run_record(outputs, result)
    found = list_images(outputs, "outputs", sampled=True)
    sets = _translations(found, record)
    result["counts"]["outputs"] = len(found)
    pairs = {}
    for role, folder in (("source", sources), ("truth", truth)):
        if folder is not None:
            pairs[role] = _pair_with(role, sets, list_images(folder, FLAGS[role]), partial, result)
    interval = {"replicates": bootstrap, "confidence": confidence, "seed": seed} if bootstrap else None
    stream = (batch_size, device, progress)

    if targets is not None:
        statistics = Path(targets).suffix == ".npz"
        references = None if statistics else list_images(targets, "targets")
        extractor = _loaded(features, device, inception_path)
        read, description = reader(extractor, protocol, image_size, native_size, resize)
        result["protocol"]["features"] = description
        known = load_statistics(targets, description) if statistics else None
        x, result["sizes"]["outputs"] = _features_of(found, "outputs", extractor, read, *stream)
        result["protocol"]["dimensions"] = x.shape[1]
        x = _split_features(x, found, sets)
        for rows in x:
            _warn_of_rank(result, "outputs", *rows.shape)
        if statistics:
            _measure_statistics(result, x, targets, known, interval)
        else:
            key = str(targets), description
            cache = {} if cache is None else cache
            if key not in cache:
                cache[key] = _features_of(references, "targets", extractor, read, *stream)
            y, result["sizes"]["targets"] = cache[key]
            result["counts"]["targets"] = len(y)
            _warn_of_rank(result, "targets", *y.shape)
            _measure_features(result, x, y, kid_subsets, kid_subset_size, seed, interval)

    images = []
    if pairs:
        distance = _lpips_or_warning(lpips, lpips_net, device, result)
        result["protocol"]["paired"] = (
            f"{_size_words(image_size, resize)}, values in [0, 1]; L2 is the Euclidean norm of the difference, SSIM "
            "and MS-SSIM have an 11-tap Gaussian window of sigma 1.5 without padding"
        ) + (f", LPIPS is v0.1 with {lpips_net}" if distance else "")
        read = functools.partial(read_image, size=image_size, resize=resize)
        images = _measure_pairs(found, pairs, read, distance, *stream, result)
        for role in pairs:
            _summarise_pairs(result, images, role, interval)
        if image_size < MIN_MSSSIM_SIZE:
            result["warnings"].append(f"MS-SSIM is left out: its scales need --image_size {MIN_MSSSIM_SIZE} or more")
    for flag, seen in result["sizes"].items():
        result["sizes"][flag] = [f"{width}x{height}" for width, height in sorted(seen)]
        if len(seen) > 1:
            result["warnings"].append(f"--{flag}: images of {len(seen)} sizes, {_few(result['sizes'][flag])}")
    result["metrics"]["negative_impact"] = _recorded_negative_impact(record)
    return result, images


def _translations(found, record):
    """The outputs as one list per translation of the sources: [(output, reference named as its source)]."""
    count = record.get("settings", {}).get("samples_per_image", 1)
    if count == 1:
        return [[(output, output) for output in found]]
    sets = {f"sample_{k}": [] for k in range(count)}
    for output in found:
        folder, _, name = output.name.partition("/")
        if folder in sets:
            sets[folder].append((output, Reference(output.path, name)))
    return [outputs for outputs in sets.values() if outputs]


def _pair_with(role, sets, others, partial, result):
    """Partners of the outputs: a dict from an output's path to the other reference."""
    flag, partners, count = FLAGS[role], {}, 0
    for outputs in sets:
        pairs, how = pair([named for _, named in outputs], others, flag=flag, partial=partial)
        partners |= {output.path: other for output, other in pairs}
        count += len(outputs)
    result["counts"] |= {flag: len(others), f"{role}_pairs": len(partners)}
    result["pairing"][role] = how
    if how == "order":
        result["warnings"].append(f"no file name in --outputs occurs in --{flag}: paired by order of names")
    elif len(partners) < max(count, len(others) * len(sets)):
        result["warnings"].append(
            f"--partial True: {len(partners)} pairs measured of {count} outputs and {len(others)} in --{flag}"
        )
    return partners


def _features_of(references, flag, extractor, read, batch_size, device, progress):
    """Features [N, D] of the images, and the set of their sizes."""
    if len(references) < 2:
        raise UserError(f"--{flag}: 1 image; FID and KID need 2 or more")
    seen = set()
    read = functools.partial(read, seen=seen)
    return extract_features(references, extractor, read, batch_size=batch_size, device=device, progress=progress), seen


def _split_features(x, found, sets):
    """Features [N, D] of all outputs as a list with those of every translation."""
    row = {output.path: i for i, output in enumerate(found)}
    x = [x[[row[output.path] for output, _ in outputs]] for outputs in sets]
    if min(map(len, x)) < 2:
        raise UserError("--outputs: a translation of 1 image; FID and KID need 2 or more")
    return x


def _warn_of_rank(result, flag, count, dimensions):
    warning = (
        f"--{flag}: too few images for FID's rank: {count} images for {dimensions} features make the covariance "
        "singular and FID biased; compare it only with FIDs of as many images"
    )
    if count <= dimensions and warning not in result["warnings"]:
        result["warnings"].append(warning)


def _measure_statistics(result, x, path, known, interval):
    mean, cov, count = known
    if len(mean) != x[0].shape[1]:
        raise UserError(f"--targets {path}: statistics of {len(mean)} features, but --features gives {x[0].shape[1]}")
    result["counts"]["targets"] = count
    if count is not None:
        _warn_of_rank(result, "targets", count, len(mean))
    result["warnings"].append("KID is left out: it needs the target images, not their statistics")
    target = (mean, root_of_covariance(cov))
    _average(result, "fid", [frechet_of_roots(*gaussian_of_features(features), *target) for features in x])
    if interval and len(x) == 1:
        result["intervals"]["fid"] = bootstrap_frechet(x[0], target, result["metrics"]["fid"], **interval)


def _measure_features(result, x, y, subsets, subset_size, seed, interval):
    if x[0].shape[1] != y.shape[1]:
        raise UserError(
            f"--features: {x[0].shape[1]} features of the outputs' size and {y.shape[1]} of the targets': "
            "--native_size True needs an extractor whose features do not depend on the size"
        )
    target = gaussian_of_features(y)
    _average(result, "fid", [frechet_of_roots(*gaussian_of_features(features), *target) for features in x])
    kids = [kernel_distance(features, y, subset_size=subset_size, subsets=subsets, seed=seed) for features in x]
    _average(result, "kid", [value for value, _ in kids])
    kid_std = kids[0][1]
    if math.isnan(kid_std):
        result["protocol"]["kid"] = "unbiased MMD² with kernel (x·y/D + 1)³ of all images"
    else:
        result["protocol"]["kid"] = (
            f"unbiased MMD² with kernel (x·y/D + 1)³, mean of {subsets} subsets of {subset_size} images, seed {seed}"
        )
        result["std"].setdefault("kid", kid_std)
    if interval and len(x) == 1:
        fid, kid = result["metrics"]["fid"], result["metrics"]["kid"]
        result["intervals"]["fid"] = bootstrap_frechet(x[0], y, fid, **interval)
        result["intervals"]["kid"] = bootstrap_kernel(x[0], y, kid, **interval)


def _average(result, name, values):
    """Record a distance: its mean, and the standard deviation where there are several translations."""
    result["metrics"][name] = float(np.mean(values))
    if len(values) > 1:
        result["std"][name] = float(np.std(values, ddof=1))
        result["protocol"]["translations"] = (
            f"{len(values)} of every source; FID and KID of each, then their mean, without bootstrap intervals"
        )


def _lpips_or_warning(lpips, net, device, result):
    if lpips is False:
        return None
    if callable(lpips):
        return lpips
    try:
        return load_lpips(net, device=device)
    except UserError as error:
        if lpips is True:
            raise
        result["warnings"].append(f"LPIPS is left out: {str(error).removeprefix('LPIPS: ')}")
        return None


def _measure_pairs(found, pairs, read, distance, batch_size, device, progress, result):
    """Paired metrics of every output that has a partner: a list of dicts {"output": name, "source_l2": ...}."""
    images = []
    sizes = {"outputs": set()} | {FLAGS[role]: set() for role in pairs}
    found = [output for output in found if any(output.path in partners for partners in pairs.values())]
    for batch in in_batches(found, batch_size, progress, "pairs"):
        rows = [{"output": output.name} for output in batch]
        outputs = [read(output.path, seen=sizes["outputs"]) for output in batch]
        for role, partners in pairs.items():
            paired = [i for i, output in enumerate(batch) if output.path in partners]
            if not paired:
                continue
            a = torch.stack([outputs[i] for i in paired]).to(device)
            b = torch.stack([read(partners[batch[i].path].path, seen=sizes[FLAGS[role]]) for i in paired]).to(device)
            with torch.no_grad():
                values = paired_metrics(a, b)
                if distance:
                    values["lpips"] = distance(a, b)
            for i, row in zip(paired, zip(*(values[name].tolist() for name in values))):
                rows[i] |= {f"{role}_{name}": value for name, value in zip(values, row)}
        images += rows
    result["sizes"] |= sizes
    return images


def _summarise_pairs(result, images, role, interval):
    for name in PAIRED_METRICS:
        key = f"{role}_{name}"
        values = np.array([row[key] for row in images if key in row])
        if len(values) == 0 or np.isnan(values).any():
            continue
        result["metrics"][key] = float(values.mean())
        if not np.isfinite(values).all():
            result["warnings"].append(
                f"{np.isinf(values).sum()} of {len(values)} {role} pairs are equal images: their PSNR is infinite, and "
                "so is the mean"
            )
            continue
        if len(values) > 1:
            result["std"][key] = float(values.std(ddof=1))
        if interval:
            result["intervals"][key] = bootstrap_mean(values, **interval)


def _run_record(outputs, result):
    """The run.json in the folder of outputs, an empty dict where there is none that can be read."""
    path = Path(outputs) / run_record.NAME
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("settings", {}), dict):
        result["warnings"].append(f"{path}: not the record of a run; negative_impact is left out")
        return {}
    return record


def _recorded_negative_impact(record):
    value = record.get("negative_impact")
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# Helpers


def _loaded(features, device, inception_path):
    if isinstance(features, Extractor):
        return features
    return feature_extractor(features, device=device, inception_path=inception_path)


def _size_words(size, resize):
    if size is None:
        return "images at their own size"
    return f"images at {size}x{size}, others resized by PIL bicubic ({resize} if not square)"


def _few(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
