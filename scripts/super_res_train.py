"""Train a super-resolution model: images of side --large_size from those of side --small_size, by diffusion.

Small images are made of the training images by averaging.

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

from guided_diffusion.cli import training as loop_flags
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.runtime import pick_device
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.training.config import DataOptions, ModelOptions, RunOptions, SuperResOptions
from guided_diffusion.training.data import TrainImages, class_labels, list_images, refuse_own_outputs
from guided_diffusion.training.files import owned
from guided_diffusion.training.losses import super_res_loss
from guided_diffusion.training.start import SUPER_RES, begin

USE = "python scripts/super_res_sample.py --model_path {path} --base_samples FOLDER --save_dir output/large"


def create_parser() -> Parser:
    usage = "--data_dir DIR --save_dir DIR [flags]"
    parser = Parser(__doc__, usage=usage, spelling={"image_size": "large_size"})
    parser.add(DataOptions, title="data")
    loop_flags.add_loop(parser, RunOptions, without=["eval_interval", "sample_interval"])
    parser.add(SuperResOptions, title="super-resolution")
    parser.add(ModelOptions, title="model and diffusion", description=loop_flags.FROM_CHECKPOINT, without=["predict_v"])
    return parser


def train(given: Given, ranks: Ranks) -> int:
    data, upscaling, run = (given.options(cls) for cls in (DataOptions, SuperResOptions, RunOptions))
    config, device = loop_flags.loop_config(given, run), pick_device(run.device, ranks.local_rank)
    model, references = given.options(ModelOptions).given(), list_images(data.data_dir)
    refuse_own_outputs(config.save_dir, data.data_dir, references)
    with owned(config, ranks.rank == 0):
        start = begin(config, SUPER_RES, model, lambda names: class_labels(references, names), super_res=True)
        upscaling.check_large(start.flags["image_size"])
        images = TrainImages(
            references, start.flags["image_size"], labels=start.labels, seed=config.seed, channels=start.channels,
            **data.reading(),
        )  # fmt: skip
        diffusion = create_diffusion(**start.flags)
        losses = super_res_loss(diffusion, upscaling.small_size)
        record = [data, upscaling, run, config]
        return loop_flags.train(start, images, losses, diffusion, config, record, ranks, device, USE)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
