"""Comparison of methods: sample with every row of a table and every seed, evaluate, and summarise over seeds."""

import contextlib
import dataclasses
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import report
from rows import SCRIPTS, Row, refuse_own_flags

from guided_diffusion.errors import InputError, display_name, library, log, shown
from guided_diffusion.evaluation import METRICS, Evaluation, Instruments, evaluate, table
from guided_diffusion.evaluation.features import NAMED
from guided_diffusion.image_datasets import list_references
from guided_diffusion.options import Checked, option
from guided_diffusion.presets import ROOT
from guided_diffusion.run import files
from guided_diffusion.run import record as run_record
from guided_diffusion.run.record import curves

TRIAL = 3  # references of a trial


@dataclass(frozen=True)
class Compared(Checked):
    """Options of a comparison: models, images and seeds, and how rows are sampled."""

    table: str = option("-", "file of the table; - for standard input", metavar="FILE")
    name: str = option("Benchmark", "title of the results")
    model_path: str = option(None, "model of the target domain", metavar="FILE")
    base_samples: str = option(None, "folder of reference images", metavar="DIR")
    targets: str | None = option(None, "images of the target domain, for FID and KID", metavar="PATH")
    truth: str | None = option(None, "true translations, by the references' names", metavar="DIR")
    seeds: str = option("0,1,2", "comma-separated sampling seeds", metavar="SEEDS")
    num_samples: int | None = option(None, "maximum number of references", least=1, most=100_000_000)
    only: str | None = option(None, "run only the rows whose method and setting contain this text")
    quick: bool = option(False, f"trial run: the first row of each method, one seed, {TRIAL} references")
    save_dir: str = option(None, "output folder for images, tables and the report", metavar="DIR")
    pictures: int = option(10, "number of references shown in the report", least=1, most=1000, metavar="N")
    flags: str = option("", "flags added to every row, such as '--precision bf16'", metavar="TEXT")
    batch_size: int | str = option(8, "images per batch, or auto", metavar="N", least=1, most=10**9, runtime=True)
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", metavar="NAME", runtime=True)
    processes: int = option(1, "number of processes per run on this machine", least=1, most=4096, runtime=True)
    launch: str = option("", "launcher of each run, such as 'srun' or 'mpiexec -n 8'", metavar="TEXT", runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, str) and not value.isprintable():
                raise InputError("it has control characters", parameter=name, value=value)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise InputError("it must be a whole number, or auto", parameter="batch_size", value=self.batch_size)
        if self.processes > 1 and self.launch:
            reason = f"it and `launch` {shown(self.launch)} exclude each other"
            raise InputError(reason, parameter="processes", value=self.processes)
        refuse_own_flags(self.words("flags"), "`flags`")
        self.words("launch")
        known = set(self.seed_numbers) if re.fullmatch(r"-?[0-9]{1,18}(,\s*-?[0-9]{1,18})*", self.seeds) else ()
        if len(known) <= self.seeds.count(","):
            reason = "it must be different whole numbers with commas between them"
            raise InputError(reason, parameter="seeds", value=self.seeds)

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds."""
        return [int(part) for part in self.seeds.split(",")]

    def words(self, name: str) -> list[str]:
        """A field's text as words of a command line."""
        try:
            return shlex.split(getattr(self, name))
        except ValueError as error:
            raise InputError(f"it cannot be read ({error})", parameter=name, value=getattr(self, name)) from None


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


def check_files(options: Compared, measured: Evaluation, rows: Sequence[Row]) -> None:
    """Raise InputError that lists all files of the options and the rows that do not exist."""
    wanted = [(f"`{name}`", getattr(options, name)) for name in ("model_path", "base_samples", "targets", "truth")]
    wanted += [("`features`", None if measured.features in NAMED else measured.features)]
    wanted += [("`inception_path`", measured.inception_path)]
    words = [word for row in rows for flag in row.flags for word in flag.split("=", 1)]
    wanted += [(flag, path) for flag, path in pairwise(words) if re.fullmatch(r"--\w*path", flag)]
    given = [(name, path) for name, path in dict.fromkeys(wanted) if path and "://" not in path]
    missing = [f"{name} {display_name(path)}" for name, path in given if not os.path.exists(path)]
    if missing:
        raise InputError(f"missing: {'; '.join(missing)}")


