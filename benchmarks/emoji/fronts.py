"""Compare methods as curves, on the outputs that scripts/emoji.sh made: fronts, areas under them, matched settings.

Realism is the Fréchet distance to the true translations of the whole test split in the features of the judge, a network
that no method uses, and beside it the kernel distance, which is unbiased in sets of any size. Faithfulness is SSIM to
the true translation, which no method sees. Besides, the judge says how often what an output shows is found again (its
nearest truth is its own), and how often it takes an output for the target vendor's drawing.

    bash scripts/emoji.sh                        # samples every row of table.txt, and calls this
    python benchmarks/emoji/fronts.py            # the tables, charts and pictures of what is there

Rows that are not sampled yet are named and left out. It writes fronts.md, fronts.json, fronts.svg and pictures.png
beside this file, and near.txt, the rows on or near their method's front, to the folder of the outputs.
"""

import argparse
import hashlib
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE), str(HERE.parent)]

import charts
import rows as tables
from charts import Point, front
from judge import SKIN_TONE, content, judged, load_judge, target_vendor

from guided_diffusion.errors import InputError
from guided_diffusion.evaluation.distances import (
    bootstrap_kernel,
    frechet_of_roots,
    gaussian_of_features,
    kernel_distance,
)
from guided_diffusion.evaluation.images import list_images
from guided_diffusion.evaluation.pairs import ssim
from guided_diffusion.evaluation.table import markdown_table
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.run import files
from guided_diffusion.run.record import sha256

OURS = "SDDM, late start"
DETAILS = ("SDDM, 100 steps", "SDDM, late start, 20 steps")  # in fronts.md alone, not in documents, chart and pictures
LOWEST_SSIM = 0.3  # of the hypervolume's reference point; its distance is that of the sources as they are
LEVELS = (0.34, 0.35, 0.36, 0.37, 0.38, 0.39, 0.40)  # of SSIM, for the table of matched faithfulness
NEAR = (0.004, 0.05)
"""A setting is near the front if so much more SSIM and so large a share less distance puts it there."""
FAR = 2  # times the smallest distance: farther settings are in the table, not in the chart
BLOCK = re.compile(r"(<!-- fronts: made by benchmarks/emoji/fronts\.py -->\n).*?(<!-- end of fronts -->)", re.DOTALL)
CELL, LABEL = 96, 236  # pixels of a picture and of the labels' column in pictures.png
COLUMNS = {
    "distance": "judge distance ↓",
    "kernel": "KID ↓",
    "ssim": "SSIM to truth ↑",
    "content": "content found ↑",
    "target": "taken for 3D ↑",
}


