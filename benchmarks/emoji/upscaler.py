"""How well an upscaler enlarges: PSNR and a distance in the judge's features, beside bicubic and Lanczos.

    python benchmarks/emoji/upscaler.py [--upscaler FILE] [--inputs NAME=DIR ...] [--table FILE] [--grid FILE]

Truths are the held-out pictures at 256 pixels. They are shrunk and enlarged again, and so is every folder of --inputs,
which has small pictures under the truths' names. The distance is the root mean square difference to the truth's
features in the judge (scaled to 1) over the 16 tiles of 64 pixels: 0 for equal pictures, about 1.4 for unrelated ones.
The grid shows 24 pictures of the last input, each enlarged by bicubic interpolation and by the upscaler.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from judge import load_judge

from guided_diffusion.image_datasets import load_image, to_tensor, to_uint8
from guided_diffusion.upscaler import load_upscaler
from resizer import Resizer

TILE = 64


def enlargements(upscaler):
    """{name: function of small images in [-1, 1] that gives 8-bit large ones}."""

    def bicubic(x):
        return F.interpolate(x, scale_factor=upscaler.factor, mode="bicubic")

    def lanczos(x):
        return Resizer(x.shape, upscaler.factor, kernel="lanczos3")(x)

    return {"bicubic": bicubic, "Lanczos": lanczos, "upscaler": upscaler.decode}


def psnr(images, truths):
    """Decibels [N] of images in [-1, 1], the peak being 2."""
    return -10 * ((images - truths) / 2).square().mean((1, 2, 3)).log10()


def tile_distance(judge, images, truths):
    """Root mean square difference [N] of the judge's features over all tiles."""
    return (features(judge, images) - features(judge, truths)).square().mean((1, 2)).sqrt()


def features(judge, images):
    """Features [N, tiles, D] of images in [-1, 1]."""
    tiles = images.unfold(2, TILE, TILE).unfold(3, TILE, TILE).permute(0, 2, 3, 1, 4, 5)
    flat = tiles.reshape(-1, 3, TILE, TILE) * 0.5 + 0.5
    return judge.judge(flat).features.reshape(len(images), -1, judge.flags["features"])


@torch.no_grad()
def measured(enlarge, judge, small, truths, batch=16):
    """(mean PSNR, mean distance) of enlarged images, as 8-bit pictures."""
    found = []
    for x, truth in zip(small.split(batch), truths.split(batch)):
        large = to_tensor(to_uint8(enlarge(x)))
        found.append(torch.stack([psnr(large, truth), tile_distance(judge, large, truth)]))
    return torch.cat(found, 1).mean(1).tolist()


def pictures(paths, size):
    return to_tensor([load_image(path, size) for path in paths])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upscaler", default=str(ROOT / "models" / "fluent3d_upscaler.safetensors"))
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji256", help="the emoji set at 256 pixels")
    parser.add_argument("--inputs", nargs="*", default=[], metavar="NAME=DIR", help="small pictures, named as truths")
    parser.add_argument("--count", type=int, default=0, help="pictures, evenly spaced by name; 0: all (default)")
    parser.add_argument("--table", type=Path, help="file for the table; without, it is printed only")
    parser.add_argument("--grid", type=Path, help="file for the grid")
    args = parser.parse_args()
    upscaler, judge = load_upscaler(args.upscaler), load_judge()
    names = sorted(path.name for path in (args.data / "fluent3d" / "test").glob("*.png"))
    if args.count:
        names = [names[i] for i in np.linspace(0, len(names) - 1, args.count).round().astype(int)]
    truths = pictures([args.data / "fluent3d" / "test" / name for name in names], TILE * upscaler.factor)
    inputs = {"truths": torch.cat([to_tensor(to_uint8(upscaler.encode(part))) for part in truths.split(16)])}
    for kind, _, folder in (text.partition("=") for text in args.inputs):
        inputs[kind] = pictures([Path(folder) / name for name in names], TILE)
    rows = [f"{len(names)} held-out pictures", "", "| input | enlarged by | PSNR, dB | distance |", "|---|---|---|---|"]
    for kind, small in inputs.items():
        for name, enlarge in enlargements(upscaler).items():
            decibels, distance = measured(enlarge, judge, small, truths)
            rows.append(f"| {kind} | {name} | {decibels:.2f} | {distance:.3f} |")
    print("\n".join(rows))
    if args.table:
        table = (
            "Made by `python benchmarks/emoji/upscaler.py`, whose first lines say what is measured; commands are in\n"
            "[the upscaler's card](../../models/fluent3d_upscaler.md).\n\n"
        )
        args.table.write_text("# Upscaler\n\n" + table + "\n".join(rows) + "\n", encoding="utf-8")
    if args.grid:
        chosen = np.linspace(0, len(names) - 1, 24).round().astype(int)
        small = inputs[list(inputs)[-1]][chosen]
        ways = enlargements(upscaler)
        shown = [torch.cat([ways[name](x[None]) for name in ("bicubic", "upscaler")], 3) for x in small]
        rows_of = [np.concatenate([to_uint8(x)[0] for x in shown[i : i + 3]], 1) for i in range(0, 24, 3)]
        Image.fromarray(np.concatenate(rows_of)).save(args.grid)


if __name__ == "__main__":
    main()
