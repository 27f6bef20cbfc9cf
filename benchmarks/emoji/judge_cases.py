"""Does the judge rank known cases rightly? Held-out truths, and the same pictures changed in known ways.

All kinds are of the same held-out code points without skin tones, and are compared with the true Fluent 3D pictures of
these very code points, as the benchmark does it: so truths themselves are at 0, and what is left is the change. Two
rows show what else a distance may mean: true pictures of other code points (of the training split), and the other
vendors' pictures. "Denoised" truths are noised to 0.3 T and denoised by the demo model (SDEdit of a truth): what a
perfect translation would still lose to the model.

    python benchmarks/emoji/judge_cases.py

It writes judge_cases.md beside this file; exit status 1 where the order is wrong.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

from judge import DEFAULT_PATH, SKIN_TONE, content, judged, load_judge, target_vendor
from judge_train import JudgeImages, JudgeOptions, held_out, judge_images

from guided_diffusion import Translator, baselines
from guided_diffusion.evaluation.distances import bootstrap_distance, fid
from guided_diffusion.image_datasets import load_image
from guided_diffusion.training.losses import means_by_quarter

DENOISED, TRUTHS = "truths, noised to 0.3 T and denoised", "truths"
SLIGHT = "truths, noise of 10 grey levels"
BATCH = 32


def blurred(sigma):
    return lambda image: image.filter(ImageFilter.GaussianBlur(sigma))


def shifted(*levels):
    """A function that adds grey levels to the channels."""
    return lambda image: Image.fromarray((np.array(image, np.int16) + levels).clip(0, 255).astype(np.uint8))


def compressed(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=20)
    return Image.open(file).convert("RGB")


def noisy(sigma):
    """A function that adds white noise of so many grey levels, seeded by the picture."""

    def add(image):
        noise = np.random.default_rng(np.array(image).sum()).normal(0, sigma, (image.height, image.width, 3))
        return Image.fromarray((np.array(image) + noise).clip(0, 255).astype(np.uint8))

    return add


DAMAGES = {
    "truths, Gaussian blur of 1 pixel": blurred(1),
    "truths, Gaussian blur of 1.5 pixels": blurred(1.5),
    "truths, 10 grey levels darker": shifted(-10, -10, -10),
    "truths, colour cast (red +10, blue -10)": shifted(10, 0, -10),
    SLIGHT: noisy(10),
    "truths, noise of 25 grey levels": noisy(25),
    "truths, JPEG of quality 20": compressed,
}


def read_pictures(folder, names):
    return [Image.fromarray(load_image(str(folder / name), 64)) for name in names]


def denoised(pictures, model, steps):
    assert baselines.sdedit  # its module registers the method
    translate = Translator(model, method="sdedit", start=0.3, steps=steps, device="cpu")
    parts = [pictures[at : at + BATCH] for at in range(0, len(pictures), BATCH)]
    return [image for k, part in enumerate(parts) for image in translate(part, seed=k)]


def seen_by(judge, pictures):
    images = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).permute(0, 3, 1, 2) / 255
    return judged(judge, images)


def held_out_lines(judge, data):
    """Accuracy on all held-out pictures of its vendors, with skin tones and without."""
    lines = ["| held-out code points | vendor named rightly | code point found among another vendor's pictures |"]
    lines.append("|---|---|---|")
    every = judge_images(JudgeOptions(data_dir=str(data), vendors=",".join(judge.vendors)), "test")
    plain = [[r for r in part.references if not SKIN_TONE.search(r.name)] for part in every.parts]
    for name, images in (("all", every), ("without skin tones", JudgeImages(plain, judge.image_size))):
        means = means_by_quarter(held_out(judge, images, "cpu"))
        lines.append(f"| {name}: {len(images)} | {means['acc']:.3f} | {means['retrieval']:.3f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--judge", type=Path, default=DEFAULT_PATH, help="a judge's file")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "fluent3d_64.safetensors")
    parser.add_argument("--steps", type=int, default=50, help="of the schedule that denoises")
    parser.add_argument("--count", type=int, default=48, help="pictures of each kind")
    parser.add_argument("--out", type=Path, default=HERE / "judge_cases.md")
    args = parser.parse_args()

    judge = load_judge(args.judge)
    listed = {
        split: sorted(p.name for p in (args.data / "fluent3d" / split).iterdir() if not SKIN_TONE.search(p.name))
        for split in ("train", "test")
    }
    rng = np.random.default_rng(0)
    names, others = ([str(n) for n in rng.permutation(listed[split])[: args.count]] for split in ("test", "train"))
    truths = read_pictures(args.data / "fluent3d" / "test", names)
    kinds = {TRUTHS: truths, DENOISED: denoised(truths, args.model, args.steps)}
    kinds |= {name: [damage(picture) for picture in truths] for name, damage in DAMAGES.items()}
    kinds["other truths (training split)"] = read_pictures(args.data / "fluent3d" / "train", others)
    kinds["Noto's pictures"] = read_pictures(args.data / "google" / "test", names)
    kinds["sources (Twemoji's pictures)"] = read_pictures(args.data / "twitter" / "test", names)

    said = {name: seen_by(judge, pictures) for name, pictures in kinds.items()}
    y, rows = said[TRUTHS]["features"], {}
    for name, each in said.items():
        x = each["features"]
        distance = fid(x, y)
        interval = bootstrap_distance(fid, x, y, distance, replicates=200) if name != TRUTHS else (0.0, 0.0)
        found = content(each, said[TRUTHS], np.arange(len(x))).mean()
        taken = target_vendor(each).mean()
        rows[name] = (distance, interval, found, taken)

    sources = rows["sources (Twemoji's pictures)"][0]
    ordered = {
        "truths are best": all(row[0] > rows[TRUTHS][0] for name, row in rows.items() if name != TRUTHS),
        "every damaged kind is farther than denoised truths, but for the slight noise": all(
            rows[name][0] > rows[DENOISED][0] for name in DAMAGES if name != SLIGHT
        ),
        "denoised truths are nearer than other truths": rows["other truths (training split)"][0] > rows[DENOISED][0],
        "sources are worst of the pictures with the truths' content": all(
            row[0] <= sources for name, row in rows.items() if not name.startswith("other")
        ),
    }
    lines = ["# Known cases, as the judge sees them", "", (__doc__ or "").split("\n\n")[1].replace("\n", " "), ""]
    headings = ("pictures", "Fréchet, judge ↓", "95 % interval", "content found again ↑")
    lines += [f"| {' | '.join(headings)} | taken for Fluent 3D ↑ |", "|---" * 5 + "|"]
    for name, (distance, (low, high), found, taken) in rows.items():
        lines.append(f"| {name} | {distance:.2f} | {low:.1f} to {high:.1f} | {found:.3f} | {taken:.3f} |")
    how = f"`{args.model.name}` with {args.steps} steps, seed 0. Intervals resample both sets."
    lines += ["", f"{len(names)} pictures of each kind, {how}", ""]
    lines += [f"- {claim}: {'yes' if holds else '**no**'}" for claim, holds in ordered.items()]
    text = "\n".join(lines) + "\n"
    text += "\n" + "\n".join(held_out_lines(judge, args.data)) + "\n"
    args.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if all(ordered.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