# A setting is a point (faithfulness, distance): the first is better when larger, the second when smaller.


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Hypervolume of the points with respect to `reference` (lowest faithfulness, largest distance).

    Two methods compare only with the same reference. Points that do not beat it add nothing.
    """
    area, reached = 0.0, reference[0]
    # Along a front, distances rise with faithfulness: each point owns the strip from its predecessor to itself.
    for x, y in front([point for point in points if point[0] > reference[0] and point[1] < reference[1]]):
        area += (x - reached) * (reference[1] - y)
        reached = x
    return area


def distance_at(points: Sequence[Point], faithfulness: float) -> float:
    """The smallest distance of a point that is at least as faithful; infinity where there is none."""
    return min((y for x, y in points if x >= faithfulness), default=math.inf)


@dataclass
class Setting:
    """A row of the table with what was measured of it.

    measured: of each seed, `features` [N, D], `ssim`, `content` and `target` [N]. costs: means over the seeds. scores:
    of all pictures, as fronts.json has them.
    """

    row: tables.Row
    measured: list = field(default_factory=list)
    costs: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)

    @property
    def point(self):
        """(SSIM, distance)."""
        return self.scores["ssim"], self.scores["distance"]

    def score(self, target, chosen=slice(None)):
        """Distance, SSIM to the truth, content found again and share of the target, of all or the chosen pictures."""
        distances = [frechet_of_roots(*gaussian_of_features(m["features"][chosen]), *target) for m in self.measured]
        means = {
            name: float(np.mean([m[name][chosen] for m in self.measured])) for name in ("ssim", "content", "target")
        }
        return {"distance": float(np.mean(distances)), **means}

    def kernel(self, truths, replicates):
        """Unbiased kernel distance to truths [M, D] and its 95 % interval (low, high), each the mean over the seeds."""
        found = [kernel(m["features"], truths, replicates) for m in self.measured]
        return np.mean(found, axis=0).tolist()


def kernel(features, truths, replicates):
    """Kernel distance of features [N, D] and truths [M, D], with its 95 % bootstrap interval: (value, low, high)."""
    value, _ = kernel_distance(features, truths)
    return value, *bootstrap_kernel(features, truths, value, replicates=replicates)


class Ruler:
    """The judge, and the true translations that everything is measured against."""

    def __init__(self, path, truth_folder):
        self.judge = load_judge(path)
        self.digest = sha256(path)[:12]
        self.truth = {r.stem: r.path for r in list_images(truth_folder, "truth")}
        self.stems = sorted(self.truth)
        self.images = self.read([self.truth[stem] for stem in self.stems])
        self.truths = judged(self.judge, self.images)
        self.features = self.truths["features"]
        self.target = gaussian_of_features(self.features)

    def read(self, paths):
        """[N, 3, H, W] in [0, 1], at the judge's size."""
        return (to_tensor([load_image(path, self.judge.image_size) for path in paths]) + 1) / 2

    def measure(self, folder):
        """The measurements of a folder with an output for every truth; kept in a file beside it."""
        paths = {r.stem: r.path for r in list_images(folder, "outputs", sampled=True)}
        if missing := [stem for stem in self.stems if stem not in paths]:
            raise InputError(f"{folder} has no output for {missing[0]} and {len(missing) - 1} more")
        newest = max(os.path.getmtime(path) for path in paths.values())
        kept, key = Path(f"{folder}.judge.npz"), f"{self.digest} {newest}"
        if kept.is_file():
            with np.load(kept, allow_pickle=False) as file:
                if str(file["key"]) == key:
                    return {name: file[name] for name in ("features", "ssim", "content", "target")}
        images = self.read([paths[stem] for stem in self.stems])
        seen = judged(self.judge, images)
        values = {
            "features": seen["features"],
            "ssim": ssim(images, self.images).double().numpy(),
            "content": content(seen, self.truths, np.arange(len(self.stems))).astype(float),
            "target": target_vendor(seen).astype(float),
        }
        files.write_atomically(str(kept), lambda file: np.savez_compressed(file, key=key, **values))
        return values


def read_settings(table, save_dir, ruler):
    """The table's rows that have a finished run, measured; the names of those that have none; and the devices.

    Seconds compare on one device alone: where there are several, they are left out.
    """
    settings, missing, devices = [], [], set()
    for row in tables.read_table(str(table)):
        setting, costs = Setting(row), []
        for folder in sorted((save_dir / row.folder).glob("seed_*")):
            record = files.read_json_or_none(str(folder / "run.json")) if folder.is_dir() else None
            if record and record.get("finished"):
                setting.measured.append(ruler.measure(str(folder)))
                costs.append([record.get("model_evaluations"), record.get("seconds_per_image")])
                devices.add(str(record.get("device")))
        if costs:
            setting.costs = dict(zip(("evaluations", "seconds"), np.mean(costs, axis=0).tolist()))
            settings.append(setting)
        else:
            missing.append(row.name)
    if len(devices) > 1:
        for setting in settings:
            del setting.costs["seconds"]
    return settings, missing, sorted(devices)


def points_of(settings):
    """The settings' points by method."""
    found = {}
    for setting in settings:
        found.setdefault(setting.row.method, []).append(setting.point)
    return found


