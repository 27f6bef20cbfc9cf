"""Train an upscaler: a small network that enlarges the outputs of a low-resolution model.

It learns from crops of the large images in --data_dir and, with --copies, from the model's own copies of them: noised
slightly and denoised, so that it also learns to remove the model's artefacts.

examples:
  python scripts/ae_sample.py --model_path models/fluent3d_64.safetensors \\
      --upscale False --base_samples data/emoji/fluent3d/train \\
      --timestep_respacing 25 --sampler ddim --start_t 0.2 --range_t 0.3 \\
      --save_dir output/copies/0.2
  python scripts/upscaler_train.py --data_dir data/emoji256/fluent3d/train \\
      --copies output/copies/0.2 --model fluent3d_64 --lr 1e-3 \\
      --lr_anneal_steps 10000 --lr_schedule cosine --lr_warmup_steps 500 \\
      --grad_clip 0.2 --precision bf16 --save_interval 1000 --resume auto
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import training as loop
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.training import upscaling
from guided_diffusion.training.data import list_images

USE = "python benchmarks/emoji/upscaler.py --upscaler {path}"
DEFAULTS = {"save_dir": "output/upscaler", "iterations": 10000, "lr": 5e-4, "batch_size": 12, "ema_rate": "0.999"}
WITHOUT = ["sample_interval", "eval_interval", "schedule_sampler", "sigma_mean", "sigma_std", "microbatch"]


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--data_dir DIR --save_dir DIR [flags]", defaults=DEFAULTS)
    parser.add(upscaling.UpscalerOptions, title="pictures and network")
    loop.add_loop(parser, without=WITHOUT)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    options, run = given.options(upscaling.UpscalerOptions), loop.Run(given, ranks)
    images = upscaling.UpscalerImages(list_images(options.data_dir), options, run.config.seed)
    with run.folder():
        start, losses = upscaling.begin(run.config, options), upscaling.upscaler_loss(options)
        return run.train(start, images, losses, None, [options], USE)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
