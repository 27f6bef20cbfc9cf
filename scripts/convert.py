"""Write any checkpoint that this project reads as a folder for diffusers, or as a .safetensors file of this project.

The name in --save_dir chooses. Checkpoints are .pt, .pth and .safetensors files, and folders and Hub ids of diffusers.
What is written is read back and compared before it appears.

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

from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.checkpoint.export import convert
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.sampling import TRAINING_FLAGS
from guided_diffusion.options import Checked, option


@dataclass(frozen=True)
class Conversion(Checked):
    """Input and output of a conversion."""

    model_path: str = option(None, "checkpoint, folder or Hub id to read", file=True, metavar="PATH")
    save_dir: str = option(
        None, "folder, or file that ends with .safetensors, to write; it must not exist", metavar="PATH"
    )
    drop_variance: bool = option(False, "keep the mean alone where variances were learned: few schedulers take both")


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path PATH --save_dir PATH [flags]")
    parser.add(Conversion, title="conversion")
    parser.add(ModelFlags, title="model", description="What the checkpoint does not tell.", without=TRAINING_FLAGS)
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
