"""Train a diffusion model on a folder of images, or fine-tune any checkpoint that the sampling scripts read.

examples:
  python scripts/image_train.py --data_dir data/emoji/fluent3d/train \\
      --save_dir output/fluent3d --image_size 64 --num_channels 32 \\
      --channel_mult 1,2,4,4 --batch_size 16 --lr 5e-4 --ema_rate 0.999 \\
      --lr_anneal_steps 15000 --save_interval 1000 --resume auto
  python scripts/ae_sample.py --preset emoji --base_samples ref_imgs \\
      --model_path output/fluent3d/model.safetensors
  torchrun --nproc_per_node 8 scripts/image_train.py --precision bf16 ...
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import training as loop
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.training.config import DataOptions, GridOptions, LossOptions, ModelOptions
from guided_diffusion.training.loop import grid_sampler
from guided_diffusion.training.losses import diffusion_loss, loss_weights
from guided_diffusion.training.start import DIFFUSION

USE = "python scripts/ae_sample.py --model_path {path} --base_samples FOLDER --save_dir output/translated"


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--data_dir DIR --save_dir DIR [flags]")
    parser.add(DataOptions, title="data")
    loop.add_loop(parser, without=["eval_interval"])
    parser.add(LossOptions, title="loss")
    parser.add(GridOptions, title="sample grids")
    parser.add(ModelOptions, title="model and diffusion", description=loop.FROM_CHECKPOINT)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    data, loss, grid = (given.options(cls) for cls in (DataOptions, LossOptions, GridOptions))
    run = loop.Run(given, ranks)
    with run.model(data, DIFFUSION) as (start, images, diffusion):
        losses = diffusion_loss(diffusion, loss_weights(diffusion, loss.p2_gamma, loss.p2_k, loss.min_snr_gamma))
        sample = grid_sampler(start, grid, run.config.seed) if run.config.sample_interval else None
        return run.train(start, images, losses, diffusion, [data, loss, grid], USE, sample=sample)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
