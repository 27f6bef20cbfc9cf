"""Train a classifier of noised images, or EGSDE's domain-specific extractor, for the energies classifier and dse.

examples:
  python scripts/classifier_train.py --data_dir train --val_data_dir val
  python scripts/classifier_train.py --domains my_sources,my_targets \\
      --image_size 64 --channel_mult 1,2,4,4 --classifier_width 32
  python scripts/classifier_train.py --domains cat,wild,dog  # the target last
  python scripts/ae_sample.py --energy dse --dsepath extractor.safetensors ...

Classes come from dataset.json in --data_dir, from its folders, or from file names up to the first underscore.
"""

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import training as loop
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.training.config import ClassifierRunOptions, ClassOptions, DataOptions, EncoderOptions
from guided_diffusion.training.data import TrainImages, labelled_images, refuse_own_outputs
from guided_diffusion.training.losses import classifier_loss, evaluate
from guided_diffusion.training.start import ENCODER, begin

USE = "python scripts/ae_sample.py --base_samples FOLDER"
DEFAULTS = {"save_dir": "output/classifier", "iterations": 150000, "lr": 3e-4, "batch_size": 4, "ema_rate": ""}


def create_parser() -> Parser:
    usage = "(--data_dir DIR | --domains SOURCE,TARGET) --save_dir DIR [flags]"
    parser = Parser(__doc__, usage=usage, defaults=DEFAULTS)
    parser.add(DataOptions, title="data")
    parser.add(ClassOptions, title="classes")
    loop.add_loop(parser, ClassifierRunOptions, without=["sample_interval"])
    parser.add(EncoderOptions, title="classifier and diffusion", description=loop.FROM_CHECKPOINT)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    data, classes, model = (given.options(cls) for cls in (DataOptions, ClassOptions, EncoderOptions))
    run = loop.Run(given, ranks, ClassifierRunOptions)
    config = run.config
    references, label = labelled_images(data.data_dir, classes.domains)
    refuse_own_outputs(config.save_dir, classes.domains or data.data_dir, references)
    with run.folder():
        start = begin(config, ENCODER, model.given(), label, head="I2Iout" if classes.domains else "out")
        reading = {"seed": config.seed, **data.reading()}
        images = TrainImages(references, start.flags["image_size"], labels=start.labels, **reading)
        diffusion = create_diffusion(**start.flags)
        losses, measure = classifier_loss(diffusion, classes.noised), None
        if classes.val_data_dir or classes.val_domains:
            held_out, label = labelled_images(classes.val_data_dir, classes.val_domains, start.classes, "val_")
            others = TrainImages(held_out, images.image_size, labels=label(start.classes)[0], **reading)
            measure = functools.partial(
                evaluate, losses=losses, images=others, num_timesteps=diffusion.num_timesteps, device=run.device,
                config=config, ranks=ranks,
            )  # fmt: skip
        use = f"{USE} --energy {'dse --dsepath' if classes.domains else 'classifier --classifier_path'} {{path}}"
        return run.train(start, images, losses, diffusion, [data, classes], use, evaluate=measure)


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
