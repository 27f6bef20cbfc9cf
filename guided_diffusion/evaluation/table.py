"""The registry of metrics, and the tables that show results.

A metric is added by decorating the function that computes it; every table and report then has it:

    @paired_metric("mae", "MAE", lower_is_better=True)
    def mae(a, b):  # images [N, 3, H, W] in [0, 1] -> [N]
        return (a - b).abs().flatten(1).mean(1)
"""

import csv
import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import display_name
from ..registry import Registry

METRICS = Registry("metric")
ROLES = {"source": "sources", "truth": "truth"}  # what outputs are paired with, and the option of its folder
FOLDERS = ("outputs", "sources", "targets", "truth")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Metric:
    """A metric. `compute` takes and returns, by kind (images are float32 [N, 3, H, W] in [0, 1]; NaN: undefined):

    - "paired": two batches of images -> [N]; "image": images -> [N]
    - "features": (outputs, truths, own) -> [N]: what the feature network returns for the outputs, float64 arrays
      [N, ...] by name, the same for all images in the truth folder, and the index [N] of each output's truth in these
    - "distance": (x [N, D], y [M, D]), float64 features -> a number, or (number, standard deviation or NaN, a note)
    - "recorded": there is none; the value stands in run.json
    """

    kind: str
    name: str
    label: str
    compute: Callable[..., Any] | None = None
    format: str = ".3f"  # of means in a comparison, times `factor`
    factor: float = 1
    lower_is_better: bool | None = None
    unit: str = ""
    hidden: bool = False  # in comparisons
    is_cost: bool = False  # it depends on the machine, not the seed
    # (options, device) -> compute, or None where the options turn it off. An InputError leaves it out with a warning.
    load: Callable[[Any, Any], Callable[..., Any] | None] | None = None
    needs: tuple[str, ...] = ()  # names that must be in `outputs`
    needs_truth: bool = True  # if False, `truths` and `own` may be None
    how: str = ""  # a note for the protocol
    general_label: str = ""  # with features other than Inception's, for which names like FID are reserved
    of_gaussian: bool = False  # y may be (mean [D], root [R, D])
    options: tuple[str, ...] = ()  # fields of the evaluation's options that are keywords
    # (x, y, estimate, replicates=, confidence=, seed=) -> (low, high), in place of `distances.bootstrap_distance`
    interval: Callable[..., tuple[float, float]] | None = None


def register(kind: str, name: str, label: str, **details: Any) -> Callable[[Callable], Callable]:
    """A decorator that registers the function below it as a metric; details: further fields of `Metric`."""

    def add(compute: Callable) -> Callable:
        METRICS.add(name)(Metric(kind, name, label, compute, **details))
        return compute

    return add


paired_metric = functools.partial(register, "paired")
image_metric = functools.partial(register, "image")
feature_metric = functools.partial(register, "features")
set_distance = functools.partial(register, "distance")
for recorded in (
    Metric("recorded", "negative_impact", "negative impact", lower_is_better=True),
    Metric("recorded", "seconds_per_image", "s/image", format=".3g", is_cost=True),
    Metric("recorded", "model_evaluations", "evaluations", format=".0f", is_cost=True),
):
    METRICS.add(recorded.name)(recorded)


def of_kind(*kinds: str) -> list[Metric]:
    """The registered metrics of some kinds."""
    return [metric for metric in METRICS.values() if metric.kind in kinds]


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
        """Its label; inception: whether the features are Inception's."""
        return self.metric.label if inception else self.metric.general_label or self.metric.label

    def words(self, inception: bool) -> str:
        """Its label in a sentence or chart: "FID", or "Fréchet distance" of other features."""
        return self.label(inception) + (" distance" if self.metric.general_label and not inception else "")

    def heading(self, inception: bool) -> str:
        """The heading of its column in a comparison, with an arrow to where it is better: "SSIM to truth ↑"."""
        metric = self.metric
        power = str(round(math.log10(metric.factor))).translate(SUPERSCRIPTS)
        scale = "" if metric.factor == 1 else f"·10{power}"
        role = " to truth" if self.role == "truth" else ""
        arrow = {True: " ↓", False: " ↑", None: ""}[metric.lower_is_better]
        return f"{self.label(inception)}{scale}{role}{arrow}"

    def cell(self, mean: float, std: float | None) -> str:
        """Mean and, except for costs, standard deviation over seeds."""
        metric = self.metric
        text = format(mean * metric.factor, metric.format)
        return text if std is None or metric.is_cost else f"{text} ± {std * metric.factor:{metric.format}}"


def values(inception: bool = True) -> list[Value]:
    """Every value of an evaluation's result and every cost of a run, in the order in which they are shown.

    FID comes first, as published; with features other than Inception's, after distances that few images do not bias.
    """
    distances = sorted(of_kind("distance"), key=lambda metric: metric.of_gaussian and not inception)
    found = [Value(metric) for metric in distances]
    found += [Value(metric, role) for role in ROLES for metric in of_kind("paired")]
    found += [Value(metric) for kind in ("image", "features", "recorded") for metric in of_kind(kind)]
    return sorted(found, key=lambda value: value.metric.is_cost)


def is_inception(protocol: Mapping[str, Any]) -> bool:
    """Whether a result's distances are of Inception features, as published ones are."""
    return str(protocol.get("features", "")).startswith("inception")


def markdown(result: Mapping[str, Any]) -> str:
    """The values of an evaluation and its protocol as a Markdown page."""
    inception = is_inception(result["protocol"])
    cells = []
    for each in values(inception):
        value = result["metrics"].get(each.key)
        if value is not None:
            std = f"{result['std'][each.key]:.4g}" if each.key in result["std"] else ""
            interval = " to ".join(f"{end:.5g}" for end in result["intervals"].get(each.key, ()))
            label = each.label(inception) + (f" ({each.metric.unit})" if each.metric.unit else "")
            cells.append([label + (f", {each.role}" if each.role else ""), f"{value:.6g}", std, interval])
    table = markdown_table(("metric", "value", "std", "interval"), cells)
    lines = [f"# {display_name(result['outputs'])}", "", table, ""]
    for folder in FOLDERS:
        if result[folder] is not None:
            count, sizes = result["counts"].get(folder), result["sizes"].get(folder, [])
            words = [f"{'unknown number of' if count is None else count} images", *sizes[:3]]
            words += ["..."] * (len(sizes) > 3)
            lines.append(f"- {folder}: `{display_name(result[folder])}` ({', '.join(words)})")
    lines += [f"- pairing with {role}: by {how}" for role, how in result["pairing"].items()]
    lines += [f"- {note}" for note in protocol_notes(result["protocol"])]
    lines += [f"- **warning**: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def protocol_notes(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol of a result as texts "key: value", where distances have the names that their features allow."""
    inception = is_inception(protocol)
    names = {"name": "protocol", **{metric.name: Value(metric).words(inception) for metric in of_kind("distance")}}
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
