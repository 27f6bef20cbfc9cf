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

from guided_diffusion.cli import training as loop_flags
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.runtime import pick_device
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.training.config import DataOptions, GridOptions, LossOptions, ModelOptions, RunOptions
from guided_diffusion.training.data import TrainImages, class_labels, list_images, refuse_own_outputs
from guided_diffusion.training.files import owned
from guided_diffusion.training.loop import grid_sampler
from guided_diffusion.training.losses import diffusion_loss, loss_weights
from guided_diffusion.training.start import DIFFUSION, begin

USE = "python scripts/ae_sample.py --model_path {path} --base_samples FOLDER --save_dir output/translated"


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--data_dir DIR --save_dir DIR [flags]")
    parser.add(DataOptions, title="data")
    loop_flags.add_loop(parser, RunOptions, without=["eval_interval"])
    parser.add(LossOptions, title="loss")
    parser.add(GridOptions, title="sample grids")
    parser.add(ModelOptions, title="model and diffusion", description=loop_flags.FROM_CHECKPOINT)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    data, loss, grid, run = (given.options(cls) for cls in (DataOptions, LossOptions, GridOptions, RunOptions))
    config, device = loop_flags.loop_config(given, run), pick_device(run.device, ranks.local_rank)
    model, references = given.options(ModelOptions).given(), list_images(data.data_dir)
    refuse_own_outputs(config.save_dir, data.data_dir, references)
    with owned(config, ranks.rank == 0):
        start = begin(config, DIFFUSION, model, lambda names: class_labels(references, names))
        images = TrainImages(
            references, start.flags["image_size"], labels=start.labels, seed=config.seed,
            channels=start.channels, **data.reading(),
        )  # fmt: skip
        diffusion = create_diffusion(**start.flags)
        losses = diffusion_loss(diffusion, loss_weights(diffusion, loss.p2_gamma, loss.p2_k, loss.min_snr_gamma))
        sample = grid_sampler(start, grid, config.seed) if config.sample_interval else None
        record = [data, loss, grid, run, config]
        return loop_flags.train(start, images, losses, diffusion, config, record, ranks, device, USE, sample=sample)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
