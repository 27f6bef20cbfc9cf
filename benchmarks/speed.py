"""Measure the speed of sampling on this machine, and write one table per part.

    python benchmarks/speed.py evaluations steps runs --out speed_cpu.md
    python benchmarks/speed.py evaluations --device cuda --models readme:8,readme:32 --modes eager,compiled
    python benchmarks/speed.py release --release FOLDER --batches 1,4 --ours fp32,bf16+fuse
    python benchmarks/speed.py startup

The cases of a part run in turns, round after round, and medians are reported, so that a machine whose speed changes
affects all of them alike. Weights are random except for the demo model's. The folder of the public release is fetched
by whoever runs this; the part `release` measures both loops in processes of their own, with the arithmetic of
`--variant released`. A part is written to `--out` as soon as it is measured.
"""

import argparse
import ast
import itertools
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "benchmarks")]

import machine

BLOCKS = 16
SHARED = {
    "image_size": 256, "num_channels": 128, "num_res_blocks": 2, "attention_resolutions": "16", "num_head_channels": 64,
    "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": False,
}  # fmt: skip
SMALL = {"image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 32}
ARCHITECTURES = {
    "readme": SHARED, "ilvr": {**SHARED, "num_res_blocks": 1, "learn_sigma": True}, "tiny": {**SHARED, **SMALL}
}  # fmt: skip
RELEASE_RUN = {"guided": 49 + 4, "plain": 51}
"""Steps of the release's example: 100 with guidance until step 50, four refinements."""


# ---- networks and clocks --------------------------------------------------------------------------------------------


def network(name, precision, device, mode="eager"):
    """Return (model as `mode` runs it, image size).

    mode: eager, compiled (with CUDA graphs on a GPU), no_graphs or channels_last; eager+fuse fuses layers.
    """
    import torch

    from guided_diffusion.checkpoint import load_model
    from guided_diffusion.runtime import DTYPES, CompiledModel, memory_format
    from guided_diffusion.script_util import create_model

    mode, _, fused = mode.partition("+")
    if name == "demo":
        model, info = load_model(os.path.join(ROOT, "models", "fluent3d_64.safetensors"), device=device)
        size = info.flags["image_size"]
    else:
        model, size = random_weights(create_model(**ARCHITECTURES[name]), device), ARCHITECTURES[name]["image_size"]
    order = torch.channels_last if mode == "channels_last" else memory_format(device, mode in ("compiled", "no_graphs"))
    model = model.set_dtype(DTYPES[precision]).to(memory_format=order)
    if fused:
        model.fuse()
    if mode == "compiled":
        return CompiledModel(model), size
    return (torch.compile(model, dynamic=False) if mode == "no_graphs" else model), size


def random_weights(model, device):
    import torch

    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    return model.to(device).eval().requires_grad_(False)


def create_energies(names, size, device):
    """Energies joined by +; VGG with random weights, an extractor trained for the demo model at 64 px."""
    import torch

    from guided_diffusion import energy
    from guided_diffusion.checkpoint import load_model
    from guided_diffusion.script_util import create_classifier

    def create(name):
        if name == "vgg":
            torch.manual_seed(0)
            return energy.vgg(energy._vgg_layers(1).state_dict(), BLOCKS)
        if name == "dse" and size == 64:
            path = os.path.join(ROOT, "models", "fluent3d_64_dse.safetensors")
            return energy.dse(load_model(path, device=device)[0])
        if name == "dse":
            wide = create_classifier(size, classifier_width=128, classifier_depth=2, channel_mult="")
            return energy.dse(wide.to(device).eval().requires_grad_(False))
        return energy.dct(BLOCKS) if name == "dct" else energy.low_pass(size // 8)

    return [] if names == "none" else [create(name) for name in names.split("+")]


def settle(device):
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds(function, device):
    settle(device)
    started = time.perf_counter()
    function()
    settle(device)
    return time.perf_counter() - started


def in_turns(cases, rounds, device):
    """Seconds of functions by name, `rounds` of each, after a first round that does not count."""
    times = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, function in cases.items():
            took = seconds(function, device)
            if turn:
                times[name].append(took)
    return times


def speedup(times, baseline):
    """The median of the rounds' ratios."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, times, strict=True))


def peak_mib(device):
    """Peak memory: allocated on a GPU since the last reset; else that of the process so far."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matrix_rate(precision, device):
    """FLOPs per second of a large matrix product, the best of several, as `@` and as a 1x1 convolution."""
    import torch

    from guided_diffusion.runtime import DTYPES

    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
    kernel = a.reshape(n, n, 1, 1).contiguous(memory_format=torch.channels_last)
    image = b.T[None, :, :, None].contiguous(memory_format=torch.channels_last)
    ways = (lambda: a @ b), (lambda: torch.nn.functional.conv2d(image, kernel))
    return 2 * n**3 / min(seconds(way, device) for way in ways for _ in range(4))


def models(args):
    """(name, batch size) of `--models`."""
    for case in args.models.split(","):
        name, _, batch = case.partition(":")
        yield name, int(batch or 1)


# ---- parts: each returns the rows of its table ----------------------------------------------------------------------


def evaluations(args, device):
    """Evaluations of the network. Output error: mean distance from eager fp32, relative."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    rows, rates = [], {precision: matrix_rate(precision, device) for precision in args.precisions}
    for name, batch in models(args):
        cases, outputs, facts = {}, {}, {}
        for precision, mode in itertools.product(args.precisions, args.modes.split(",")):
            model, size = network(name, precision, device, mode)
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(device)
            t = torch.full((batch,), 500, device=device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()

            def run(model=model, x=x, t=t):
                return model(x, t)

            started = time.perf_counter()
            with torch.no_grad():
                outputs[precision, mode] = run().clone()
            settle(device)
            cases[precision, mode] = run
            facts[precision, mode] = {"first s": time.perf_counter() - started, "peak MiB": round(peak_mib(device))}
        plain, _ = network(name, "fp32", device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            exact = plain(x, t)
        gflop = counter.get_total_flops() / batch / 1e9
        with torch.no_grad():
            times = in_turns(cases, args.rounds, device)
        for (precision, mode), taken in times.items():
            took, output = statistics.median(taken), outputs[precision, mode]
            rows.append(
                {"model": name, "px": size, "batch": batch, "precision": precision, "mode": mode, "s": took}
                | {"images/s": batch / took, "GFLOP/image": gflop}
                | {"share of the matrix rate": f"{gflop * 1e9 * batch / took / rates[precision]:.0%}"}
                | {"output error": ((output - exact).abs().mean() / exact.abs().mean()).item()}
                | facts[precision, mode]
            )
    return rows


def guided_steps(model, ref, draw, names, device, learned, steps=4):
    """A function that takes `steps` steps, guided by the energies `names`, or unguided for None."""
    from guided_diffusion import sddm
    from guided_diffusion.script_util import create_diffusion

    diffusion = create_diffusion(timestep_respacing=str(steps + 1), learn_sigma=learned)
    energies = create_energies(names or "none", ref.shape[-1], device)
    options = {"blocks": BLOCKS, "range_t": steps if names is None else 0, "energies": energies}

    def take():
        # The last step of a schedule is always unguided: it is not taken.
        run = sddm.sample.steps(model, diffusion, ref, noise=lambda _: draw, **options)
        for _ in itertools.islice(run, steps):
            pass

    return take


def steps(args, device):
    """A step without its evaluation of the network (fp32), and its share of an evaluation's time."""
    import torch

    rows = []
    for name, batch in models(args):
        model, size = network(name, "fp32", device)
        learned = ARCHITECTURES.get(name, SHARED)["learn_sigma"]
        generator = torch.Generator().manual_seed(2)
        ref = (torch.rand(batch, 3, size, size, generator=generator) * 2 - 1).to(device)
        draw = torch.randn(ref.shape, generator=generator).to(device)
        t, output = torch.full((batch,), 500, device=device), torch.cat([draw, draw], 1) if learned else draw
        cases = {"evaluation": lambda model=model, ref=ref, t=t: [model(ref, t) for _ in range(4)]}
        for names in (None, *args.energies.split(",")):
            cases[names] = guided_steps(lambda x, t, output=output: output, ref, draw, names, device, learned)
        with torch.no_grad():
            times = {key: statistics.median(taken) / 4 for key, taken in in_turns(cases, args.rounds, device).items()}
        alone = times.pop("evaluation")
        for names, took in times.items():
            step = "unguided" if names is None else f"guided, {names}"
            rows.append({"model": name, "px": size, "batch": batch, "step": step, "ms": 1e3 * took})
            rows[-1]["of an evaluation"] = f"{took / alone:.1%}"
    return rows


def runs(args, device):
    """Whole runs of the demo model on ref_imgs. Speed-up and RMS in grey levels: against the first case."""
    import numpy as np

    from guided_diffusion.translator import Translator

    folder = os.path.join(ROOT, "ref_imgs")
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".png"))
    rows, names = [], args.cases.split(";")
    for batch in args.batches:
        pictures = [paths[n % len(paths)] for n in range(batch)]
        cases, outputs = {}, {}
        for name in names:
            options = {"steps": args.run_steps, "range_t": 0.3, "area": BLOCKS, "energy": "dct"}
            for pair in filter(None, name.split(",")):
                key, _, value = pair.partition("=")
                options[key] = value if re.fullmatch(r"[a-z]\w*", value) else ast.literal_eval(value)
            translate = Translator(os.path.join(ROOT, "models", "fluent3d_64.safetensors"), device=device, **options)

            def run(name=name, translate=translate, pictures=pictures, outputs=outputs):
                outputs[name] = np.stack([np.asarray(image, float) for image in translate(pictures)])

            cases[name] = run
        times = in_turns(cases, args.rounds, device)
        for name, taken in times.items():
            took, first = statistics.median(taken), names[0]
            rms = np.sqrt(np.square(outputs[name] - outputs[first]).mean())
            rows.append({"batch": batch, "case": name or "as it is", "s": took, "images/s": batch / took})
            rows[-1] |= {"times as fast": speedup(taken, times[first]), "RMS": rms}
    return rows


