"""Evaluate the likelihood of images under a diffusion model: the variational bound in bits per dimension, by term.

Writes guided-diffusion's vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz (means over images by step, from the last
to the first), bpd.csv with a row per image, and every image's terms to images.jsonl.

example:
  python scripts/image_nll.py --model_path my_model.pt --data_dir data/test
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.checkpoint.targets import TargetOptions, load_target, num_classes
from guided_diffusion.cli import sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.progress import Progress
from guided_diffusion.dist_util import Peers
from guided_diffusion.errors import display_name
from guided_diffusion.run.job import opened
from guided_diffusion.run.likelihood import LikelihoodJob, LikelihoodLoop, LikelihoodOptions, data_images, likelihood
from guided_diffusion.run.sources import listed
from guided_diffusion.runtime import pick_device

FOR_SAMPLING = ("clip_denoised", "class_index", "compile", "fuse", "upscale", "prompt", "negative_prompt",
                "prompt_file", "guidance_scale")  # fmt: skip


def evaluate(given: Given, peers: Peers) -> int:
    options = given.options(LikelihoodOptions)
    images = listed(options.data_dir, options.num_samples, peers, "data_dir")
    wanted = given.options(TargetOptions, upscale=False)
    device = pick_device(wanted.device, peers.local_rank)
    target = load_target(wanted, given.options(ModelFlags), device, any_class=True)
    source = data_images(images, num_classes(target) is not None)
    job = LikelihoodJob(options, peers, target.device, source, steps=target.diffusion.num_timesteps)
    found = {"method": "likelihood", "clip_denoised": options.clip_denoised}
    settings = sampling.given_settings(given, target, [options], peers, **found)
    with opened(job, target.image_size, settings) as plan:
        with Progress(0 if peers.rank else plan.image_steps(1), len(job.items), plan.skipped) as progress:
            loop = LikelihoodLoop(job, plan, likelihood(target, options.clip_denoised), 1, progress)
            loop.run()
        ended = loop.finish()
    if peers.rank:
        return command.DONE
    for name, reason in loop.failed.items():
        command.say(f"failed: {display_name(name)}: {reason}")
    done = len(job.items) - len(loop.failed)
    where = f"the terms are in {display_name(options.save_dir)}"
    command.say(f"{done} images: {ended['bits_per_dimension']:.4f} bits per dimension; {where}")
    return command.FAILED if loop.failed else command.DONE


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path PATH --data_dir PATH [flags]", defaults={"sigma_small": False})
    first = ("model_path", "data_dir", "save_dir")
    parser.add(TargetOptions, LikelihoodOptions, title="input and output", only=first)
    parser.add(LikelihoodOptions, title="input and output")
    sampling.add_model(parser, without=FOR_SAMPLING)
    return parser


if __name__ == "__main__":
    command.run(evaluate, create_parser())
