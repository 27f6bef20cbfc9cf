"""Compare methods: sample with every method, setting and seed of a table, evaluate, and set published results beside.

The table says how each row is sampled; scripts/cat2dog.sh and its neighbours hold one each. A line is

    method | setting | script and its flags | published FID | published SSIM

where the last two may be missing and # begins a comment. Every row is sampled with every seed, in a process of its own,
on the same references and with the same model. A run that was killed goes on when the same command is started again.
"""

import argparse
import csv
import io
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import report  # noqa: E402

from guided_diffusion import run_record  # noqa: E402
from guided_diffusion.dist_util import default_device  # noqa: E402
from guided_diffusion.errors import UserError  # noqa: E402
from guided_diffusion.image_datasets import list_references  # noqa: E402
from guided_diffusion.monitor import curves  # noqa: E402
from guided_diffusion.outputs import write_atomically, write_json  # noqa: E402
from guided_diffusion.script_util import str2bool  # noqa: E402

# What the table shows, where it was measured: key, heading, format, factor.
COLUMNS = (
    ("fid", "FID ↓", ".2f", 1),
    ("kid", "KID·10³ ↓", ".2f", 1000),
    ("source_ssim", "SSIM ↑", ".3f", 1),
    ("source_l2", "L2 ↓", ".2f", 1),
    ("source_psnr", "PSNR ↑", ".2f", 1),
    ("source_msssim", "MS-SSIM ↑", ".3f", 1),
    ("source_lpips", "LPIPS ↓", ".3f", 1),
    ("truth_ssim", "SSIM to truth ↑", ".3f", 1),
    ("truth_l2", "L2 to truth ↓", ".2f", 1),
    ("truth_psnr", "PSNR to truth ↑", ".2f", 1),
    ("truth_msssim", "MS-SSIM to truth ↑", ".3f", 1),
    ("truth_lpips", "LPIPS to truth ↓", ".3f", 1),
    ("negative_impact", "negative impact ↓", ".3f", 1),
    ("seconds_per_image", "s/image", ".3g", 1),
    ("model_evaluations", "evaluations", ".0f", 1),
)
QUICK = 3  # references of --quick
FILE_FLAGS = ("--dsepath", "--vgg_path", "--classifier_path")  # of rows, looked for before anything is sampled


@dataclass(frozen=True)
class Row:
    """One line of the table; published: FID and SSIM as printed, "" where there is none."""

    method: str
    setting: str
    script: str
    flags: tuple
    published: tuple

    @property
    def name(self):
        return f"{self.method}, {self.setting}" if self.setting else self.method

    @property
    def folder(self):
        return re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")


