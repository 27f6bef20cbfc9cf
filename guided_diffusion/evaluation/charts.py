"""The comparison's charts, drawn as SVG: trade-offs, and what the guided steps do."""

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import table
from .fronts import front

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#3a9bd9", "#7a4fbf", "#777777")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "5 2", "1 4", "9 2 2 2 2 2")
MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross", "plus", "bar")
WIDTH, HEIGHT = 480, 380  # of a chart; margins:
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 46
LETTER, LINE = 6.6, 14  # width of a label's character, height of its line
MARKED = 8  # steps between the markers on a curve
TRADE_OFFS = {"trade_off.svg": "source_ssim", "trade_off_truth.svg": "truth_ssim"}
"""Files of the charts of the distance against another value."""
WHERE = {"source": "the source", "truth": "the true translation"}
INK = "var(--ink, #222)"
GRID = "var(--grid, #e2e2e2)"
PAPER = "var(--paper, #fff)"
FONT = "text { font: 12px system-ui, sans-serif; fill: var(--ink, #222) } text.halo { paint-order: stroke; \
stroke: var(--paper, #fff); stroke-width: 3px; stroke-linejoin: round }"


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in all charts of a report, so that it can be told without colours."""

    colour: str
    dash: str
    marker: str

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        """A path through points."""
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = f' stroke-dasharray="{self.dash}"' if self.dash else ""
        return f'<path d="{path}" fill="none" stroke="{self.colour}" stroke-width="1.6"{dash}/>'

    def mark(self, x: float, y: float, *, hollow: bool = False, title: str = "", radius: float = 4.5) -> str:
        """The method's marker."""
        fill = PAPER if hollow else self.colour
        look = f'fill="{fill}" stroke="{self.colour}" stroke-width="1.6"'
        inside = f"<title>{html.escape(title)}</title>" if title else ""
        kind = 'class="point" ' if title else ""
        if self.marker == "circle":
            return f'<circle {kind}cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {look}>{inside}</circle>'
        corners = "L".join(f"{x + radius * dx:.1f} {y + radius * dy:.1f}" for dx, dy in SHAPES[self.marker])
        return f'<path {kind}d="M{corners}Z" {look}>{inside}</path>'


_T = 0.35
SHAPES = {
    "square": ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "triangle": ((0, -1.2), (1.15, 0.9), (-1.15, 0.9)),
    "diamond": ((0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)),
    "down": ((0, 1.2), (1.15, -0.9), (-1.15, -0.9)),
    "cross": tuple(
        (x * math.cos(math.pi / 4) - y * math.sin(math.pi / 4), x * math.sin(math.pi / 4) + y * math.cos(math.pi / 4))
        for x, y in ((-_T, -1.2), (_T, -1.2), (_T, -_T), (1.2, -_T), (1.2, _T), (_T, _T), (_T, 1.2), (-_T, 1.2),
                     (-_T, _T), (-1.2, _T), (-1.2, -_T), (-_T, -_T))
    ),
    "plus": ((-_T, -1.2), (_T, -1.2), (_T, -_T), (1.2, -_T), (1.2, _T), (_T, _T), (_T, 1.2), (-_T, 1.2), (-_T, _T),
             (-1.2, _T), (-1.2, -_T), (-_T, -_T)),
    "bar": ((-1.2, -0.5), (1.2, -0.5), (1.2, 0.5), (-1.2, 0.5)),
}  # fmt: skip


