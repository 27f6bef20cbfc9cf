"""One evaluation: translated images, measured by a named protocol.

`evaluate` returns plain numbers together with everything that a reader needs to compare them: protocol, feature
extractor, pairing, counts and warnings. In Python:

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
from .distances import bootstrap_distance, bootstrap_mean, gaussian_of_features, root_of_covariance
from .features import (
    Extractor,
    extract_features,
    feature_extractor,
    load_statistics,
    names_judge,
    save_statistics,
)
from .images import Progress, in_batches, is_npz, list_images, npz_names, read_image, read_male2female
from .judge import Judge, Judged
from .pairs import MIN_MSSSIM_SIZE, MIN_SSIM_SIZE, Paired, measure, pair
from .table import METRICS, ROLES, Measured, SetDistance

PROTOCOLS = {
    "egsde": "EGSDE/CUT protocol: features of images in [0, 1]",
    "egsde-male2female": "EGSDE protocol for male2female: images stretched to 256x256, then to 299x299 (PIL bilinear), "
    "normalised with ImageNet's mean and std before the network, whose own scaling stays",
}
YES, NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
MOST_RESAMPLES = 100_000

Read = Callable[..., torch.Tensor]
"""A function (reference, seen=) -> [3, H, W] in [0, 1] that adds the image's own size to the set `seen`."""


@dataclass(frozen=True)
class Images:
    """Folders, searched recursively, or samples_*.npz of image samplers."""

    outputs: str | None = option(None, "the translated images", metavar="PATH")
    sources: str | None = option(None, "what was translated: L2, PSNR, SSIM, MS-SSIM, LPIPS", metavar="DIR")
    targets: str | None = option(
        None,
        "images of the target domain: FID and KID; or their statistics (mu and sigma, pytorch-fid's format): FID",
        metavar="PATH",
    )
    truth: str | None = option(None, "the true translation of each source, where there is one", metavar="DIR")
    partial: bool = option(
        False, "measure the pairs that exist, where an image without a partner is an error otherwise"
    )


@dataclass(frozen=True)
class Protocol:
    """How images enter the measurements."""

    protocol: str = option(
        "egsde", "how images enter Inception; egsde-male2female: 256, then 299 pixels, and ImageNet's normalisation",
        choices=PROTOCOLS,
    )  # fmt: skip
    image_size: int = option(256, "side at which images are compared; 256 as published", least=1, most=8192)
    native_size: bool = option(False, "features of the files' own pixels, as the pytorch-fid command takes them")
    resize: str = option(
        "crop", "how images that are not square become so; as when sampling", choices=("crop", "pad", "stretch")
    )


@dataclass(frozen=True)
class Distances:
    """What FID and KID are measured in."""

    features: str = option(
        "inception",
        "inception (pytorch-fid's); judge, or the FILE.safetensors of a judge: adds the metrics content and "
        "target_vendor; a TorchScript FILE.pt from images [N, 3, H, W] in [0, 1] to features [N, D]; or a "
        "FILE.safetensors of a model of this project, whose middle block is read at t = 50",
        metavar="NAME",
    )
    trust_features: bool = option(
        False, "run a TorchScript FILE.pt, which is a program: give True only for a file whose origin you trust"
    )
    inception_path: str | None = option(
        None, "pt_inception-2015-12-05-6726825d.pth, where it cannot be downloaded", metavar="FILE"
    )
    kid_subsets: int = option(100, "random subsets that KID is the mean of", least=1, most=MOST_RESAMPLES)
    kid_subset_size: int = option(1000, "images in a subset; smaller sets are used whole", least=2, most=1_000_000)


@dataclass(frozen=True)
class Pairs:
    """LPIPS."""

    lpips: str = option(
        "auto",
        "auto: measured where the lpips package and its weights are available, left out with a warning otherwise; "
        "True: an error otherwise",
        metavar="{auto,True,False}",
    )
    lpips_net: str = option("alex", "LPIPS's backbone", choices=("alex", "vgg", "squeeze"))