def bootstrap(settings, target, reference, replicates, seed=0):
    """Of every resample of the pictures, the same for all settings: scores [R, settings, 4] and areas by method.

    A resample repeats pictures, which raises every Fréchet distance. Distances are therefore shifted, each setting's by
    the same amount in all resamples, so that their mean is the measured one.
    """
    rng = np.random.default_rng(seed)
    count = len(settings[0].measured[0]["ssim"])
    draws = []
    for _ in range(replicates):
        chosen = rng.integers(count, size=count)
        draws.append([list(setting.score(target, chosen).values()) for setting in settings])
    draws = np.array(draws)
    draws[..., 0] += [setting.scores["distance"] for setting in settings] - draws[..., 0].mean(axis=0)
    areas = {}
    for method in dict.fromkeys(setting.row.method for setting in settings):
        own = [k for k, setting in enumerate(settings) if setting.row.method == method]
        areas[method] = [hypervolume([(draw[k, 1], draw[k, 0]) for k in own], reference) for draw in draws]
    return draws, {method: np.array(values) for method, values in areas.items()}


def interval(values):
    """95 % percentile interval."""
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


def matched(settings, draws):
    """Each other method's front setting beside the best of OURS that is at least as faithful.

    Dicts with both names, and of distance, SSIM and content the difference (ours minus theirs) with its interval; ours
    is None where no setting is as faithful.
    """
    points, found = points_of(settings), []
    for k, theirs in enumerate(settings):
        if theirs.row.method == OURS or theirs.point not in front(points[theirs.row.method]):
            continue
        found.append({"theirs": theirs.row.name, "ours": None})
        fitting = [i for i, s in enumerate(settings) if s.row.method == OURS and s.point[0] >= theirs.point[0]]
        if fitting:
            best = min(fitting, key=lambda i: settings[i].point[1])
            found[-1]["ours"] = settings[best].row.name
            for column, name in enumerate(("distance", "ssim", "content")):
                difference = settings[best].scores[name] - theirs.scores[name]
                found[-1][name] = [difference, *interval(draws[:, best, column] - draws[:, k, column])]
    return found


def near(settings):
    """Names of the settings on or near their method's front; see NEAR."""
    points = points_of(settings)
    better = [(s, s.point[0] + NEAR[0], s.point[1] * (1 - NEAR[1])) for s in settings]
    return [s.row.name for s, x, y in better if distance_at(points[s.row.method], x) >= y]


