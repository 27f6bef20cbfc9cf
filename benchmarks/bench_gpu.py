"""The table of results/speed_notes.md on one GPU, in parts: what is measured is kept, and the next start goes on there.

Parts, the most telling first: model evaluations by precision, mode and batch size (those of one model and batch size
in turns); what guided steps cost besides; whole runs of the demo model; the profile; and with --release, the public
release's loop beside ours. Compiling takes most of the time, so only some cases are compiled.

example: python benchmarks/bench_gpu.py --minutes 9 --release ../sddm
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import bench_sampling as bench
import machine
import torch

from guided_diffusion.errors import first_line
from guided_diffusion.runtime import DTYPES, is_out_of_memory, keep_freed_memory

BOTH, ALL = ["fp32", "bf16"], ["eager", "eager+fuse", "channels_last", "compiled"]
# model:batch, precisions, modes; `compiled` takes CUDA graphs on a GPU, `no_graphs` does not; `channels_last` is eager
# evaluation in the order in memory that CPUs have.
FORWARDS = [
    ("readme:8", BOTH, ALL),
    ("demo:8", BOTH, ["eager", "eager+fuse", "no_graphs", "compiled"]),
    ("readme:32", BOTH, ["eager", "eager+fuse", "channels_last"]),
    ("readme:1", BOTH, ["eager"]),
    ("demo:1", BOTH, ["eager"]),
    ("demo:64", BOTH, ["eager", "eager+fuse", "channels_last"]),
    ("readme:32", ["bf16"], ["compiled"]),
    ("demo:64", ["bf16"], ["compiled"]),
    ("readme:64", ["bf16"], ["eager"]),
    ("demo:32", BOTH, ["eager"]),
    ("readme:4", BOTH, ["eager"]),
    ("demo:4", BOTH, ["eager"]),
]
IN_PLACE = [("demo", 64, "eager"), ("demo", 64, "compiled"), ("readme", 32, "eager"), ("readme", 32, "compiled")]
DRY = [("tiny:1", BOTH, ["eager", "eager+fuse"]), ("tiny:2", ["fp32"], ["eager"])]


def forward(case, precisions, modes, rounds, device):
    name, _, batch = case.partition(":")
    return {"forward": bench.measure_forward(name, int(batch), precisions, modes, rounds, device)}


def overhead(case, energies, rounds, device, known):
    """Overheads of a case that was measured; nothing where it did not fit into memory."""
    name, _, batch = case.partition(":")
    plain = {"model": name, "batch": int(batch), "precision": "fp32", "mode": "eager"}
    took = [row["forward_s"] for row in known if plain.items() <= row.items()]
    return {"overhead": bench.measure_overhead(name, int(batch), energies, rounds, device, took[0]) if took else []}


def release(args, dry):
    """The lines of bench_release.py."""
    out = f"{args.out}_release"
    command = [sys.executable, os.path.join(ROOT, "benchmarks", "bench_release.py"), "--release", args.release]
    command += ["--device", args.device, "--rounds", str(args.rounds), "--out", out]
    command += ["--ours", "fp32,bf16,bf16+fuse"]  # compiling at three batch sizes would take the time of all others
    if dry:
        small = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"}
        command += [
            "--batches",
            "1",
            "--ours",
            "fp32",
            "--architecture",
            json.dumps({**small, "num_head_channels": 32}),
        ]
    subprocess.run(command, check=True)
    with open(f"{out}.md", encoding="utf-8") as file:
        return {"release": file.read()}


def parts(args, device, result):
    """(name, function that measures it and gives its entries) of everything, in order."""
    forwards, rounds = (DRY if args.dry_run else FORWARDS), args.rounds
    for case, precisions, modes in forwards:
        name = f"forward {case} {','.join(precisions)} {','.join(modes)}"
        yield name, lambda case=case, p=precisions, m=modes: forward(case, p, m, rounds, device)
        if case in ("readme:8", "demo:8", "tiny:1") and "fp32" in precisions:
            energies = ["none", "dct"] if args.dry_run else ["none", "dct", "vgg", "low_pass", "dct+low_pass+vgg"]
            yield (
                f"overhead {case}",
                lambda case=case, e=energies: overhead(case, e, rounds, device, result["forward"]),
            )
    for name, batch, mode in [("tiny", 1, "eager")] if args.dry_run else IN_PLACE:
        measure = functools.partial(bench.measure_in_place, name, batch, "bf16", mode, ["none", "dct", "vgg"], device)
        yield f"in place {name}:{batch} {mode}", lambda measure=measure: {"in_place": measure()}
    if args.release:
        yield "release", lambda: release(args, args.dry_run)
    steps = 5 if args.dry_run else 100
    yield "whole runs", lambda: {"whole_run": bench.measure_whole_run(BOTH, device, args.batch, steps)}
    yield "profile", lambda: {"waits": [bench.profile_step(f"{args.out}_profile.txt", device, batch=args.batch)]}


def report(result):
    """The results in words and tables."""
    lines = [bench.report(result).rstrip(), ""]
    lines += [f"Waits for the device in the profile: {waits}.\n" for waits in result["waits"]]
    lines += [f"{name}: {reason}.\n" for name, reason in result["missing"].items()]
    lines += [text.replace("# ", "## ", 1) for text in ([result["release"]] if result["release"] else [])]
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9, help="start no other part after so long")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="images of whole runs and of the profile")
    parser.add_argument("--release", help="folder of the SDDM release, for bench_release.py")
    parser.add_argument("--dry_run", action="store_true", help="the same parts with tiny networks")
    parser.add_argument("--out", default=os.path.join(ROOT, "benchmarks", "results", "speed_gpu"))
    args = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    started = time.monotonic()
    keep_freed_memory()
    device = torch.device(args.device)
    result = {name: [] for name in ("forward", "overhead", "in_place", "whole_run", "waits", "done")}
    result |= {"release": "", "missing": {}}
    if os.path.exists(f"{args.out}.json"):
        with open(f"{args.out}.json", encoding="utf-8") as file:
            result |= json.load(file)
        if result["machine"] != machine.describe():
            raise SystemExit(f"error: --out is {args.out!r}; it holds measurements of another machine")
    else:
        result |= {"machine": machine.describe(), "device": args.device, "rounds": args.rounds}
        result["matrix_flops"] = {name: bench.matrix_rate(DTYPES[name], device) for name in BOTH}
    for name, measure in parts(args, device, result):
        if name in result["done"]:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"time is up before: {name}; start again for the rest", flush=True)
            break
        try:
            found = measure()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found, result["missing"][name] = {}, first_line(error)
        for key, value in found.items():
            result[key] = value if key == "release" else result[key] + value
        result["done"].append(name)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - started:.0f} s: {name}", flush=True)
        with open(f"{args.out}.json", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
        with open(f"{args.out}.md", "w", encoding="utf-8") as file:
            file.write(report(result))


if __name__ == "__main__":
    main()
