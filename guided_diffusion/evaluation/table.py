"""The registry of metrics, and how they are shown: every name, label, format, factor and direction stands here once.

A metric is added by decorating the function that computes it; the evaluation, its files, the benchmark's table and its
report then have it, too:

    @paired_metric("mae", "MAE", lower_is_better=True)
    def mae(a, b):  # images [N, 3, H, W] in [0, 1] -> [N]
        return (a - b).abs().flatten(1).mean(1)

    @set_distance("mean", "distance of means", lower_is_better=True)
    def mean_distance(x, y):  # features [N, D], [M, D] -> a number
        return np.linalg.norm(x.mean(0) - y.mean(0))
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import display_name
from ..options import Registry

METRICS = Registry("metric")
ROLES = {"source": "sources", "truth": "truth"}
"""What outputs are paired with, and the option that names its folder."""
FOLDERS = ("outputs", "sources", "targets", "truth")
LAST = 99


@dataclass(frozen=True)
class Metric:
    """What all metrics have.

    format: of a mean in a comparison, after multiplying by `factor`. lower_is_better: None where neither is. unit: of
    the value as it is stored. column: its place among those of its kind in a comparison; None leaves it out there.
    """

    name: str
    label: str
    format: str = ".3f"
    factor: float = 1
    lower_is_better: bool | None = None
    unit: str = ""
    column: int | None = LAST


@dataclass(frozen=True)
class PairedMetric(Metric):
    """A metric of image pairs. compute: (a, b), float32 [N, 3, H, W] in [0, 1] -> [N], NaN where it is undefined.

    load: in place of `compute`, for a metric with a network: (options, device) -> compute, or None where the options
    switch it off. An InputError of it leaves the metric out with a warning, unless the option of the metric's name
    demands it.
    """

    compute: Callable[[Any, Any], Any] | None = None
    load: Callable[[Any, Any], Callable[[Any, Any], Any] | None] | None = None


@dataclass(frozen=True)
class SetDistance(Metric):
    """A distance between sets of features. compute: (x [N, D], y [M, D]) float64 -> a number, or `Measured`.

    general_label: the label where the features are not Inception's, for which names like FID are reserved. of_gaussian:
    `compute` takes (mean [D], root [R, D]) of y in place of y, so that statistics suffice. options: fields of the
    evaluation's options that `compute` takes by keyword. interval: (x, y, estimate, replicates=, confidence=, seed=) ->
    (low, high); resamples of both sets by default.
    """

    compute: Callable[..., Any] | None = None
    general_label: str = ""
    of_gaussian: bool = False
    options: tuple[str, ...] = ()
    interval: Callable[..., tuple[float, float]] | None = None


@dataclass(frozen=True)
class JudgedMetric(Metric):
    """What a judge says of outputs; measured where the features are a judge's.

    compute: (outputs, truths, own) -> float [N]. outputs, truths: what `Judge.judge` says of N outputs and of all
    images in the truth's folder; own: the place [N] of each output's truth among these. needs_truth: whether it looks
    at truths at all; otherwise it may get None for both.
    """

    compute: Callable[..., Any] | None = None
    needs_truth: bool = True


@dataclass(frozen=True)
class RecordedMetric(Metric):
    """A value that a run's run.json has under the metric's name. is_cost: it varies with the machine, not the seed."""

    is_cost: bool = False


class Measured(NamedTuple):
    """A distance with its standard deviation (NaN for none) and the words that describe how it was measured."""

    value: float
    std: float = math.nan
    how: str = ""


def paired_metric(name: str, label: str, **details: Any) -> Callable[[Callable], Callable]:
    """A decorator that registers a function (a, b) -> [N]; details: further fields of `PairedMetric`."""
    return _registering(lambda compute: PairedMetric(name, label, compute=compute, **details))


def set_distance(name: str, label: str, **details: Any) -> Callable[[Callable], Callable]:
    """A decorator that registers a function (x, y) -> a number; details: further fields of `SetDistance`."""
    return _registering(lambda compute: SetDistance(name, label, compute=compute, **details))


def judged_metric(name: str, label: str, **details: Any) -> Callable[[Callable], Callable]:
    """A decorator that registers (outputs, truths, own) -> [N]; details: further fields of `JudgedMetric`."""
    return _registering(lambda compute: JudgedMetric(name, label, compute=compute, **details))


def _registering(make: Callable[[Callable], Metric]) -> Callable[[Callable], Callable]:
    def register(compute: Callable) -> Callable:
        metric = make(compute)
        METRICS.add(metric.name)(metric)
        return compute

    return register


def add_recorded(name: str, label: str, **details: Any) -> None:
    """Register a value of run.json; details: further fields of `RecordedMetric`."""
    METRICS.add(name)(RecordedMetric(name, label, **details))


add_recorded("negative_impact", "negative impact", lower_is_better=True)
add_recorded("seconds_per_image", "s/image", format=".3g", is_cost=True)
add_recorded("model_evaluations", "evaluations", format=".0f", is_cost=True)


def distances() -> list[SetDistance]:
    """The registered distances between sets."""
    return [metric for metric in METRICS.values() if isinstance(metric, SetDistance)]


def paired() -> list[PairedMetric]:
    """The registered metrics of pairs."""
    return [metric for metric in METRICS.values() if isinstance(metric, PairedMetric)]


def judged() -> list[JudgedMetric]:
    """The registered metrics of a judge."""
    return [metric for metric in METRICS.values() if isinstance(metric, JudgedMetric)]


def recorded(costs: bool) -> list[RecordedMetric]:
    """The registered values of run.json: the costs, or the others."""
    return [metric for metric in METRICS.values() if isinstance(metric, RecordedMetric) and metric.is_cost == costs]


@dataclass(frozen=True)
class Value:
    """One value of a result: a metric and, for pairs, what the outputs are compared with ("source" or "truth")."""

    metric: Metric
    role: str = ""

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.role}_{self.metric.name}" if self.role else self.metric.name

    def label(self, inception: bool) -> str:
        """Its name for people; inception: whether the features are Inception's."""
        label = self.metric.label
        if isinstance(self.metric, SetDistance) and not inception:
            label = self.metric.general_label or label
        return label

    def line(self, inception: bool) -> str:
        """What one evaluation calls it: "PSNR (dB), source"."""
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
        """Mean and, but for costs, standard deviation over seeds."""
        metric = self.metric
        text = format(mean * metric.factor, metric.format)
        if std is not None and not (isinstance(metric, RecordedMetric) and metric.is_cost):
            text += f" ± {std * metric.factor:{metric.format}}"
        return text


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def values() -> Iterator[Value]:
    """Every value of an evaluation's result, in its order."""
    yield from map(Value, distances())
    for role in ROLES:
        yield from (Value(metric, role) for metric in paired())
    yield from map(Value, judged())
    yield from map(Value, recorded(costs=False))


