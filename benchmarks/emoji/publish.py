"""Take over what scripts/emoji.sh made, and look at its outputs once more by other means.

The benchmark measures distances in features of the model that all methods sample with, and says nothing about how sure
a difference is. This adds, of the same outputs:

- the Fréchet distance in the domain-specific extractor's features, and the share of outputs that it calls 3D. EGSDE is
  guided by this very extractor, so that both favour EGSDE;
- two rows to read the table by: sources left as they are, and true pictures of other emoji (of the training split);
- every row's difference to SDDM at 100 steps, with bootstrap intervals over the pictures (same resamples for all rows).

    bash scripts/emoji.sh && python benchmarks/emoji/publish.py

It writes table.md, table.csv, results.json, trade_off.svg and trade_off_truth.svg (copies), comparison.md,
comparison.json and pictures.png beside this file.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import search

from guided_diffusion.checkpoint import load_model
from guided_diffusion.evaluation.distances import frechet_of_roots, gaussian_of_features
from guided_diffusion.evaluation.features import feature_extractor
from guided_diffusion.evaluation.images import list_images
from guided_diffusion.evaluation.pairs import ssim
from guided_diffusion.image_datasets import load_image, to_tensor

COPIES = ("table.md", "table.csv", "results.json", "trade_off.svg", "trade_off_truth.svg")
BASE = "SDDM"  # the first row of this method is what the others are compared with
MEASURES = {  # key: heading, format
    "model": ("Fréchet, model's features ↓", ".3f"),
    "extractor": ("Fréchet, extractor's features ↓", ".1f"),
    "called_3d": ("called 3D ↑", ".3f"),
    "truth_ssim": ("SSIM to truth ↑", ".4f"),
}
BATCH = 16  # pictures that the networks see at once
CELL, LABEL = 96, 260  # pixels of a picture and of the labels' column in pictures.png


@dataclass(frozen=True)
class Row:
    """A row of the benchmark's table; sets: what `Ruler.measure` gives for each seed's outputs."""

    method: str
    setting: str
    sets: list

    @property
    def name(self):
        return f"{self.method}, {self.setting}"


class Ruler:
    """Measures sets of pictures against those in a folder, in the features of the extractor and of other networks.

    dsepath: the extractor; others: files of networks, by the name of their feature space.
    """

    def __init__(self, target_folder, dsepath, **others):
        self.extractors = {name: feature_extractor(path) for name, path in {"extractor": dsepath, **others}.items()}
        self.classifier, info = load_model(dsepath)
        self.classifier.eval()
        self.size = info.flags["image_size"]
        self.truth = {reference.stem: reference.path for reference in list_images(target_folder, "targets")}
        features = self.features(self.images(self.truth.values()))
        self.targets = {space: gaussian_of_features(x) for space, x in features.items()}

    def images(self, paths):
        """[N, 3, H, W] in [0, 1]."""
        return (to_tensor([load_image(path, self.size) for path in paths]) + 1) / 2

    def features(self, images):
        """Those of images [N, 3, H, W] in [0, 1] by space: [N, D] float64."""
        with torch.no_grad():
            return {
                space: torch.cat([extractor.extract(part) for part in images.split(BATCH)]).double().numpy()
                for space, extractor in self.extractors.items()
            }

    def measure(self, folder, names=None, paired=True):
        """Features [N, D] by space, `called_3d` [N] and, if paired, `truth_ssim` [N] of a folder, or its `names`."""
        references = list_images(folder, "outputs", sampled=True)
        references = [r for r in references if names is None or r.name in names]
        images = self.images([r.path for r in references])
        values = self.features(images)
        with torch.no_grad():  # logits of source and target, at noise level 0
            values["called_3d"] = self.classifier(images * 2 - 1, torch.zeros(len(images))).argmax(1).double().numpy()
        if paired:
            truth = self.images([self.truth[r.stem] for r in references])
            values["truth_ssim"] = ssim(images, truth).double().numpy()
        return values

    def score(self, sets, chosen=slice(None)):
        """The numbers of MEASURES of the pictures, or of the `chosen` of them: means over the sets."""
        scores = {key: np.mean([v[key][chosen] for v in sets]) for key in ("called_3d", "truth_ssim") if key in sets[0]}
        for space, target in self.targets.items():
            moments = [gaussian_of_features(values[space][chosen]) for values in sets]
            scores[space] = np.mean([frechet_of_roots(*each, *target) for each in moments])
        return {key: float(value) for key, value in scores.items()}


def base_of(rows):
    return next(row for row in rows if row.method == BASE)


def compare(ruler, rows, replicates, seed=0):
    """Scores of all rows, and their differences to the base: [{key: (difference, low, high)}], 95 % intervals.

    Pictures are resampled, the same for all rows. A resample repeats pictures, which raises every Fréchet distance: in
    a difference this cancels to first order, and the intervals are shifted to have the measured difference as their
    centre.
    """
    base, rng = rows.index(base_of(rows)), np.random.default_rng(seed)
    count = len(rows[0].sets[0]["truth_ssim"])
    scores = [ruler.score(row.sets) for row in rows]
    draws = []
    for _ in range(replicates):
        chosen = rng.integers(count, size=count)
        drawn = [ruler.score(row.sets, chosen) for row in rows]
        draws.append([[score[key] - drawn[base][key] for key in MEASURES] for score in drawn])
    draws = np.array(draws)  # [replicates, rows, measures]
    centred = draws - draws.mean(axis=0)
    differences = []
    for i, score in enumerate(scores):
        differences.append({})
        for k, key in enumerate(MEASURES):
            low, high = np.quantile(centred[:, i, k], [0.025, 0.975])
            difference = score[key] - scores[base][key]
            differences[i][key] = (difference, difference + float(low), difference + float(high))
    return scores, differences


def text_of(rows, scores, differences, anchors, replicates):
    """comparison.md; anchors: scores by name."""
    base = base_of(rows)
    headings = " | ".join(["method, setting", *(heading for heading, _ in MEASURES.values())])
    head = ["", f"| {headings} |", "|---" * (len(MEASURES) + 1) + "|"]
    lines = ["# Flat to 3D emoji: a second look", *head]
    for name, score in [*((row.name, score) for row, score in zip(rows, scores)), *anchors.items()]:
        cells = [format(score[key], form) if key in score else "" for key, (_, form) in MEASURES.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    how = f"95 % bootstrap intervals over the pictures ({replicates} resamples)"
    lines += ["", f"Differences to {base.name}, with {how}:", *head]
    for row, difference in zip(rows, differences):
        if row is base:
            continue
        cells = []
        for key, (_, form) in MEASURES.items():
            middle, low, high = (format(value, f"+{form}") for value in difference[key])
            cells.append(f"{middle} [{low}, {high}]")
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += ["", "Distances to the true translations of the whole test split; means over the seeds. How: publish.py."]
    return "\n".join(lines) + "\n"


def sheet(rows, folders, stems):
    """pictures.png: what each row made of the same sources; a row each."""
    image = Image.new("RGB", (LABEL + CELL * len(stems), CELL * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    for i, (row, folder) in enumerate(zip(rows, folders)):
        draw.multiline_text((8, i * CELL + 28), f"{row.method}\n{row.setting}", fill="black", font_size=16, spacing=6)
        for k, stem in enumerate(stems):
            picture = Image.fromarray(load_image(f"{folder}/{stem}.png", CELL))
            image.paste(picture, (LABEL + k * CELL, i * CELL))
    return image


def add_common_flags(parser):
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--dsepath", default=str(ROOT / search.DSE))
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results (default this file's)")


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", type=Path, default=ROOT / "output_emoji", help="what scripts/emoji.sh wrote")
    parser.add_argument("--model_path", default=str(ROOT / "models" / "fluent3d_64.safetensors"))
    parser.add_argument("--replicates", type=int, default=200, help="resamples (default 200)")
    parser.add_argument("--pictures", type=int, default=10, help="columns of pictures.png (default 10)")
    add_common_flags(parser)
    return parser.parse_args()


def read_rows(folder, made_by):
    """The rows of a benchmark's results.json; None, and a message, where there is none."""
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError) as error:
        message = f"error: --save_dir: {folder} has no results.json that can be read ({error}); {made_by} makes it"
        print(message, file=sys.stderr)
        return None


