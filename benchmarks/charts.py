"""Charts of a comparison, drawn by matplotlib as SVG: trade-offs, and what the guided steps do."""

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from guided_diffusion.errors import library
from guided_diffusion.evaluation import table

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd9", "#7a4fbf", "#777777")
DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1)), (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "os^DvXPp"
TRADE_OFFS = {"trade_off.svg": "source_ssim", "trade_off_truth.svg": "truth_ssim"}  # files, and values on the x axis
WHERE = {"source": "the source", "truth": "the true translation"}
SCORE = "score"
RADIUS = 4  # of a marker, in pixels
LEAST_CHANGE = 0.01  # of a weight, for a chart of it

Result = Mapping[str, Any]  # a row's result, as results.json of a comparison has it
Point = tuple[float, float]


def front(points: Iterable[Point]) -> list[Point]:
    """The points (x, y) that no other one beats in both, x the larger the better, y the smaller; sorted by x."""
    kept: list[Point] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept[::-1]


def new_figure(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """A figure and its axes, without pyplot's global state; raises InputError where matplotlib is missing."""
    figure = library("matplotlib.figure", "matplotlib", "the report's charts").Figure((5.6, 4.4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.title.set(fontsize="medium", wrap=True)
    axes.grid(color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Any) -> str:
    """A figure as SVG with text as text; equal figures give equal files."""
    matplotlib, file = library("matplotlib", "matplotlib", "the report's charts"), io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sddm", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def styles(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Colour, dash and marker for every method, so that methods can be told apart without colours."""
    looks = itertools.cycle(zip(COLOURS, DASHES, MARKERS))
    methods = dict.fromkeys(row["method"] for row in results)
    return {method: dict(zip(("color", "linestyle", "marker"), look)) for method, look in zip(methods, looks)}


def trade_off(results: Sequence[Result], against: str = "source_ssim") -> Any:
    """A figure of a distance against SSIM to the source or, with "truth_ssim", to the truth; None without any point.

    Each method has a line through its `front`. Published results are hollow, and stand only beside what they can be
    compared with: FIDs of Inception features and SSIM to the source.
    """
    role, _, name = against.partition("_")
    inception = any(table.is_inception(row["protocol"]) for row in results)
    key = "kid" if not inception and any("kid" in row["mean"] for row in results) else "fid"
    distance, other = table.Value(table.METRICS[key]), table.Value(table.METRICS[name], role)
    y_label, x_label = distance.words(inception), f"{other.label(inception)} to {WHERE[role]}"
    figure, axes = new_figure(f"{y_label} against {x_label} (lower right is better)", x_label, y_label)
    points, labels = [], []
    for method, style in styles(results).items():
        own, bare = [], {**style, "linestyle": ""}
        for row in (row for row in results if row["method"] == method):
            if {key, against} <= row["mean"].keys():
                own.append((row["mean"][against], row["mean"][key]))
                points.append(own[-1])
                axes.errorbar(*own[-1], row["std"][key], row["std"][against], **bare)
                labels.append(name_of(row))
            # the number at the beginning of a text such as "62.29 ± 0.63"
            published = [re.match(r"[0-9]+(\.[0-9]+)?", row["published"][key]) for key in ("source_ssim", "fid")]
            if inception and against == "source_ssim" and all(published):
                points.append(tuple(float(number[0]) for number in published if number))
                axes.plot(*points[-1], **bare, markerfacecolor="white")
                labels.append(f"{name_of(row)} (published)")
        if own:
            axes.plot(*zip(*front(own)), **style, label=method)
    if not points:
        return None
    scale_logarithmically(axes, [y for _, y in points])
    axes.legend(fontsize="small")
    annotate(figure, axes, points, labels)
    return figure


def annotate(figure: Any, axes: Any, points: Sequence[Point], labels: Sequence[str]) -> None:
    """Label points where there is room: labels overlap neither each other nor a point."""
    figure.draw_without_rendering()
    places = [axes.transData.transform(point) for point in points]
    bbox = library("matplotlib.transforms", "matplotlib", "the report's charts").Bbox
    taken = [bbox([place - RADIUS, place + RADIUS]) for place in places]
    for point, label in zip(points, labels):
        for x, y, side in ((7, 4, "left"), (-7, 4, "right"), (7, -10, "left"), (-7, -10, "right")):
            options = {"textcoords": "offset points", "fontsize": "x-small", "horizontalalignment": side}
            text = axes.annotate(label, point, (x, y), **options)
            box = text.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


# Guided steps


def step_charts(results: Sequence[Result]) -> list[Any]:
    """Figures of the guided steps: norms of the score's parts, and weights of the merged directions.

    Charts in which every line is constant are left out.
    """
    guided, charts = [row for row in results if row["curves"]], []
    for part in ("tangent", "normal"):
        curves = [(row, [step[part] for step in row["curves"]]) for row in guided]
        charts.append(lines(curves, f"Norm of the score's {part} part", "norm"))
    for name in dict.fromkeys(name for row in guided for name in weights(row)):
        shown = "the score's tangent part" if name == SCORE else f"the energy {name}"
        curves = [(row, weights(row)[name]) for row in guided if name in weights(row)]
        charts.append(lines(curves, f"Weight of {shown}", "weight", least=LEAST_CHANGE))
    return [chart for chart in charts if chart]


def lines(curves: Sequence[tuple[Result, Sequence[float]]], title: str, y_label: str, *, least: float = 0) -> Any:
    """A figure with a line for each row of its values in every guided step, from 0 (the image) to 1 (noise).

    None where all lines are constant: they change by less than `least` or rounding.
    """
    if not any(max(ys) - min(ys) > max(least, 1e-6 * max(map(abs, ys))) for _, ys in curves):
        return None
    figure, axes = new_figure(title, "share of the schedule; sampling runs leftwards", y_label)
    looks = styles([row for row, _ in curves])
    for (row, ys), colour in zip(curves, itertools.cycle(COLOURS)):
        xs = [step["i"] / (row["curves"][0]["i"] + 1) for step in row["curves"]]
        axes.plot(xs, ys, **{**looks[row["method"]], "color": colour}, markevery=0.1, label=name_of(row))
    if y_label == "norm":
        scale_logarithmically(axes, [y for _, ys in curves for y in ys])
    axes.legend(fontsize="small")
    return figure


def scale_logarithmically(axes: Any, values: Sequence[float]) -> None:
    """Use a logarithmic axis for positive values that differ by more than ten times."""
    if max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")


def weights(row: Result) -> dict[str, list[float]]:
    """Weights of the merged directions in every guided step: the score's, then the energies'; {} without a merge."""
    columns = [list(column) for column in zip(*(step["weights"] for step in row["curves"]))]
    return dict(zip([SCORE, *row["energies"]], columns)) if len(columns) > 1 else {}


def name_of(row: Result) -> str:
    """Method and setting of a row."""
    return ", ".join(filter(None, (row["method"], row["setting"])))
