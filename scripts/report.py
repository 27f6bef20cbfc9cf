"""The benchmark's report: one HTML file with pictures, table and charts in it, that needs nothing else.

Charts are SVG, written here; pictures are data URIs.
"""

import base64
import html
import io
import math
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image

from guided_diffusion.image_datasets import ImageError, list_references, load_image

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4fbf", "#555555")
WIDTH, HEIGHT = 560, 380  # of a chart; margins:
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: bottom }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
.pictures td, .pictures th { padding: 2px; border: 0; text-align: center; font-size: 12px; font-weight: normal;
  max-width: 96px }
.pictures img { display: block; width: 96px; height: 96px }
.charts { display: flex; flex-wrap: wrap; gap: 1.5rem }
figure { margin: 0 }
figcaption { font-weight: 600 }
code { font-size: 13px; overflow-wrap: anywhere }
svg text { font: 12px system-ui, sans-serif; fill: #222 }
"""


def page(title, headings, cells, notes, results, args):
    """The report as a string.

    headings, cells, notes: of the table, as text; results: what benchmark.measure returns; args: the benchmark's flags.
    """
    charts = list(trade_offs(results).values())
    guided = [row for row in results if row["curves"]]
    if guided:
        charts += [norms(guided), *weights(guided)]
    commands = [f"<li>{html.escape(name_of(row))}: <code>{html.escape(row['command'])}</code></li>" for row in results]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        '<div class="wide">' + html_table(headings, cells) + "</div>",
        "<ul>" + "".join(f"<li>{html.escape(note.replace('**', ''))}</li>" for note in notes) + "</ul>",
        "<h2>Side by side</h2>",
        '<div class="wide">' + pictures(results, args) + "</div>",
        "<h2>Charts</h2>",
        '<div class="charts">' + "".join(chart.figure() for chart in charts) + "</div>",
        "<h2>How each row was sampled</h2>",
        "<ul>" + "".join(commands) + "</ul>",
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def name_of(row):
    return ", ".join(filter(None, (row["method"], row["setting"])))


def html_table(headings, cells):
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# ---- pictures -------------------------------------------------------------------------------------------------------


def pictures(results, args):
    """A table of references and what every row made of them with its first seed."""
    folders = [("source", args.base_samples)]
    folders += [(name_of(row), os.path.join(args.save_dir, row["folder"])) for row in results]
    if args.truth:
        folders.append(("truth", args.truth))
    made = [{r.stem: r for r in list_references(folder)} for _, folder in folders]
    stems = [stem for stem in made[0] if all(stem in images for images in made[1 : len(results) + 1])]
    shown = [stems[round(i)] for i in np.linspace(0, len(stems) - 1, min(args.pictures, len(stems)))] if stems else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in folders)
    lines = ["".join(f"<td>{picture(images.get(stem))}</td>" for images in made) for stem in shown]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="pictures"><tr>{head}</tr>{body}</table>'


def picture(reference):
    """An <img> of at most 128 pixels; empty where there is no readable picture."""
    if reference is None:
        return ""
    try:
        image = Image.fromarray(load_image(reference, 128))
    except ImageError:
        return ""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(os.path.basename(reference.name))}" src="data:image/webp;base64,{data}">'


# ---- charts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A chart: its title, its SVG elements, and what its colours mean, [(label, colour)]."""

    title: str
    parts: list
    key: list

    def figure(self):
        """For an HTML page: title and key are text beside it."""
        svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(self.parts)}</svg>'
        key = "".join(
            f'<span style="color:{colour}">■</span> {html.escape(label)} &nbsp; ' for label, colour in self.key
        )
        caption = f"<figcaption>{html.escape(self.title)}</figcaption>"
        return f'<figure style="max-width:{WIDTH}px">{caption}{svg}<div>{key}</div></figure>'

    def file(self):
        """An SVG file of its own: title and key are in it, and it is white behind."""
        height = 30 + HEIGHT + 20 * len(self.key)
        body = [f'<text x="{RIGHT}" y="20" style="font-weight:600">{html.escape(self.title)}</text>']
        body.append(f'<g transform="translate(0 30)">{"".join(self.parts)}</g>')
        for k, (label, colour) in enumerate(self.key):
            top = 30 + HEIGHT + 20 * k
            body.append(f'<rect x="{LEFT}" y="{top}" width="10" height="10" fill="{colour}"/>')
            body.append(f'<text x="{LEFT + 16}" y="{top + 10}">{html.escape(label)}</text>')
        style = "<style>text { font: 12px system-ui, sans-serif; fill: #222 }</style>"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
            f'{style}<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
        )


