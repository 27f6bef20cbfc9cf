"""Evaluate translated images with FID, KID, L2, PSNR, SSIM, MS-SSIM and LPIPS; write JSON, CSV and Markdown.

examples:
  python scripts/evaluate.py --outputs output/cat2dog --out results/cat2dog \\
      --sources data/afhq/val/cat --targets data/afhq/val/dog
  python scripts/evaluate.py --outputs output/emoji --out results/emoji \\
      --truth data/emoji/fluent3d/test --targets data/emoji/fluent3d/test \\
      --features models/fluent3d_64.safetensors --image_size 64
  python scripts/evaluate.py --outputs output/emoji --out results/judged \\
      --truth data/emoji/fluent3d/test --targets data/emoji/fluent3d/test \\
      --features models/emoji_judge_64.safetensors --bootstrap 200
  python scripts/evaluate.py --targets data/afhq/val/dog --save_stats dog.npz
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.extensions import Extensions
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.evaluation import Evaluation, protocol, table

PAIRING = (
    "Folders are searched recursively. Outputs are paired with files of the same relative path, or by number or order "
    "if no path matches."
)
GROUPS = {
    "images": ("outputs", "sources", "targets", "truth", "partial"),
    "protocol": ("protocol", "image_size", "native_size", "resize"),
    "FID and KID": ("features", "trust_features", "inception_path", "kid_subsets", "kid_subset_size"),
    "LPIPS": ("lpips", "lpips_net"),
    "confidence": ("bootstrap", "confidence", "seed"),
    "run": ("batch_size", "device"),
}


def create_parser() -> Parser:
    parser = Parser(__doc__)
    for title, names in GROUPS.items():
        parser.add(Evaluation, title=title, only=names, description=PAIRING if title == "images" else None)
    parser.add(Extensions, title="extensions")
    parser.add(protocol.Results, title="result")
    return parser


def measure(given: Given) -> None:
    given.options(Extensions).load()
    options, results = given.options(Evaluation), given.options(protocol.Results)
    results.prepare(options)
    if results.save_stats:
        protocol.target_statistics(options, results.save_stats, progress=progress_bar)
        return
    result, images = protocol.evaluate(options, progress=progress_bar)
    for warning in result["warnings"]:
        command.say(f"warning: {warning}")
    command.say(table.markdown(result).rstrip("\n"), sys.stdout)
    results.write(result, images)


def progress_bar(batches, description):
    from tqdm import tqdm

    return tqdm(batches, desc=description, unit="batch", disable=None)


if __name__ == "__main__":
    command.run(measure, create_parser(), ranks="none")
