"""What a guided step costs beyond its model evaluation, and how fast the evaluations are.

All in one process: the cases of one model and batch are measured in turns, round after round, and medians are reported,
so that a machine that changes its speed does so for all of them. overhead = (guided step - forward) / forward, where a
guided step without its model evaluation is measured on a model that does nothing. roofline share: the model's FLOPs per
second (torch.utils.flop_counter) over those of a large matrix product in the same precision.

example: python benchmarks/bench_sampling.py --models demo,readme --batches 1,8 --precisions fp32,bf16
"""

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import machine
import torch

from guided_diffusion import energy, sddm
from guided_diffusion.checkpoint import load_model
from guided_diffusion.runtime import DTYPES, CompiledModel, keep_freed_memory, memory_format
from guided_diffusion.script_util import create_classifier, create_diffusion, create_model

BLOCKS = 16
SHARED = {
    "image_size": 256,
    "num_channels": 128,
    "attention_resolutions": "16",
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
}
ARCHITECTURES = {
    "readme": {**SHARED, "num_res_blocks": 2, "learn_sigma": False},
    "ilvr": {**SHARED, "num_res_blocks": 1, "learn_sigma": True},
    "tiny": {
        **SHARED,
        "image_size": 32,
        "num_channels": 32,
        "channel_mult": "1,2",
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "learn_sigma": False,
    },
}
ENERGIES = ("none", "dct", "vgg", "low_pass", "dse", "dct+low_pass", "dct+low_pass+vgg")


def network(name, dtype, device, compiled=False):
    """(model, image size, whether it learned variances): the demo model, or an architecture with random weights.

    Its order in memory is the one that sampling has, eagerly or compiled.
    """
    order = memory_format(device, compiled)
    if name == "demo":
        model, info = load_model(os.path.join(ROOT, "models", "fluent3d_64.safetensors"), device=device, dtype=dtype)
        return model.to(memory_format=order), info.flags["image_size"], info.flags["learn_sigma"]
    with torch.device("meta"):
        model = create_model(**ARCHITECTURES[name])
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    model = model.eval().requires_grad_(False).set_dtype(dtype)
    flags = ARCHITECTURES[name]
    return model.to(memory_format=order), flags["image_size"], flags["learn_sigma"]