def startup(args, device):
    """From the command to its first denoising step, and what imports take; caches are warm."""
    flags = ["--model_path", "models/fluent3d_64.safetensors", "--base_samples", "ref_imgs", "--area", "16"]
    flags += ["--range_t", "20", "--timestep_respacing", "100", "--batch_size", "1", "--device", str(device)]

    def first_step():
        with tempfile.TemporaryDirectory() as out:
            ours, theirs = machine.terminal()
            command = [sys.executable, "scripts/ae_sample.py", *flags, "--save_dir", out]
            process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs)
            os.close(theirs)
            shown = ""
            try:
                while not re.search(r"step [1-9]\d*/", shown):
                    shown += os.read(ours, 4096).decode(errors="replace")
            except OSError:
                raise SystemExit(f"error: the command ended before its first step: {shown}") from None
            finally:
                process.kill()
                process.wait()
                os.close(ours)

    def importing(statement):
        return lambda: subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)

    script = "import runpy; runpy.run_path('scripts/ae_sample.py', run_name='imported')"
    cases = {"first denoising step": first_step, "import torch": importing("import torch")}
    cases |= {"all imports of the command": importing(script), "import sddm": importing("import guided_diffusion.sddm")}
    return [
        {"until": name, "s": statistics.median(taken), "rounds": args.rounds}
        for name, taken in in_turns(cases, args.rounds, device).items()
    ]