def parse_table(text, source="--table"):
    """The rows of a table; raises UserError that names the line which cannot be read."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        where = f"{source}, line {number}"
        cells = [cell.strip() for cell in line.split("|")]
        if not 3 <= len(cells) <= 5:
            raise UserError(f"{where}: {len(cells)} columns; method | setting | command | FID | SSIM are needed")
        try:
            script, *flags = shlex.split(cells[2]) or [""]
        except ValueError as error:
            raise UserError(f"{where}: the command cannot be read ({error})") from None
        if not os.path.isfile(os.path.join(ROOT, "scripts", script)) or not script.endswith("_sample.py"):
            raise UserError(f"{where}: {script!r} is no sampling script, such as ae_sample.py")
        row = Row(*cells[:2], script, tuple(flags), (*cells[3:], "", "")[:2])
        if any(row.folder.lower() == other.folder.lower() for other in rows):
            raise UserError(f"{where}: a second row with the name '{row.name}'")
        rows.append(row)
    if not rows:
        raise UserError(f"{source}: no row in it")
    return rows


def parse_flags():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    boolean = {"type": str2bool, "default": False, "metavar": "BOOL", "nargs": "?", "const": True}
    what = parser.add_argument_group("what is compared")
    what.add_argument("--table", default="-", metavar="FILE", help="the table; - is standard input (default -)")
    what.add_argument("--name", default="Benchmark", help="title of the results")
    what.add_argument("--model_path", required=True, metavar="FILE", help="the target domain's diffusion model")
    what.add_argument("--base_samples", required=True, metavar="DIR", help="references")
    what.add_argument("--targets", metavar="DIR|FILE.npz", help="images of the target domain, for FID and KID")
    what.add_argument("--truth", metavar="DIR", help="true translations with the references' names, if there are any")
    what.add_argument("--seeds", type=seeds, default=[0, 1, 2], metavar="N,N,...", help="(default 0,1,2)")
    what.add_argument("--num_samples", type=positive, metavar="N", help="only the first so many references")
    what.add_argument("--only", metavar="TEXT", help="only rows whose method and setting contain this")
    what.add_argument("--quick", **boolean, help=f"a trial: the first row of each method, seed, {QUICK} references")
    what.add_argument("--save_dir", required=True, metavar="DIR", help="folder for images, tables and the report")

    how = parser.add_argument_group("how it is sampled")
    how.add_argument("--flags", default="", metavar="'...'", help="flags for every row, as '--precision bf16'")
    how.add_argument("--batch_size", default="8", metavar="N|auto", help="(default 8)")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    how.add_argument("--processes", type=positive, default=1, metavar="N", help="processes per run here (default 1)")
    how.add_argument("--launch", default="", metavar="'...'", help="what starts each run, as 'srun' or 'mpiexec -n 8'")

    protocol = parser.add_argument_group("how it is evaluated", "see scripts/evaluate.py")
    protocol.add_argument("--features", default="inception", metavar="NAME")
    protocol.add_argument("--inception_path", metavar="FILE")
    protocol.add_argument("--protocol", default="egsde", choices=("egsde", "egsde-male2female"))
    protocol.add_argument("--image_size", type=positive, default=256, metavar="N")
    protocol.add_argument("--lpips", default="auto", type=lambda text: text if text == "auto" else str2bool(text))
    protocol.add_argument("--pictures", type=positive, default=10, metavar="N", help="references shown in the report")
    return parser.parse_args()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def seeds(text):
    numbers = [int(part) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text} has a seed twice")
    return numbers


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def check_files(args, rows):
    """Raise UserError that names every file which is missing."""
    wanted = {f"--{name}": getattr(args, name) for name in ("model_path", "base_samples", "targets", "truth")}
    wanted["--features"] = None if args.features == "inception" else args.features
    wanted["--inception_path"] = args.inception_path
    files = [(flag, path) for flag, path in wanted.items() if path]
    for row in rows:
        files += [(flag, row.flags[i + 1]) for i, flag in enumerate(row.flags[:-1]) if flag in FILE_FLAGS]
    missing = [file for file in dict.fromkeys(files) if not os.path.exists(file[1]) and "://" not in file[1]]
    if missing:
        raise UserError(f"missing: {'; '.join(map(' '.join, missing))}")


def sample(args, row, seed, folder):
    """Sample one row with one seed into a folder, unless that is done; returns its run.json."""
    flags = ["--model_path", args.model_path, "--base_samples", args.base_samples, "--save_dir", folder]
    flags += ["--seed", str(seed), *row.flags, *shlex.split(args.flags)]
    if args.num_samples:
        flags += ["--num_samples", str(args.num_samples)]
    stamp = f"{folder}.command.json"
    wanted = {"script": row.script, "flags": flags, "model": run_record.sha256(args.model_path)}
    if read_json(stamp) == wanted and is_complete(args, read_json(os.path.join(folder, run_record.NAME))):
        return read_json(os.path.join(folder, run_record.NAME))
    command = [sys.executable, os.path.join(ROOT, "scripts", row.script), *flags]
    command += ["--batch_size", args.batch_size, "--device", args.device]
    if args.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.processes)]
        command[1:1] = torchrun
    status = run([*shlex.split(args.launch), *command])
    if status not in (0, 1):
        raise UserError(f"{row.name}, seed {seed}: ended with status {status}: {shlex.join(command)}")
    record = read_json(os.path.join(folder, run_record.NAME))
    if record is None or not record["finished"]:
        raise UserError(f"{row.name}, seed {seed}: {folder} has no finished run after: {shlex.join(command)}")
    write_json(stamp, wanted)
    return record


def run(command):
    """Run a command whose messages go to this process's stderr; it ends with this one."""
    process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def is_complete(args, record):
    """Whether a run.json tells of a finished run of all references."""
    if not record or not record.get("finished"):
        return False
    return record["counts"]["references"] == len(list_references(args.base_samples)[: args.num_samples])


