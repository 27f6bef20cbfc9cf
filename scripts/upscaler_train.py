"""Train an upscaler: the small network that enlarges what a model of small images makes.

It learns from crops of the large images in --data_dir and, where --copies names folders, from the model's own copies of
them: noised a little and denoised, so that it repairs what the model does to a picture.

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

from types import SimpleNamespace

from guided_diffusion.cli import training as loop_flags
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.runtime import keep_freed_memory, pick_device
from guided_diffusion.training import upscaling
from guided_diffusion.training.config import RunOptions
from guided_diffusion.training.data import list_images
from guided_diffusion.training.files import owned

USE = "python benchmarks/emoji/upscaler.py --upscaler {path}"
DEFAULTS = {"save_dir": "output/upscaler", "iterations": 10000, "lr": 5e-4, "batch_size": 12, "ema_rate": "0.999"}
WITHOUT = ["sample_interval", "eval_interval", "schedule_sampler", "sigma_mean", "sigma_std", "microbatch"]


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--data_dir DIR --save_dir DIR [flags]")
    parser.add(upscaling.UpscalerOptions, title="pictures and network")
    loop_flags.add_loop(parser, RunOptions, without=WITHOUT, defaults=DEFAULTS)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    options, run = given.options(upscaling.UpscalerOptions), given.options(RunOptions)
    config, device = loop_flags.loop_config(given, run), pick_device(run.device, ranks.local_rank)
    images = upscaling.UpscalerImages(list_images(options.data_dir), options, config.seed)
    keep_freed_memory()
    with owned(config, ranks.rank == 0):
        start, losses = upscaling.begin(config, options), upscaling.upscaler_loss(options)
        process = SimpleNamespace(num_timesteps=1)  # it is no diffusion model
        return loop_flags.train(start, images, losses, process, config, [options, run, config], ranks, device, USE)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
