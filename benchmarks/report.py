"""Files of a comparison: a table as Markdown and CSV, results.json, charts, and a report as one HTML file."""

import base64
import io
import os
from collections.abc import Sequence

import charts
import numpy as np
from charts import Result, name_of
from PIL import Image

from guided_diffusion.evaluation import table
from guided_diffusion.image_datasets import ImageError, Reference, list_references, load_image
from guided_diffusion.run import files

PUBLISHED = {"fid": "published FID", "source_ssim": "published SSIM"}

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
{% for line in range(pictures[0][1] | length) %}
<tr>{% for _, column in pictures %}
<td>{% if column[line] %}<img{{ column[line] | xmlattr }}>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<h2>Results</h2>
{% macro grid(headings, lines) %}
<div class="wide"><table><thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead><tbody>
{% for line in lines %}
<tr>{% for text in line %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{{ grid(headings, cells) }}
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


def write(
    results: Sequence[Result], notes: Sequence[str], *, name: str, save_dir: str, sources: str, truth: str | None,
    count: int,
) -> str:  # fmt: skip
    """Write the files of a comparison into its save folder; returns the text of table.md.

    notes: facts beside the numbers. sources, truth: folders of the report's pictures, of `count` references.
    """
    import jinja2  # comes with torch
    from markupsafe import Markup

    headings, cells = table_of(results)
    warnings = list(dict.fromkeys(warning for row in results for warning in row["warnings"]))
    lines = [f"# {name}", "", table.markdown_table(headings, cells), ""]
    lines += [f"- {note}" for note in [*notes, *(f"**warning**: {warning}" for warning in warnings)]]
    lines += ["", "Sampled with", "", *(f"- {name_of(row)}: `{row['command']}`" for row in results), ""]
    figures = {file: charts.trade_off(results, against) for file, against in charts.TRADE_OFFS.items()}
    drawn = {file: charts.svg(figure) for file, figure in figures.items() if figure}
    shown = [*drawn.values(), *map(charts.svg, charts.step_charts(results))]
    folders = [("source", sources), *((name_of(row), os.path.join(save_dir, row["folder"])) for row in results)]
    directions, weights = mean_weights(results)
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE).render(
        title=name, headings=headings, cells=cells, notes=notes, warnings=warnings, results=results, name_of=name_of,
        directions=directions, weights=weights, pictures=pictures(folders, truth, count), charts=map(Markup, shown),
    )  # fmt: skip
    content = {"table.md": "\n".join(lines), "table.csv": csv_of(results), "report.html": page, **drawn}
    content["results.json"] = files.json_text({"name": name, "notes": notes, "rows": list(results)})
    for file, text in content.items():
        files.write_text(os.path.join(save_dir, file), text)
    return content["table.md"]


def shown_columns(results: Sequence[Result]) -> tuple[list[table.Value], bool]:
    """The columns that some row has a value for, and whether distances are of Inception's features."""
    inception = any(table.is_inception(row["protocol"]) for row in results)
    known = {key for row in results for key in row["mean"]}
    return [v for v in table.values(inception) if v.key in known and not v.metric.hidden], inception


def table_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table."""
    columns, inception = shown_columns(results)
    published = {key: heading for key, heading in PUBLISHED.items() if any(row["published"][key] for row in results)}
    cells = []
    for row in results:
        mean, std = row["mean"], row["std"]
        values = [column.cell(mean[column.key], std[column.key]) if column.key in mean else "" for column in columns]
        cells.append([row["method"], row["setting"], *values, *(row["published"][key] for key in published)])
    return ["method", "setting", *(column.heading(inception) for column in columns), *published.values()], cells


def csv_of(results: Sequence[Result]) -> str:
    """All means and standard deviations as CSV."""
    columns, lines = shown_columns(results)[0], []
    for row in results:
        line = {name: row[name] for name in ("method", "setting", "images")}
        line["seeds"] = " ".join(map(str, row["seeds"]))
        for column in columns:
            line |= {column.key: row["mean"].get(column.key), f"{column.key}_std": row["std"].get(column.key)}
        line |= {"published_fid": row["published"]["fid"], "published_ssim": row["published"]["source_ssim"]}
        lines.append({**line, "command": row["command"]})
    return table.csv_text(lines)


def mean_weights(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Names of the merged directions, and for every row that merges some, cells with their mean weights."""
    found = [(row, {name: f"{np.mean(ys):.4f}" for name, ys in charts.weights(row).items()}) for row in results]
    names = list(dict.fromkeys(name for _, means in found for name in means))
    return names, [[row["method"], row["setting"], *(m.get(name, "") for name in names)] for row, m in found if m]


def pictures(
    folders: Sequence[tuple[str, str]], truth: str | None, count: int
) -> list[tuple[str, list[dict[str, str] | None]]]:
    """Columns (name, pictures) of what all folders, (name, path), have. truth: a folder that may have fewer."""
    shown = [*folders, ("truth", truth)] if truth else folders
    made = [{reference.stem: reference for reference in list_references(folder)} for _, folder in shown]
    stems = [stem for stem in made[0] if all(stem in images for images in made[: len(folders)])]
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