def text_of(settings, anchors, areas, volumes, pairs, missing, reference, notes):
    """fronts.md."""
    points = points_of(settings)
    lines = ["# Flat to 3D emoji: fronts", ""]
    timed = all("seconds" in setting.costs for setting in settings)
    titles = headings([setting.scores for setting in settings])
    head, cells = ["method", "setting", "evaluations", *["s/image"] * timed, *titles, "seeds"], []
    for setting in settings:
        method, name = setting.row.method, setting.row.setting
        name += " *" if setting.point in front(points[method]) else ""
        costs = [f"{setting.costs['evaluations']:.0f}", *[f"{setting.costs['seconds']:.2f}" for _ in range(timed)]]
        cells.append([method, name, *costs, *shown(setting.scores), str(len(setting.measured))])
    cells += [[f"*{name}*", "", *[""] * (1 + timed), *shown(score), ""] for name, score in anchors.items()]
    lines += [markdown_table(head, cells), "", "\\* on its method's front", ""]
    lines += [f"## Area under the front, with SSIM above {reference[0]:g} and distance below {reference[1]:.2f}", ""]
    cells = []
    for method in points:
        low, high = interval(areas[method])
        line = [method, f"{volumes[method]:.4f}", f"{low:.4f} to {high:.4f}"]
        if OURS in areas and method != OURS:
            low, high = interval(areas[OURS] - areas[method])
            line.append(f"{volumes[OURS] - volumes[method]:+.4f} [{low:+.4f}, {high:+.4f}]")
        cells.append([*line, ""][:4])
    lines += [markdown_table(["method", "area ↑", "95 % interval", f"{OURS} minus it"], cells), ""]
    lines += ["## At matched faithfulness", "", "The smallest judge distance with an SSIM to the truth of at least", ""]
    cells = []
    for method in points:
        best = [distance_at(points[method], level) for level in LEVELS]
        cells.append([method, *("" if math.isinf(value) else f"{value:.2f}" for value in best)])
    lines += [markdown_table(["method", *(f"{level:.2f}" for level in LEVELS)], cells), ""]
    lines += [f"Every setting of the other fronts beside the nearest of {OURS} that is at least as faithful:", ""]
    cells = []
    for pair in pairs:
        found = [pair[name] for name in ("distance", "ssim", "content") if name in pair]
        values = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*each) for each in found]
        cells.append([pair["theirs"], (pair["ours"] or "none").removeprefix(f"{OURS}, "), *(values or [""] * 3)])
    lines += [markdown_table(["theirs", "ours", "judge distance", "SSIM to truth", "content found"], cells), ""]
    if missing:
        lines += [f"Not sampled: {'; '.join(missing)}.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes), ""])


def summary(record):
    """The table of docs/results.md, from the content of fronts.json: the settings on the methods' fronts."""
    head = ["method", "setting", "evaluations", *headings(record["settings"])]
    cells = []
    for row in record["settings"]:
        own = [(other["ssim"], other["distance"]) for other in record["settings"] if other["method"] == row["method"]]
        if row["method"] not in DETAILS and (row["ssim"], row["distance"]) in front(own):
            evaluations = f"{row['evaluations']:.0f}"
            cells.append([row["method"], row["setting"], evaluations, *shown(row)])
    cells += [[f"*{name}*", "", "", *shown(score)] for name, score in record["anchors"].items()]
    return markdown_table(head, cells)


def headings(scores):
    """The columns that these scores have; records made before there was a kernel distance have none."""
    return [title for name, title in COLUMNS.items() if all(name in score for score in scores)]


def shown(score):
    return [spelled(name, score[name]) for name in COLUMNS if name in score]


def spelled(name, value):
    if name == "kernel":
        return "{:.3f} [{:.3f}, {:.3f}]".format(*value)
    return f"{value:.2f}" if name == "distance" else f"{value:.3f}"


def chart_rows(settings):
    """The settings as `charts.trade_off` takes them, but those so distant that the others would lie on one line."""
    largest = FAR * min(setting.point[1] for setting in settings)
    return [
        {"method": setting.row.method, "setting": setting.row.setting, "std": {"fid": None, "truth_ssim": None},
         "published": {"fid": "", "source_ssim": ""}, "protocol": {"features": "judge"},
         "mean": {"fid": setting.point[1], "truth_ssim": setting.point[0]}}
        for setting in settings
        if setting.point[1] <= largest and setting.row.method not in DETAILS
    ]  # fmt: skip


def representatives(settings, reference):
    """Of each method, the row of the setting with the largest area of its own: how far it beats the reference."""
    best = {}
    for setting in settings:
        area = hypervolume([setting.point], reference)
        if setting.row.method not in DETAILS and area > best.get(setting.row.method, (-1, None))[0]:
            best[setting.row.method] = area, setting.row
    return [row for _, row in best.values()]


def sheet(named_folders, stems):
    """pictures.png: sources, what each method made of them, and truths; a row each."""
    image = Image.new("RGB", (LABEL + CELL * len(stems), CELL * len(named_folders)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    for i, (name, folder) in enumerate(named_folders):
        draw.multiline_text((8, i * CELL + 26), name, fill="black", font=font, spacing=6)
        for k, stem in enumerate(stems):
            picture = Image.fromarray(load_image(f"{folder}/{stem}.png", CELL))
            image.paste(picture, (LABEL + k * CELL, i * CELL))
    return image


def parse_flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", type=Path, default=ROOT / "output_emoji", help="what scripts/emoji.sh wrote")
    parser.add_argument("--table", type=Path, default=HERE / "table.txt", help="the rows")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji", help="the emoji set")
    parser.add_argument("--judge", default=str(ROOT / "models" / "emoji_judge_64.safetensors"), help="the judge's file")
    parser.add_argument("--replicates", type=int, default=300, help="resamples (default 300)")
    parser.add_argument("--pictures", type=int, default=12, help="columns of pictures.png (default 12)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results (default this file's)")
    parser.add_argument("--readme", type=Path, help="a document whose table of fronts is to be made again")
    return parser.parse_args()


def main():
    args = parse_flags()
    test = {vendor: args.data / vendor / "test" for vendor in ("twitter", "fluent3d")}
    ruler = Ruler(args.judge, test["fluent3d"])
    settings, missing, devices = read_settings(args.table, args.save_dir, ruler)
    if not settings:
        raise InputError(f"{args.save_dir} has no finished row of {args.table}; scripts/emoji.sh makes them")
    train = list_images(args.data / "fluent3d" / "train", "train")
    others = sorted(train, key=lambda r: hashlib.sha256(r.name.encode()).hexdigest())[: len(ruler.stems)]
    drawn = judged(ruler.judge, ruler.read([r.path for r in others]))["features"]
    apart = {
        "distance": frechet_of_roots(*gaussian_of_features(drawn), *ruler.target),
        "kernel": kernel(drawn, ruler.features, args.replicates),
    }
    unchanged = Setting(None, [ruler.measure(str(test["twitter"]))])
    for setting in (*settings, unchanged):
        setting.scores = setting.score(ruler.target)
        setting.scores["kernel"] = setting.kernel(ruler.features, args.replicates)
    anchors, reference = {"sources as they are": unchanged.scores}, (LOWEST_SSIM, unchanged.point[1])
    draws, areas = bootstrap(settings, ruler.target, reference, args.replicates)
    volumes = {method: hypervolume(own, reference) for method, own in points_of(settings).items()}
    pairs = matched(settings, draws)
    notes = [
        f"{len(ruler.stems)} pictures; judge {ruler.digest}; intervals by {args.replicates} resamples of the pictures",
        "KID is unbiased, so that it is about 0 for true pictures; in brackets its interval of 95 %",
        f"true pictures of other emoji, of the training split, are {' and KID '.join(shown(apart))} away",
    ]
    if len(devices) > 1:
        notes.append(f"sampled on {' and '.join(devices)}; the draws are the same, seconds would not compare")
    text = text_of(settings, anchors, areas, volumes, pairs, missing, reference, notes)
    record = {
        "settings": [
            {"method": s.row.method, "setting": s.row.setting, "command": " ".join((s.row.script, *s.row.flags)),
             "seeds": len(s.measured), **s.costs, **s.scores}
            for s in settings
        ],
        "anchors": anchors, "others": apart, "reference": reference, "matched": pairs, "missing": missing,
        "areas": {method: [volumes[method], *interval(values)] for method, values in areas.items()},
    }  # fmt: skip
    files.write_text(str(args.out / "fronts.md"), text)
    files.write_json(str(args.out / "fronts.json"), record)
    chart = charts.trade_off(chart_rows(settings), "truth_ssim")
    files.write_text(str(args.out / "fronts.svg"), charts.svg(chart))
    if args.readme:
        document = args.readme.read_text(encoding="utf-8")
        files.write_text(str(args.readme), BLOCK.sub(lambda m: f"{m[1]}{summary(record)}\n{m[2]}", document))
    lines = [line for line in args.table.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    chosen = near(settings)
    kept = [line for line in lines if tables.parse_row(line).name in chosen]
    files.write_text(str(args.save_dir / "near.txt"), "\n".join([*kept, ""]))
    stems = [stem for stem in ruler.stems if not SKIN_TONE.search(stem)]
    stems = [stems[round(k)] for k in np.linspace(0, len(stems) - 1, min(args.pictures, len(stems)))]
    shown_rows = [("source", test["twitter"])]
    for row in representatives(settings, reference):
        folder = sorted((args.save_dir / row.folder).glob("seed_*[0-9]"))[0]
        shown_rows.append((f"{row.method}\n{row.setting}", folder))
    sheet([*shown_rows, ("truth", test["fluent3d"])], stems).save(args.out / "pictures.png", optimize=True)
    print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
