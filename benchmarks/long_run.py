"""500 small images by ae_sample.py: does memory grow, does the writer keep up, is the time left right?

    python benchmarks/long_run.py [--images 500] [--steps 10] [--batch_size 4] [--threads 1]

The run is a process of its own, whose resident memory is sampled from outside. Inside it, the writer counts what waits,
and the progress bar's estimate is kept at every call, to be compared with the time that was really left.

Writes benchmarks/results/NAME.json and .md, NAME being long_run or what --name says.
"""

import argparse
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "models" / "fluent3d_64.safetensors"
SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)


def child(log, flags):
    """ae_sample.py with `flags`; what its writer and its progress did goes to the file `log`."""
    sys.path.insert(0, str(ROOT))
    from guided_diffusion.cli import progress
    from guided_diffusion.run import files

    waiting, seconds, estimates = [], [], []
    count, lock = 0, threading.Lock()

    class WatchedWriter(files.Writer):
        def submit(self, task, *arguments):
            nonlocal count
            submitted = time.monotonic()

            def watched(*arguments):
                nonlocal count
                try:
                    task(*arguments)
                finally:
                    with lock:
                        count -= 1
                        seconds.append(time.monotonic() - submitted)

            with lock:
                count += 1
                waiting.append(count)
            super().submit(watched, *arguments)

    class WatchedProgress(progress.Progress):
        def __call__(self, *done):
            super().__call__(*done)
            estimates.append((time.monotonic(), self.done / self.total, self.seconds_left()))

        def close(self):
            super().close()
            with open(log, "w") as file:
                began, ended = self.started, time.monotonic()
                json.dump(
                    {"began": began, "ended": ended, "waiting": waiting, "seconds": seconds, "estimates": estimates},
                    file,
                )

    files.Writer, progress.Progress = WatchedWriter, WatchedProgress
    sys.argv = ["ae_sample.py", *flags]
    runpy.run_path(str(ROOT / "scripts" / "ae_sample.py"), run_name="__main__")


def watch_memory(process, interval=0.1):
    """Samples (time.monotonic(), resident bytes) of a process until it ends."""
    samples, page = [], os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page
            samples.append((time.monotonic(), resident))
        except (OSError, IndexError):
            break
        time.sleep(interval)
    process.wait()
    return samples


def memory_figures(samples, began, ended, images):
    """Resident memory in MB at moments of the run, each the median over a twentieth of it, and its growth."""

    def median(start, stop):
        inside = sorted(size for t, size in samples if start <= (t - began) / (ended - began) <= stop)
        return inside[len(inside) // 2] / 2**20

    import numpy as np

    late = np.array([(t, size) for t, size in samples if 0.1 <= (t - began) / (ended - began) <= 1])
    slope = np.polyfit((late[:, 0] - began) / (ended - began) * images, late[:, 1] / 2**20, 1)[0]
    return {
        "mb_by_tenths": [round(median(tenth / 10 - 0.025, tenth / 10 + 0.025), 1) for tenth in range(1, 11)],
        "mb_peak": round(max(size for _, size in samples) / 2**20, 1),
        "mb_per_100_images_after_a_tenth": round(100 * float(slope), 3),
    }


def estimate_figures(estimates, ended):
    """At each of SHARES of the steps: the estimated and the real time left in seconds, and the error as a share."""
    figures = []
    for share in SHARES:
        moment, _, left = next(entry for entry in estimates if entry[1] >= share)
        really = ended - moment
        figures.append(
            {
                "share": share,
                "estimated": round(left, 2),
                "real": round(really, 2),
                "error": round(left / really - 1, 4),
            }
        )
    return figures


def report(result):
    """The result as Markdown."""
    from machine import sentence

    memory, writer = result["memory"], result["writer"]
    settings = result["settings"]
    lines = [
        "# A long run",
        "",
        f"{settings['images']} references, batches of {settings['batch_size']}, {settings['steps']} steps of the demo "
        f"model at 64 px on {settings['threads'] or 'all'} thread{'s' * (settings['threads'] != 1)}: "
        f"{result['seconds']} s of sampling.",
        "",
        f"Machine: {sentence(result['machine'])}.",
        "",
        "| resident memory | MB |",
        "|---|---|",
        f"| after 1, 2, … 10 tenths of the run | {', '.join(map(str, memory['mb_by_tenths']))} |",
        f"| peak | {memory['mb_peak']} |",
        f"| growth per 100 images after a tenth (fitted line) | {memory['mb_per_100_images_after_a_tenth']} |",
        "",
        "| writer | |",
        "|---|---|",
        f"| images waiting or being written, at most (64 may) | {writer['waiting_peak']} |",
        f"| from sampled to on disk, median | {writer['ms_median']} ms |",
        f"| from sampled to on disk, at most | {writer['ms_peak']} ms |",
        "",
        "| share of the run done | time left, estimated | time left, real | error |",
        "|---|---|---|---|",
    ]
    for row in result["time_left"]:
        lines.append(
            f"| {row['share']:.0%} | {row['estimated']:.1f} s | {row['real']:.1f} s | {100 * row['error']:+.1f} % |"
        )
    return "\n".join([*lines, ""])


def main():
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--name", default="long_run", help="of the result files")
    parser.add_argument("--threads", type=int, help="of the arithmetic (default: one for each core)")
    args = parser.parse_args()
    from machine import describe

    with tempfile.TemporaryDirectory() as root:
        base, out, log = (Path(root) / name for name in ("ref", "out", "log"))
        base.mkdir()
        drawings = sorted((ROOT / "ref_imgs").glob("*.png"))
        for n in range(args.images):
            shutil.copy(drawings[n % len(drawings)], base / f"{n:04d}.png")
        flags = [
            *("--model_path", MODEL, "--base_samples", base, "--save_dir", out, "--batch_size", args.batch_size),
            *("--timestep_respacing", args.steps, "--range_t", args.steps // 3, "--area", 16, "--energy", "dct"),
        ]
        env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)} if args.threads else None
        process = subprocess.Popen([sys.executable, __file__, "--child", str(log), *map(str, flags)], env=env)
        samples = watch_memory(process)
        if process.returncode:
            sys.exit(f"the run ended with status {process.returncode}")
        run = json.loads(log.read_text())
        made = len(list(out.glob("[0-9]*.png")))
    if made != args.images:
        sys.exit(f"{made} of {args.images} images were made")
    began, ended = run["began"], run["ended"]
    seconds = sorted(run["seconds"])
    result = {
        "machine": describe(),
        "settings": {name: getattr(args, name) for name in ("images", "batch_size", "steps", "threads")},
        "seconds": round(ended - began, 1),
        "memory": memory_figures(samples, began, ended, args.images),
        "writer": {
            "waiting_peak": max(run["waiting"]),
            "ms_median": round(1000 * seconds[len(seconds) // 2], 2),
            "ms_peak": round(1000 * seconds[-1], 2),
        },
        "time_left": estimate_figures(run["estimates"], ended),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
