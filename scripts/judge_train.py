"""Train the judge: a small network in whose features `evaluate.py --features judge` measures realism.

examples:
  python scripts/judge_train.py --data_dir data/emoji --iterations 1000 \\
      --save_dir output/judge --resume auto
  python scripts/evaluate.py --features output/judge/model.safetensors \\
      --outputs output --truth truth --targets truth

It learns to tell which vendor drew a clean picture, and which code point it shows, from the folders VENDOR/train in
--data_dir. Pictures of one code point have one file name. Held-out figures are of VENDOR/test, where it exists.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli import training as loop_flags
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Ranks
from guided_diffusion.resample import UniformSampler
from guided_diffusion.runtime import pick_device
from guided_diffusion.training import judge as judging
from guided_diffusion.training.config import RunOptions
from guided_diffusion.training.files import owned
from guided_diffusion.training.loop import Trainer, process_group

DEFAULTS = {"save_dir": "output/judge", "iterations": 1000, "lr": 2e-3, "batch_size": 64, "ema_rate": "0.99"}
WITHOUT = ["sample_interval", "schedule_sampler", "sigma_mean", "sigma_std", "microbatch"]


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--data_dir DIR --save_dir DIR [flags]")
    parser.add(judging.JudgeOptions, title="pictures and network")
    loop_flags.add_loop(parser, RunOptions, without=WITHOUT, defaults=DEFAULTS)
    return parser


def train(given: Given, ranks: Ranks) -> int:
    options, run = given.options(judging.JudgeOptions), given.options(RunOptions)
    config = loop_flags.loop_config(given, run)
    device = pick_device(run.device, ranks.local_rank)
    images, held_out = judging.judge_images(options, "train", config.seed), judging.held_out_images(options)
    with owned(config, ranks.rank == 0):
        judge, checkpoint = judging.begin(config, options)
        if ranks.rank == 0:
            judging.record(config, options, judge)
            count = sum(p.numel() for p in judge.parameters()) / 1e6
            command.say(f"{len(images)} code points by {options.vendors}, {count:.2f} M parameters, {device}")
        with process_group(ranks, device):
            trainer = Trainer(
                judge, judging.judge_loss(len(judge.vendors), options.temperature), images, config,
                UniformSampler(judging.OneStep), device=device, ranks=ranks, checkpoint=checkpoint,
                metadata=judging.metadata(judge, images), evaluate=judging.measure(held_out, device),
                progress=sys.stderr.isatty(),
            )  # fmt: skip
            finished = trainer.run()
    use = "--features {path} --outputs DIR --truth DIR --targets DIR"
    return loop_flags.end(finished, config, ranks, f"python scripts/evaluate.py {use}")


if __name__ == "__main__":
    command.run(train, create_parser(), ranks="ranks")