def styles(results: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A style for every method."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    looks = itertools.cycle(zip(COLOURS, DASHES, MARKERS))
    return {method: Style(*look) for method, look in zip(methods, looks)}


@dataclass(frozen=True)
class Point:
    """A mark of a chart, with its deviations, and a label of a few lines."""

    xy: tuple[float, float]
    style: Style
    lines: tuple[str, ...]
    deviation: tuple[float, float] = (0.0, 0.0)
    hollow: bool = False


@dataclass(frozen=True)
class Series:
    """A line of a chart. label: in its key, "" for none. marked: whether markers stand on it."""

    label: str
    points: list[tuple[float, float]]
    style: Style
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: its title, its SVG elements, and what its lines mean."""

    title: str
    parts: list[str]
    key: list[tuple[str, Style]]

    def figure(self) -> str:
        """For an HTML page: title and key are text beside it; as wide as there is room, up to a limit."""
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">'
        key = "".join(f"<span>{swatch(style)}{html.escape(label)}</span>" for label, style in self.key)
        caption = f"<figcaption>{html.escape(self.title)}</figcaption>"
        return f'<figure>{caption}{svg}{"".join(self.parts)}</svg><div class="key">{key}</div></figure>'

    def file(self) -> str:
        """An SVG file of its own: title and key are in it, and it is white behind."""
        lines = wrapped(self.title, int((WIDTH - 2 * RIGHT) / 7))
        top = 12 + 18 * len(lines)
        height = top + HEIGHT + 20 * len(self.key)
        body = [
            f'<text x="{RIGHT}" y="{20 + 18 * k}" style="font-weight:600">{html.escape(line)}</text>'
            for k, line in enumerate(lines)
        ]
        body.append(f'<g transform="translate(0 {top})">{"".join(self.parts)}</g>')
        for k, (label, style) in enumerate(self.key):
            down = top + HEIGHT + 20 * k
            body.append(f'<g transform="translate({LEFT} {down})">{swatch_parts(style)}</g>')
            body.append(f'<text x="{LEFT + 36}" y="{down + 10}">{html.escape(label)}</text>')
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
            f'<style>{FONT}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
        )


def swatch(style: Style) -> str:
    """A piece of a method's line with its marker, for keys in HTML."""
    return f'<svg viewBox="0 0 30 12" class="swatch">{swatch_parts(style)}</svg>'


def swatch_parts(style: Style) -> str:
    """A piece of a method's line with its marker, 30 by 12 pixels."""
    return style.line([(0, 6), (30, 6)]) + style.mark(15, 6)


def wrapped(text: str, most: int) -> list[str]:
    """A text in lines of at most so many characters, broken between words."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > most:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


# ---- trade-offs -----------------------------------------------------------------------------------------------------


def trade_offs(results: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """The charts of distance against SSIM to the source and to the truth, where they were measured, by file name."""
    charts = {name: trade_off(results, against) for name, against in TRADE_OFFS.items()}
    return {name: chart for name, chart in charts.items() if chart}


def trade_off(results: Sequence[Mapping[str, Any]], against: str = "source_ssim") -> Chart | None:
    """The Fréchet distance against SSIM to the source or, with "truth_ssim", to the truth.

    Each method has a line through its front: the settings that no other of its settings beats in both. Published
    results are hollow; they stand beside FIDs of Inception features only, which alone can be compared, and are of SSIM
    to the source. Distances that differ by more than ten times have a logarithmic axis. None where nothing is there.
    """
    role, _, name = against.partition("_")
    inception = comparable(results)
    distance, other = table.Value(table.METRICS["fid"]), table.Value(table.METRICS[name], role)
    y_label = distance.label(inception) + ("" if inception else " distance")
    x_label = f"{other.label(inception)} to {WHERE[role]}"
    looks = styles(results)
    points: list[Point] = []
    fronts: list[Series] = []
    for method, style in looks.items():
        own = []
        for row in (row for row in results if row["method"] == method):
            lines = tuple(filter(None, (method, row["setting"])))
            if {"fid", against} <= row["mean"].keys():
                own.append((row["mean"][against], row["mean"]["fid"]))
                deviation = (row["std"][against] or 0, row["std"]["fid"] or 0)
                points.append(Point(own[-1], style, lines, deviation))
            printed = [leading_number(row["published"][key]) for key in ("source_ssim", "fid")]
            if inception and against == "source_ssim" and None not in printed:
                x, y = (value or 0.0 for value in printed)
                points.append(Point((x, y), style, (*lines[:-1], f"{lines[-1]} (published)"), hollow=True))
        if own:
            fronts.append(Series(method, front(own), style))
    if not points:
        return None
    found = [point.xy[1] for point in points]
    logarithmic = max(found) > 10 * min(found) > 0
    if logarithmic:
        fronts = [replace(line, points=[(x, math.log10(y)) for x, y in line.points]) for line in fronts]
        points = [on_logarithmic_axis(point) for point in points]
    title = f"{y_label} against {x_label} (lower right is better)"
    return chart(title, x_label, y_label, fronts, points, logarithmic)


def on_logarithmic_axis(point: Point) -> Point:
    """A mark with y as a logarithm to base 10; its deviation to first order."""
    (x, y), (dx, dy) = point.xy, point.deviation
    return replace(point, xy=(x, math.log10(y)), deviation=(dx, dy / (y * math.log(10))))


def comparable(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the distances are FIDs, of Inception features, as the published ones are."""
    return any(table.is_inception(row["protocol"]) for row in results)


def leading_number(text: str) -> float | None:
    """The number with which "62.29 ± 0.63" begins; None where there is none."""
    try:
        number = float(text.split()[0])
    except (IndexError, ValueError):
        return None
    return number if math.isfinite(number) else None


# ---- guided steps ---------------------------------------------------------------------------------------------------

PROGRESS = "share of the schedule; sampling runs leftwards"


def step_charts(results: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """What the guided steps of the rows do: norms of the score's parts, and the weights of the directions."""
    guided = [row for row in results if row["curves"]]
    if not guided:
        return []
    looks = row_styles(results)
    charts = [norms(guided, looks, part) for part in ("tangent", "normal")]
    names = list(dict.fromkeys(name for row in guided for name in directions(row)))
    return charts + [weights(guided, looks, name) for name in names]


def row_styles(results: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """A style for every row: dash and marker of its method, and a colour of its own."""
    looks = styles(results)
    colours = itertools.cycle(COLOURS)
    guided = [row for row in results if row["curves"]]
    return {name_of(row): replace(looks[row["method"]], colour=colour) for row, colour in zip(guided, colours)}


def norms(rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Style], part: str) -> Chart:
    """Norm of the score's tangent or normal part in every guided step."""
    series = []
    for row in rows:
        curve = [(progress(row, step), math.log10(max(step[part], 1e-12))) for step in row["curves"]]
        series.append(Series(name_of(row), curve, looks[name_of(row)], marked=True))
    return chart(f"Norm of the score's {part} part", PROGRESS, "norm", series, logarithmic=True)


def weights(rows: Sequence[Mapping[str, Any]], looks: Mapping[str, Style], name: str) -> Chart:
    """Weight of one of the merged directions, the score's or an energy's, in every guided step."""
    series = []
    for row in rows:
        if name in directions(row):
            k = directions(row).index(name)
            curve = [(progress(row, step), step["weights"][k]) for step in row["curves"]]
            series.append(Series(name_of(row), curve, looks[name_of(row)], marked=True))
    what = "the score's tangent part" if name == SCORE else f"the energy {name}"
    return chart(f"Weight of {what}", PROGRESS, "weight", series)


SCORE = "score"


def directions(row: Mapping[str, Any]) -> list[str]:
    """Names of the directions that a row merges: the score, then its energies; none where nothing is merged."""
    count = len(row["curves"][0]["weights"])
    names = list(row.get("energies", ()))
    if len(names) != count - 1:  # of results that do not name them
        names = [str(k) for k in range(1, count)]
    return [SCORE, *names] if count > 1 else []


def progress(row: Mapping[str, Any], step: Mapping[str, Any]) -> float:
    """Where a step is on the schedule, from 0 (the image) to 1 (noise)."""
    return step["i"] / (row["curves"][0]["i"] + 1)


def name_of(row: Mapping[str, Any]) -> str:
    """Method and setting of a row."""
    return ", ".join(filter(None, (row["method"], row["setting"])))


# ---- drawing --------------------------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    points: Sequence[Point] = (),
    logarithmic: bool = False,
) -> Chart:
    """A Chart of lines and marks. logarithmic: y values are logarithms to base 10."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    for point in points:
        (x, y), (dx, dy) = point.xy, point.deviation
        xs += [x - dx, x + dx]
        ys += [y - dy, y + dy]
    x_low, x_high = padded(xs)
    y_low, y_high = padded(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for x in ticks(x_low, x_high):
        across, bottom = at(x, y_low)
        parts.append(f'<path d="M{across:.1f} {TOP}V{bottom:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for y in powers(y_low, y_high) if logarithmic else ticks(y_low, y_high):
        left, down = at(x_low, y)
        text = f"{10**y:.3g}" if logarithmic else f"{y:g}"
        parts.append(f'<path d="M{left:.1f} {down:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    for place, text in (
        (f"translate({(LEFT + WIDTH) / 2:.0f} {HEIGHT - 8})", x_label),
        (f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)", y_label),
    ):
        parts.append(f'<text transform="{place}" text-anchor="middle">{html.escape(text)}</text>')
    for k, line in enumerate(series):
        places = [at(*xy) for xy in line.points]
        parts.append(line.style.line(places))
        if line.marked:
            parts += [line.style.mark(*place, radius=3.5) for place in places[(2 * k) % MARKED :: MARKED]]
    dots = [at(*point.xy) for point in points]
    taken: list[Box] = [(across - 6, down - 6, across + 6, down + 6) for across, down in dots]
    for point in points:
        (start, end), (low, high) = bars(point, at)
        taken.append((start[0], start[1] - 2, end[0], end[1] + 2))
        taken.append((low[0] - 2, high[1], low[0] + 2, low[1]))
    for point in points:
        parts += mark(point, at, taken)
    return Chart(title, parts, [(line.label, line.style) for line in series if line.label])


def bars(point: Point, at: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Ends of a mark's deviations: from left to right, and from low to high values."""
    (x, y), (dx, dy) = point.xy, point.deviation
    return (at(x - dx, y), at(x + dx, y)), (at(x, y - dy), at(x, y + dy))


def mark(point: Point, at: Any, taken: list[Box]) -> list[str]:
    """A marker with its deviations, and its label where none of `taken` is: boxes of markers and other labels.

    Where there is no room, the label is seen only when the pointer is on the marker.
    """
    across, down = at(*point.xy)
    ((left, _), (right, _)), ((_, low), (_, high)) = bars(point, at)
    cross = f"M{left:.1f} {down:.1f}H{right:.1f}M{across:.1f} {low:.1f}V{high:.1f}"
    parts = [
        f'<path d="{cross}" stroke="{point.style.colour}"/>',
        point.style.mark(across, down, hollow=point.hollow, title=", ".join(point.lines)),
    ]
    length, tall = LETTER * max(map(len, point.lines), default=0), LINE * len(point.lines)
    sides = (across + 9, across - 9 - length, across - length / 2)
    offsets = (-tall / 2, -tall, 0, -tall - 9, 9, -tall - 24, 24, -tall - 40, 40)
    boxes = [(x, down + y, x + length, down + y + tall) for y in offsets for x in sides]
    inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH - RIGHT and box[1] >= TOP
              and box[3] <= HEIGHT - BOTTOM]  # fmt: skip
    box = next((box for box in inside if not any(overlap(box, other) for other in taken)), None)
    if box and point.lines:
        taken.append(box)
        is_left = box[2] < across  # then its end is beside the marker
        start = f'x="{box[2]:.1f}" text-anchor="end"' if is_left else f'x="{box[0]:.1f}"'
        for k, line in enumerate(point.lines):
            place = f'{start} y="{box[1] + LINE * (k + 1) - 3:.1f}"'
            parts.append(f'<text class="halo" {place}>{html.escape(line)}</text>')
    return parts


def overlap(a: Box, b: Box) -> bool:
    """Whether two boxes have points in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, wanted: int = 6) -> list[float]:
    """Round numbers in a range, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Logarithms of round numbers, for a range of logarithms to base 10."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    values = [decade + math.log10(factor) for decade in decades for factor in factors]
    return [value for value in values if low <= value <= high] or ticks(low, high)