def columns() -> list[Value]:
    """The columns of a comparison, in their order."""
    kinds = [distances(), *([paired()] * len(ROLES)), judged(), [*recorded(costs=False), *recorded(costs=True)]]
    roles = ["", *ROLES, "", ""]
    found = []
    for role, kind in zip(roles, kinds):
        shown = [(metric.column, metric) for metric in kind if metric.column is not None]
        found += [Value(metric, role) for _, metric in sorted(shown, key=lambda pair: pair[0])]
    return found


def is_inception(protocol: Mapping[str, Any]) -> bool:
    """Whether a result's distances are of Inception features, as published ones are."""
    return str(protocol.get("features", "")).startswith("inception")


def markdown(result: Mapping[str, Any]) -> str:
    """What an evaluation measured, and how, as a Markdown page."""
    inception = is_inception(result["protocol"])
    lines = [f"# {display_name(result['outputs'])}", "", "| metric | value | std | interval |", "|---|---|---|---|"]
    for each in values():
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
            lines.append(
                f"- {folder}: `{display_name(result[folder])}` ({', '.join(words)}{', ...' * (len(sizes) > 3)})"
            )
    lines += [f"- pairing with {role}: by {how}" for role, how in result["pairing"].items()]
    lines += protocol_notes(result["protocol"])
    lines += [f"- **warning**: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def protocol_notes(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol of a result as list items."""
    return [f"- {'protocol' if key == 'name' else key}: {value}" for key, value in protocol.items()]


def row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result as one row: every value under one name, empty where it was not measured."""
    cells: dict[str, Any] = {folder: result[folder] for folder in FOLDERS}
    counted = (*FOLDERS, *(f"{role}_pairs" for role in ROLES))
    cells |= {f"count_{name}": result["counts"].get(name) for name in counted}
    cells |= {f"protocol_{key}": result["protocol"].get(key) for key in ("name", "features", "dimensions")}
    for metric, value in result["metrics"].items():
        low, high = result["intervals"].get(metric, (None, None))
        cells |= {
            metric: value,
            f"{metric}_std": result["std"].get(metric),
            f"{metric}_low": low,
            f"{metric}_high": high,
        }
    return cells | {"warnings": "; ".join(result["warnings"])}


def csv_text(rows: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> str:
    """Rows as CSV with a heading; names: of the columns, by default all that occur."""
    names = list(dict.fromkeys(name for row in rows for name in row)) if names is None else list(names)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a newline at its end."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
