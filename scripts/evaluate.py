"""Measure translated images: FID, KID, L2, PSNR, SSIM, MS-SSIM, LPIPS; JSON, CSV and Markdown out."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.extensions import Extensions
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.evaluation import protocol, table

DESCRIPTION = """\
Measure a folder of translated images: FID, KID, L2, PSNR, SSIM, MS-SSIM, LPIPS; JSON, CSV and Markdown out.

examples:
  python scripts/evaluate.py --outputs output/cat2dog --out results/cat2dog \\
      --sources data/afhq/val/cat --targets data/afhq/val/dog
  python scripts/evaluate.py --outputs output/emoji --out results/emoji \\
      --truth data/emoji/fluent3d/test --targets data/emoji/fluent3d/test \\
      --features models/fluent3d_64.safetensors --image_size 64
  python scripts/evaluate.py --outputs output/emoji --out results/judged \\
      --truth data/emoji/fluent3d/test --targets data/emoji/fluent3d/test \\
      --features models/emoji_judge_64.safetensors --bootstrap 200
  python scripts/evaluate.py --targets data/afhq/val/dog --save_stats dog.npz"""
PAIRING = (
    "searched recursively; outputs are paired with files of the same relative name, by number or order only where no "
    "name matches"
)
PARTS = {
    "images": protocol.Images,
    "protocol": protocol.Protocol,
    "FID and KID": protocol.Distances,
    "LPIPS": protocol.Pairs,
    "confidence": protocol.Confidence,
    "run": protocol.Running,
}


def create_parser() -> Parser:
    parser = Parser(DESCRIPTION)
    for title, part in PARTS.items():
        parser.add(part, title=title, description=PAIRING if title == "images" else None)
    parser.add(Extensions, title="extensions")
    parser.add(protocol.Results, title="result")
    return parser


def measure(given: Given) -> None:
    given.options(Extensions).load()
    options = protocol.Evaluation(**{k: v for part in PARTS.values() for k, v in given.values(part).items()})
    results = given.options(protocol.Results)
    results.check_with(options)
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
