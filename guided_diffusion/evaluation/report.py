"""The comparison's report: one HTML file with pictures, table and charts in it, that needs nothing else."""

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..image_datasets import ImageError, Reference, list_references, load_image
from . import charts
from .charts import name_of

STYLE = (
    """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --grid: #e2e2e2; --rule: #ddd }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --grid: #33373d; --rule: #3a3f46 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 76rem; padding: 0 1rem }
h1 { overflow-wrap: anywhere }
ul { padding-left: 1.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: bottom }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left }
td:nth-child(n+3) { white-space: nowrap }
td:nth-child(2) { min-width: 8.5rem }
.pictures td, .pictures td:nth-child(2), .pictures th { padding: 2px; border: 0; text-align: center; font-size: 12px;
  font-weight: normal; min-width: 0; max-width: 96px; white-space: normal }
.pictures img { display: block; width: 96px; height: 96px; background: #fff }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 2rem 1.5rem }
figure { margin: 0; max-width: 36rem; min-width: 0 }
figure > svg { display: block; width: 100%; height: auto }
figcaption { font-weight: 600 }
@media (max-width: 32rem) { figure > svg text:not(.halo) { font-size: 15px } }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: 13px }
.key span { display: inline-flex; align-items: center; gap: .4rem }
.swatch { width: 30px; height: 12px; flex: none }
li { overflow-wrap: anywhere }
code { font-size: 13px; overflow-wrap: anywhere }
"""
    + charts.FONT
)


@dataclass(frozen=True)
class Folders:
    """Where the report's pictures are: the references, the save folder and the truths, if there are any."""

    sources: str
    made: str
    truth: str | None = None


def page(
    title: str,
    headings: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    folders: Folders,
    count: int,
) -> str:
    """The report as a string.

    headings, cells, notes: of the table, as text; results: what `Comparison.run` returns; count: of references shown.
    """
    drawn = [*charts.trade_offs(results).values(), *charts.step_charts(results)]
    commands = [f"<li>{html.escape(name_of(row))}: <code>{html.escape(row['command'])}</code></li>" for row in results]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        '<div class="wide">' + html_table(headings, cells) + "</div>",
        "<ul>" + "".join(f"<li>{html.escape(note.replace('**', ''))}</li>" for note in notes) + "</ul>",
        "<h2>Side by side</h2>",
        '<div class="wide">' + pictures(results, folders, count) + "</div>",
        "<h2>Charts</h2>",
        '<div class="charts">' + "".join(chart.figure() for chart in drawn) + "</div>",
        "<h2>How each row was sampled</h2>",
        "<ul>" + "".join(commands) + "</ul>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def html_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def pictures(results: Sequence[Mapping[str, Any]], folders: Folders, count: int) -> str:
    """A table of references and what every row made of them with its first seed."""
    shown = [("source", folders.sources)]
    shown += [(name_of(row), os.path.join(folders.made, row["folder"])) for row in results]
    if folders.truth:
        shown.append(("truth", folders.truth))
    made = [{reference.stem: reference for reference in list_references(folder)} for _, folder in shown]
    stems = [stem for stem in made[0] if all(stem in images for images in made[1 : len(results) + 1])]
    if stems:
        stems = [stems[round(i)] for i in np.linspace(0, len(stems) - 1, min(count, len(stems)))]
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in shown)
    lines = ["".join(f"<td>{picture(images.get(stem))}</td>" for images in made) for stem in stems]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="pictures"><tr>{head}</tr>{body}</table>'


def picture(reference: Reference | None) -> str:
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
    name = os.path.basename(reference.name).encode("utf-8", "replace").decode()
    return f'<img alt="{html.escape(name)}" src="data:image/webp;base64,{data}">'
