"""The report of a comparison: one HTML file with pictures, tables and charts in it."""

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..image_datasets import ImageError, Reference, list_references, load_image
from . import charts
from .charts import Result, name_of

TEMPLATE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --rule: #8884 }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h1, li, code { overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .4rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: bottom }
td { white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; white-space: normal }
td:nth-child(2) { min-width: 8rem }
.few { color: #999 }
.pictures th, .pictures td, .pictures td:nth-child(2) { padding: 2px; border: 0; text-align: center; font-size: 12px;
  font-weight: normal; min-width: 0; max-width: 96px; white-space: normal }
img { display: block; width: 96px; height: 96px; background: #fff }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem }
figure { margin: 0; background: #fff; border-radius: 4px }
figure svg { display: block; width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
<div class="wide"><table class="pictures">
<tr>{% for name, _ in pictures %}<th>{{ name }}</th>{% endfor %}</tr>
{% for line in range(count) %}
<tr>{% for _, column in pictures %}
<td>{% if column[line] %}<img{{ column[line] | xmlattr }}>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>Results</h2>
{% macro grid(headings, lines) %}
<div class="wide"><table><thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead><tbody>
{% for line in lines %}
<tr>{% for text, few in line %}
<td{% if few %} class="few" title="from too few pictures"{% endif %}>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{{ grid(headings, cells) }}
{% if few %}<p class="few">Grey values come from too few pictures.</p>{% endif %}
{% for warning in warnings %}<p><strong>Warning</strong>: {{ warning }}</p>{% endfor %}
{% if charts %}<h2>Charts</h2><div class="charts">
{% for chart in charts %}<figure>{{ chart }}</figure>{% endfor %}
</div>{% endif %}
{% if weights %}<h2>Weights in the merge, mean over guided steps</h2>
{{ grid(["method", "setting"] + directions, weights) }}{% endif %}
<details><summary>Protocol</summary><ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul></details>
<details><summary>Commands</summary><ul>
{% for row in results %}<li>{{ name_of(row) }}: <code>{{ row.command }}</code></li>{% endfor %}
</ul></details>
</body></html>
"""


@dataclass(frozen=True)
class Folders:
    """Folders of the report's pictures: the references, the save folder and the truths, if there are any."""

    sources: str
    made: str
    truth: str | None = None


def page(
    title: str,
    headings: Sequence[str],
    cells: Sequence[Sequence[tuple[str, bool]]],
    notes: Sequence[str],
    warnings: Sequence[str],
    results: Sequence[Result],
    folders: Folders,
    count: int,
) -> str:
    """The report as a string.

    headings, cells: of the table; a cell is (text, whether it rests on too few pictures). notes: the protocol. results:
    from `Comparison.run`. count: number of references shown.
    """
    import jinja2  # comes with torch
    from markupsafe import Markup

    shown = pictures(results, folders, count)
    figures = [*charts.trade_offs(results).values(), *charts.step_charts(results)]
    names, weights = mean_weights(results)
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    return template.render(
        title=title, headings=headings, cells=cells, notes=notes, warnings=warnings, results=results, pictures=shown,
        count=len(shown[0][1]), charts=[Markup(charts.svg(figure)) for figure in figures], directions=names,
        weights=weights, name_of=name_of, few=any(few for line in cells for _, few in line),
    )  # fmt: skip


def mean_weights(results: Sequence[Result]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Names of the merged directions, and for every row that merges some, cells with their mean weights."""
    names = list(dict.fromkeys(name for row in results for name in charts.directions(row)))
    lines = []
    for row in results:
        known = charts.directions(row)
        means = {n: np.mean([charts.weight(row, step, n) for step in row["curves"]]) for n in known}
        cells = [f"{means[n]:.4f}" if n in means else "" for n in names]
        if known:
            lines.append([(text, False) for text in (row["method"], row["setting"], *cells)])
    return names, lines


def pictures(results: Sequence[Result], folders: Folders, count: int) -> list[tuple[str, list[dict[str, str] | None]]]:
    """Columns of pictures: references, what every row made of them with its first seed, and truths.

    Returns (name, pictures as `picture` gives them) per column.
    """
    shown = [("source", folders.sources)]
    shown += [(name_of(row), os.path.join(folders.made, row["folder"])) for row in results]
    shown += [("truth", folders.truth)] if folders.truth else []
    made = [{reference.stem: reference for reference in list_references(folder)} for _, folder in shown]
    stems = [stem for stem in made[0] if all(stem in images for images in made[1 : len(results) + 1])]
    if stems:
        stems = [stems[round(i)] for i in np.linspace(0, len(stems) - 1, min(count, len(stems)))]
    return [(name, [picture(images.get(stem)) for stem in stems]) for (name, _), images in zip(shown, made)]


def picture(reference: Reference | None) -> dict[str, str] | None:
    """Attributes `alt` and `src` of an image of 128 pixels; None where there is no readable picture."""
    if reference is None:
        return None
    try:
        image = Image.fromarray(load_image(reference, 128))
    except ImageError:
        return None
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = os.path.basename(reference.name).encode("utf-8", "replace").decode()
    return {"alt": name, "src": f"data:image/webp;base64,{data}"}