class Comparison:
    """Sample and measure; results that an earlier run of the same comparison has made are kept."""

    def __init__(self, options: Compared, measured: Evaluation) -> None:
        self.options, self.measured = options, measured
        self.instruments = Instruments(measured)
        self.count = len(list_references(options.base_samples)[: options.num_samples])
        self.model = run_record.sha256(options.model_path)
        names = ("sources", "targets", "truth", "protocol", "image_size", "lpips")
        self.key = {name: getattr(measured, name) for name in names}
        self.key |= {"features": run_record.sha256(measured.features) or measured.features, "metrics": sorted(METRICS)}

    def run(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """Sample and measure everything; returns one dict per row with its values by seed, means and deviations."""
        runs = [(row, seed, self.folder(row, seed)) for row in rows for seed in self.options.seed_numbers]
        files.make_folder(self.options.save_dir, "save_dir")
        for _, _, folder in runs:
            if not files.inside(folder, self.options.save_dir):
                reason = f"{display_name(folder)} is a link that leads out of it"
                raise InputError(reason, parameter="save_dir", value=self.options.save_dir)
        library("matplotlib", "matplotlib", "the report's charts")  # what is missing is reported before sampling
        self.instruments.load()
        for warning in self.instruments.per_image[1]:
            log.warning("warning: %s", warning)
        found: dict[Row, dict[int, tuple[dict[str, Any], dict[str, Any]]]] = {}
        for n, (row, seed, folder) in enumerate(runs, 1):
            log.info("[%d/%d] %s, seed %d", n, len(runs), row.name, seed)
            record = self._sample(row, seed, folder)
            found.setdefault(row, {})[seed] = record, self._measure(folder, record)
        return [self._result(row, runs) for row, runs in found.items()]

    def folder(self, row: Row, seed: int) -> str:
        """The save folder of a row's run."""
        return os.path.join(self.options.save_dir, row.folder, f"seed_{seed}")

    def write(self, results: Sequence[Mapping[str, Any]]) -> str:
        """Write the results of `run`, see `report.write`; returns the text of table.md."""
        options, seeds = self.options, self.options.seed_numbers
        notes = [
            f"model {os.path.basename(options.model_path)}, sha256 {str(self.model)[:12]}",
            f"references {options.base_samples.removeprefix(ROOT + os.sep)}: {results[0]['images']} outputs per seed",
            f"seeds {', '.join(map(str, seeds))}" + ("; mean ± standard deviation" if len(seeds) > 1 else ""),
            *table.protocol_notes(results[0]["protocol"]),
        ]
        if any(row["published"]["fid"] or row["published"]["source_ssim"] for row in results):
            notes.append("published: as printed in the papers, with their model and FID of Inception features")
        folders = {"save_dir": options.save_dir, "sources": options.base_samples, "truth": options.truth}
        return report.write(results, notes, name=options.name, count=options.pictures, **folders)

    def _sample(self, row: Row, seed: int, folder: str) -> dict[str, Any]:
        """Sample one row with one seed, unless that is done; returns its run.json."""
        options, stamp = self.options, f"{folder}.command.json"
        flags = ["--model_path", options.model_path, "--base_samples", options.base_samples, "--save_dir", folder]
        flags += ["--seed", str(seed), *row.flags, *options.words("flags")]
        flags += ["--num_samples", str(options.num_samples)] if options.num_samples else []
        wanted = {"script": row.script, "flags": flags, "model": self.model}
        record = read_record(folder)
        if record and record["counts"]["references"] == self.count and files.read_json_or_none(stamp) == wanted:
            return record
        command = [*options.words("launch"), sys.executable]
        if options.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
        command += [os.path.join(SCRIPTS, row.script), *flags]
        command += ["--batch_size", str(options.batch_size), "--device", options.device]
        status = run(command)
        if status not in (0, 1):
            raise InputError(f"{row.name}, seed {seed}: ended with status {status}: {shlex.join(command)}")
        record = read_record(folder)
        if record is None:
            raise InputError(f"{row.name}, seed {seed}: {display_name(folder)} has no finished run after its command")
        files.write_json(stamp, wanted)
        return record

    def _measure(self, folder: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """The result for a run's folder, measured or from `folder`.json, where it was measured before."""
        key, known = {"options": self.key, "finished": record["finished"]}, files.read_json_or_none(f"{folder}.json")
        if isinstance(known, dict) and known.get("key") == key:
            return known["result"]
        partial = self.options.num_samples is not None or record["counts"]["failed"] > 0
        options = dataclasses.replace(self.measured, outputs=folder, partial=partial)
        result, _ = evaluate(options, instruments=self.instruments)
        files.write_json(f"{folder}.json", {"key": key, "result": result})
        return result

    def _result(self, row: Row, runs: Mapping[int, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
        """A row's result, of the record and the evaluation of every seed's run."""
        costs = [metric.name for metric in METRICS.values() if metric.is_cost]
        seeds = {
            seed: {**result["metrics"], **{name: record.get(name) for name in costs}}
            for seed, (record, result) in runs.items()
        }
        first, (record, result) = next(iter(runs.items()))
        by_name = {name: [values[name] for values in seeds.values()] for name in seeds[first]}
        known = {name: values for name, values in by_name.items() if None not in values}
        warnings = [warning for _, each in runs.values() for warning in each["warnings"]]
        words = [row.script, *row.flags, *self.options.words("flags")]
        return {
            "method": row.method,
            "setting": row.setting,
            "command": shlex.join(word.removeprefix(ROOT + os.sep) for word in words),
            "published": dict(zip(("fid", "source_ssim"), row.published)),
            "mean": {name: statistics.fmean(values) for name, values in known.items()},
            "std": {name: statistics.stdev(v) if len(v) > 1 else None for name, v in known.items()},
            "seeds": seeds,
            "images": result["counts"]["outputs"],
            "protocol": result["protocol"],
            "warnings": list(dict.fromkeys(warnings)),
            "folder": os.path.relpath(self.folder(row, first), self.options.save_dir),
            "energies": record["settings"].get("energy") or [],
            "curves": curves(record),
        }


def read_record(folder: str) -> dict[str, Any] | None:
    """The run.json of a finished run, or None."""
    with contextlib.suppress(InputError):
        record = run_record.read(folder)
        return record if record and record["finished"] else None


def run(command: Sequence[str]) -> int:
    """Run a command whose messages go to this process's stderr; it ends with this one."""
    try:
        process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(command[0])} cannot be started: {error}") from None
    with process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # and wait for its end
            raise
