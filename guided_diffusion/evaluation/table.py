"""The registry of metrics, with their labels, formats and directions, and the tables that show results.

A metric is added by decorating the function that computes it. The evaluation, its files, the table and the report of a
comparison then include it:

    @paired_metric("mae", "MAE", lower_is_better=True)
    def mae(a, b):  # images [N, 3, H, W] in [0, 1] -> [N]
        return (a - b).abs().flatten(1).mean(1)

    @image_metric("brightness", "brightness")
    def brightness(images):  # [N, 3, H, W] in [0, 1] -> [N]
        return images.flatten(1).mean(1)

    @set_distance("mean", "distance of means", lower_is_better=True)
    def mean_distance(x, y):  # features [N, D], [M, D] -> a number
        return np.linalg.norm(x.mean(0) - y.mean(0))
"""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ..errors import display_name
from ..registry import Registry

METRICS = Registry("metric")
ROLES = {"source": "sources", "truth": "truth"}
"""Kinds of pictures that outputs are paired with, and the option that names their folder."""
FOLDERS = ("outputs", "sources", "targets", "truth")
FEW = 10
"""Means over fewer images than this are shown as unreliable."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Decorator = Callable[[Callable], Callable]


@dataclass(frozen=True)
class Metric:
    """Fields that all metrics have.

    format: of a mean in a comparison, after multiplication by `factor`. lower_is_better: None where neither is. unit:
    of the stored value. column: position among the metrics of its kind in a comparison; None hides it there.
    """

    name: str
    label: str
    format: str = ".3f"
    factor: float = 1
    lower_is_better: bool | None = None
    unit: str = ""
    column: int | None = 99
    compute: Callable[..., Any] | None = None


@dataclass(frozen=True)
class PerImage(Metric):
    """A metric with one value per output.

    load: replaces `compute` where a network is needed: (options, device) -> compute, or None where the options turn the
    metric off. If it raises InputError, the metric is left out with a warning, unless the option that has the metric's
    name is "True".
    """

    load: Callable[[Any, Any], Callable[..., Any] | None] | None = None


@dataclass(frozen=True)
class PairedMetric(PerImage):
    """A metric of image pairs. compute: (a, b), float32 [N, 3, H, W] in [0, 1] -> [N], NaN where undefined."""


@dataclass(frozen=True)
class ImageMetric(PerImage):
    """A metric of single outputs. compute: images, float32 [N, 3, H, W] in [0, 1] -> [N], NaN where undefined."""


@dataclass(frozen=True)
class FeatureMetric(Metric):
    """A metric of what the feature network returns for single outputs; measured where it returns all of `needs`.

    compute: (outputs, truths, own) -> [N]. outputs: arrays [N, ...] float64 by name; "features" is always among them.
    truths: the same arrays for all images in the truth folder. own: index [N] of each output's truth among these.
    needs_truth: if False, `truths` and `own` may be None. how: a note on the measurement, for the protocol.
    """

    needs: tuple[str, ...] = ()
    needs_truth: bool = True
    how: str = ""


@dataclass(frozen=True)
class SetDistance(Metric):
    """A distance between sets of features. compute: (x [N, D], y [M, D]) float64 -> a number, or `Measured`.

    general_label: label for features other than Inception's, for which names like FID are reserved. of_gaussian:
    `compute` also takes (mean [D], root [R, D]) for y, so statistics suffice. options: fields of the
    evaluation's options that `compute` takes as keywords. interval: (x, y, estimate, replicates=, confidence=, seed=)
    -> (low, high); by default, both sets are resampled.
    """

    general_label: str = ""
    of_gaussian: bool = False
    options: tuple[str, ...] = ()
    interval: Callable[..., tuple[float, float]] | None = None


@dataclass(frozen=True)
class RecordedMetric(Metric):
    """A value that a run's run.json has under the metric's name. is_cost: it depends on the machine, not the seed."""

    is_cost: bool = False


class Measured(NamedTuple):
    """A distance with its standard deviation (NaN if none) and a description of how it was measured."""

    value: float
    std: float = math.nan
    how: str = ""

    @classmethod
    def of(cls, value: Any) -> "Measured":
        """The result of a distance, a number or a `Measured`."""
        return value if isinstance(value, cls) else cls(float(value))


def registering(kind: type[Metric]) -> Callable[..., Decorator]:
    """A decorator (name, label, further fields of the kind) that registers the function below it as a metric."""

    def named(name: str, label: str, **details: Any) -> Decorator:
        def register(compute: Callable) -> Callable:
            METRICS.add(name)(kind(name, label, compute=compute, **details))
            return compute

        return register

    return named


paired_metric = registering(PairedMetric)
image_metric = registering(ImageMetric)
feature_metric = registering(FeatureMetric)
set_distance = registering(SetDistance)

for recorded in (
    RecordedMetric("negative_impact", "negative impact", lower_is_better=True),
    RecordedMetric("seconds_per_image", "s/image", format=".3g", is_cost=True),
    RecordedMetric("model_evaluations", "evaluations", format=".0f", is_cost=True),
):
    METRICS.add(recorded.name)(recorded)

Kind = TypeVar("Kind", bound=Metric)


def of_kind(kind: type[Kind]) -> list[Kind]:
    """The registered metrics of one kind."""
    return [metric for metric in METRICS.values() if isinstance(metric, kind)]


@dataclass(frozen=True)
class Value:
    """One value of a result: a metric and, for pairs, what the outputs are compared with ("source" or "truth")."""

    metric: Metric
    role: str = ""

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.role}_{self.metric.name}" if self.role else self.metric.name

    @property
    def is_cost(self) -> bool:
        """Whether it is a cost of the run, not a measurement of its outputs."""
        return isinstance(self.metric, RecordedMetric) and self.metric.is_cost

    def label(self, inception: bool) -> str:
        """Its label; inception: whether the features are Inception's."""
        general = self.metric.general_label if isinstance(self.metric, SetDistance) and not inception else ""
        return general or self.metric.label

    def words(self, inception: bool) -> str:
        """Its label in a sentence or chart: "FID", or "Fréchet distance" of other features."""
        is_general = isinstance(self.metric, SetDistance) and self.metric.general_label and not inception
        return self.label(inception) + (" distance" if is_general else "")

    def line(self, inception: bool) -> str:
        """Its label in the table of one evaluation: "PSNR (dB), source"."""
        unit = f" ({self.metric.unit})" if self.metric.unit else ""
        return f"{self.label(inception)}{unit}" + (f", {self.role}" if self.role else "")

    def heading(self, inception: bool) -> str:
        """The heading of its column in a comparison, with an arrow to where it is better: "SSIM to truth ↑"."""
        metric = self.metric
        power = round(math.log10(metric.factor)) if metric.factor > 0 else 0
        scale = "" if metric.factor == 1 else f"·10{str(power).translate(SUPERSCRIPTS)}"
        role = " to truth" if self.role == "truth" else ""
        arrow = {True: " ↓", False: " ↑", None: ""}[metric.lower_is_better]
        return f"{self.label(inception)}{scale}{role}{arrow}"

    def cell(self, mean: float, std: float | None) -> str:
        """Mean and, except for costs, standard deviation over seeds."""
        metric = self.metric
        text = format(mean * metric.factor, metric.format)
        return text if std is None or self.is_cost else f"{text} ± {std * metric.factor:{metric.format}}"