def profile(args, device):
    """Guided steps of the demo model by operation (torch.profiler), the 15 that take most of the time."""
    import torch
    from torch.profiler import ProfilerActivity

    name, batch = next(models(args))
    model, size = network(name, "fp32", device)
    draw = torch.randn(batch, 3, size, size, device=device)
    take = guided_steps(model, draw.clamp(-1, 1), draw, "dct", device, ARCHITECTURES.get(name, SHARED)["learn_sigma"])
    take()
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiled:
        take()
        settle(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    waits = ("Synchronize", "aten::item", "_local_scalar_dense")
    rows = [{"operation": "waits for the device", "calls": sum(e.count for e in events if e.key.endswith(waits))}]
    return rows + [
        {"operation": e.key, "calls": e.count, "ms": getattr(e, key) / 1e3, "share": f"{getattr(e, key) / total:.1%}"}
        for e in events[:15]
    ]


# ---- the release, and other children --------------------------------------------------------------------------------


def release_steps(folder, architecture, device, blocks):
    """A function of (references, last guided step) that returns the release's generator of steps."""
    sys.path.insert(0, folder)
    sys.modules.setdefault("cv2", types.SimpleNamespace(norm=None))  # imported by the release and not used
    import torch

    from guided_diffusion import gaussian_diffusion as parts
    from guided_diffusion import script_util

    flags = {**script_util.model_and_diffusion_defaults(), **architecture, "timestep_respacing": "100"}
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


def our_steps(case, architecture, device, blocks):
    """The same of this repository, for a case such as bf16+fuse."""
    sys.path.insert(0, ROOT)
    from guided_diffusion import energy, sddm
    from guided_diffusion.runtime import DTYPES, CompiledModel, keep_freed_memory, memory_format
    from guided_diffusion.script_util import create_diffusion, create_model

    keep_freed_memory()
    precision, *extras = case.split("+")
    model = random_weights(create_model(**architecture), device).set_dtype(DTYPES[precision])
    model = model.to(memory_format=memory_format(device, "compile" in extras))
    if "fuse" in extras:
        model.fuse()
    if "compile" in extras:
        model = CompiledModel(model)
    options = {"bf16": precision == "bf16" and "fuse" in extras, "channels_last": "fuse" in extras}
    vgg = energy.vgg(energy._vgg_layers(1).state_dict(), blocks, **options)
    diffusion = create_diffusion(timestep_respacing="100", learn_sigma=architecture["learn_sigma"])
    return lambda ref, range_t: sddm.sample.steps(
        model, diffusion, ref, blocks=blocks, range_t=range_t, energies=[vgg], variant="released"
    )


def serve(pipe, name, args):
    """Take a step for every message {"start": kind, "batch": N}, the first, or {}, the next; answer with its time."""
    import torch

    device, architecture = torch.device(args.device), ARCHITECTURES[next(models(args))[0]]
    blocks = min(BLOCKS, architecture["image_size"] // 4)
    torch.manual_seed(0)
    create, which = (release_steps, args.release) if name == "release" else (our_steps, name)
    start = create(which, architecture, device, blocks)
    while wanted := pipe.recv():
        if "start" in wanted:
            ref = torch.rand(wanted["batch"], 3, *2 * [architecture["image_size"]], device=device) * 2 - 1
            steps = start(ref, 0 if wanted["start"] == "guided" else 99)
        pipe.send((seconds(lambda: next(steps), device), peak_mib(device)))  # noqa: B023


class Child:
    """A loop in a process of its own: both packages have one name."""

    def __init__(self, name, args):
        self.name, self.peak = name, 0.0
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, name, args), daemon=True)
        self.process.start()
        theirs.close()

    def step(self, start="", batch=0):
        """Take a step, the first of a kind where `start` names it; returns its seconds."""
        self.pipe.send({"start": start, "batch": batch} if start else {"next": True})
        try:
            took, self.peak = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"error: {self.name} ended") from None
        return took


