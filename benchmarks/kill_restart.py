"""SIGKILL runs of ae_sample.py at random moments, restart them until they are done, and compare with an unbroken run.

    python benchmarks/kill_restart.py --processes 1 2 --kills 50 20

Every round starts with an empty folder and continues, kill after kill, until the run ends by itself; rounds follow
until the kills are used up. Moments are uniform over the time that an unbroken run takes, start-up and last writing
included. The folder must then equal the unbroken run's byte for byte, with no other file in it; in run.json, where
times differ, the settings, the plan and the counts must be equal. An image may be computed twice only if it was in
flight at a kill: its batch begun, and some image of the batch not on disk.

Writes benchmarks/results/kill_restart.json and .md. Exit status 1 where anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "models" / "fluent3d_64.safetensors"


def child(log, flags):
    """ae_sample.py with `flags`; every batch that a process begins adds a line to `log`."""
    sys.path.insert(0, str(ROOT))
    from guided_diffusion.run import job

    class LoggedNoise(job.ImageNoise):
        """A job makes one for each batch, from the names that its images have in the run."""

        def __init__(self, names, device):
            with open(log, "a") as file:
                file.write(json.dumps([name.partition("/")[2].partition("#")[0] for name in names]) + "\n")
            super().__init__(names, device)

    job.ImageNoise = LoggedNoise
    sys.argv = ["ae_sample.py", *flags]
    runpy.run_path(str(ROOT / "scripts" / "ae_sample.py"), run_name="__main__")


class Series:
    """Rounds of one configuration. `figures` is what they add up to."""

    def __init__(self, root, args, processes, kills):
        self.root, self.args, self.processes, self.kills = root, args, processes, kills
        self.random = random.Random(args.seed * 1000 + processes)
        self.log = root / "log"
        self.figures = {
            "processes": processes,
            "kills": 0,
            "rounds": 0,
            "images": 0,
            "batches_begun": 0,
            "computed_twice": 0,
            "computed_twice_not_in_flight": 0,
            "in_flight_at_kills": 0,
            "temporary_files_at_kills": 0,
            "kills_before_sampling": 0,
            "kills_while_sampling": 0,
            "kills_after_the_last_image": 0,
            "rounds_that_differ": 0,
            "files_left_over": 0,
        }
        self.differences = []

    def start(self, folder):
        flags = [
            *("--model_path", MODEL, "--base_samples", self.root / "ref", "--save_dir", folder, "--device", "cpu"),
            *("--timestep_respacing", self.args.steps, "--range_t", self.args.steps // 3, "--area", 16),
            *("--energy", "dct", "--batch_size", self.args.batch_size),
        ]
        command = [sys.executable]
        if self.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", self.processes]
        command += [__file__, "--child", self.log, *flags]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(self.root / "said", "w") as said:
            return subprocess.Popen(list(map(str, command)), env=env, stdout=said, stderr=said)

    def finish(self, process):
        if process.wait(timeout=600):
            raise SystemExit(f"a run ended with status {process.returncode}:\n{(self.root / 'said').read_text()}")

    def unbroken(self):
        self.wanted = self.root / "unbroken"
        started = time.monotonic()
        self.finish(self.start(self.wanted))
        self.duration = time.monotonic() - started
        self.figures |= {"images_per_round": self.args.images, "seconds_unbroken": round(self.duration, 2)}

    def begun(self):
        """The batches that were begun so far in this round."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def round(self):
        """From an empty folder to a finished run."""
        folder = self.root / "out"
        shutil.rmtree(folder, ignore_errors=True)
        self.log.unlink(missing_ok=True)
        in_flight, known = set(), 0
        while True:
            process = self.start(folder)
            killed = False
            if self.figures["kills"] < self.kills:
                time.sleep(self.random.uniform(0, self.duration))
                killed = kill_family(process)
            if not killed:
                self.finish(process)
            batches = self.begun()
            earlier = {name for batch in batches[:known] for name in batch}
            again = [name for batch in batches[known:] for name in batch if name in earlier]
            self.figures["computed_twice"] += len(again)
            self.figures["computed_twice_not_in_flight"] += sum(name not in in_flight for name in again)
            known = len(batches)
            if not killed:
                break
            made = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.glob("*.png")}
            unfinished = [batch for batch in batches if any(name.removesuffix(".png") not in made for name in batch)]
            in_flight = {name for batch in unfinished for name in batch}
            self.count_kill(folder, batches, len(made - {"grid"}), in_flight)
        self.figures["rounds"] += 1
        self.figures["images"] += self.args.images
        self.figures["batches_begun"] += len(self.begun())
        self.compare(folder)

    def count_kill(self, folder, batches, made, in_flight):
        figures = self.figures
        figures["kills"] += 1
        moment = "while_sampling" if batches else "before_sampling"
        if made == self.args.images:
            moment = "after_the_last_image"
        figures[f"kills_{moment}"] += 1
        figures["in_flight_at_kills"] += len(in_flight)
        figures["temporary_files_at_kills"] += len(list(folder.glob(".*.writing")))

    def compare(self, folder):
        wanted, found = content(self.wanted), content(folder)
        left_over = sorted(found.keys() - wanted.keys())
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        self.figures["files_left_over"] += len(left_over)
        if left_over or differing:
            self.figures["rounds_that_differ"] += 1
            self.differences.append({"left_over": left_over, "differing": differing})