def values(inception: bool = True) -> list[Value]:
    """Every value of an evaluation's result and every cost of a run, in the order in which they are shown.

    inception: whether the features are Inception's, for which FID comes first, as published. With others, distances of
    Gaussians, which are biased where there are few images, come after those that are not.
    """
    distances = of_kind(SetDistance)
    found = [Value(metric) for metric in sorted(distances, key=lambda metric: metric.of_gaussian and not inception)]
    found += [Value(metric, role) for role in ROLES for metric in of_kind(PairedMetric)]
    found += [Value(metric) for kind in (ImageMetric, FeatureMetric, RecordedMetric) for metric in of_kind(kind)]
    return sorted(found, key=lambda value: value.is_cost)


def columns(inception: bool = True) -> list[Value]:
    """The columns of a comparison, in their order; see `values`."""
    found = [value for value in values(inception) if value.metric.column is not None]
    groups = list(dict.fromkeys((type(value.metric), value.role, value.is_cost) for value in found))
    places = {group: place for place, group in enumerate(groups)}
    return sorted(found, key=lambda v: (places[type(v.metric), v.role, v.is_cost], v.metric.column))


def is_inception(protocol: Mapping[str, Any]) -> bool:
    """Whether a result's distances are of Inception features, as published ones are."""
    return str(protocol.get("features", "")).startswith("inception")