def trade_offs(results):
    """The charts of distance against SSIM to the source and to the truth, where they were measured, by file name."""
    charts = {"trade_off.svg": trade_off(results, "source_ssim"), "trade_off_truth.svg": trade_off(results, "truth_ssim")}
    return {name: chart for name, chart in charts.items() if chart}


def trade_off(results, against="source_ssim"):
    """FID against SSIM to the source or, with "truth_ssim", to the truth: rows of one method are joined.

    Published results are hollow; they stand beside FIDs of Inception features only, which alone can be compared, and
    are of SSIM to the source. Distances that differ by more than ten times have a logarithmic axis. None where nothing
    was measured.
    """
    distance = "FID" if comparable(results) else "Fréchet distance"
    with_published = comparable(results) and against == "source_ssim"
    methods = list(dict.fromkeys(row["method"] for row in results))
    points, series = [], []
    for colour, method in zip(cycle(), methods):
        line = []
        for row in results:
            if row["method"] != method:
                continue
            if {"fid", against} <= row["mean"].keys():
                xy = row["mean"][against], row["mean"]["fid"]
                line.append(xy)
                deviation = row["std"][against] or 0, row["std"]["fid"] or 0
                points.append({"xy": xy, "deviation": deviation, "colour": colour, "label": row["setting"]})
            xy = [leading_number(row["published"][key]) for key in ("source_ssim", "fid")]
            if with_published and None not in xy:
                label = f"{row['setting']} (published)"
                points.append({"xy": xy, "deviation": (0, 0), "colour": colour, "label": label, "hollow": True})
        if line:
            series.append({"label": method, "points": sorted(line), "colour": colour})
    if not points:
        return None
    where = {"source_ssim": "the source", "truth_ssim": "the true translation"}[against]
    title = f"{distance} against SSIM to {where} (lower right is better)"
    distances = [point["xy"][1] for point in points]
    logarithmic = max(distances) > 10 * min(distances) > 0
    if logarithmic:
        series = [{**line, "points": [(x, math.log10(y)) for x, y in line["points"]]} for line in series]
        points = [on_logarithmic_axis(point) for point in points]
    return chart(title, f"SSIM to {where}", distance, series, points, logarithmic)


def on_logarithmic_axis(point):
    """A mark with y as a logarithm to base 10; its deviation to first order."""
    (x, y), (dx, dy) = point["xy"], point["deviation"]
    return {**point, "xy": (x, math.log10(y)), "deviation": (dx, dy / (y * math.log(10)))}


def comparable(results):
    """Whether the distances are FIDs, of Inception features, as the published ones are."""
    return any(row["protocol"].get("features", "").startswith("inception") for row in results)


PROGRESS = "step, as a share of the schedule: sampling goes from right to left"


def norms(rows):
    """Norms of the score's tangent (solid) and normal (dashed) part in every guided step."""
    series = []
    for colour, row in zip(cycle(), rows):
        for key, dash in (("tangent", ""), ("normal", "5 3")):
            curve = [(step["i"] / steps_of(row), math.log10(max(step[key], 1e-12))) for step in row["curves"]]
            label = None if dash else name_of(row)
            series.append({"label": label, "points": curve, "colour": colour, "dash": dash})
    title = "Norm of the score's tangent part (solid) and normal part (dashed)"
    return chart(title, PROGRESS, "norm", series, logarithmic=True)


def weights(rows):
    """Weights of the merged directions in every guided step: a chart for the score and one for each energy."""
    most = max(len(row["curves"][0]["weights"]) for row in rows)
    charts = []
    for k in range(most if most > 1 else 0):
        series = [
            {
                "label": name_of(row),
                "points": [(step["i"] / steps_of(row), step["weights"][k]) for step in row["curves"]],
                "colour": colour,
            }
            for colour, row in zip(cycle(), rows)
            if len(row["curves"][0]["weights"]) > max(k, 1)
        ]
        what = "the score's tangent part" if k == 0 else f"energy {k}, as listed in --energy"
        charts.append(chart(f"Weight of {what}", PROGRESS, "weight", series))
    return charts


