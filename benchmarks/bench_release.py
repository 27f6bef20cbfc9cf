"""Our sampling loop beside that of the public SDDM release, step by step in turns.

Both run as children of this process, with random weights of the same shapes: a step of one, then a step of the other,
so that a machine that changes its speed does so for both. Whoever runs this fetches the release; --release is its
folder, which holds `guided_diffusion`. Ours computes what the release does (--variant released). A case of ours is a
precision, then any of `fuse`, `compile` and `cacheN`, joined by +.

example: python benchmarks/bench_release.py --release ../sddm --batches 1,4,16 --ours fp32,bf16+fuse
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "benchmarks"))

ARCHITECTURE = {
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": "16",
    "num_head_channels": 64,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "learn_sigma": False,
    "timestep_respacing": "100",
}
RUN = {"guided": 49 + 4, "plain": 51}  # steps of the README's run: 100, guidance until step 50, four refinements


# ---- in a child -----------------------------------------------------------------------------------------------------


def random_weights(model, device):
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return model.to(device).eval().requires_grad_(False)


def release_steps(folder, architecture, device, blocks):
    """A function of (references, last guided step) that gives the release's generator of steps."""
    sys.path.insert(0, folder)
    try:
        import cv2  # noqa: F401 - the release imports it and uses nothing of it
    except ImportError:
        sys.modules["cv2"] = types.SimpleNamespace(norm=None)
    import torch

    from guided_diffusion import gaussian_diffusion as parts
    from guided_diffusion import script_util

    flags = {**script_util.model_and_diffusion_defaults(), **architecture}
    model, diffusion = script_util.create_model_and_diffusion(**flags)
    model = random_weights(model, device)
    # Its VGG reads a file at a fixed path: random weights do for times.
    load, fill = torch.load, torch.nn.Module.load_state_dict
    torch.load, torch.nn.Module.load_state_dict = (lambda *_, **__: {}), (lambda *_, **__: None)
    try:
        vgg = parts.StageVGG().to(device).eval()
    finally:
        torch.load, torch.nn.Module.load_state_dict = load, fill

    def gradients(x, t, ref_img=None, ref_noisyimg=None):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            found = vgg(x)
            gap = found - parts.block_adaIN(found, vgg(ref_img), blocknum=blocks)
            return [-torch.autograd.grad(gap.square().sum(), x)[0]]

    def start(ref, range_t):
        mean, std = parts.calc_mean_std(parts.blockzation(ref, blocks))
        condition = {"ref_mean": mean, "ref_std": std, "area": blocks, "range_t": range_t, "detail_merge": False}
        return diffusion.p_sample_loop_progressive(
            model, tuple(ref.shape), clip_denoised=True, model_kwargs={"ref_img": ref}, condition_kwargs=condition,
            cond_fn=gradients, device=device,
        )  # fmt: skip

    return start


def cache_interval(case):
    """The interval of a case such as bf16+cache2; 1 without."""
    found = [part.removeprefix("cache") for part in case.split("+") if part.startswith("cache")]
    return int(found[0]) if found else 1


def our_steps(case, architecture, device, blocks):
    """The same of this project, for a case such as bf16+fuse."""
    sys.path.insert(0, ROOT)
    import torch

    from guided_diffusion import energy, sddm
    from guided_diffusion.runtime import DTYPES, CompiledModel, keep_freed_memory, memory_format
    from guided_diffusion.script_util import create_diffusion, create_model

    keep_freed_memory()
    precision, *extras = case.split("+")
    flags = dict(architecture)
    respacing = flags.pop("timestep_respacing")
    model = random_weights(create_model(**flags), device).set_dtype(DTYPES[precision])
    model = model.to(memory_format=memory_format(torch.device(device), "compile" in extras))
    if "fuse" in extras:
        model.fuse()
    if "compile" in extras:
        model = CompiledModel(model)
    interval = cache_interval(case)
    options = {"bf16": precision == "bf16" and "fuse" in extras, "channels_last": "fuse" in extras}
    vgg = energy.vgg(energy._vgg_layers(1).state_dict(), blocks, **options)
    diffusion = create_diffusion(timestep_respacing=respacing, learn_sigma=flags["learn_sigma"])

    def start(ref, range_t):
        return sddm.sample.steps(
            model, diffusion, ref, blocks=blocks, range_t=range_t, energies=[vgg], variant="released",
            cache_interval=interval, cache_guided=True,
        )  # fmt: skip

    return start


def serve(name, release, architecture, device, blocks, answers):
    """Answer lines of JSON: {"start": kind, "batch": N} takes a first step, {} takes one more and gives its time."""
    import torch

    device = torch.device(device)
    torch.manual_seed(0)
    create = (release_steps, release) if name == "release" else (our_steps, name)
    start = create[0](create[1], architecture, device, blocks)

    def settle():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def answer(**values):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        answers.write(json.dumps({**values, "peak_mib": peak}) + "\n")
        answers.flush()

    answer()
    for line in sys.stdin:
        wanted = json.loads(line)
        if "start" in wanted:
            side, last = architecture["image_size"], int(architecture["timestep_respacing"]) - 1
            ref = torch.rand(wanted["batch"], 3, side, side, device=device) * 2 - 1
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps = start(ref, 0 if wanted["start"] == "guided" else last)
        settle()
        started = time.perf_counter()
        next(steps)
        settle()
        answer(seconds=time.perf_counter() - started)