@dataclass(frozen=True)
class Confidence:
    """Intervals and the draws they need."""

    bootstrap: int = option(
        0, "bootstrap replicates for the intervals of every value, 0 for none", least=0, most=MOST_RESAMPLES
    )
    confidence: float = option(0.95, "confidence of the intervals", metavar="P", above=0, most=0.9999)
    seed: int = option(0, "seed of bootstrap and KID", least=0)


@dataclass(frozen=True)
class Running:
    """How to measure; changes no value by more than rounding."""

    batch_size: int = option(16, "images at once", least=1, most=4096, runtime=True)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...", runtime=True, metavar="NAME")


@dataclass(frozen=True)
class Evaluation(Images, Protocol, Distances, Pairs, Confidence, Running):
    """All options of an evaluation. Raises InputError for a value that does not fit."""

    def __post_init__(self) -> None:
        wanted = str(self.lpips).lower()
        spelled = "True" if wanted in YES else "False" if wanted in NO else wanted
        if spelled not in ("auto", "True", "False"):
            raise InputError("it can be auto, True or False", parameter="lpips", value=self.lpips)
        object.__setattr__(self, "lpips", spelled)
        for name in ("outputs", "sources", "targets", "truth", "inception_path", "features"):  # pathlib's are welcome
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        check(self)


