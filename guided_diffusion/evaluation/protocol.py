"""One evaluation: measure translated images by a named protocol.

result, images = evaluate(Evaluation(outputs="output", sources="ref_imgs", targets="afhq/val/dog"))
result["metrics"]["fid"]
"""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name
from ..image_datasets import Reference
from ..options import Checked, option
from ..run import files
from ..run import record as run_record
from ..runtime import pick_device
from . import table
from .distances import Gaussian, bootstrap_distance, bootstrap_mean
from .features import WEIGHTS, Extractor, extract_features, feature_extractor, load_statistics, save_statistics
from .images import Progress, in_batches, is_npz, list_images, open_npz, read_image, read_male2female
from .pairs import MIN_MSSSIM_SIZE, MIN_SSIM_SIZE, measure, pair
from .table import METRICS, ROLES, Metric

PROTOCOLS = {
    "egsde": "EGSDE/CUT protocol: features of images in [0, 1]",
    "egsde-male2female": "EGSDE protocol for male2female: images stretched to 256x256, then to 299x299 (PIL bilinear), "
    "normalised with ImageNet's mean and std before the network, whose own scaling stays",
}
MOST_RESAMPLES = 100_000
Sizes = set[tuple[int, int]]


@dataclass(frozen=True)
class Evaluation(Checked):
    """Options of an evaluation. Raises InputError for a value that does not fit.

    Images are in folders, searched recursively, or in samples_*.npz files of image samplers.
    """

    outputs: str | None = option(None, "folder or .npz file of translated images", metavar="PATH")
    sources: str | None = option(None, "folder of source images, for paired metrics", metavar="DIR")
    targets: str | None = option(
        None, "images of the target domain, for FID and KID; or an .npz of their statistics, for FID", metavar="PATH"
    )
    truth: str | None = option(None, "folder of ground-truth translations of the sources, if available", metavar="DIR")
    partial: bool = option(False, "evaluate the pairs that exist; by default, an unpaired image is an error")

    protocol: str = option(
        "egsde", "how images are prepared for Inception; egsde-male2female: resized to 256, then 299 pixels, and "
        "normalised as for ImageNet", choices=PROTOCOLS,
    )  # fmt: skip
    image_size: int = option(256, "size at which images are compared; 256 as published", least=MIN_SSIM_SIZE, most=8192)
    native_size: bool = option(False, "compute features at the files' own size, as the pytorch-fid command does")
    resize: str = option("crop", "how images are made square, as in sampling", choices=("crop", "pad", "stretch"))

    features: str = option(
        "inception", "feature network: inception; efficientnet; a TorchScript FILE.pt that maps images [N, 3, H, W] in "
        "[0, 1] to features [N, D]; or a FILE.safetensors of a model of this project or of a registered kind, such as "
        "models/emoji_judge_64.safetensors, which adds content and target_vendor", metavar="NAME",
    )  # fmt: skip
    trust_features: bool = option(False, "run a TorchScript FILE.pt, which can contain any code")
    inception_path: str | None = option(None, f"{WEIGHTS}, where it cannot be downloaded", metavar="FILE")
    kid_subsets: int = option(100, "number of random subsets over which KID is averaged", least=1, most=MOST_RESAMPLES)
    kid_subset_size: int = option(1000, "images per subset; smaller sets are used as a whole", least=2, most=1_000_000)

    lpips: str = option(
        "auto", "auto: measure it if the lpips package and its weights are available, else warn; True: else raise an "
        "error", choices=("auto", "True", "False"),
    )  # fmt: skip
    lpips_net: str = option("alex", "backbone of LPIPS", choices=("alex", "vgg", "squeeze"))

    bootstrap: int = option(0, "bootstrap replicates for confidence intervals; 0: none", least=0, most=MOST_RESAMPLES)
    confidence: float = option(0.95, "confidence level of the intervals", metavar="P", above=0, most=0.9999)
    seed: int = option(0, "seed of the bootstrap and of KID's subsets", least=0)

    batch_size: int = option(16, "images per batch", least=1, most=4096, runtime=True)
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", runtime=True, metavar="NAME")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # paths of pathlib are welcome
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        object.__setattr__(self, "lpips", {"true": "True", "false": "False"}.get(str(self.lpips).lower(), self.lpips))
        super().__post_init__()


