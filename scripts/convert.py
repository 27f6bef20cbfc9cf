"""Convert any checkpoint that this project reads to a diffusers folder or a .safetensors file.

The name in --save_dir decides which. Checkpoints are .pt, .pth and .safetensors files, and folders and Hub ids
of diffusers. The output is read back and compared before it gets its final name.

examples:
  python scripts/convert.py --model_path models/afhq_dog_4m.pt --save_dir dog
  python scripts/convert.py --model_path google/ddpm-cat-256 \\
      --save_dir models/cat.safetensors
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

from guided_diffusion.cli import main as command

command.start()

from dataclasses import dataclass

from guided_diffusion.checkpoint import ModelFlags, convert
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.sampling import TRAINING_FLAGS
from guided_diffusion.options import Checked, option

UNSTATED = "Needed only where the checkpoint does not state it."


@dataclass(frozen=True)
class Conversion(Checked):
    """Input and output of a conversion."""

    model_path: str = option(None, "checkpoint, diffusers folder or Hub id to convert", file=True, metavar="PATH")
    save_dir: str = option(None, "new folder, or new file that ends with .safetensors", metavar="PATH")
    drop_variance: bool = option(False, "drop learned variances, which few schedulers support")


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path PATH --save_dir PATH [flags]")
    parser.add(Conversion, title="conversion")
    parser.add(ModelFlags, title="model", description=UNSTATED, without=TRAINING_FLAGS)
    parser.add_without_effect(**TRAINING_FLAGS)
    return parser


def main(given: Given) -> int:
    options = given.options(Conversion)
    flags = given.options(ModelFlags).given()
    convert(options.model_path, options.save_dir, drop_variance=options.drop_variance, **flags)
    print(f"{options.save_dir} is written")
    return command.DONE


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