def is_unreliable(value: Value, counts: Mapping[str, Any], dimensions: int | None) -> bool:
    """Whether a value rests on too few images: fewer than `FEW`, or too few for the rank of a covariance."""
    if value.is_cost:
        return False
    known = [counts[name] for name in ("outputs", "targets") if counts.get(name) is not None]
    few = bool(known) and known[0] < FEW
    if isinstance(value.metric, SetDistance):
        few = min(known, default=FEW) < FEW
        few |= value.metric.of_gaussian and dimensions is not None and min(known, default=math.inf) <= dimensions
    return few


def markdown(result: Mapping[str, Any]) -> str:
    """The values of an evaluation and its protocol as a Markdown page."""
    inception = is_inception(result["protocol"])
    lines = [f"# {display_name(result['outputs'])}", "", "| metric | value | std | interval |", "|---|---|---|---|"]
    for each in values(inception):
        value = result["metrics"].get(each.key)
        if value is not None:
            std = f"{result['std'][each.key]:.4g}" if each.key in result["std"] else ""
            interval = " to ".join(f"{end:.5g}" for end in result["intervals"].get(each.key, ()))
            lines.append(f"| {each.line(inception)} | {value:.6g} | {std} | {interval} |")
    lines.append("")
    for folder in FOLDERS:
        if result[folder] is not None:
            count, sizes = result["counts"].get(folder), result["sizes"].get(folder, [])
            words = ["unknown number of images" if count is None else f"{count} images", *sizes[:3]]
            words += ["..."] * (len(sizes) > 3)
            lines.append(f"- {folder}: `{display_name(result[folder])}` ({', '.join(words)})")
    lines += [f"- pairing with {role}: by {how}" for role, how in result["pairing"].items()]
    lines += [f"- {note}" for note in protocol_notes(result["protocol"])]
    lines += [f"- **warning**: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def protocol_notes(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol of a result as texts "key: value", where distances have the names that their features allow."""
    inception = is_inception(protocol)
    names = {"name": "protocol", **{metric.name: Value(metric).words(inception) for metric in of_kind(SetDistance)}}
    return [f"{names.get(key, key)}: {value}" for key, value in protocol.items()]


def row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as one row: every value under one name, empty where it was not measured."""
    cells: dict[str, Any] = {folder: result[folder] for folder in FOLDERS}
    counted = (*FOLDERS, *(f"{role}_pairs" for role in ROLES))
    cells |= {f"count_{name}": result["counts"].get(name) for name in counted}
    cells |= {f"protocol_{key}": result["protocol"].get(key) for key in ("name", "features", "dimensions")}
    for key, value in result["metrics"].items():
        low, high = result["intervals"].get(key, (None, None))
        cells |= {key: value, f"{key}_std": result["std"].get(key), f"{key}_low": low, f"{key}_high": high}
    return cells | {"warnings": "; ".join(result["warnings"])}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a heading of all names that occur."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a newline at its end."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])
