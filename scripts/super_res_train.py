"""Train a diffusion model for super-resolution, from --small_size to --large_size pixels.

Small images are averages of the training images.

examples:
  python scripts/super_res_train.py --data_dir data/emoji/fluent3d/train \\
      --save_dir output/upsampler --large_size 64 --small_size 16 \\
      --num_channels 32 --batch_size 16 --lr_anneal_steps 15000 --resume auto
  python scripts/super_res_sample.py --base_samples small_images \\
      --model_path output/upsampler/model.safetensors
  torchrun --nproc_per_node 8 scripts/super_res_train.py --precision bf16 ...
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import training as loop
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.errors import InputError
from guided_diffusion.training.config import DataOptions, ModelOptions, SuperResOptions
from guided_diffusion.training.losses import super_res_loss
from guided_diffusion.training.start import SUPER_RES

USE = "python scripts/super_res_sample.py --model_path {path} --base_samples FOLDER --save_dir output/large"


def create_parser() -> Parser:
    usage = "--data_dir DIR --save_dir DIR [flags]"
    parser = Parser(__doc__, usage=usage, spelling={"image_size": "large_size"})
    parser.add(DataOptions, title="data")
    loop.add_loop(parser, without=["eval_interval", "sample_interval"])
    parser.add(SuperResOptions, title="super-resolution")
    parser.add(ModelOptions, title="model and diffusion", description=loop.FROM_CHECKPOINT, without=["predict_v"])
    return parser


def train(given: Given, ranks: Ranks) -> int:
    data, upscaling = given.options(DataOptions), given.options(SuperResOptions)
    run = loop.Run(given, ranks)
    with run.model(data, SUPER_RES, super_res=True) as (start, images, diffusion):
        if upscaling.small_size >= (large := start.flags["image_size"]):
            reason = f"it must be below that of the images to make, {large}"
            raise InputError(reason, parameter="small_size", value=upscaling.small_size)
        losses = super_res_loss(diffusion, upscaling.small_size)
        return run.train(start, images, losses, diffusion, [data, upscaling], USE)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