def steps_of(row):
    return row["curves"][0]["i"] + 1


def cycle():
    while True:
        yield from COLOURS


def leading_number(text):
    """The number with which "62.29 ± 0.63" begins; None where there is none."""
    try:
        return float(text.split()[0])
    except (IndexError, ValueError):
        return None


def chart(title, x_label, y_label, series, points=(), logarithmic=False):
    """A Chart of lines [{label, points, colour, dash}] and marks [{xy, deviation, colour, label, hollow}].

    logarithmic: y values are logarithms to base 10.
    """
    xs = [x for line in series for x, _ in line["points"]]
    ys = [y for line in series for _, y in line["points"]]
    for point in points:
        (x, y), (dx, dy) = point["xy"], point["deviation"]
        xs, ys = xs + [x - dx, x + dx], ys + [y - dy, y + dy]
    x_low, x_high = padded(xs)
    y_low, y_high = padded(ys)

    def at(x, y):
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for x in ticks(x_low, x_high):
        across, bottom = at(x, y_low)
        parts.append(f'<path d="M{across:.1f} {TOP}V{bottom:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{across:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:g}</text>')
    for y in powers(y_low, y_high) if logarithmic else ticks(y_low, y_high):
        left, down = at(x_low, y)
        text = f"{10**y:.3g}" if logarithmic else f"{y:g}"
        parts.append(f'<path d="M{left:.1f} {down:.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    for place, text in (
        (f"translate({(LEFT + WIDTH) / 2:.0f} {HEIGHT - 8})", x_label),
        (f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)", y_label),
    ):
        parts.append(f'<text transform="{place}" text-anchor="middle">{html.escape(text)}</text>')
    for line in series:
        path = "M" + "L".join("{:.1f} {:.1f}".format(*at(*xy)) for xy in line["points"])
        dash = f' stroke-dasharray="{line["dash"]}"' if line.get("dash") else ""
        parts.append(f'<path d="{path}" fill="none" stroke="{line["colour"]}" stroke-width="1.6"{dash}/>')
    dots = [at(*point["xy"]) for point in points]
    taken = [(across - 5, down - 5, across + 5, down + 5) for across, down in dots]
    for point in points:
        parts += mark(point, at, taken)
    return Chart(title, parts, [(line["label"], line["colour"]) for line in series if line["label"]])


def mark(point, at, taken):
    """A dot with its deviations, and its label where none of `taken` is: boxes of dots and other labels.

    Where there is no room, the label is seen only when the pointer is on the dot.
    """
    (x, y), (dx, dy), colour = point["xy"], point["deviation"], point["colour"]
    across, down = at(x, y)
    (left, low), (right, high) = at(x - dx, y - dy), at(x + dx, y + dy)
    cross = f"M{left:.1f} {down:.1f}H{right:.1f}M{across:.1f} {low:.1f}V{high:.1f}"
    fill = "#fff" if point.get("hollow") else colour
    length = 6.5 * len(point["label"])
    places = [(x, y) for y in (-6, 16, -20, 30, -34, 44) for x in (across + 8, across - 8 - length)]
    boxes = [
        (x, down + y - 10, x + length, down + y + 3)
        for x, y in places
        if LEFT <= x <= WIDTH - RIGHT - length and TOP < down + y < HEIGHT - BOTTOM
    ]
    label = html.escape(point["label"])
    parts = [
        f'<path d="{cross}" stroke="{colour}"/>',
        f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4.5" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
        f"<title>{label}</title></circle>",
    ]
    box = next((box for box in boxes if not any(overlap(box, other) for other in taken)), None)
    if box:
        taken.append(box)
        parts.append(f'<text x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{label}</text>')
    return parts


def overlap(a, b):
    """Whether two boxes (left, top, right, bottom) have points in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def padded(values):
    """The range of values with some room on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def ticks(low, high, wanted=6):
    """Round numbers in a range, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]


def powers(low, high):
    """Logarithms of round numbers, for a range of logarithms to base 10."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 3 else (1, 2, 5)
    values = [decade + math.log10(factor) for decade in decades for factor in factors]
    return [value for value in values if low <= value <= high] or ticks(low, high)
