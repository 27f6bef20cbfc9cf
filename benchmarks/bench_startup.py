"""How long the command takes until its first denoising step is done, and which imports that goes to.

The real command runs on a pseudo-terminal until its progress bar shows the first step; then it is interrupted.
"""

import argparse
import fcntl
import json
import os
import pty
import re
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "benchmarks"))

import machine

FLAGS = [
    "--model_path",
    "models/fluent3d_64.safetensors",
    "--base_samples",
    "ref_imgs",
    "--timestep_respacing",
    "100",
    "--range_t",
    "20",
    "--area",
    "16",
]
UNWANTED = ("mpi4py", "torchvision", "scipy")


def first_step(flags):
    """Seconds from the start of the command to the progress bar's first step."""
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))  # a bar needs a width
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "scripts/ae_sample.py", *flags, "--save_dir", folder],
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        shown = ""
        try:
            while not re.search(r"step [1-9]\d*/", shown):
                shown += os.read(ours, 4096).decode(errors="replace")
            return time.perf_counter() - started
        except OSError:
            raise SystemExit(f"the command ended before its first step:\n{shown}") from None
        finally:
            process.send_signal(signal.SIGINT)
            while True:
                try:
                    if not os.read(ours, 4096):
                        break
                except OSError:
                    break
            process.wait()
            os.close(ours)


def imports(statement, top=15):
    """(total seconds, slowest top-level packages with the seconds of their own modules, all modules) of a statement."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", statement], cwd=ROOT, capture_output=True, text=True, check=True
    )
    own, modules = {}, set()
    for microseconds, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", run.stderr):
        package = name.partition(".")[0]
        own[package] = own.get(package, 0) + int(microseconds) / 1e6
        modules.add(package)
    slowest = sorted(own.items(), key=lambda item: -item[1])[:top]
    return sum(own.values()), slowest, modules


def seconds_of(statement, rounds):
    def once():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", default="1", help="of the command: a first step of many images takes longer")
    parser.add_argument(
        "--out", default=os.path.join(ROOT, "benchmarks", "results", "startup"), help="path without suffix"
    )
    args = parser.parse_args()
    flags = [*FLAGS, "--batch_size", args.batch_size]
    first_step(flags)  # what the first run reads from the disk, later ones find in memory
    times = [first_step(flags) for _ in range(args.rounds)]
    script = "import runpy; runpy.run_path('scripts/ae_sample.py', run_name='imported')"
    total, slowest, modules = imports(script)
    result = {
        "machine": machine.describe(),
        "command": "python scripts/ae_sample.py " + " ".join(flags),
        "first_step_s": times,
        "median_s": statistics.median(times),
        "import_torch_s": seconds_of("import torch", args.rounds),
        "import_script_s": seconds_of(script, args.rounds),
        "import_package_s": seconds_of("import guided_diffusion", args.rounds),
        "imports_s": total,
        "slowest": slowest,
        "unwanted": sorted(modules & set(UNWANTED)),
    }
    with open(f"{args.out}.json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    lines = [
        "# Start-up",
        "",
        f"{machine.sentence(result['machine'])}.",
        "",
        f"`{result['command']}`",
        "",
        f"From the command to the end of its first denoising step: **{result['median_s']:.2f} s** "
        f"(median of {len(times)}: {', '.join(f'{t:.2f}' for t in times)}; target 4 s).",
        "",
        f"Interpreter and `import torch`: {result['import_torch_s']:.2f} s; and all that the script imports: "
        f"{result['import_script_s']:.2f} s; `import guided_diffusion`: {result['import_package_s']:.2f} s. "
        f"Imported though not needed: {', '.join(result['unwanted']) or 'none of ' + ', '.join(UNWANTED)}.",
        "",
        "Import times by package, own modules only (`-X importtime`, which slows imports down):",
        "",
        "| package | s |",
        "|---|---|",
        *(f"| {name} | {seconds:.3f} |" for name, seconds in slowest),
    ]
    with open(f"{args.out}.md", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