# ---- in the parent --------------------------------------------------------------------------------------------------


class Child:
    """One of the loops in a process of its own."""

    def __init__(self, name, args):
        self.name = name
        passed = ["--child", name, "--release", args.release or "", "--device", args.device]
        passed += ["--blocks", str(args.blocks), "--architecture", args.architecture]
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), *passed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.peak = self.read()["peak_mib"]

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **wanted):
        """Seconds of a step."""
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        self.peak = answer["peak_mib"]
        return answer["seconds"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(children, batch, kind, rounds):
    """Rows of one kind of step at one batch size, with the release (or the first case) as the measure."""
    for child in children:
        child.ask(start=kind, batch=batch)
    times = {child.name: [] for child in children}
    # Where evaluations share features, steps differ in cost: a round is as long as all intervals fit into.
    span = math.lcm(*(cache_interval(child.name) for child in children))
    for _ in range(rounds):
        for child in children:
            times[child.name].append(statistics.mean(child.ask() for _ in range(span)))
    first = times[children[0].name]
    return [
        {
            "loop": child.name,
            "batch": batch,
            "step": kind,
            "seconds": statistics.median(times[child.name]),
            "ratio": statistics.median(theirs / ours for theirs, ours in zip(first, times[child.name])),
            "peak_mib": child.peak,
            "rounds": rounds,
        }
        for child in children
    ]


def earlier(out, result):
    """The rows that a file holds of the same machine and network."""
    if not os.path.exists(f"{out}.json"):
        return []
    with open(f"{out}.json", encoding="utf-8") as file:
        found = json.load(file)
    same = all(found[key] == result[key] for key in ("machine", "device", "architecture", "blocks"))
    return found["rows"] if same else []


def report(result):
    """The results in words and a table."""
    import machine

    flags = ", ".join(f"{name} {value}" for name, value in result["architecture"].items())
    lines = [
        "# Beside the public release",
        "",
        f"{machine.sentence(result['machine'])}. On {result['device']}.",
        f"Random weights; {flags}. Energy `vgg`, {result['blocks']} blocks a side, variant `released`. Medians of "
        "rounds, in turns; the ratio is the median of the rounds' ratios to the loop that stands first, more is "
        "faster. Peak memory: of the process on a CPU, else what was allocated on the device.",
        "",
        "| loop | batch | step | rounds | s | times as fast | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        times = f"{r['seconds']:.3f} | {r['ratio']:.2f} | {r['peak_mib']:.0f}"
        lines.append(f"| {r['loop']} | {r['batch']} | {r['step']} | {r['rounds']} | {times} |")
    lines += ["", "The release's own example, 100 steps with guidance until step 50, computed from these steps:", ""]
    lines += ["| loop | batch | s a run | images/s |", "|---|---|---|---|"]
    for loop, batch in dict.fromkeys((r["loop"], r["batch"]) for r in result["rows"]):
        steps = {r["step"]: r["seconds"] for r in result["rows"] if (r["loop"], r["batch"]) == (loop, batch)}
        run = sum(count * steps[kind] for kind, count in RUN.items())
        lines.append(f"| {loop} | {batch} | {run:.1f} | {batch / run:.4f} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", help="folder of the release; without it, the first case of ours is the measure")
    parser.add_argument("--ours", default="fp32", help="cases of ours, such as fp32,bf16,bf16+fuse+cache2")
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--architecture", default="{}", help="JSON of flags that differ from the README's")
    parser.add_argument("--out", default=os.path.join(ROOT, "benchmarks", "results", "speed_release"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    architecture = {**ARCHITECTURE, **json.loads(args.architecture)}
    if args.child:
        answers, sys.stdout = sys.stdout, sys.stderr
        serve(args.child, args.release, architecture, args.device, args.blocks, answers)
        return
    if args.release and not os.path.isdir(os.path.join(args.release, "guided_diffusion")):
        raise SystemExit(f"error: --release is {args.release!r}; a folder that holds guided_diffusion is needed")
    import machine

    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    children = [Child(name, args) for name in [*(["release"] if args.release else []), *args.ours.split(",")]]
    result = {"machine": machine.describe(), "device": args.device, "architecture": architecture}
    result |= {"blocks": args.blocks, "rows": []}
    try:
        for batch in map(int, args.batches.split(",")):
            fresh = [row for kind in RUN for row in measure(children, batch, kind, args.rounds)]
            result["rows"] = [row for row in earlier(args.out, result) if row["batch"] != batch] + fresh
            result["rows"].sort(key=lambda row: row["batch"])
            with open(f"{args.out}.json", "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
                file.write("\n")
            with open(f"{args.out}.md", "w", encoding="utf-8") as file:
                file.write(report(result))
    finally:
        for child in children:
            child.close()


if __name__ == "__main__":
    main()
