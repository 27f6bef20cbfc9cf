"""Comparison of methods: sample with every row and seed, evaluate, and set published results beside.

`commands` samples a row: an object with the methods of `Commands`; `cli.rows` has the one that starts this project's
scripts as processes.
"""

import dataclasses
import logging
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import InputError, display_name, one_line, shown
from ..image_datasets import list_references
from ..options import check, option
from ..run import files
from ..run import record as run_record
from ..run.record import curves
from . import charts, report, table
from .features import NAMED
from .packages import library
from .protocol import Evaluation, Instruments, evaluate

log = logging.getLogger("sddm")

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TRIAL = 3  # references of a trial
MOST_SEEDS = 1000
OWN_FILES = ("table.md", "table.csv", "results.json", "report.html", *charts.TRADE_OFFS)
"""Files that a comparison writes beside the folders of its rows."""


@dataclass(frozen=True)
class Compared:
    """Options of a comparison: models, images and seeds."""

    table: str = option("-", "the table; - is standard input", metavar="FILE")
    name: str = option("Benchmark", "title of the results")
    model_path: str = option(None, "diffusion model of the target domain", metavar="FILE")
    base_samples: str = option(None, "references", metavar="DIR")
    targets: str | None = option(None, "images of the target domain, for FID and KID", metavar="PATH")
    truth: str | None = option(None, "true translations with the references' names, if there are any", metavar="DIR")
    seeds: str = option("0,1,2", "seeds to sample with", metavar="SEEDS")
    num_samples: int | None = option(None, "number of references to use; default: all", least=1, most=100_000_000)
    only: str | None = option(None, "only rows whose method and setting contain this text")
    quick: bool = option(False, f"a trial: the first row of each method, one seed, {TRIAL} references")
    save_dir: str = option(None, "folder for images, tables and the report", metavar="DIR")
    pictures: int = option(10, "number of references shown in the report", least=1, most=1000, metavar="N")

    def __post_init__(self) -> None:
        check(self)
        for name in ("name", "model_path", "base_samples", "targets", "truth", "save_dir"):
            value = getattr(self, name)
            if value is not None and (len(value) > 4096 or not value.isprintable()):
                raise InputError("it has control characters or is too long", parameter=name, value=value)
        _ = self.seed_numbers

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds."""
        wrong: dict[str, Any] = {"parameter": "seeds", "value": self.seeds}
        parts = str(self.seeds).split(",")
        if len(parts) > MOST_SEEDS or not all(re.fullmatch(r"\s*-?[0-9]{1,18}\s*", part) for part in parts):
            raise InputError(f"it must be up to {MOST_SEEDS} whole numbers with commas between them", **wrong)
        numbers = [int(part) for part in parts]
        if len(set(numbers)) < len(numbers):
            raise InputError("it has a seed twice", **wrong)
        return numbers


@dataclass(frozen=True)
class Row:
    """One line of the table; published: FID and SSIM as printed, "" where there is none."""

    method: str
    setting: str
    script: str
    flags: tuple[str, ...]
    published: tuple[str, str]

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}" if self.setting else self.method

    @property
    def folder(self) -> str:
        """Name of the row's folder in the save folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")


class Commands(Protocol):
    """How rows are sampled. settings: parameters of the run by name, the same for all methods."""

    def flags(self, row: Row, settings: Mapping[str, Any]) -> list[str]:
        """The settings that determine the row's outputs, for the record beside its folder."""
        ...

    def run(self, row: Row, settings: Mapping[str, Any]) -> None:
        """Sample; raises InputError where the run ends without its outputs."""
        ...

    def text(self, row: Row) -> str:
        """The row's command, for readers."""
        ...


def check_folder(row: Row) -> None:
    """Raise InputError where a row's name does not make a folder of its own within the save folder."""
    if not row.folder.strip(".") or row.folder.lower() in OWN_FILES or len(os.fsencode(row.folder)) > 200:
        raise InputError(f"a row cannot be called {shown(row.name)}: its outputs would have no folder of their own")


