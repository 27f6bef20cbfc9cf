"""Measure a folder of translated images: FID, KID, L2, PSNR, SSIM, MS-SSIM, LPIPS; JSON, CSV and Markdown out."""

import argparse
import csv
import inspect
import io
import json
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

import torch

from guided_diffusion import evaluation
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import str2bool

LABELS = {
    "fid": "FID", "kid": "KID", "l2": "L2", "mse": "MSE", "psnr": "PSNR (dB)", "ssim": "SSIM", "msssim": "MS-SSIM",
    "lpips": "LPIPS", "negative_impact": "negative impact",
}
FOLDERS = ("outputs", "sources", "targets", "truth")
EPILOG = """examples:
  python scripts/evaluate.py --outputs output --sources ref_imgs --targets afhq/val/dog --out results/cat2dog
  python scripts/evaluate.py --outputs output --truth emoji/fluent/test --targets emoji/fluent/test \\
      --features models/fluent3d_64.safetensors --bootstrap 200 --out results/emoji
  python scripts/evaluate.py --targets afhq/val/dog --save_stats dog.npz"""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def main():
    flags = vars(parse_flags())
    prefix, per_image, save_stats = (flags.pop(name) for name in ("out", "per_image", "save_stats"))
    check_flags(flags, prefix, per_image, save_stats)
    flags["device"] = find_device(flags["device"])
    flags["progress"] = progress_bar
    if save_stats:
        wanted = inspect.signature(evaluation.target_statistics).parameters
        flags = {name: value for name, value in flags.items() if name in wanted}
        evaluation.target_statistics(path=save_stats, **flags)
        return
    result, images = evaluation.evaluate(**flags)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(markdown(result), end="")
    if prefix:
        write(f"{prefix}.json", json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        write(f"{prefix}.csv", table([flat(result)]))
        write(f"{prefix}.md", markdown(result))
    if per_image:
        write(f"{prefix}_images.csv", table(images))


def parse_flags():
    parser = Parser(description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("images", "searched recursively; outputs are paired with files of the same "
                                     "relative name, by order only where no name matches")
    data.add_argument("--outputs", metavar="DIR", help="the translated images")
    data.add_argument("--sources", metavar="DIR", help="what was translated: L2, PSNR, SSIM, MS-SSIM, LPIPS")
    data.add_argument("--targets", metavar="DIR|FILE.npz", help="images of the target domain: FID and KID; or "
                      "their statistics (mu and sigma, pytorch-fid's format): FID")
    data.add_argument("--truth", metavar="DIR", help="the true translation of each source, where there is one")
    data.add_argument("--partial", type=str2bool, default=False, metavar="BOOL",
                      help="measure the pairs that there are, where images without a partner are an error otherwise "
                      "(default False)")

    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--protocol", default="egsde", choices=("egsde", "egsde-male2female"),
                          help="how images enter Inception; egsde-male2female: 256, then 299 pixels, and ImageNet's "
                          "normalisation (default egsde)")
    protocol.add_argument("--image_size", type=whole(1), default=256, metavar="N",
                          help="side at which images are compared (default 256, as published)")
    protocol.add_argument("--native_size", type=str2bool, default=False, metavar="BOOL",
                          help="features of the files' own pixels, as the pytorch-fid command takes them "
                          "(default False)")
    protocol.add_argument("--resize", default="crop", choices=("crop", "pad", "stretch"),
                          help="how images that are not square become so; as when sampling (default crop)")

    features = parser.add_argument_group("FID and KID")
    features.add_argument("--features", default="inception", metavar="NAME",
                          help="inception (pytorch-fid's, the default); a TorchScript FILE.pt from images "
                          "[N, 3, H, W] in [0, 1] to features [N, D]; or a FILE.safetensors of a model of this "
                          "project, whose middle block is read at t = 50")
    features.add_argument("--inception_path", metavar="FILE",
                          help="pt_inception-2015-12-05-6726825d.pth, where it cannot be downloaded")
    features.add_argument("--save_stats", metavar="FILE.npz", help="write the statistics of --targets and end")
    features.add_argument("--kid_subsets", type=whole(1), default=100, metavar="N", help="(default 100)")
    features.add_argument("--kid_subset_size", type=whole(2), default=1000, metavar="N",
                          help="images in a subset; smaller sets are used whole (default 1000)")

    paired = parser.add_argument_group("LPIPS")
    paired.add_argument("--lpips", type=auto_or_bool, default="auto", metavar="auto|True|False",
                        help="auto: measured if the lpips package and its weights can be had, left out with a warning "
                        "otherwise; True: an error otherwise (default auto)")
    paired.add_argument("--lpips_net", default="alex", choices=("alex", "vgg", "squeeze"), help="(default alex)")

    confidence = parser.add_argument_group("confidence")
    confidence.add_argument("--bootstrap", type=whole(0), default=0, metavar="N",
                            help="bootstrap replicates for the intervals of every value, 0 for none (default 0)")
    confidence.add_argument("--confidence", type=float, default=0.95, metavar="P", help="(default 0.95)")
    confidence.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of bootstrap and KID (default 0)")

    run = parser.add_argument_group("result and run")
    run.add_argument("--out", metavar="PREFIX", help="write PREFIX.json, PREFIX.csv (one row) and PREFIX.md")
    run.add_argument("--per_image", type=str2bool, default=False, metavar="BOOL",
                     help="write PREFIX_images.csv with the paired values of each output (default False)")
    run.add_argument("--batch_size", type=whole(1), default=16, metavar="N", help="(default 16)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser.parse_args()


def whole(least):
    def number(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: a whole number of at least {least} is needed")
        return int(text)

    return number


def auto_or_bool(text):
    return "auto" if text == "auto" else str2bool(text)


def check_flags(flags, prefix, per_image, save_stats):
    if save_stats:
        if flags["outputs"] is not None or flags["targets"] is None or flags["targets"].endswith(".npz"):
            raise UserError(f"--save_stats {save_stats}: needs a folder for --targets, and no --outputs")
        if not save_stats.endswith(".npz"):
            raise UserError(f"--save_stats {save_stats}: the name must end in .npz")
        check_folder("--save_stats", save_stats)
        del flags["outputs"]
    elif flags["outputs"] is None:
        raise UserError("--outputs is needed: the folder of images to measure")
    if not 0 < flags["confidence"] < 1:
        raise UserError(f"--confidence {flags['confidence']:g}: must lie between 0 and 1, for example 0.95")
    if prefix:
        check_folder("--out", prefix)
    if per_image and not (prefix and (flags["sources"] or flags["truth"])):
        raise UserError("--per_image True: needs --out, and --sources or --truth")


def check_folder(flag, path):
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: the folder {folder} cannot be made ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {folder} is not writable")


def find_device(name):
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({str(error).splitlines()[0]})") from None
    return name


def progress_bar(batches, description):
    from tqdm import tqdm

    return tqdm(batches, desc=description, unit="batch", disable=None)


def label(metric):
    role, _, name = metric.rpartition("_") if metric != "negative_impact" else ("", "", metric)
    return f"{LABELS[name]}, {role}" if role else LABELS[name]


def markdown(result):
    """The measured values, and how they were measured."""
    lines = [f"# {result['outputs']}", "", "| metric | value | std | interval |", "|---|---|---|---|"]
    for metric, value in result["metrics"].items():
        if value is not None:
            std = f"{result['std'][metric]:.4g}" if metric in result["std"] else ""
            interval = " to ".join(f"{end:.5g}" for end in result["intervals"].get(metric, ()))
            lines.append(f"| {label(metric)} | {value:.6g} | {std} | {interval} |")
    lines.append("")
    for folder in FOLDERS:
        if result[folder] is not None:
            count, sizes = result["counts"].get(folder), result["sizes"].get(folder, [])
            words = ["unknown number of images" if count is None else f"{count} images", *sizes[:3]]
            lines.append(f"- {folder}: `{result[folder]}` ({', '.join(words)}{', ...' * (len(sizes) > 3)})")
    lines += [f"- pairing with {role}: by {how}" for role, how in result["pairing"].items()]
    lines += [f"- {key}: {value}" for key, value in result["protocol"].items()]
    lines += [f"- **warning**: {warning}" for warning in result["warnings"]]
    return "\n".join(lines) + "\n"


def flat(result):
    """The result as one row: every value under one name, empty where it was not measured."""
    row = {folder: result[folder] for folder in FOLDERS}
    row |= {f"count_{name}": result["counts"].get(name) for name in (*FOLDERS, "source_pairs", "truth_pairs")}
    row |= {f"protocol_{key}": result["protocol"].get(key) for key in ("name", "features", "dimensions")}
    for metric, value in result["metrics"].items():
        low, high = result["intervals"].get(metric, (None, None))
        row |= {metric: value, f"{metric}_std": result["std"].get(metric), f"{metric}_low": low, f"{metric}_high": high}
    return row | {"warnings": "; ".join(result["warnings"])}


def table(rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def finite(value):
    """The value with None in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path, text):
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise UserError(f"--out: {path} cannot be written ({error.strerror})") from None


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