@dataclass(frozen=True)
class Results(Checked):
    """Where the result is written."""

    out: str | None = option(None, "write PREFIX.json, PREFIX.csv (one row) and PREFIX.md", metavar="PREFIX")
    per_image: bool = option(False, "also write the values of each image to PREFIX_images.csv")
    save_stats: str | None = option(None, "only write the statistics of the targets to this .npz file", metavar="FILE")

    def prepare(self, options: Evaluation) -> None:
        """Raise InputError where these and an evaluation's options do not go together; make the folders."""
        images = options.outputs is None and options.targets is not None and not is_statistics(options.targets)
        if self.save_stats and not (images and self.save_stats.endswith(".npz")):
            reason = "it needs the images of `targets`, no `outputs`, and a name that ends in .npz"
            raise InputError(reason, parameter="save_stats", value=self.save_stats)
        if self.per_image and not self.out:
            raise InputError("it needs `out`", parameter="per_image", value=True)
        for name, path in (("save_stats", self.save_stats), ("out", self.out)):
            if path is not None:
                files.make_folder(os.path.dirname(path) or ".", name)

    def write(self, result: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> None:
        """Write what `evaluate` returned; numbers that JSON does not have become null."""
        if self.out is None:
            return
        content = json.loads(json.dumps(result), parse_constant=lambda name: None)
        files.write_text(f"{self.out}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        files.write_text(f"{self.out}.csv", table.csv_text([table.row(result)]))
        files.write_text(f"{self.out}.md", table.markdown(result))
        if self.per_image:
            files.write_text(f"{self.out}_images.csv", table.csv_text(images))


class Instruments:
    """Networks and target features, loaded when first needed and kept for further evaluations with these options."""

    def __init__(self, options: Evaluation) -> None:
        self.options, self.device = options, pick_device(options.device)
        self.targets: dict[tuple[str, str], tuple[np.ndarray, Sizes]] = {}
        """Features and sizes of the targets by folder and description of the features."""

    @cached_property
    def network(self) -> tuple[Extractor, Callable[..., torch.Tensor], str]:
        """The feature network, how images reach it, and a description of both; see `reader`."""
        options = self.options
        given = {"inception_path": options.inception_path, "trust_features": options.trust_features}
        extractor = feature_extractor(options.features, device=self.device, **given)
        return extractor, *reader(extractor, options)

    @cached_property
    def per_image(self) -> tuple[dict[str, Callable], list[str]]:
        """The metrics of pairs and of single images by name, their networks loaded; and which are left out, and why."""
        found: dict[str, Callable | None] = {}
        warnings = []
        for metric in table.of_kind("paired", "image"):
            try:
                found[metric.name] = metric.load(self.options, self.device) if metric.load else metric.compute
            except InputError as error:
                if getattr(self.options, metric.name, "auto") == "True":
                    raise
                warnings.append(f"{metric.label} is left out: {error.reason}")
        return {name: compute for name, compute in found.items() if compute is not None}, warnings

    @property
    def needs_features(self) -> bool:
        """Whether the feature network is used: for distances, or because one is given for metrics of features."""
        given = self.options.features != "inception" and bool(table.of_kind("features"))
        return self.options.targets is not None or given

    def load(self) -> None:
        """Load everything now, so that what is missing is reported before hours of sampling."""
        _ = self.per_image, self.needs_features and self.network

    def features(
        self, references: Sequence[Reference], sizes: Sizes, progress: Progress | None
    ) -> dict[str, np.ndarray]:
        """The feature network's arrays for images, whose own sizes are added to `sizes`."""
        extractor, read, _ = self.network
        options: dict[str, Any] = {"batch_size": self.options.batch_size, "device": self.device, "progress": progress}
        return extract_features(references, extractor, functools.partial(read, seen=sizes), **options)


def reader(extractor: Extractor, options: Evaluation | None = None) -> tuple[Callable[..., torch.Tensor], str]:
    """How images reach a feature network: (a function as `read_image` with a size, a description of both)."""
    options = options or Evaluation()
    if options.protocol == "egsde-male2female":
        if not extractor.name.startswith("inception") or options.native_size:
            reason = "it needs `features` inception and `native_size` False"
            raise InputError(reason, parameter="protocol", value=options.protocol)
        return read_male2female, f"{extractor.name}; {PROTOCOLS[options.protocol]}"
    if options.native_size and extractor.image_size is not None:
        reason = f"{extractor.name} needs images of {extractor.image_size}; leave it out"
        raise InputError(reason, parameter="native_size", value=True)
    size = None if options.native_size else extractor.image_size or options.image_size
    read = functools.partial(read_image, size=size, resize=options.resize)
    return read, f"{extractor.name}; {_size_words(size, options.resize)}"


def is_statistics(path: str) -> bool:
    """Whether `targets` is a statistics file, not images; raises InputError for a damaged .npz."""
    if not is_npz(path):
        return False
    with open_npz(path, "an .npz file of images or statistics") as file:
        return "arr_0" not in file


def target_statistics(options: Evaluation, path: str | Path, *, progress: Progress | None = None) -> None:
    """Write the statistics file `path` of the images in `options.targets`, for `evaluate` to use in their place."""
    if options.targets is None:
        raise InputError("give the images of the target domain", parameter="targets")
    instruments = Instruments(options)
    found = instruments.features(list_images(options.targets, "targets", least=2), set(), progress)
    save_statistics(path, found["features"], instruments.network[2])


def evaluate(
    options: Evaluation, *, instruments: Instruments | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the images in `options.outputs` -> (result, images with a dict for each output). Raises InputError.

    result: `metrics` by name (fid, source_l2, ...; None where there is none), `std` over images (of kid: over subsets),
    `intervals` of confidence, `counts`, `sizes`, `pairing`, `protocol` and `warnings`. instruments: from an earlier
    evaluation, to load no network and read no target twice.
    """
    if options.outputs is None:
        raise InputError("give the images to measure", parameter="outputs")
    if options.sources is options.targets is options.truth is None and not table.of_kind("image"):
        reason = "there is nothing to compare it with: give `sources`, `targets` or `truth`"
        raise InputError(reason, parameter="outputs", value=options.outputs)
    return _Measuring(options, instruments or Instruments(options), progress).run(options.outputs)


class _Measuring:
    """One evaluation in progress."""

    def __init__(self, options: Evaluation, instruments: Instruments, progress: Progress | None) -> None:
        self.options, self.instruments, self.progress = options, instruments, progress
        confidence, seed = options.confidence, options.seed
        self.resampling = {"replicates": options.bootstrap, "confidence": confidence, "seed": seed}
        self.sizes: dict[str, Sizes] = {name: set() for name in table.FOLDERS}
        self.result: dict[str, Any] = {
            **{name: getattr(options, name) for name in table.FOLDERS},
            "protocol": {"name": options.protocol},
            "counts": {},
            "sizes": {},
            "pairing": {},
            "metrics": {value.key: None for value in table.values() if not value.metric.is_cost},
            "std": {},
            "intervals": {},
            "warnings": [],
        }
        self.warn = self.result["warnings"].append
        if options.bootstrap:
            words = f"bootstrap, {options.bootstrap} replicates, confidence {confidence:g}, seed {seed}"
            self.result["protocol"]["intervals"] = words

    def run(self, folder: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure everything; see `evaluate`."""
        options, result = self.options, self.result
        record = files.read_json_or_none(os.path.join(folder, run_record.NAME))
        record = record if isinstance(record, dict) else {}
        least = 1 if options.targets is None else 2
        self.found = list_images(folder, "outputs", sampled=True, least=least)
        self.sets = translations(self.found, record)
        if min(map(len, self.sets)) < least:
            raise InputError("a translation has 1 image; distances need 2 or more", parameter="outputs", value=folder)
        self.rows: dict[str, dict[str, Any]] = {output.path: {"output": output.name} for output in self.found}
        result["counts"]["outputs"] = len(self.found)
        given = {role: getattr(options, name) for role, name in ROLES.items()}
        self.others = {role: list_images(path, ROLES[role]) for role, path in given.items() if path is not None}
        self.partners = {role: self.pair_with(role) for role in self.others}
        if self.instruments.needs_features:
            self.measure_features()
        if self.others or table.of_kind("image"):
            self.measure_images()
        for value in table.values():
            self.summarise(value)
        for parameter, seen in self.sizes.items():
            if seen:
                result["sizes"][parameter] = sizes = [f"{width}x{height}" for width, height in sorted(seen)]
                if len(sizes) > 1:
                    self.warn(f"{parameter}: images of {len(sizes)} sizes, {_first(sizes)}")
        for metric in table.of_kind("recorded"):
            value = record.get(metric.name)
            if not metric.is_cost and isinstance(value, float) and math.isfinite(value):
                result["metrics"][metric.name] = value
        return result, [row for row in self.rows.values() if len(row) > 1]

    def pair_with(self, role: str) -> dict[str, Reference]:
        """Partners of the outputs: a dict from an output's path to the other reference."""
        parameter, others, count = ROLES[role], self.others[role], len(self.found)
        pairs, how = [], ""
        for outputs in self.sets:
            found, how = pair(outputs, others, parameter=parameter, partial=self.options.partial)
            pairs += found
        self.result["counts"] |= {parameter: len(others), f"{role}_pairs": len(pairs)}
        self.result["pairing"][role] = how
        first = _first([f"{display_name(a.name)} with {display_name(b.name)}" for a, b in pairs])
        if how == "order":
            self.warn(f"no file name in outputs occurs in {parameter}: paired by order of names, {first}")
        elif how == "number":
            self.warn(f"outputs and {parameter} are paired by the numbers in names, {first}")
        elif len(pairs) < max(count, len(others) * len(self.sets)):
            self.warn(f"partial: {len(pairs)} pairs measured of {count} outputs and {len(others)} in {parameter}")
        return {output.path: other for output, other in pairs}

    def measure_features(self) -> None:
        """Distances of the outputs' features from those of the targets, and metrics of features."""
        y = None if self.options.targets is None else self.target_features(self.options.targets)
        outputs = self.instruments.features(self.found, self.sizes["outputs"], self.progress)
        x = outputs["features"]
        self.result["protocol"] |= {"features": self.instruments.network[2], "dimensions": x.shape[1]}
        self.measure_single(outputs)
        if y is None:
            return
        if (width := len(y[0])) != x.shape[1]:
            reason = f"it has {width} features, and `outputs` has {x.shape[1]}; both need one feature network and size"
            raise InputError(reason, parameter="targets", value=self.options.targets)
        inception = table.is_inception(self.result["protocol"])
        smallest = min(map(len, self.sets))
        for parameter, count in (("outputs", smallest), ("targets", self.result["counts"]["targets"])):
            if count is not None and count <= width:
                words = f"too few images for the covariance's rank: {count} images for {width} features"
                name = table.Value(METRICS["fid"]).words(inception)
                self.warn(f"{parameter}: {words}; {name}s are biased, and comparable at the same count only")
        for metric in table.of_kind("distance"):
            if isinstance(y, tuple) and not metric.of_gaussian:
                label = table.Value(metric).words(inception)
                self.warn(f"{label} is left out: it needs the target images, not their statistics")
            else:
                self.measure_distance(metric, x, y)

    def target_features(self, targets: str) -> np.ndarray | Gaussian:
        """The targets' features [M, D], or the Gaussian in their statistics file."""
        instruments, counts = self.instruments, self.result["counts"]
        key = targets, instruments.network[2]
        if is_statistics(targets):
            gaussian, counts["targets"] = load_statistics(*key)
            return gaussian
        if key not in instruments.targets:
            sizes: Sizes = set()
            found = instruments.features(list_images(targets, "targets", least=2), sizes, self.progress)
            instruments.targets[key] = found["features"], sizes
        y, self.sizes["targets"] = instruments.targets[key]
        counts["targets"] = len(y)
        return y

    def measure_distance(self, metric: Metric, x: np.ndarray, y: np.ndarray | Gaussian) -> None:
        """One distance of the outputs' features from the targets': of each translation, then their mean."""
        result, name, row = self.result, metric.name, {output.path: i for i, output in enumerate(self.found)}
        chosen = {option: getattr(self.options, option) for option in metric.options}
        compute = functools.partial(metric.compute, **chosen)  # type: ignore[arg-type]
        found = [compute(x[[row[output.path] for output in outputs]], y) for outputs in self.sets]
        values, stds, notes = zip(*(each if isinstance(each, tuple) else (each, math.nan, "") for each in found))
        std, note = stds[0], notes[0]
        result["metrics"][name] = float(np.mean(values))
        if len(found) > 1:
            std, words = float(np.std(values, ddof=1)), "of every source; distances of each, then their mean"
            result["protocol"]["translations"] = f"{len(found)} {words}, without bootstrap intervals"
        elif self.options.bootstrap:
            interval = metric.interval or functools.partial(bootstrap_distance, compute)
            result["intervals"][name] = interval(x, y, float(values[0]), **self.resampling)
        if note:
            result["protocol"][name] = note
        if not math.isnan(std):
            result["std"][name] = std

    def measure_single(self, outputs: dict[str, np.ndarray]) -> None:
        """Metrics of single outputs that the feature network's arrays suffice for."""
        fitting = [metric for metric in table.of_kind("features") if set(metric.needs) <= outputs.keys()]
        partners, truths, own = self.partners.get("truth", {}), None, None
        chosen = [i for i, output in enumerate(self.found) if not partners or output.path in partners]
        if partners and any(metric.needs_truth for metric in fitting):
            truths = self.instruments.features(self.others["truth"], self.sizes["truth"], self.progress)
            place = {other.path: k for k, other in enumerate(self.others["truth"])}
            own = np.array([place[partners[self.found[i].path].path] for i in chosen])
        shown = {name: values[chosen] for name, values in outputs.items()}
        for metric in (metric for metric in fitting if truths is not None or not metric.needs_truth):
            values = np.asarray(metric.compute(shown, truths, own), np.float64)  # type: ignore[misc]
            self.add(table.Value(metric), [self.found[i] for i in chosen], values)
            if metric.how:
                self.result["protocol"][metric.name] = metric.how

    def measure_images(self) -> None:
        """Metrics of single outputs, and of pairs for every output that has a partner."""
        options = self.options
        computes, warnings = self.instruments.per_image
        self.result["warnings"] += warnings
        self.result["protocol"]["paired" if self.others else "images"] = (
            f"{_size_words(options.image_size, options.resize)}, values in [0, 1]; L2 is the Euclidean norm of the "
            "difference, SSIM and MS-SSIM have an 11-tap Gaussian window of sigma 1.5 without padding"
        ) + (f", LPIPS is v0.1 with {options.lpips_net}" if "lpips" in computes else "")
        if self.others and options.image_size < MIN_MSSSIM_SIZE:
            self.warn(f"MS-SSIM is left out: its scales need images of {MIN_MSSSIM_SIZE} pixels or more")

        def read(references: Sequence[Reference], parameter: str) -> torch.Tensor:
            sizes = self.sizes[parameter]
            images = [read_image(each, options.image_size, options.resize, sizes) for each in references]
            return torch.stack(images).to(self.instruments.device)

        for role, partners in {"": {}, **self.partners}.items():
            kind = "paired" if role else "image"
            values = [table.Value(metric, role) for metric in table.of_kind(kind) if metric.name in computes]
            outputs = [output for output in self.found if values and (output.path in partners or not role)]
            for batch in in_batches(outputs, options.batch_size, self.progress, "images"):
                images = [read(batch, "outputs")]
                images += [read([partners[output.path] for output in batch], ROLES[role])] if role else []
                for value in values:
                    self.add(value, batch, measure(value.metric.name, computes[value.metric.name], *images))

    def add(self, value: table.Value, outputs: Sequence[Reference], numbers: np.ndarray | torch.Tensor) -> None:
        """Add the numbers of a value to the outputs' rows."""
        for output, number in zip(outputs, numbers.tolist()):
            self.rows[output.path][value.key] = number

    def summarise(self, value: table.Value) -> None:
        """Mean, deviation and interval over images; nothing with a NaN, the mean alone with an infinity."""
        key, numbers = value.key, np.array([row[value.key] for row in self.rows.values() if value.key in row])
        if not len(numbers) or np.isnan(numbers).any():
            return
        self.result["metrics"][key] = float(numbers.mean())
        if infinite := np.isinf(numbers).sum():
            words = f"{infinite} of {len(numbers)} images is infinite, as is the mean"
            self.warn(f"{key}: {value.metric.label} of {words}")
            return
        if len(numbers) > 1:
            self.result["std"][key] = float(numbers.std(ddof=1))
        if self.options.bootstrap:
            self.result["intervals"][key] = bootstrap_mean(numbers, **self.resampling)


def translations(found: Sequence[Reference], record: Mapping[str, Any]) -> list[list[Reference]]:
    """The outputs of each translation, named as their sources: of a run with several per image, in sample_0, …"""
    count = record.get("settings", {}).get("samples_per_image", 1)
    sets: dict[str, list[Reference]] = {}
    for output in found:
        folder, _, name = output.name.partition("/")
        if count != 1 and re.fullmatch("sample_[0-9]+", folder):
            sets.setdefault(folder, []).append(Reference(output.path, name))
    return list(sets.values()) or [list(found)]


def _first(words: Sequence[str]) -> str:
    """The first three of a list, for a message."""
    return ", ".join([*words[:3], *["..."] * (len(words) > 3)])


def _size_words(size: int | None, resize: str) -> str:
    # Stored in statistics files, which are compared with it: the words must not change.
    if size is None:
        return "images at their own size"
    return f"images at {size}x{size}, others resized by PIL bicubic ({resize} if not square)"