def main():
    args = parse_flags()
    results = read_rows(args.save_dir, "scripts/emoji.sh")
    if results is None:
        return 2
    ruler = Ruler(args.data / "fluent3d" / "test", args.dsepath, model=args.model_path)
    folders = [args.save_dir / result["folder"] for result in results]
    rows = []
    for result, folder in zip(results, folders):
        sets = [ruler.measure(folder.parent / f"seed_{seed}") for seed in result["seeds"]]
        rows.append(Row(result["method"], result["setting"], sets))
    scores, differences = compare(ruler, rows, args.replicates)
    others = search.pick_sources(args.data / "fluent3d" / "train", len(ruler.truth))
    anchors = {
        "sources as they are": ruler.score([ruler.measure(args.data / "twitter" / "test")]),
        f"{len(others)} true pictures of other emoji": ruler.score(
            [ruler.measure(args.data / "fluent3d" / "train", others, paired=False)]
        ),
    }
    text = text_of(rows, scores, differences, anchors, args.replicates)
    record = [
        {"method": row.method, "setting": row.setting, **score, "difference": difference}
        for row, score, difference in zip(rows, scores, differences)
    ]
    (args.out / "comparison.md").write_text(text, encoding="utf-8")
    (args.out / "comparison.json").write_text(
        json.dumps({"rows": record, "anchors": anchors}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    stems = sorted(ruler.truth)
    stems = [stems[round(k)] for k in np.linspace(0, len(stems) - 1, min(args.pictures, len(stems)))]
    sheet(rows, folders, stems).save(args.out / "pictures.png", optimize=True)
    for name in COPIES:
        shutil.copyfile(args.save_dir / name, args.out / name)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