class Evaluator:
    """Evaluates folders by one protocol; networks and the targets' features are loaded once, when first needed."""

    def __init__(self, args):
        self.options = {
            "sources": args.base_samples,
            "targets": args.targets,
            "truth": args.truth,
            "protocol": args.protocol,
            "image_size": args.image_size,
        }
        self.description = {**self.options, "features": args.features, "lpips": args.lpips}
        if os.path.isfile(args.features):
            self.description["features"] = run_record.sha256(args.features)
        self.args, self.loaded, self.cache = args, None, {}

    def load(self):
        """Options of `evaluate` that take time to make; raises UserError where they cannot be had."""
        from guided_diffusion import metrics

        if self.loaded is None:
            device = self.args.device if self.args.device != "auto" else default_device()
            self.loaded = {"device": device, "cache": self.cache, "lpips": False}
            if self.args.targets:
                self.loaded["features"] = metrics.feature_extractor(
                    self.args.features, device=device, inception_path=self.args.inception_path
                )
            try:
                self.loaded["lpips"] = self.args.lpips and metrics.load_lpips(device=device)
            except UserError as error:
                if self.args.lpips is True:
                    raise
                print(f"{error}; LPIPS is left out", file=sys.stderr)
        return self.loaded

    def __call__(self, folder, record):
        """The result for a run's folder, measured or from `folder`.json, where it was measured before."""
        from guided_diffusion import evaluation

        key = {"options": self.description, "finished": record["finished"]}
        known = read_json(f"{folder}.json")
        if known and known["key"] == key:
            return known["result"]
        partial = self.args.num_samples is not None or record["counts"]["failed"] > 0
        result, _ = evaluation.evaluate(folder, **self.options, **self.load(), partial=partial)
        write_json(f"{folder}.json", {"key": key, "result": result})
        return result


def measure(args, rows, evaluator):
    """Sample and evaluate everything; returns one dict per row with its values by seed, means and deviations."""
    results, total, number = [], len(rows) * len(args.seeds), 0
    for row in rows:
        values, runs = {}, []
        for seed in args.seeds:
            number += 1
            print(f"[{number}/{total}] {row.name}, seed {seed}", file=sys.stderr)
            folder = os.path.join(args.save_dir, row.folder, f"seed_{seed}")
            record = sample(args, row, seed, folder)
            result = evaluator(folder, record)
            cost = {name: record.get(name) for name in ("seconds_per_image", "model_evaluations")}
            values[seed] = {**result["metrics"], **cost}
            runs.append((folder, record, result))
        mean, std = summarise(list(values.values()))
        results.append({
            "method": row.method,
            "setting": row.setting,
            "command": shlex.join(map(shown, [row.script, *row.flags, *shlex.split(args.flags)])),
            "published": dict(zip(("fid", "source_ssim"), row.published)),
            "mean": mean,
            "std": std,
            "seeds": values,
            "images": runs[0][2]["counts"]["outputs"],
            "protocol": runs[0][2]["protocol"],
            "warnings": list(dict.fromkeys(warning for *_, result in runs for warning in result["warnings"])),
            "folder": os.path.relpath(runs[0][0], args.save_dir),
            "curves": curves(runs[0][1]),
        })
    return results


def summarise(values):
    """Mean and standard deviation over seeds of every value that all seeds have."""
    names = [name for name in values[0] if all(value[name] is not None for value in values)]
    mean = {name: statistics.fmean(value[name] for value in values) for name in names}
    if len(values) == 1:
        return mean, dict.fromkeys(names)
    return mean, {name: statistics.stdev(value[name] for value in values) for name in names}