def content(folder):
    """Every file of a run by its name: its bytes; of run.json all but the times."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files["run.json"])
    names = ("format", "settings", "versions", "processes", "batch_size", "plan", "counts", "failed")
    files["run.json"] = {name: record[name] for name in names} | {"finished": record["finished"] is not None}
    return files


def kill_family(process):
    """SIGKILL a process and all that it started; returns whether it was running."""
    if process.poll() is not None:
        return False
    family = [process.pid]
    children = defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The second field, the name, may have spaces, but is in brackets.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        children[parent].append(int(stat.parent.name))
    for pid in family:
        family += children[pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def make_references(folder, count):
    """`count` references: the drawings of ref_imgs/ under several names, which give them noise of their own."""
    folder.mkdir(parents=True)
    drawings = sorted((ROOT / "ref_imgs").glob("*.png"))
    for n in range(count):
        shutil.copy(drawings[n % len(drawings)], folder / f"{n:04d}.png")


def report(machine, args, series):
    """The result as Markdown."""
    from machine import sentence

    rows = {
        "processes": "processes",
        "kills": "SIGKILLs",
        "kills_before_sampling": "… before the first batch",
        "kills_while_sampling": "… while sampling",
        "kills_after_the_last_image": "… after the last image",
        "rounds": "runs that were finished by restarts",
        "images": "images of these runs",
        "rounds_that_differ": "runs that differ from the unbroken one in any byte",
        "files_left_over": "files left over",
        "temporary_files_at_kills": "half-written files at the kills, removed by the restarts",
        "in_flight_at_kills": "images in flight at the kills",
        "computed_twice": "images computed twice",
        "computed_twice_not_in_flight": "… that were not in flight",
    }
    lines = [
        "# Kill and restart",
        "",
        f"{args.images} references, batches of {args.batch_size}, {args.steps} steps of the demo model at 64 px; "
        f"killed at moments uniform over the {' or '.join(str(s['seconds_unbroken']) for s in series)} s of a run.",
        "",
        f"Machine: {sentence(machine)}.",
        "",
        "| | " + " | ".join(f"{s['processes']} process{'es (torchrun)' * (s['processes'] > 1)}" for s in series) + " |",
        "|---|" + "---|" * len(series),
    ]
    for name, words in list(rows.items())[1:]:
        lines.append(f"| {words} | " + " | ".join(str(s[name]) for s in series) + " |")
    lines += ["", "In flight: of a batch that was begun and of which an image was not on disk.", ""]
    return "\n".join(lines)


def main():
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="processes of each series")
    parser.add_argument("--kills", type=int, nargs="+", default=[50], help="kills of each series")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    from machine import describe

    figures, differences = [], []
    for processes, kills in zip(args.processes, args.kills, strict=True):
        with tempfile.TemporaryDirectory() as root:
            make_references(Path(root) / "ref", args.images)
            series = Series(Path(root), args, processes, kills)
            series.unbroken()
            while series.figures["kills"] < kills:
                series.round()
                print(json.dumps(series.figures), flush=True)
        figures.append(series.figures)
        differences += series.differences
    machine = describe()
    RESULTS.mkdir(exist_ok=True)
    settings = {name: getattr(args, name) for name in ("images", "batch_size", "steps", "seed")}
    result = {"machine": machine, "settings": settings, "series": figures, "differences": differences}
    (RESULTS / "kill_restart.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "kill_restart.md").write_text(report(machine, args, figures))
    print(report(machine, args, figures))
    wrong = any(s["rounds_that_differ"] or s["computed_twice_not_in_flight"] for s in figures)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
