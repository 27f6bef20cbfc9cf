"""What cheaper evaluations give and cost: shared deep features, fused layers, cheaper energies, one pass of norms.

Whole runs of the demo model on its example pictures, each case beside its plain twin: the cases of one batch size and
precision are measured in turns, and medians are reported. The difference of outputs is that of the same seeds.

example: python benchmarks/bench_cheaper.py --batches 7 --precisions fp32   # adds to what --out holds
"""

import argparse
import json
import os
import statistics
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import machine
import torch
from torch.nn import functional as F

from guided_diffusion import energy, nn, sddm, unet
from guided_diffusion.checkpoint import load_model
from guided_diffusion.image_datasets import list_references, load_image, to_tensor
from guided_diffusion.runtime import DTYPES, keep_freed_memory
from guided_diffusion.script_util import create_diffusion

MODELS = os.path.join(ROOT, "models")
BLOCKS = 16


class OneBatch(energy.DomainSpecificEnergy):
    """`dse` with both evaluations as one batch, whose backward pass then covers the reference's half, too."""

    def energy_and_grad(self, x, t, alpha_bar):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            both = torch.cat([energy._diffuse(self.ref, self.noise, alpha_bar), x])
            of_ref, features = self.encoder.middle_features(both, t.repeat(2)).float().chunk(2)
            value = F.cosine_similarity(features, of_ref.detach(), dim=1).mean(dim=(1, 2))
            (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad


def one_pass(norm, x, scale=None, shift=None, silu=None):
    """`nn.norm_silu` with the affine part in one pass, for half precision."""
    if x.dtype == torch.float32 or scale is None or torch.is_grad_enabled():
        return nn.norm_silu(norm, x, scale, shift, silu)
    halves = nn._parameters_for_halves(norm, x)
    weight, bias = halves or (norm.weight, norm.bias)
    h = F.group_norm(x if halves else x.float(), norm.num_groups, weight, bias, norm.eps)
    torch.addcmul(shift.to(h.dtype), h, (1 + scale).to(h.dtype), out=h)
    return F.silu(h, inplace=True).to(x.dtype)


def vgg(**options):
    """VGG's first level with random weights: what it costs and how it rounds does not depend on them much."""
    torch.manual_seed(0)
    return energy.vgg(energy._vgg_layers(1).state_dict(), BLOCKS, **options)


def create_cases(precision):
    """name: (what it is compared with, options of the run, whether layers are fused, its energy)."""
    encoder = load_model(os.path.join(MODELS, "fluent3d_64_dse.safetensors"))[0]
    dct = energy.dct(BLOCKS)
    cases = {"dct": (None, {}, False, dct), "fuse": ("dct", {}, True, dct)}
    for n in (2, 3, 5):
        cases[f"cache_interval {n}"] = ("dct", {"cache_interval": n}, False, dct)
        cases[f"cache_interval {n}, guided"] = ("dct", {"cache_interval": n, "cache_guided": True}, False, dct)
    both = {"cache_interval": 2, "cache_guided": True}
    cases["fuse, cache_interval 2, guided"] = ("dct", both, True, dct)
    cases |= {"vgg": (None, {}, False, vgg()), "vgg, channels-last": ("vgg", {}, False, vgg(channels_last=True))}
    if precision == "bf16":
        cases["vgg, bf16"] = ("vgg", {}, False, vgg(bf16=True))
        cases["norms in one pass"] = ("dct", {"norm": one_pass}, False, dct)
    cases |= {"dse": (None, {}, False, energy.dse(encoder)), "dse, one batch": ("dse", {}, False, OneBatch(encoder))}
    return cases


def measure(batch, precision, names, rounds, steps, range_t, deadline):
    """Rows of images per second, speed-up and difference of outputs, one a case; deadline: of time.monotonic()."""
    networks = {}
    for fused in (False, True):
        model, info = load_model(os.path.join(MODELS, "fluent3d_64.safetensors"), dtype=DTYPES[precision])
        networks[fused] = model.to(memory_format=torch.channels_last)
    networks[True].fuse()
    size = info.flags["image_size"]
    paths = [reference.path for reference in list_references(os.path.join(ROOT, "ref_imgs"))]
    ref = to_tensor([load_image(paths[n % len(paths)], size) for n in range(batch)])
    diffusion = create_diffusion(timestep_respacing=str(steps))
    draws = torch.randn(steps + 1, *ref.shape, generator=torch.Generator().manual_seed(0))
    cases = create_cases(precision)
    if names:
        cases = {name: case for name, case in cases.items() if name in names or any(
            cases[each][0] == name for each in names)}  # fmt: skip

    def run(options, fused, term):
        remaining, options = iter(draws), dict(options)
        unet.norm_silu = options.pop("norm", nn.norm_silu)
        started = time.perf_counter()
        x = sddm.sample(
            networks[fused], diffusion, ref, blocks=BLOCKS, range_t=range_t, energies=[term],
            noise=lambda _: next(remaining), **options,
        )  # fmt: skip
        return time.perf_counter() - started, x.clamp(-1, 1)

    with torch.no_grad():
        for model in networks.values():
            model(ref, torch.zeros(batch))
    times, outputs = {name: [] for name in cases}, {}
    for _ in range(rounds):
        started = time.monotonic()
        for name, (_, *case) in cases.items():
            took, outputs[name] = run(*case)
            times[name].append(took)
        if 2 * time.monotonic() - started > deadline:
            break  # another round would end too late
    rows = []
    for name, (twin, *_) in cases.items():
        took = statistics.median(times[name])
        row = {"case": name, "batch": batch, "precision": precision, "seconds": took, "images_per_s": batch / took}
        row["rounds"] = len(times[name])
        if twin:
            difference = (outputs[name] - outputs[twin]).square().mean().sqrt().item() * 127.5
            ratios = [theirs / ours for theirs, ours in zip(times[twin], times[name])]
            row |= {"twin": twin, "speedup": statistics.median(ratios), "rms_grey_levels": difference}
        rows.append(row)
    return rows


def report(result):
    """The results in words and a table."""
    lines = [
        "# Cheaper evaluations",
        "",
        f"{machine.sentence(result['machine'])}.",
        f"Demo model at 64 px, {result['steps']} steps, guided above step {result['range_t']}; medians of "
        "rounds, the cases of a batch size and precision in turns; the speed-up is the median of the rounds' ratios. "
        "RMS: difference of the outputs from those of the twin with the same seeds, in grey levels of 255; few steps "
        "make it larger.",
        "",
        "| precision | batch | case | rounds | s | images/s | compared with | speed-up | RMS |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        twin = f"{r['twin']} | {r['speedup']:.2f} | {r['rms_grey_levels']:.2f}" if "twin" in r else "| |"
        case = f"{r['precision']} | {r['batch']} | {r['case']} | {r['rounds']}"
        lines.append(f"| {case} | {r['seconds']:.2f} | {r['images_per_s']:.2f} | {twin} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="7,14")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--cases", default="", help="names of cases, joined by ;, with their twins; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round that would end later")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--range_t", type=int, default=6)
    parser.add_argument("--out", default=os.path.join(ROOT, "benchmarks", "results", "speed_cheaper"))
    args = parser.parse_args()
    keep_freed_memory()
    deadline = time.monotonic() + 60 * args.minutes
    rows = []
    if os.path.exists(f"{args.out}.json"):
        with open(f"{args.out}.json", encoding="utf-8") as file:
            rows = json.load(file)["rows"]
    names = [name for name in args.cases.split(";") if name]
    for precision in args.precisions.split(","):
        for batch in map(int, args.batches.split(",")):
            fresh = measure(batch, precision, names, args.rounds, args.steps, args.range_t, deadline)
            keys = {(r["precision"], r["batch"], r["case"]) for r in fresh}
            rows = [r for r in rows if (r["precision"], r["batch"], r["case"]) not in keys] + fresh
            rows.sort(key=lambda r: (r["precision"] != "fp32", r["batch"]))
            result = {"machine": machine.describe(), "steps": args.steps, "range_t": args.range_t}
            result["rows"] = rows
            with open(f"{args.out}.json", "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
                file.write("\n")
            with open(f"{args.out}.md", "w", encoding="utf-8") as file:
                file.write(report(result))


if __name__ == "__main__":
    main()