@dataclass(frozen=True)
class Results:
    """Where the result goes."""

    out: str | None = option(None, "write PREFIX.json, PREFIX.csv (one row) and PREFIX.md", metavar="PREFIX")
    per_image: bool = option(False, "write PREFIX_images.csv with the paired values of each output")
    save_stats: str | None = option(
        None, "write the statistics of the targets to this file and measure nothing", metavar="FILE"
    )

    def check_with(self, options: Evaluation) -> None:
        """Raise InputError where these and an evaluation's options do not go together; make the folders."""
        if self.save_stats is not None:
            wrong: dict[str, Any] = {"parameter": "save_stats", "value": self.save_stats}
            if options.outputs is not None or options.targets is None or is_statistics(options.targets):
                raise InputError("it needs the images of `targets`, and no `outputs`", **wrong)
            if not self.save_stats.endswith(".npz"):
                raise InputError("the name must end in .npz", **wrong)
            files.make_folder(os.path.dirname(self.save_stats) or ".", "save_stats")
        elif options.outputs is None:
            raise InputError("give the images to measure", parameter="outputs")
        if self.per_image and not (self.out and (options.sources or options.truth)):
            raise InputError("it needs `out`, and `sources` or `truth`", parameter="per_image", value=True)
        if self.out is not None:
            files.make_folder(os.path.dirname(self.out) or ".", "out")

    def write(self, result: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> None:
        """Write what `evaluate` returned."""
        if self.out is None:
            return
        content = json.dumps(table.finite(result), indent=2, ensure_ascii=False, allow_nan=False)
        files.write_text(f"{self.out}.json", content + "\n")
        files.write_text(f"{self.out}.csv", table.csv_text([table.row(result)]))
        files.write_text(f"{self.out}.md", table.markdown(result))
        if self.per_image:
            files.write_text(f"{self.out}_images.csv", table.csv_text(images))


class Instruments:
    """What an evaluation measures with: loaded when first needed, and kept for further evaluations.

    options: those that the evaluations share. extractor: in place of the one that `options.features` names.
    """

    def __init__(self, options: Evaluation, extractor: Extractor | None = None) -> None:
        self.options, self._extractor = options, extractor
        self.targets: dict[tuple[str, str], tuple[np.ndarray, set]] = {}
        """Features and sizes of the targets by folder and protocol."""

    @cached_property
    def device(self) -> torch.device:
        """The device to measure on."""
        return pick_device(self.options.device)

    @cached_property
    def extractor(self) -> Extractor:
        """The extractor of features."""
        options = self.options
        return self._extractor or feature_extractor(
            options.features,
            device=self.device,
            inception_path=options.inception_path,
            trust_features=options.trust_features,
        )

    @cached_property
    def judge(self) -> Judge | None:
        """The judge, where the features are a judge's."""
        known = self._extractor
        if known is None and not names_judge(self.options.features):
            return None
        return self.extractor.judge

    @cached_property
    def _paired(self) -> tuple[dict[str, Paired], list[str]]:
        found: dict[str, Paired] = {}
        warnings = []
        for metric in table.paired():
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
    def paired(self) -> dict[str, Paired]:
        """The metrics of pairs by name, their networks loaded."""
        return self._paired[0]

    @property
    def warnings(self) -> list[str]:
        """Which metrics of pairs are left out, and why."""
        return self._paired[1]

    def load(self) -> None:
        """Load everything now, so that what is missing is reported before hours of sampling."""
        if self.options.targets is not None:
            _ = self.extractor
        _ = self._paired


def reader(
    extractor: Extractor,
    protocol: str = "egsde",
    image_size: int = 256,
    native_size: bool = False,
    resize: str = "crop",
) -> tuple[Read, str]:
    """How images reach the extractor -> (a function of a reference and a set of sizes seen, a description of it and the
    extractor).

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
    read = functools.partial(read_image, size=size, resize=resize)
    return read, f"{extractor.name}; {_size_words(size, resize)}"


def is_statistics(path: str) -> bool:
    """Whether `targets` is a statistics file, not images; raises InputError for a damaged .npz."""
    return is_npz(path) and "arr_0" not in npz_names(path, "targets")


def target_statistics(
    options: Evaluation, path: str | Path, *, instruments: Instruments | None = None, progress: Progress | None = None
) -> None:
    """Write the statistics file `path` of the images in `options.targets`, for `evaluate` to take in their place."""
    if options.targets is None:
        raise InputError("give the images of the target domain", parameter="targets")
    instruments = instruments or Instruments(options)
    references = list_images(options.targets, "targets")
    read, description = _reader(options, instruments)
    x, _ = _Measuring(options, instruments, progress).features(references, "targets", read)
    save_statistics(path, x, description)


def evaluate(
    options: Evaluation, *, instruments: Instruments | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure the images in `options.outputs` -> (result, images).

    instruments: from an earlier evaluation, to load no network and read no target twice. progress: a function
    (iterable, description) -> iterable that sees the batches pass.

    Where a sampling script wrote several translations of every source (folders sample_0, sample_1, ...), each is paired
    with its source, paired values are means over all, and distances are measured for each set and averaged.

    `result` can be written as JSON, except that a PSNR can be infinite. `metrics` holds every value by name (fid, kid,
    source_l2, ..., truth_lpips, negative_impact; None where there is none), `std` the standard deviation over images
    (of kid: over subsets; of distances of several translations: over these), `intervals` confidence intervals, beside
    `counts`, `sizes`, `pairing`, `protocol` and `warnings`. `images` has one dict per output with its paired metrics.
    Raises InputError for folders, files and options that do not fit.
    """
    if options.outputs is None:
        raise InputError("give the images to measure", parameter="outputs")
    if options.sources is None and options.targets is None and options.truth is None:
        reason = "there is nothing to compare it with: give `sources`, `targets` or `truth`"
        raise InputError(reason, parameter="outputs", value=options.outputs)
    if options.image_size < MIN_SSIM_SIZE:
        reason = f"SSIM's window needs {MIN_SSIM_SIZE} or more"
        raise InputError(reason, parameter="image_size", value=options.image_size)
    return _Measuring(options, instruments or Instruments(options), progress).run()


class _Measuring:
    """One evaluation in the making."""

    def __init__(self, options: Evaluation, instruments: Instruments, progress: Progress | None) -> None:
        self.options, self.instruments, self.progress = options, instruments, progress
        confidence, seed = options.confidence, options.seed
        self.interval = {"replicates": options.bootstrap, "confidence": confidence, "seed": seed}
        self.warnings: list[str] = []
        self.counts: dict[str, int | None] = {}
        self.sizes: dict[str, Any] = {}
        self.pairing: dict[str, str] = {}
        self.protocol: dict[str, Any] = {"name": options.protocol}
        self.metrics: dict[str, float | None] = {value.key: None for value in table.values()}
        self.std: dict[str, float] = {}
        self.intervals: dict[str, tuple[float, float]] = {}

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Measure everything; what `evaluate` returns."""
        options = self.options
        if options.bootstrap:
            self.protocol["intervals"] = (
                f"bootstrap, {options.bootstrap} replicates, confidence {options.confidence:g}, seed {options.seed}"
            )
        record = self.run_record()
        found = list_images(str(options.outputs), "outputs", sampled=True)
        sets = translations(found, record)
        self.counts["outputs"] = len(found)
        pairs = {}
        for role, parameter in ROLES.items():
            folder = getattr(options, parameter)
            if folder is not None:
                pairs[role] = self.pair_with(role, sets, list_images(folder, parameter))
        if options.targets is not None:
            self.measure_distances(found, sets)
        images = self.measure_pairs(found, pairs) if pairs else []
        if judge := self.instruments.judge:
            images = self.measure_judged(judge, found, pairs.get("truth", {}), images)
        for parameter, seen in self.sizes.items():
            self.sizes[parameter] = [f"{width}x{height}" for width, height in sorted(seen)]
            if len(seen) > 1:
                listed = _few(self.sizes[parameter])
                self.warnings.append(f"{parameter}: images of {len(seen)} sizes, {listed}")
        for metric in table.recorded(costs=False):
            self.metrics[metric.name] = _number(record.get(metric.name))
        result = {folder: None if getattr(options, folder) is None else str(getattr(options, folder))
                  for folder in table.FOLDERS}  # fmt: skip
        parts = ("protocol", "counts", "sizes", "pairing", "metrics", "std", "intervals", "warnings")
        return {**result, **{name: getattr(self, name) for name in parts}}, images

    def run_record(self) -> dict[str, Any]:
        """The run.json in the folder of outputs; an empty dict, and a warning, where it cannot be read."""
        path = os.path.join(str(self.options.outputs), run_record.NAME)
        try:
            record = files.read_json(path)
            if isinstance(record, dict) and isinstance(record.get("settings", {}), dict):
                return record
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except InputError:
            if not os.path.isdir(str(self.options.outputs)):
                return {}
        self.warnings.append(f"{display_name(path)}: not the record of a run; negative_impact is left out")
        return {}

    # Distances between sets

    def measure_distances(self, found: list[Reference], sets: list) -> None:
        """Distances of the outputs' features from those of the targets."""
        options, instruments = self.options, self.instruments
        targets = str(options.targets)
        statistics = is_statistics(targets)
        references = [] if statistics else list_images(targets, "targets")
        read, description = _reader(options, instruments)
        self.protocol["features"] = description
        known = load_statistics(targets, description) if statistics else None
        features, self.sizes["outputs"] = self.features(found, "outputs", read)
        self.protocol["dimensions"] = features.shape[1]
        x = split_features(features, found, sets)
        for rows in x:
            self.warn_of_rank("outputs", *rows.shape)
        if known is not None:
            self.measure_from_statistics(x, known)
            return
        key = targets, description
        if key not in instruments.targets:
            instruments.targets[key] = self.features(references, "targets", read)
        y, self.sizes["targets"] = instruments.targets[key]
        self.counts["targets"] = len(y)
        self.warn_of_rank("targets", *y.shape)
        self.measure_from_features(x, y)

    def features(self, references: list[Reference], parameter: str, read: Read) -> tuple[np.ndarray, set]:
        """Features [N, D] of the images, and the set of their sizes."""
        if len(references) < 2:
            raise InputError("it has 1 image; distances need 2 or more", parameter=parameter,
                             value=getattr(self.options, parameter))  # fmt: skip
        seen: set[tuple[int, int]] = set()
        x = extract_features(
            references,
            self.instruments.extractor,
            functools.partial(read, seen=seen),
            batch_size=self.options.batch_size,
            device=self.instruments.device,
            progress=self.progress,
        )
        return x, seen

    def warn_of_rank(self, parameter: str, count: int, dimensions: int) -> None:
        warning = (
            f"{parameter}: too few images for FID's rank: {count} images for {dimensions} features make the covariance "
            "singular and FID biased; compare it only with FIDs of as many images"
        )
        if count <= dimensions and warning not in self.warnings:
            self.warnings.append(warning)

    def measure_from_statistics(self, x: list[np.ndarray], known: tuple[np.ndarray, np.ndarray, int | None]) -> None:
        """Distances that need no more of the targets than their mean and covariance."""
        mean, cov, count = known
        if len(mean) != x[0].shape[1]:
            reason = f"it has statistics of {len(mean)} features, but `features` gives {x[0].shape[1]}"
            raise InputError(reason, parameter="targets", value=self.options.targets)
        self.counts["targets"] = count
        if count is not None:
            self.warn_of_rank("targets", count, len(mean))
        target = (mean, root_of_covariance(cov))
        for metric in table.distances():
            if metric.of_gaussian:
                self.measure_distance(metric, x, target, target)
            else:
                self.warnings.append(f"{metric.label} is left out: it needs the target images, not their statistics")

    def measure_from_features(self, x: list[np.ndarray], y: np.ndarray) -> None:
        """All distances."""
        if x[0].shape[1] != y.shape[1]:
            raise InputError(
                f"it gives {x[0].shape[1]} features of the outputs' size and {y.shape[1]} of the targets': with "
                "`native_size`, an extractor is needed whose features do not depend on the size",
                parameter="features",
                value=self.options.features,
            )
        gaussian = gaussian_of_features(y)
        for metric in table.distances():
            self.measure_distance(metric, x, gaussian if metric.of_gaussian else y, y)

    def measure_distance(self, metric: SetDistance, x: list[np.ndarray], target: Any, resampled: Any) -> None:
        """One distance of every translation's features from the target's; resampled: what its interval is made of."""
        chosen = {name: getattr(self.options, name) for name in metric.options}
        compute = functools.partial(metric.compute, **chosen)  # type: ignore[arg-type]
        results = [
            each if isinstance(each, Measured) else Measured(float(each)) for each in (compute(r, target) for r in x)
        ]
        self.metrics[metric.name] = estimate = float(np.mean([result.value for result in results]))
        if len(x) > 1:
            self.std[metric.name] = float(np.std([result.value for result in results], ddof=1))
            self.protocol["translations"] = (
                f"{len(x)} of every source; FID and KID of each, then their mean, without bootstrap intervals"
            )
        if results[0].how:
            self.protocol[metric.name] = results[0].how
        if not math.isnan(results[0].std):
            self.std.setdefault(metric.name, results[0].std)
        if self.options.bootstrap and len(x) == 1:
            interval = metric.interval or functools.partial(bootstrap_distance, _of_features(compute, metric))
            self.intervals[metric.name] = interval(x[0], resampled, estimate, **self.interval)

    # Pairs

    def pair_with(self, role: str, sets: list, others: list[Reference]) -> dict[str, Reference]:
        """Partners of the outputs: a dict from an output's path to the other reference."""
        parameter = ROLES[role]
        partners: dict[str, Reference] = {}
        count, how = 0, ""
        for outputs in sets:
            named = [named for _, named in outputs]
            pairs, how = pair(named, others, parameter=parameter, partial=self.options.partial)
            partners |= {output.path: other for output, other in pairs}
            count += len(outputs)
        self.counts |= {parameter: len(others), f"{role}_pairs": len(partners)}
        self.pairing[role] = how
        if how == "order":
            self.warnings.append(f"no file name in outputs occurs in {parameter}: paired by order of names")
        elif len(partners) < max(count, len(others) * len(sets)):
            self.warnings.append(
                f"partial: {len(partners)} pairs measured of {count} outputs and {len(others)} in {parameter}"
            )
        return partners

    def measure_pairs(self, found: list[Reference], pairs: dict[str, dict[str, Reference]]) -> list[dict[str, Any]]:
        """Paired metrics of every output that has a partner: a list of dicts {"output": name, "source_l2": ...}."""
        options, instruments = self.options, self.instruments
        self.warnings += instruments.warnings
        self.protocol["paired"] = (
            f"{_size_words(options.image_size, options.resize)}, values in [0, 1]; L2 is the Euclidean norm of the "
            "difference, SSIM and MS-SSIM have an 11-tap Gaussian window of sigma 1.5 without padding"
        ) + (f", LPIPS is v0.1 with {options.lpips_net}" if "lpips" in instruments.paired else "")
        read = functools.partial(read_image, size=options.image_size, resize=options.resize)
        images: list[dict[str, Any]] = []
        sizes: dict[str, set] = {"outputs": set(), **{ROLES[role]: set() for role in pairs}}
        found = [output for output in found if any(output.path in partners for partners in pairs.values())]
        for batch in in_batches(found, options.batch_size, self.progress, "pairs"):
            rows: list[dict[str, Any]] = [{"output": output.name} for output in batch]
            outputs = [read(output, seen=sizes["outputs"]) for output in batch]
            for role, partners in pairs.items():
                chosen = [i for i, output in enumerate(batch) if output.path in partners]
                if not chosen:
                    continue
                others = [read(partners[batch[i].path], seen=sizes[ROLES[role]]) for i in chosen]
                a = torch.stack([outputs[i] for i in chosen]).to(instruments.device)
                b = torch.stack(others).to(instruments.device)
                with torch.no_grad():
                    values = {name: measure(name, compute, a, b) for name, compute in instruments.paired.items()}
                for i, row in zip(chosen, zip(*(values[name].tolist() for name in values))):
                    rows[i] |= {f"{role}_{name}": value for name, value in zip(values, row)}
            images += rows
        self.sizes |= sizes
        for role in pairs:
            self.summarise_pairs(images, role)
        if options.image_size < MIN_MSSSIM_SIZE:
            self.warnings.append(f"MS-SSIM is left out: its scales need images of {MIN_MSSSIM_SIZE} pixels or more")
        return images

    def summarise_pairs(self, images: list[dict[str, Any]], role: str) -> None:
        """Means, deviations and intervals of the paired metrics."""
        for name in self.instruments.paired:
            key = f"{role}_{name}"
            values = np.array([row[key] for row in images if key in row])
            if len(values) == 0 or np.isnan(values).any():
                continue
            if not np.isfinite(values).all():
                self.metrics[key] = float(values.mean())
                self.warnings.append(
                    f"{np.isinf(values).sum()} of {len(values)} {role} pairs are equal images: their "
                    f"{METRICS[name].label} is infinite, and so is the mean"
                )
                continue
            self.summarise(key, values)

    # What a judge says

    def measure_judged(
        self, judge: Judge, found: list[Reference], truth: dict[str, Reference], images: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """The judge's metrics, their values added to `images`, the list of the paired ones: the longer list.

        truth: the partners of outputs; those without one count where no truth is needed.
        """
        outputs, truths, own = self.judged(judge, found), None, None
        with_truth = [i for i, output in enumerate(found) if output.path in truth]
        if truth:
            others = list_images(str(self.options.truth), "truth")
            place = {other.path: k for k, other in enumerate(others)}
            truths = self.judged(judge, others)
            own = torch.tensor([place[truth[found[i].path].path] for i in with_truth], device=outputs.features.device)
        rows = {row["output"]: row for row in images}
        for metric in table.judged():
            if metric.needs_truth and truths is None:
                continue
            chosen = with_truth if truth else list(range(len(found)))
            said = Judged(*(part[chosen] for part in outputs))
            values = metric.compute(said, truths, own).cpu().double().numpy()  # type: ignore[misc]
            for i, value in zip(chosen, values.tolist()):
                rows.setdefault(found[i].name, {"output": found[i].name})[metric.name] = value
            self.summarise(metric.name, values)
        self.protocol["judge"] = f"{self.instruments.extractor.name}; target {judge.vendors[-1]}" + (
            "; content: the nearest, by cosine similarity, of all images of the truth's folder is the output's own"
        ) * bool(truth)
        return list(rows.values())

    def judged(self, judge: Judge, references: list[Reference]) -> Judged:
        """What the judge says of images."""
        options, parts = self.options, []
        for batch in in_batches(references, options.batch_size, self.progress, "judge"):
            images = [read_image(reference, judge.image_size, options.resize) for reference in batch]
            parts.append(judge.judge(torch.stack(images).to(self.instruments.device)))
        return Judged(*(torch.cat(part) for part in zip(*parts)))

    def summarise(self, key: str, values: np.ndarray) -> None:
        """Mean, deviation and interval of finite values [N]."""
        self.metrics[key] = float(values.mean())
        if len(values) > 1:
            self.std[key] = float(values.std(ddof=1))
        if self.options.bootstrap:
            self.intervals[key] = bootstrap_mean(values, **self.interval)


def _reader(options: Evaluation, instruments: Instruments) -> tuple[Read, str]:
    return reader(
        instruments.extractor, options.protocol, options.image_size, options.native_size, options.resize
    )  # fmt: skip


def translations(found: Sequence[Reference], record: Mapping[str, Any]) -> list[list[tuple[Reference, Reference]]]:
    """The outputs as one list per translation of the sources: [(output, reference named as its source)]."""
    count = record.get("settings", {}).get("samples_per_image", 1)
    if not isinstance(count, int) or count <= 1:
        return [[(output, output) for output in found]]
    sets: dict[int, list[tuple[Reference, Reference]]] = {}
    for output in found:
        folder, _, name = output.name.partition("/")
        number = re.fullmatch(r"sample_(0|[1-9][0-9]{0,8})", folder)
        if number and int(number[1]) < count:
            sets.setdefault(int(number[1]), []).append((output, Reference(output.path, name)))
    return [sets[k] for k in sorted(sets)] or [[(output, output) for output in found]]


def split_features(features: np.ndarray, found: Sequence[Reference], sets: list) -> list[np.ndarray]:
    """Features [N, D] of all outputs as a list with those of every translation."""
    row = {output.path: i for i, output in enumerate(found)}
    x = [features[[row[output.path] for output, _ in outputs]] for outputs in sets]
    if not x or min(map(len, x)) < 2:
        raise InputError("a translation in `outputs` has 1 image or none; distances need 2 or more")
    return x


def _of_features(compute: Callable, metric: SetDistance) -> Callable:
    """A distance as a function of two sets of features."""
    if metric.of_gaussian:
        return lambda x, y: compute(x, gaussian_of_features(y))
    return compute


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _size_words(size: int | None, resize: str) -> str:
    if size is None:
        return "images at their own size"
    return f"images at {size}x{size}, others resized by PIL bicubic ({resize} if not square)"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


__all__ = ["PROTOCOLS", "Evaluation", "Instruments", "Results", "evaluate", "reader", "target_statistics"]
