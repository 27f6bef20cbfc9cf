"""How far a model's colours drift: true pictures noised to M and denoised; what becomes of their white backgrounds.

    python benchmarks/emoji/drift.py [--model_path FILE] [--count 32]

Prints, for M = 0.5 T and 0.7 T of 50 steps, the mean error in grey levels of the pixels that are white in the true
picture, and the median over pictures of each one's median, which a shifted outline hardly changes. Held-out pictures
without skin tones, evenly spaced by name; seed 0.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from judge import SKIN_TONE

from guided_diffusion import baselines, checkpoint
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.runtime import keep_freed_memory
from guided_diffusion.script_util import create_diffusion

STEPS, SHARES, BATCH = 50, (0.5, 0.7), 16


def drift(model, diffusion, truths, share):
    """(mean, median of medians) of the error of white pixels in grey levels, truths [N, 3, H, W] in [-1, 1]."""
    torch.manual_seed(0)
    made = torch.cat([baselines.sdedit(model, diffusion, part, start=share) for part in truths.split(BATCH)])
    white = (truths > 0.999).all(1, keepdim=True).expand_as(truths)
    error = (made.clamp(-1, 1) - truths) * 127.5
    medians = [one[mask].median() for one, mask in zip(error, white) if mask.any()]
    return error[white].mean().item(), torch.stack(medians).median().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default=str(ROOT / "models" / "fluent3d_64.safetensors"))
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="the emoji set")
    parser.add_argument("--count", type=int, default=32, help="pictures (default 32)")
    args = parser.parse_args()
    keep_freed_memory()
    model, info = checkpoint.load_model(args.model_path)
    paths = [p for p in sorted((args.data / "fluent3d" / "test").glob("*.png")) if not SKIN_TONE.search(p.name)]
    paths = [paths[round(k * (len(paths) - 1) / max(1, args.count - 1))] for k in range(min(args.count, len(paths)))]
    truths = to_tensor([load_image(path, info.flags["image_size"]) for path in paths])
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": str(STEPS)})
    for share in SHARES:
        mean, median = drift(model.eval(), diffusion, truths, share)
        print(f"{share:g} T: white pixels {mean:+.1f} grey levels, median {median:+.1f}")


if __name__ == "__main__":
    main()
