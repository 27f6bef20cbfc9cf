"""Repair photographs of defective solar cells: sample every row of table.txt, and measure.

Realism, of translated defective cells: kernel distance to held-out functional cells in ImageNet features
(EfficientNet-Lite0, trained by others), and the share that the judge takes for functional. Faithfulness, of translated
functional cells, which should come back unchanged: SSIM and L2 to the source. The use: the absolute difference between
source and translation, its mean and the peak of its blurred map, as a score of a defect: AUROC for defective against
functional cells.

    bash scripts/cells.sh                        # makes data and models, and calls this
    python benchmarks/cells/cells.py --only SDDM # some of the rows; a run that was stopped resumes

Writes results.md, results.json, front.svg and pictures.png to the folder of the outputs.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import charts
import rows as tables

from guided_diffusion.evaluation.distances import (
    bootstrap_kernel,
    bootstrap_mean,
    fid,
    gaussian_of_features,
    kernel_distance,
)
from guided_diffusion.evaluation.features import Extractor, extract_features, feature_extractor
from guided_diffusion.evaluation.images import list_images, read_image
from guided_diffusion.evaluation.pairs import l2, ssim
from guided_diffusion.evaluation.protocol import reader
from guided_diffusion.evaluation.table import markdown_table
from guided_diffusion.run import files

FUNCTIONAL, DEFECTIVE = "functional", "defective"
REPLICATES = 1000
CELL, LABEL = 128, 150  # pixels of a picture and of the labels' column in pictures.png
BRIGHTEST = 0.25  # difference, as a share of the range of pixels, that the map shows as its brightest colour
BLUR = 5  # side of the box filter over a difference map


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of pairs in which the positive has the larger score, ties half: the area under the ROC curve."""
    order = np.sort(negative)
    below = np.searchsorted(order, positive, "left") + np.searchsorted(order, positive, "right")
    return float(below.mean() / 2 / len(negative))