def release(args, device):
    """Steps of the public release and of this repository, `vgg` energy; the run is 100 steps, guided until step 50."""
    if args.release and not os.path.isdir(os.path.join(args.release, "guided_diffusion")):
        raise SystemExit(f"error: --release is {args.release!r}; a folder that holds guided_diffusion is needed")
    names = [*(["release"] if args.release else []), *args.ours.split(",")]
    children, rows = [Child(name, args) for name in names], []
    for batch in args.batches:
        times = {}
        for kind in RELEASE_RUN:
            for child in children:
                child.step(kind, batch)
            turns = [[child.step() for child in children] for _ in range(args.rounds)]
            times[kind] = dict(zip(names, zip(*turns)))
        for child in children:
            medians = {kind: statistics.median(taken[child.name]) for kind, taken in times.items()}
            run = sum(count * medians[kind] for kind, count in RELEASE_RUN.items())
            rows.append({"loop": child.name, "batch": batch, **{f"{kind} step, s": medians[kind] for kind in times}})
            for kind, taken in times.items():
                rows[-1][f"{kind}, times as fast"] = speedup(taken[child.name], taken[names[0]])
            rows[-1] |= {"run, s": run, "images/s": batch / run, "peak MiB": round(child.peak)}
    return rows


# ---- the command ----------------------------------------------------------------------------------------------------

PARTS = {each.__name__: each for each in (evaluations, steps, runs, release, startup, profile)}


def table(rows):
    """Rows as a Markdown table; its columns are all keys, in order."""
    from guided_diffusion.evaluation.table import markdown_table

    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[text(row.get(key, "")) for key in columns] for row in rows]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all but release)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each case")
    parser.add_argument("--models", default="demo:1,demo:8", help=f"NAME:BATCH of demo, {', '.join(ARCHITECTURES)}")
    parser.add_argument("--precisions", default="fp32,bf16", type=lambda text: text.split(","))
    parser.add_argument("--modes", default="eager,eager+fuse", help="also channels_last, compiled, no_graphs")
    parser.add_argument("--energies", default="none,dct,vgg,low_pass,dse,dct+low_pass+vgg", help="of guided steps")
    parser.add_argument("--batches", default="7", help="of runs and release",
                        type=lambda text: [int(n) for n in text.split(",")])  # fmt: skip
    parser.add_argument("--run_steps", type=int, default=20, help="denoising steps of runs")
    cases = ";fuse=True;precision=bf16;cache_interval=2;cache_interval=2,cache_guided=True;start=0.6,range_t=0.4"
    parser.add_argument("--cases", default=cases, help="runs: options of Translator, cases joined by ;")
    parser.add_argument("--release", help="folder of the public release; without it, ours alone are measured")
    parser.add_argument("--ours", default="fp32,bf16+fuse", help="precision with +fuse and +compile, for release")
    parser.add_argument("--out", help="Markdown file to write (default: print only)")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    import torch

    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    args.device = str(device)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        raise SystemExit(f"error: PART is {unknown[0]!r}; it can be {', '.join(PARTS)}")
    from guided_diffusion.runtime import keep_freed_memory

    keep_freed_memory()
    report = f"# Speed\n\n{machine.description()}. On {device}; medians of {args.rounds}.\n"
    print(report)
    for part in args.parts or [part for part in PARTS if part != "release"]:
        section = f"## {part}\n\n{PARTS[part].__doc__}\n\n{table(PARTS[part](args, device))}"
        print(section, flush=True)
        report += f"\n{section}"
        if args.out:
            with open(args.out, "w", encoding="utf-8") as file:
                file.write(report)


if __name__ == "__main__":
    main()
