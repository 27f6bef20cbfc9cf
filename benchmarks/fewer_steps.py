"""What fewer model evaluations cost in quality: every sampler with 100, 50, 25 and 12 steps on the emoji test split.

Same references and same draws of x_T for all. Frechet distance to the truths of the whole split, in the demo model's
own features (so it does not tell one model from another, and it is not FID); SSIM to each source's own truth, and to
the source. T0 is a fifth of the steps. Few images make Frechet distances large: compare within the table only.

example: python benchmarks/fewer_steps.py --images 64 --precision bf16
"""

import argparse
import json
import os
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]

import machine
import torch
from guided_diffusion.metrics import feature_extractor, frechet_distance, paired_metrics

from guided_diffusion import energy, sddm
from guided_diffusion.checkpoint import load_model
from guided_diffusion.image_datasets import list_references, load_image, to_tensor
from guided_diffusion.run.noise import ImageNoise
from guided_diffusion.run.record import sha256
from guided_diffusion.runtime import DTYPES, keep_freed_memory, pick_device, pick_precision
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.solvers import SOLVERS


def images(folder, size, names=None):
    """Names and images [N, 3, H, W] in [-1, 1] of a folder, all or those of the names."""
    references = [r for r in list_references(folder) if names is None or r.name in names]
    return [r.name for r in references], to_tensor([load_image(r, size) for r in references])


def moments(extractor, x, batch_size):
    """Mean and covariance of the features of images in [-1, 1]."""
    with torch.no_grad():
        features = torch.cat([extractor.extract((part + 1) / 2) for part in x.split(batch_size)]).double().cpu().numpy()
    return features.mean(0), torch.from_numpy(features).T.cov().numpy()


def translate(model, flags, ref, names, sampler, steps, args, device):
    """Outputs for all references, and the seconds they took."""
    diffusion = create_diffusion(**{**flags, "timestep_respacing": str(steps)})
    outputs, started = [], time.perf_counter()
    for n in range(0, len(ref), args.batch_size):
        batch = ref[n : n + args.batch_size].to(device)
        noise = ImageNoise([f"{args.seed}/{name}" for name in names[n : n + args.batch_size]], device)
        outputs.append(
            sddm.sample(
                model,
                diffusion,
                batch,
                blocks=args.area,
                range_t=round(0.2 * steps),
                energies=[energy.dct(args.area)],
                sampler=sampler,
                eta=args.eta,
                noise=noise,
            ).cpu()
        )
    return torch.cat(outputs).clamp(-1, 1), time.perf_counter() - started


def report(result):
    lines = [
        "# Fewer steps",
        "",
        f"{machine.sentence(result['machine'])}. On {result['device']}, {result['precision']}.",
        f"Model {result['model']}, sha256 {result['sha256'][:12]}; {result['images']} references of the emoji "
        f"test split; area {result['area']}, T0 = 0.2 T, `dct`, eta {result['eta']:g} for ddim and the guided "
        "steps of dpmpp_2m.",
        "",
        "Fréchet distance in the model's own features to the truths of the whole split; SSIM to the source's own "
        "truth and to the source.",
        "",
        "| sampler | evaluations | Fréchet | SSIM to truth | SSIM to source | s per image |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['sampler']} | {r['evaluations']} | {r['frechet']:.3f} | {r['ssim_truth']:.4f} | "
            f"{r['ssim_source']:.4f} | {r['seconds_per_image']:.2f} |"
            for r in result["rows"]
        ),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=os.path.join(ROOT, "models", "fluent3d_64.safetensors"))
    parser.add_argument(
        "--data", default=os.path.join(ROOT, "data", "emoji"), help="folder of datasets/prepare_emoji.py"
    )
    parser.add_argument("--images", type=int, default=64, help="references, evenly over the split (default 64)")
    parser.add_argument("--steps", default="100,50,25,12")
    parser.add_argument("--samplers", default=",".join(SOLVERS))
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--area", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=(*DTYPES, "auto"), default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--out", default=os.path.join(ROOT, "benchmarks", "results", "fewer_steps"), help="without suffix"
    )
    args = parser.parse_args()
    keep_freed_memory()
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model, info = load_model(args.model_path, device=device, dtype=DTYPES[precision])
    model.to(memory_format=torch.channels_last)
    size = info.flags["image_size"]
    names, sources = images(os.path.join(args.data, "twitter", "test"), size)
    chosen = torch.linspace(0, len(names) - 1, min(args.images, len(names))).round().long()
    names, sources = [names[i] for i in chosen], sources[chosen]
    truth_names, truths = images(os.path.join(args.data, "fluent3d", "test"), size)
    own_truths = truths[[truth_names.index(name) for name in names]]
    extractor = feature_extractor(args.model_path, device=device)
    target = moments(extractor, truths.to(device), args.batch_size)
    result = {
        "machine": machine.describe(),
        "device": args.device,
        "precision": precision,
        "images": len(names),
        "model": os.path.basename(args.model_path),
        "sha256": sha256(args.model_path),
        "area": args.area,
        "eta": args.eta,
        "rows": [],
    }
    for steps in map(int, args.steps.split(",")):
        for sampler in args.samplers.split(","):
            x, took = translate(model, info.flags, sources, names, sampler, steps, args, device)
            ssim = [paired_metrics((x + 1) / 2, (y + 1) / 2)["ssim"].mean().item() for y in (own_truths, sources)]
            distance = frechet_distance(*moments(extractor, x.to(device), args.batch_size), *target)
            result["rows"].append(
                {
                    "sampler": sampler,
                    "evaluations": steps,
                    "frechet": float(distance),
                    "ssim_truth": ssim[0],
                    "ssim_source": ssim[1],
                    "seconds_per_image": took / len(names),
                }
            )
            print(result["rows"][-1], flush=True)
            with open(f"{args.out}.json", "w", encoding="utf-8") as file:
                json.dump(result, file, indent=1)
                file.write("\n")
            with open(f"{args.out}.md", "w", encoding="utf-8") as file:
                file.write(report(result))


if __name__ == "__main__":
    main()