def create_energies(names, size, device):
    """The energies of a case: `vgg` has random weights, `dse` EGSDE's extractor at 256 and the emoji one at 64."""

    def create(name):
        if name == "vgg":
            torch.manual_seed(0)
            return energy.vgg(energy._vgg_layers(1).state_dict(), BLOCKS)
        if name == "dse":
            if size == 64:
                return energy.dse(
                    load_model(os.path.join(ROOT, "models", "fluent3d_64_dse.safetensors"), device=device)[0]
                )
            return energy.dse(
                create_classifier(size, classifier_width=128, classifier_depth=2, channel_mult="").to(device)
            )
        return {"dct": lambda: energy.dct(BLOCKS), "low_pass": lambda: energy.low_pass(size // 8)}[name]()

    return [] if names == "none" else [create(name) for name in names.split("+")]


class Still:
    """A model that costs nothing: what is left of a step is what sampling adds to evaluations."""

    def __init__(self, output):
        self.output = output

    def __call__(self, x, t):
        return self.output


def settle(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    settle(device)
    started = time.perf_counter()
    function()
    settle(device)
    return time.perf_counter() - started


def medians(cases, rounds, device):
    """Median seconds of functions by name, run in turns after a first round that does not count."""
    times = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, function in cases.items():
            took = seconds(function, device)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_rate(dtype, device):
    """FLOPs per second of a large matrix product, the best of several, by the libraries of `@` and of convolutions."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    kernel = a.reshape(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
    image = b.T[None, :, :, None].contiguous(memory_format=torch.channels_last)
    ways = (lambda: a @ b), (lambda: torch.nn.functional.conv2d(image, kernel))
    return 2 * n**3 / min(seconds(way, device) for way in ways for _ in range(6))


def flops(model, x, t):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    return counter.get_total_flops()


def peak_mib(device):
    """Most memory so far: allocated on a GPU since the last reset, else resident in the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def take(steps, count):
    """Take so many steps of a run."""
    for _ in itertools.islice(steps, count):
        pass


def measure_forward(name, batch, precisions, modes, rounds, device):
    """Rows of images per second, by precision and mode, and the fp32 output's distance in grey levels."""
    cases, rows, outputs = {}, {}, {}
    for precision, mode in itertools.product(precisions, modes):
        model, size, _ = network(name, DTYPES[precision], device, not mode.startswith("eager"))
        x = torch.randn(batch, 3, size, size, device=device, generator=torch.Generator(device).manual_seed(1))
        t = torch.full((batch,), 500, device=device)
        row = {
            "model": name,
            "size": size,
            "batch": batch,
            "precision": precision,
            "mode": mode,
        }
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["gflop_per_image"] = flops(model, x, t) / batch / 1e9
        mode, _, fused = mode.partition("+")
        run = model.fuse() if fused else model
        if mode == "no_graphs":
            run = torch.compile(model, dynamic=False)
            with torch.no_grad():
                row["compile_seconds"] = seconds(functools.partial(run, x, t), device)
        if mode == "compiled":
            run = CompiledModel(model)
            with torch.no_grad():
                row["compile_seconds"] = seconds(functools.partial(run, x, t), device)
            if run.compiled is None:
                row["mode"] = f"{row['mode']}, fell back to eager"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        key = precision, row["mode"]
        cases[key] = lambda run=run, x=x, t=t: run(x, t)
        with torch.no_grad():
            outputs[key] = run(x, t)
        row["peak_mib"] = peak_mib(device)
        rows[key] = row
    with torch.no_grad():
        times = medians(cases, rounds, device)
    exact = outputs.get(("fp32", "eager"))
    for (precision, mode), row in rows.items():
        took = times[precision, mode]
        row |= {"forward_s": took, "evaluations_per_s": batch / took}
        if exact is not None:
            row["output_error"] = ((outputs[precision, mode] - exact).abs().mean() / exact.abs().mean()).item()
    return list(rows.values())


def measure_overhead(name, batch, names, rounds, device, forward_s):
    """Rows of what a guided step costs besides its evaluation, for every energy with and without detail_merge."""
    flags = {"image_size": 64, "learn_sigma": False} if name == "demo" else ARCHITECTURES[name]
    size, learned = flags["image_size"], flags["learn_sigma"]
    generator = torch.Generator(device).manual_seed(2)
    ref = torch.rand(batch, 3, size, size, device=device, generator=generator) * 2 - 1
    steps = 4  # the last of a schedule is always a plain one, and is not taken
    diffusion = create_diffusion(timestep_respacing=str(steps + 1), learn_sigma=learned)
    still = Still(torch.randn(batch, 6 if learned else 3, size, size, device=device, generator=generator) / 4)
    draw = torch.randn(ref.shape, device=device, generator=generator)
    cases = {}
    for label, detail in itertools.product(names, (False, True)):
        energies = create_energies(label, size, device)
        options = {"range_t": 0, "energies": energies, "detail_merge": detail}
        cases[label, detail] = lambda options=options: take(run(**options), steps)

    def run(**options):
        return sddm.sample.steps(still, diffusion, ref, blocks=BLOCKS, noise=lambda _: draw, **options)

    def plain():
        take(run(range_t=steps), steps)

    times = medians({**cases, ("plain step", False): plain}, rounds, device)
    return [
        {
            "model": name,
            "size": size,
            "batch": batch,
            "energy": label,
            "detail_merge": detail,
            "forward_s": forward_s,
            "step_s": took / steps,
            "overhead": took / steps / forward_s,
        }
        for (label, detail), took in times.items()
    ]


def measure_in_place(name, batch, precision, mode, names, device, steps=8):
    """Rows of what guided steps cost with their evaluations, beside the evaluations alone, and of a late-start run.

    Launching a step's kernels then hides behind the network's, as far as it does. mode: eager, channels_last or
    compiled. The run: a schedule of 25 steps from 0.6 T, guided by `dct` until 0.4 T, 15 evaluations.
    """
    plain, size, _ = network(name, DTYPES[precision], device, mode != "eager")
    model = CompiledModel(plain) if mode == "compiled" else plain
    generator = torch.Generator(device).manual_seed(4)
    ref = torch.rand(batch, 3, size, size, device=device, generator=generator) * 2 - 1
    draw = torch.randn(ref.shape, device=device, generator=generator)
    t = torch.full((batch,), 500, device=device)
    options = {"blocks": BLOCKS, "noise": lambda _: draw}

    def evaluations():
        for _ in range(steps):
            model(ref, t)

    def guided(energies):
        diffusion = create_diffusion(timestep_respacing=str(4 * steps + 1))
        moving = sddm.sample.steps(model, diffusion, ref, range_t=0, energies=energies, **options)
        return lambda: take(moving, steps)

    def late_start():
        diffusion = create_diffusion(timestep_respacing="25")
        sddm.sample(model, diffusion, ref, start=0.6, range_t=0.4, energies=[energy.dct(BLOCKS)], **options)

    with torch.no_grad():
        cases = {label: guided(create_energies(label, size, device)) for label in names}
        times = medians({"evaluations": evaluations, **cases}, 3, device)
        seconds(late_start, device)
        took = seconds(late_start, device)
    alone = times.pop("evaluations")
    case = {"model": name, "size": size, "batch": batch, "precision": precision, "mode": mode}
    rows = [
        {**case, "energy": label, "step_s": value / steps, "overhead": value / alone - 1}
        for label, value in times.items()
    ]
    return [*rows, {**case, "energy": "late start", "seconds": took, "images_per_s": batch / took}]


def measure_whole_run(precisions, device, batch=8, steps=100):
    """Seconds of whole runs of the demo model (100 steps, 80 guided), and their distance from fp32 in grey levels."""
    reference, rows = None, []
    for precision in precisions:
        model, size, _ = network("demo", DTYPES[precision], device)
        generator = torch.Generator(device).manual_seed(3)
        ref = torch.rand(batch, 3, size, size, device=device, generator=generator) * 2 - 1
        draws = iter(torch.randn(steps + 1, *ref.shape, device=device, generator=generator))
        started = time.perf_counter()
        image = sddm.sample(
            model,
            create_diffusion(timestep_respacing=str(steps)),
            ref,
            blocks=BLOCKS,
            range_t=steps // 5,
            energies=[energy.dct(BLOCKS)],
            noise=lambda _, draws=draws: next(draws),
        )
        settle(device)
        took = time.perf_counter() - started
        reference = image if reference is None else reference
        grey = (image.clamp(-1, 1) - reference.clamp(-1, 1)).abs().mean().item() * 127.5
        rows.append(
            {"precision": precision, "batch": batch, "seconds": took, "images_per_s": batch / took, "grey_levels": grey}
        )
    return rows


def profile_step(path, device, batch=8, steps=12):
    """Write what guided steps of the demo model spend their time on; returns the count of waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    model, size, _ = network("demo", torch.float32, device)
    ref = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    diffusion = create_diffusion(timestep_respacing=str(steps + 1))
    draw = torch.randn_like(ref)

    def run():
        options = {"blocks": BLOCKS, "range_t": 0, "energies": [energy.dct(BLOCKS)], "noise": lambda _: draw}
        take(sddm.sample.steps(model, diffusion, ref, **options), steps)

    run()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        run()
        settle(device)
    table = profiled.key_averages()
    waits = sum(
        e.count for e in table if "Synchronize" in e.key or e.key in ("aten::item", "aten::_local_scalar_dense")
    )
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{machine.sentence(machine.describe())}\n")
        file.write(f"{steps} guided steps of the demo model, batch {batch}, fp32, dct\n")
        file.write(f"waits for the device or reads of a value from it: {waits}\n\n")
        file.write("\n".join(line.rstrip() for line in table.table(sort_by=key, row_limit=30).splitlines()) + "\n")
    return waits


def report(result):
    """The results in words and tables."""
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in result["matrix_flops"].items())
    where = (
        "GPU"
        if result["device"].startswith("cuda")
        else "CPU; no GPU was available, so nothing here says how fast one is"
    )
    lines = [
        "# Sampling speed",
        "",
        f"{machine.sentence(result['machine'])}. On {result['device']} ({where}).",
        f"Matrix products, GFLOP/s: {rates}.",
        "",
        "Model evaluations (random weights but for the demo model). Output error: mean distance from fp32, relative.",
        "",
        "| model | px | batch | precision | mode | s | evaluations/s | GFLOP/image | share of matrix rate | peak MiB "
        "| output error | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["forward"]:
        error, build, peak = (r.get(name) for name in ("output_error", "compile_seconds", "peak_mib"))
        share = r["gflop_per_image"] * 1e9 * r["evaluations_per_s"] / result["matrix_flops"][r["precision"]]
        lines.append(
            f"| {r['model']} {r['parameters'] / 1e6:.1f}M | {r['size']} | {r['batch']} | {r['precision']} | "
            f"{r['mode']} | {r['forward_s']:.4f} | {r['evaluations_per_s']:.2f} | {r['gflop_per_image']:.1f} | "
            f"{share:.0%} | {'' if peak is None else round(peak)} | {'' if error is None else f'{error:.4f}'} | "
            f"{'' if build is None else f'{build:.0f}'} |"
        )
    lines += [
        "",
        "Peak memory on a CPU is that of the whole process up to then, so it only ever grows.",
        "",
        "A guided step without its evaluation (fp32), and the overhead over it: per cent of the fp32 forward.",
        "",
        "| model | px | batch | energy | detail_merge | step ms | overhead |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["overhead"]:
        lines.append(
            f"| {r['model']} | {r['size']} | {r['batch']} | {r['energy']} | {r['detail_merge']} | "
            f"{r['step_s'] * 1e3:.2f} | {r['overhead']:.2%} |"
        )
    if result.get("in_place"):
        lines += [
            "",
            "Guided steps with their evaluations, and what they cost more than these alone; and whole runs of 25 steps "
            "from 0.6 T, guided by `dct` until 0.4 T (15 evaluations).",
            "",
            "| model | px | batch | precision | mode | steps | ms a step | overhead | images/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
    for r in result.get("in_place", []):
        case = f"| {r['model']} | {r['size']} | {r['batch']} | {r['precision']} | {r['mode']} | {r['energy']} |"
        if "seconds" in r:
            lines.append(f"{case} | | {r['images_per_s']:.1f} |")
        else:
            lines.append(f"{case} {r['step_s'] * 1e3:.2f} | {r['overhead']:.1%} | |")
    if result["whole_run"]:
        lines += [
            "",
            "Whole runs of the demo model: 100 steps, 80 guided, `dct`.",
            "",
            "| precision | batch | s | images/s | grey levels from fp32 |",
            "|---|---|---|---|---|",
        ]
    for r in result["whole_run"]:
        lines.append(
            f"| {r['precision']} | {r['batch']} | {r['seconds']:.2f} | {r['images_per_s']:.2f} | "
            f"{r['grey_levels']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write(result, out):
    with open(f"{out}.json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    with open(f"{out}.md", "w", encoding="utf-8") as file:
        file.write(report(result))


def add(known, rows):
    """Put rows into the list `known`, in place of those of the same case: whatever is neither measured nor counted."""

    def case(row):
        return {
            name: value for name, value in row.items() if isinstance(value, (str, bool)) or name in ("size", "batch")
        }

    fresh = [case(row) for row in rows]
    known[:] = [row for row in known if case(row) not in fresh] + rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--cases", default="demo:1,demo:8,readme:1", help="model:batch pairs; models: demo, readme, ilvr, tiny"
    )
    parser.add_argument("--precisions", default="fp32,bf16", help="of fp32, bf16 and fp16")
    modes = (
        "of eager, channels_last, compiled (with CUDA graphs on a GPU) and no_graphs, the first two also as eager+fuse"
    )
    parser.add_argument("--modes", default="eager", help=modes)
    parser.add_argument(
        "--energies", default=",".join(ENERGIES), help="energies of guided steps, joined by +; empty for none"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times that every case is measured (default 5)")
    parser.add_argument("--whole_run", action="store_true", help="also whole runs of the demo model")
    parser.add_argument("--profile", help="file for a profile of guided steps")
    parser.add_argument(
        "--default_malloc", action="store_true", help="without keep_freed_memory, to see what that gives"
    )
    parser.add_argument("--add", action="store_true", help="keep what --out holds of other cases")
    parser.add_argument(
        "--out", default=os.path.join(ROOT, "benchmarks", "results", "speed_cpu"), help="path without suffix"
    )
    args = parser.parse_args()
    if not args.default_malloc:
        keep_freed_memory()
    device = torch.device(args.device)
    precisions, modes = args.precisions.split(","), args.modes.split(",")
    rates = {precision: matrix_rate(DTYPES[precision], device) for precision in precisions}
    result = {
        "machine": machine.describe(),
        "device": args.device,
        "matrix_flops": rates,
        "rounds": args.rounds,
        "forward": [],
        "overhead": [],
        "whole_run": [],
    }
    if args.add:
        with open(f"{args.out}.json", encoding="utf-8") as file:
            old = json.load(file)
        result |= {name: old[name] for name in ("forward", "overhead", "whole_run")}
        best = {name: max(rate, old["matrix_flops"].get(name, 0)) for name, rate in rates.items()}
        result["matrix_flops"] = {**old["matrix_flops"], **best}
    for case in filter(None, args.cases.split(",")):
        name, _, batch = case.partition(":")
        rows = measure_forward(name, int(batch), precisions, modes, args.rounds, device)
        add(result["forward"], rows)
        print(*rows, sep="\n", flush=True)
        if args.energies and precisions[0] == "fp32":
            rows = measure_overhead(
                name, int(batch), args.energies.split(","), args.rounds, device, rows[0]["forward_s"]
            )
            add(result["overhead"], rows)
            print(*rows, sep="\n", flush=True)
        write(result, args.out)
    if args.whole_run:
        result["whole_run"] = measure_whole_run(precisions, device)
        write(result, args.out)
    if args.profile:
        print("waits:", profile_step(args.profile, device))


if __name__ == "__main__":
    main()