def auroc_interval(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of `auroc`; both sets are resampled."""
    rng = np.random.default_rng(0)
    draws = [auroc(rng.choice(positive, len(positive)), rng.choice(negative, len(negative))) for _ in range(REPLICATES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


class Cells:
    """Pictures of a folder with functional/ and defective/, by class: names and tensors [N, 3, S, S] in [0, 1]."""

    def __init__(self, folder: Path, sampled: bool = False) -> None:
        references = sorted(list_images(folder, "data", sampled=sampled), key=lambda r: r.name)
        self.references = {c: [r for r in references if r.name.startswith(f"{c}/")] for c in (FUNCTIONAL, DEFECTIVE)}
        self.images = {c: torch.stack([read_image(r) for r in found]) for c, found in self.references.items()}

    def features(self, name: str, extractor: Extractor) -> np.ndarray:
        read, _ = reader(extractor)  # at the network's size
        return extract_features(self.references[name], extractor, read)["features"]


class Judge:
    """Logistic regression on ImageNet features of the training split's cells; no method uses it.

    features: by class, [N, D]. The penalty on the squared weights of standardised features was set
    on folds of the training split, where AUROC is 0.66 to 0.67 for 1 to 10.
    """

    PENALTY = 3.0

    def __init__(self, features: dict[str, np.ndarray]) -> None:
        x = np.concatenate([features[FUNCTIONAL], features[DEFECTIVE]])
        self.mean, self.deviation = x.mean(0), x.std(0) + 1e-6
        labels = torch.zeros(len(x), dtype=torch.float64)
        labels[: len(features[FUNCTIONAL])] = 1
        self.weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            entropy = F.binary_cross_entropy_with_logits(self.logits(x), labels)
            value = entropy + self.PENALTY * self.weights[:-1].square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)

    def logits(self, features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((features - self.mean) / self.deviation) @ self.weights[:-1] + self.weights[-1]

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Probability of being functional, [N]."""
        return self.logits(features).detach().sigmoid().numpy()


def choose(data: Path, folder: Path) -> None:
    """Copy the defective cells and as many functional ones, spread evenly, to the folder of sources."""
    found = {name: sorted((data / name).glob("*.png")) for name in (FUNCTIONAL, DEFECTIVE)}
    count = min(map(len, found.values()))
    for name, paths in found.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            path = paths[k * len(paths) // count]
            shutil.copyfile(path, folder / name / path.name)


def sample(row: Any, args: argparse.Namespace, folder: Path) -> None:
    """Translate the held-out cells by a row's script. What is finished is left alone."""
    record = files.read_json_or_none(folder / "run.json")
    if record and record.get("finished"):
        return
    flags = [flag.replace("$DSE", str(args.save_dir / "extractor.safetensors")) for flag in row.flags]
    command = [sys.executable, str(ROOT / "scripts" / row.script), "--model_path", str(args.model), *flags]
    command += ["--base_samples", str(args.save_dir / "sources"), "--save_dir", str(folder)]
    command += ["--batch_size", str(args.batch_size), "--precision", "auto", "--grid", "0"]
    print(row.name, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def differences(sources: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Absolute differences [N, S, S], averaged over the channels."""
    return (sources - outputs).abs().mean(1)


def blurred(maps: torch.Tensor) -> torch.Tensor:
    """Maps [N, S, S] under a box filter."""
    return F.avg_pool2d(maps[:, None], BLUR, 1, BLUR // 2, count_include_pad=False)[:, 0]


def measure(sources: Cells, outputs: Cells, judge: Judge, features: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    """All numbers of a setting, features [N, D] those of its repaired cells; intervals of 95 % under "… interval"."""
    kernel = kernel_distance(features, real)[0]
    functional = judge(features) > 0.5
    kept = ssim(outputs.images[FUNCTIONAL], sources.images[FUNCTIONAL]).double().numpy()
    maps = [differences(sources.images[name], outputs.images[name]) for name in (DEFECTIVE, FUNCTIONAL)]
    means = [x.mean((1, 2)).double().numpy() for x in maps]
    peaks = [blurred(x).amax((1, 2)).double().numpy() for x in maps]
    return {
        "kernel": kernel, "kernel interval": bootstrap_kernel(features, real, kernel, replicates=200),
        "frechet": fid(features, gaussian_of_features(real)),
        "functional": float(functional.mean()),
        "functional interval": bootstrap_mean(functional.astype(float), replicates=REPLICATES),
        "ssim": float(kept.mean()), "ssim interval": bootstrap_mean(kept, replicates=REPLICATES),
        "l2": float(l2(outputs.images[FUNCTIONAL], sources.images[FUNCTIONAL]).mean()),
        "auroc": auroc(*means), "auroc interval": auroc_interval(*means),
        "peak": auroc(*peaks), "peak interval": auroc_interval(*peaks),
    }  # fmt: skip


def spelled(result: dict[str, Any], name: str, digits: int = 3) -> str:
    """A number with its interval."""
    text = f"{result[name]:.{digits}f}"
    low, high = result.get(f"{name} interval", (None, None))
    return text if low is None else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def text_of(results: Sequence[tuple[Any, dict[str, Any]]], notes: Sequence[str]) -> str:
    """results.md."""
    head = ["method", "setting", "evaluations", "kernel distance ↓", "Fréchet ↓", "judged functional ↑",
            "SSIM to source ↑", "L2 ↓", "AUROC ↑", "of peaks ↑"]  # fmt: skip
    cells = [
        [row.method, row.setting, f"{r['evaluations']:.0f}", spelled(r, "kernel"), f"{r['frechet']:.1f}",
         spelled(r, "functional", 2), spelled(r, "ssim"), f"{r['l2']:.2f}",
         spelled(r, "auroc", 2), spelled(r, "peak", 2)]
        for row, r in results
    ]  # fmt: skip
    table = markdown_table(head, cells)
    return "\n".join(["# Repaired solar cells", "", table, "", *(f"- {note}" for note in notes), ""])


def chart(results: Sequence[tuple[Any, dict[str, Any]]]) -> str:
    """Realism against faithfulness, as SVG."""
    x_label = "SSIM of functional cells to their source"
    figure, axes = charts.new_figure("Repaired solar cells", x_label, "kernel distance")
    for method in dict.fromkeys(row.method for row, _ in results):
        points = sorted((r["ssim"], r["kernel"]) for row, r in results if row.method == method)
        axes.plot(*zip(*points), marker="o", label=method)
    axes.legend()
    return charts.svg(figure)


def heat(maps: np.ndarray) -> np.ndarray:
    """Differences [S, S] as colours from black over red to yellow and white, uint8 [S, S, 3]."""
    level = np.clip(maps / BRIGHTEST, 0, 1)[..., None] * 3 - np.arange(3)
    return (np.clip(level, 0, 1) * 255).round().astype(np.uint8)


def sheet(sources: Cells, outputs: Cells, chosen: Sequence[int]) -> Image.Image:
    """pictures.png: defective cells, their repair, and the blurred difference; a column each."""
    before, after = (cells.images[DEFECTIVE][list(chosen)] for cells in (sources, outputs))
    maps = blurred(differences(before, after))
    image = Image.new("RGB", (LABEL + CELL * len(chosen), 3 * CELL), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    pictures = [[(x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for x in part] for part in (before, after)]
    for i, (name, row) in enumerate(zip(("defective", "repaired", "difference"), [*pictures, map(heat, maps.numpy())])):
        draw.text((8, i * CELL + CELL // 2 - 9), name, fill="black", font=font)
        for k, array in enumerate(row):
            picture = Image.fromarray(array).resize((CELL, CELL), Image.Resampling.BICUBIC)
            image.paste(picture, (LABEL + k * CELL, i * CELL))
    return image


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "cells", help="the cells set")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "cells_64.safetensors", help="the model")
    parser.add_argument("--save_dir", type=Path, default=ROOT / "output_cells", help="folder of outputs and results")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    parser.add_argument("--batch_size", type=int, default=32, help="images at once (default 32)")
    parser.add_argument(
        "--cells", default="", help="cells of pictures.png, as cell0419,cell0505; default see results.md"
    )
    parser.add_argument("--shown", default="", help="the row of pictures.png; default the one of the largest AUROC")
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    rows = [row for row in tables.read_table(str(HERE / "table.txt")) if args.only in row.name]
    choose(args.data / "test", args.save_dir / "sources")
    for row in rows:
        sample(row, args, args.save_dir / row.folder)

    sources, trained, held_out = (
        Cells(folder) for folder in (args.save_dir / "sources", args.data / "train", args.data / "test")
    )
    extractor = feature_extractor("efficientnet")
    judge = Judge({name: trained.features(name, extractor) for name in (FUNCTIONAL, DEFECTIVE)})
    real, unchanged = held_out.features(FUNCTIONAL, extractor), sources.features(DEFECTIVE, extractor)
    outputs = {row.name: Cells(args.save_dir / row.folder, sampled=True) for row in rows}
    features = {name: cells.features(DEFECTIVE, extractor) for name, cells in outputs.items()}
    results = []
    for row in rows:
        record = files.read_json(args.save_dir / row.folder / "run.json")
        found = measure(sources, outputs[row.name], judge, features[row.name], real)
        results.append((row, {"evaluations": record["model_evaluations"], **found}))

    fine, defective = judge(real), judge(unchanged)
    right, half = np.concatenate([fine > 0.5, defective <= 0.5]), np.random.default_rng(0).permutation(len(real))
    low, high = bootstrap_mean(right.astype(float), replicates=REPLICATES)
    taken = [100 * float((p > 0.5).mean()) for p in (defective, fine)]
    floor, start = kernel_distance(real[half[::2]], real[half[1::2]])[0], kernel_distance(unchanged, real)[0]
    notes = [
        f"{len(defective)} defective and {len(sources.images[FUNCTIONAL])} functional cells that no training saw were "
        f"translated; distances are to all {len(fine)} functional ones; 95 % intervals.",
        f"The judge names {100 * right.mean():.1f} % of them rightly ({100 * low:.1f} to {100 * high:.1f}); its "
        f"AUROC, with labels, is {auroc(1 - defective, 1 - fine):.3f}. It takes {taken[0]:.0f} % of the "
        f"defective and {taken[1]:.0f} % of the functional cells for functional.",
        f"Kernel distance between halves of the functional cells {floor:.4f}, of the defective cells {start:.4f}.",
    ]
    best = next((row for row in rows if row.name == args.shown), max(results, key=lambda found: found[1]["auroc"])[0])
    rise = judge(features[best.name]) - defective
    names = [Path(reference.name).stem for reference in sources.references[DEFECTIVE]]
    chosen = [names.index(name) for name in args.cells.split(",") if name] or np.argsort(-rise)[:8].tolist()
    sheet(sources, outputs[best.name], chosen).save(args.save_dir / "pictures.png")
    notes.append(f"pictures.png: {best.name}; by default the cells whose probability of being functional rises most.")
    files.write_text(args.save_dir / "results.md", text_of(results, notes))
    files.write_json(args.save_dir / "results.json", {row.name: found for row, found in results})
    files.write_text(args.save_dir / "front.svg", chart(results))
    print((args.save_dir / "results.md").read_text())


if __name__ == "__main__":
    main()
