"""Kill runs of ae_sample.py at random moments, or watch one long run.

    python benchmarks/reliability.py kill --kills 50 --processes 2
    python benchmarks/reliability.py long --images 500

`kill`: SIGKILL to a run and all its processes at a moment uniform over the time of an unbroken run, restart it, and so
on until it ends by itself; then the next round, until the kills are used up. The folder must equal the unbroken run's
byte for byte (in records: all but the times), and a picture that was on disk at a kill must never be written again.

`long`: resident memory, sampled from outside, and the estimates of the time left on the progress bar, compared with
the time that was really left.

Prints a table, and writes it to `--out`. Exit status 1 where a run differs from the unbroken one.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

ROOT = Path(__file__).resolve().parent.parent


def command(root, folder, args):
    """The command of a run into `folder`."""
    model = ROOT / "models" / "fluent3d_64.safetensors"
    start = [sys.executable]
    if args.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", args.processes]
    flags = ["--model_path", model, "--base_samples", root / "ref", "--save_dir", folder, "--device", "cpu"]
    flags += ["--timestep_respacing", args.steps, "--range_t", args.steps // 3, "--area", 16]
    flags += ["--energy", "dct", "--batch_size", args.batch_size]
    return list(map(str, [*start, ROOT / "scripts" / "ae_sample.py", *flags]))


def make_references(folder, count):
    """Write `count` references: the drawings of ref_imgs/ under several names, each of which has noise of its own."""
    folder.mkdir(parents=True)
    drawings = sorted((ROOT / "ref_imgs").glob("*.png"))
    for n in range(count):
        shutil.copy(drawings[n % len(drawings)], folder / f"{n:04d}.png")


# ---- kill -----------------------------------------------------------------------------------------------------------


def kill_family(process):
    """SIGKILL to a process and all that it started; returns whether it was running."""
    if process.poll() is not None:
        return False
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            # The second field, the name, may have spaces, but is in brackets.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def content(folder):
    """Every file of a run by its name: its bytes, but those of records without the times."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    record = json.loads(files["run.json"])
    names = ("format", "settings", "versions", "processes", "batch_size", "plan", "counts", "failed")
    files["run.json"] = {name: record[name] for name in names} | {"finished": record["finished"] is not None}
    lines = map(json.loads, files["images.jsonl"].splitlines())
    files["images.jsonl"] = sorted((line["key"], line["source"]) for line in lines)
    return files


def written(folder):
    """When each finished picture was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}


def kill(args, root):
    """Rows of the table, and whether every run ended as the unbroken one."""
    said = root / "said"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(folder):
        with open(said, "w") as file:
            return subprocess.Popen(command(root, folder, args), env=env, stdout=file, stderr=file)

    def finish(process):
        if process.wait():
            raise SystemExit(f"error: a run ended with status {process.returncode}:\n{said.read_text()}")

    chance = random.Random(args.seed * 1000 + args.processes)
    started = time.monotonic()
    finish(start(root / "unbroken"))
    duration = time.monotonic() - started
    wanted = content(root / "unbroken")
    names = ["SIGKILLs", "… before the first picture", "… with some pictures", "… after the last picture"]
    rows = dict.fromkeys([*names, "half-written files at the kills", "runs finished by restarts"], 0)
    wrong = {"runs that differ from the unbroken one": 0, "files left over": 0, "finished images written again": 0}
    while rows["SIGKILLs"] < args.kills:
        folder, known = root / "out", {}
        shutil.rmtree(folder, ignore_errors=True)
        while True:
            process = start(folder)
            if rows["SIGKILLs"] < args.kills:
                time.sleep(chance.uniform(0, duration))
                if kill_family(process):
                    known |= {name: when for name, when in written(folder).items() if name not in known}
                    moment = "before the first picture" if not known else "with some pictures"
                    moment = "after the last picture" if len(known) == args.images else moment
                    rows["SIGKILLs"] += 1
                    rows[f"… {moment}"] += 1
                    rows["half-written files at the kills"] += len(list(folder.glob(".*.writing")))
                    continue
            finish(process)
            break
        found, times = content(folder), written(folder)
        if found != wanted:
            names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
            print(f"differs: {', '.join(names)}", file=sys.stderr)
        rows["runs finished by restarts"] += 1
        wrong["runs that differ from the unbroken one"] += found != wanted
        wrong["files left over"] += len(found.keys() - wanted.keys())
        wrong["finished images written again"] += sum(times.get(name) != when for name, when in known.items())
    return {"processes": args.processes, "seconds of an unbroken run": round(duration, 1), **rows, **wrong}, wrong


# ---- long -----------------------------------------------------------------------------------------------------------


def seconds_of(text):
    """The seconds of a time such as 1:02:03."""
    return sum(int(part) * 60**n for n, part in enumerate(reversed(text.split(":"))))


def long(args, root):
    """Rows of the table, and nothing that could be wrong."""
    ours, theirs = machine.terminal()
    process = subprocess.Popen(command(root, root / "out", args), stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.set_blocking(ours, False)
    samples, shown, estimates, page = [], "", [], os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        now = time.monotonic()
        with contextlib.suppress(BlockingIOError, OSError):
            shown += os.read(ours, 1 << 16).decode(errors="replace")
        for share, left in re.findall(r"(\d+)%\|[^\r]*?([\d:]+) remaining", shown):
            estimates.append((now, int(share), seconds_of(left)))
        shown = shown.rpartition("\r")[2]
        with contextlib.suppress(OSError, IndexError):
            samples.append((now, int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20))
        time.sleep(0.1)
    os.close(ours)
    made = len(written(root / "out"))
    if process.returncode or made != args.images:
        raise SystemExit(f"error: the run ended with status {process.returncode} and {made} of {args.images} images")
    if not estimates or estimates[0][0] == estimates[-1][0]:
        raise SystemExit("error: the bar showed no estimate; more --images or --steps are needed")
    began, ended = estimates[0][0], estimates[-1][0]  # the end of sampling, without that of the interpreter
    tenths = [[] for _ in range(10)]
    for now, size in samples:
        if began <= now < ended:
            tenths[int(10 * (now - began) / (ended - began))].append(size)
    medians = [statistics.median(tenth) for tenth in tenths if tenth]
    rows = {"images": made, "seconds": round(ended - began, 1)}
    rows["MB resident, by tenths of the run"] = ", ".join(f"{size:.0f}" for size in medians)
    rows["MB resident at most"] = round(max(size for _, size in samples))
    rows["MB more in the last tenth than in the second"] = round(medians[-1] - medians[min(1, len(medians) - 1)], 1)
    for share in (10, 25, 50, 75, 90):
        found = next(((now, left) for now, done, left in estimates if done >= share), None)
        if found:
            rows[f"seconds left at {share} %: estimated, real"] = f"{found[1]}, {ended - found[0]:.1f}"
    return rows, {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kill", "long"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, help="ranks under torchrun")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="Markdown file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        make_references(Path(root) / "ref", args.images)
        rows, wrong = {"kill": kill, "long": long}[args.part](args, Path(root))
    what = f"{args.images} references, batches of {args.batch_size}, {args.steps} steps of the demo model at 64 px"
    lines = [f"# Reliability: {args.part}", "", f"{what}. {machine.description()}.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        Path(args.out).write_text(text, encoding="utf-8")
    sys.exit(1 if any(wrong.values()) else 0)


if __name__ == "__main__":
    main()