def write_results(args, results):
    """table.md, table.csv, results.json, report.html and trade_off*.svg in the save folder."""
    columns = [column for column in COLUMNS if any(column[0] in row["mean"] for row in results)]
    headings, cells = table(results, columns)
    notes = make_notes(args, results)
    text = "\n".join(["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)])
    text += "".join("\n| " + " | ".join(line) + " |" for line in cells)
    details = "\n".join(f"- {report.name_of(row)}: `{row['command']}`" for row in results)
    listed = "\n".join(f"- {note}" for note in notes)
    markdown = f"# {args.name}\n\n{text}\n\n{listed}\n\nSampled with\n\n{details}\n"
    save = {
        "table.md": markdown,
        "table.csv": as_csv(results, columns),
        "report.html": report.page(args.name, headings, cells, notes, results, args),
    }
    save |= {name: chart.file() for name, chart in report.trade_offs(results).items()}
    for name, content in save.items():
        data = content.encode("utf-8", "surrogateescape")
        write_atomically(os.path.join(args.save_dir, name), lambda file, data=data: file.write(data))
    write_json(os.path.join(args.save_dir, "results.json"), {"name": args.name, "notes": notes, "rows": results})
    return markdown


def table(results, columns):
    """Headings and cells of the table that people read."""
    headings = ["method", "setting", *(heading for _, heading, *_ in columns)]
    if not report.comparable(results):  # FID and KID are names of distances between Inception features only
        headings = [heading.replace("FID", "Fréchet").replace("KID", "kernel") for heading in headings]
    published = {"fid": "published FID", "source_ssim": "published SSIM"}
    published = {key: heading for key, heading in published.items() if any(row["published"][key] for row in results)}
    cells = []
    for row in results:
        line = [row["method"], row["setting"]]
        for key, _, form, factor in columns:
            if key not in row["mean"]:
                line.append("")
                continue
            text = format(row["mean"][key] * factor, form)
            # Costs vary with the machine, not with the seed.
            if row["std"][key] is not None and key not in ("seconds_per_image", "model_evaluations"):
                text += f" ± {row['std'][key] * factor:{form}}"
            line.append(text)
        cells.append([*line, *(row["published"][key] for key in published)])
    return headings + list(published.values()), cells


def as_csv(results, columns):
    names = ["method", "setting", "images", "seeds"]
    names += [name for key, *_ in columns for name in (key, f"{key}_std")]
    names += ["published_fid", "published_ssim", "command"]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in results:
        line = {name: row[name] for name in ("method", "setting", "images", "command")}
        line["seeds"] = " ".join(map(str, row["seeds"]))
        line |= {"published_fid": row["published"]["fid"], "published_ssim": row["published"]["source_ssim"]}
        for key, *_ in columns:
            line |= {key: row["mean"].get(key), f"{key}_std": row["std"].get(key)}
        writer.writerow(line)
    return text.getvalue()


def make_notes(args, results):
    """What a reader needs to know beside the numbers."""
    notes = [
        f"model {os.path.basename(args.model_path)}, sha256 {str(run_record.sha256(args.model_path))[:12]}",
        f"references {shown(args.base_samples)}: {results[0]['images']} outputs per seed",
        f"seeds {', '.join(map(str, args.seeds))}" + ("; mean ± standard deviation" if len(args.seeds) > 1 else ""),
    ]
    notes += [f"{key}: {value}" for key, value in results[0]["protocol"].items()]
    if any(row["published"]["fid"] or row["published"]["source_ssim"] for row in results):
        notes.append("published: as printed in the papers, with their model and FID of Inception features")
    warnings = dict.fromkeys(warning for row in results for warning in row["warnings"])
    return notes + [f"**warning**: {warning}" for warning in warnings]


def shown(path):
    """A path as the results name it: from the repository's folder on, if it lies there."""
    return path.removeprefix(ROOT + os.sep)


def read_json(path):
    """The content of a JSON file; None where there is none that can be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def read_rows(args):
    """The rows that --table and --only leave."""
    try:
        if args.table == "-":
            text = sys.stdin.read()
        else:
            with open(args.table, encoding="utf-8") as file:
                text = file.read()
    except (OSError, ValueError) as error:
        raise UserError(f"--table {args.table} cannot be read: {error}") from None
    rows = [row for row in parse_table(text) if args.only is None or args.only in row.name]
    if not rows:
        raise UserError(f"--only {args.only}: no row's method and setting contain it")
    return rows


def main():
    args = parse_flags()
    rows = read_rows(args)
    if args.quick:
        rows = [row for i, row in enumerate(rows) if row.method not in {other.method for other in rows[:i]}]
        args.num_samples, args.seeds = min(QUICK, args.num_samples or QUICK), args.seeds[:1]
        args.save_dir = args.save_dir.rstrip("/") + "_quick"  # its outputs do not get mixed into the real one's
    if args.processes > 1 and args.launch:
        raise UserError(f"--processes {args.processes} and --launch {args.launch!r} exclude each other")
    check_files(args, rows)
    evaluator = Evaluator(args)
    evaluator.load()  # what cannot be had is said before hours of sampling
    print(write_results(args, measure(args, rows, evaluator)), end="")
    print(f"report: {os.path.join(args.save_dir, 'report.html')}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)