def select(options: Compared, rows: Sequence[Row]) -> tuple[Compared, list[Row]]:
    """The rows that `only` and `quick` leave, and the options to compare them with."""
    chosen = [row for row in rows if options.only is None or options.only in row.name]
    if not chosen:
        raise InputError("no row's method and setting contain it", parameter="only", value=options.only)
    if options.quick:
        chosen = list({row.method: row for row in reversed(chosen)}.values())[::-1]
        options = dataclasses.replace(
            options,
            num_samples=min(TRIAL, options.num_samples or TRIAL),
            seeds=str(options.seed_numbers[0]),
            save_dir=options.save_dir.rstrip("/") + "_quick",  # apart from the outputs of a whole comparison
        )
    return options, chosen


def missing_files(options: Compared, measured: Evaluation) -> list[str]:
    """Names and paths of the options' files that do not exist, their parameters in backticks."""
    wanted = {name: getattr(options, name) for name in ("model_path", "base_samples", "targets", "truth")}
    wanted["features"] = None if measured.features in NAMED else measured.features
    wanted["inception_path"] = measured.inception_path
    missing = {name: path for name, path in wanted.items() if path and not os.path.exists(path) and "://" not in path}
    return [f"`{name}` {display_name(path)}" for name, path in missing.items()]


class Comparison:
    """Sample, measure and write; results that an earlier run of the same comparison has made are kept."""

    def __init__(self, options: Compared, measured: Evaluation, commands: Commands) -> None:
        self.options, self.measured, self.commands = options, measured, commands
        self.instruments = Instruments(measured)
        self.count = len(list_references(options.base_samples)[: options.num_samples])
        self.model = run_record.sha256(options.model_path)
        # Names and values are those of version 0.1, whose measurements stay valid.
        self.key = {name: getattr(measured, name) for name in ("sources", "targets", "truth", "protocol", "image_size")}
        lpips = {"True": True, "False": False}.get(measured.lpips, measured.lpips)
        self.key |= {"features": run_record.sha256(measured.features) or measured.features, "lpips": lpips}

    def run(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Sample and measure everything; returns one dict per row with its values by seed, means and deviations."""
        files.make_folder(self.options.save_dir, "save_dir")
        for row in rows:
            self._check_inside(row)
        library("matplotlib", "matplotlib", "the report's charts")  # what is missing is reported before sampling
        self.instruments.load()
        for warning in self.instruments.per_image[1]:
            log.warning("warning: %s", warning)
        results, seeds = [], self.options.seed_numbers
        for k, row in enumerate(rows):
            runs = {}
            for n, seed in enumerate(seeds):
                log.info("[%d/%d] %s, seed %d", k * len(seeds) + n + 1, len(rows) * len(seeds), row.name, seed)
                record = self._sample(row, seed)
                runs[seed] = record, self._measure(self.folder(row, seed), record)
            results.append(self._result(row, runs))
        return results

    def folder(self, row: Row, seed: int) -> str:
        """The save folder of a row's run."""
        return os.path.join(self.options.save_dir, row.folder, f"seed_{seed}")

    def _check_inside(self, row: Row) -> None:
        """Raise InputError where a link leads out of the save folder."""
        inside = os.path.realpath(self.options.save_dir)
        for seed in self.options.seed_numbers:
            folder = self.folder(row, seed)
            if os.path.commonpath([inside, os.path.realpath(folder)]) != inside:
                reason = f"{display_name(folder)} is a link that leads out of it"
                raise InputError(reason, parameter="save_dir", value=self.options.save_dir)

    def _sample(self, row: Row, seed: int) -> dict[str, Any]:
        """Sample one row with one seed, unless that is done; returns its run.json."""
        options, folder = self.options, self.folder(row, seed)
        settings = {"model_path": options.model_path, "base_samples": options.base_samples, "save_dir": folder}
        settings |= {"seed": seed, "num_samples": options.num_samples}
        stamp = f"{folder}.command.json"
        wanted = {"script": row.script, "flags": self.commands.flags(row, settings), "model": self.model}
        record = read_record(folder)
        if record and record["counts"]["references"] == self.count and files.read_json_or_none(stamp) == wanted:
            return record
        self.commands.run(row, settings)
        record = read_record(folder)
        if record is None:
            raise InputError(f"{row.name}, seed {seed}: {display_name(folder)} has no finished run after its command")
        files.write_json(stamp, wanted)
        return record

    def _measure(self, folder: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """The result for a run's folder, measured or from `folder`.json, where it was measured before."""
        key = {"options": self.key, "finished": record["finished"]}
        known = files.read_json_or_none(f"{folder}.json")
        if isinstance(known, dict) and known.get("key") == key and is_result(known.get("result")):
            return known["result"]
        partial = self.options.num_samples is not None or record["counts"]["failed"] > 0
        options = dataclasses.replace(self.measured, outputs=folder, partial=partial)
        result, _ = evaluate(options, instruments=self.instruments)
        files.write_json(f"{folder}.json", {"key": key, "result": result})
        return result

    def _result(self, row: Row, runs: Mapping[int, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
        costs = [value.key for value in table.values() if value.is_cost]
        values = {
            seed: {**result["metrics"], **{name: record.get(name) for name in costs}}
            for seed, (record, result) in runs.items()
        }
        mean, std = summarise(list(values.values()))
        first, (record, result) = next(iter(runs.items()))
        warnings = [warning for _, each in runs.values() for warning in each["warnings"]]
        return {
            "method": row.method,
            "setting": row.setting,
            "command": self.commands.text(row),
            "published": dict(zip(("fid", "source_ssim"), row.published)),
            "mean": mean,
            "std": std,
            "seeds": values,
            "images": result["counts"]["outputs"],
            "counts": result["counts"],
            "protocol": result["protocol"],
            "warnings": list(dict.fromkeys(warnings)),
            "folder": os.path.relpath(self.folder(row, first), self.options.save_dir),
            "energies": energy_names(record),
            "curves": curves(record),
        }

    def write(self, results: Sequence[Mapping[str, Any]]) -> str:
        """Write the tables, results.json, report.html and the charts to the save folder; returns table.md's text."""
        options = self.options
        headings, cells = table_of(results)
        notes = self.notes(results)
        warnings = list(dict.fromkeys(warning for row in results for warning in row["warnings"]))
        listed = "\n".join(f"- {note}" for note in [*notes, *(f"**warning**: {warning}" for warning in warnings)])
        details = "\n".join(f"- {charts.name_of(row)}: `{row['command']}`" for row in results)
        text = table.markdown_table(headings, [[text for text, _ in line] for line in cells])
        markdown = f"# {options.name}\n\n{text}\n\n{listed}\n\nSampled with\n\n{details}\n"
        folders = report.Folders(options.base_samples, options.save_dir, options.truth)
        page = report.page(options.name, headings, cells, notes, warnings, results, folders, options.pictures)
        save = {"table.md": markdown, "table.csv": csv_of(results), "report.html": page}
        save |= {name: charts.svg(figure) for name, figure in charts.trade_offs(results).items()}
        save["results.json"] = files.json_text({"name": options.name, "notes": notes, "rows": list(results)})
        for name, content in save.items():
            files.write_text(os.path.join(options.save_dir, name), content)
        return markdown

    def notes(self, results: Sequence[Mapping[str, Any]]) -> list[str]:
        """Facts that a reader needs beside the numbers."""
        options, seeds = self.options, self.options.seed_numbers
        notes = [
            f"model {os.path.basename(options.model_path)}, sha256 {str(self.model)[:12]}",
            f"references {options.base_samples.removeprefix(ROOT + os.sep)}: {results[0]['images']} outputs per seed",
            f"seeds {', '.join(map(str, seeds))}" + ("; mean ± standard deviation" if len(seeds) > 1 else ""),
            *table.protocol_notes(results[0]["protocol"]),
        ]
        if any(row["published"]["fid"] or row["published"]["source_ssim"] for row in results):
            notes.append("published: as printed in the papers, with their model and FID of Inception features")
        return notes


def read_record(folder: str) -> dict[str, Any] | None:
    """The run.json of a finished run; None where there is none, or one without the entries that are needed."""
    record = files.read_json_or_none(os.path.join(folder, run_record.NAME))
    try:
        entries = record["finished"], record["counts"]["references"], record["counts"]["failed"], record["settings"]
    except Exception:  # a record of another kind fails in many ways
        return None
    kinds = (str, int, int, dict)
    return record if all(isinstance(entry, kind) for entry, kind in zip(entries, kinds)) else None


def is_result(result: Any) -> bool:
    """Whether a stored result has every value that `evaluate` returns now, including newly registered metrics."""
    try:
        wanted = [value.key for value in table.values() if not value.is_cost]
        return all(isinstance(result["metrics"][key], (int, float, type(None))) for key in wanted)
    except (KeyError, TypeError):
        return False


def energy_names(record: Mapping[str, Any]) -> list[str]:
    """The energies that a run's record names, in the order of its weights."""
    names = record["settings"].get("energy") or []
    names = names.split(",") if isinstance(names, str) else names
    return [one_line(name, longest=40) for name in names] if isinstance(names, list) else []


def summarise(values: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float | None]]:
    """Mean and standard deviation over seeds of every value that all seeds have."""
    names = [name for name in values[0] if all(value[name] is not None for value in values)]
    mean = {name: statistics.fmean(value[name] for value in values) for name in names}
    if len(values) == 1:
        return mean, dict.fromkeys(names)
    return mean, {name: statistics.stdev(value[name] for value in values) for name in names}


def shown_columns(results: Sequence[Mapping[str, Any]]) -> list[table.Value]:
    """The columns that some row has a value for."""
    inception = any(table.is_inception(row["protocol"]) for row in results)
    return [column for column in table.columns(inception) if any(column.key in row["mean"] for row in results)]


def table_of(results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings and cells of the table; a cell is (text, whether it rests on too few pictures)."""
    columns, inception = shown_columns(results), any(table.is_inception(row["protocol"]) for row in results)
    headings = ["method", "setting", *(column.heading(inception) for column in columns)]
    published = {"fid": "published FID", "source_ssim": "published SSIM"}
    published = {key: heading for key, heading in published.items() if any(row["published"][key] for row in results)}
    cells = []
    for row in results:
        line = [(row["method"], False), (row["setting"], False)]
        for column in columns:
            known = column.key in row["mean"]
            text = column.cell(row["mean"][column.key], row["std"][column.key]) if known else ""
            line.append((text, table.is_unreliable(column, row["counts"], row["protocol"].get("dimensions"))))
        cells.append([*line, *((row["published"][key], False) for key in published)])
    return headings + list(published.values()), cells


def csv_of(results: Sequence[Mapping[str, Any]]) -> str:
    """All means and standard deviations as CSV."""
    keys = [column.key for column in shown_columns(results)]
    lines = []
    for row in results:
        line = {name: row[name] for name in ("method", "setting", "images")}
        line["seeds"] = " ".join(map(str, row["seeds"]))
        for key in keys:
            line |= {key: row["mean"].get(key), f"{key}_std": row["std"].get(key)}
        line |= {"published_fid": row["published"]["fid"], "published_ssim": row["published"]["source_ssim"]}
        lines.append({**line, "command": row["command"]})
    return table.csv_text(lines)
