"""Translate every image under --base_samples into the domain of --model_path (ILVR, ICCV 2021).

The result keeps the low frequencies of the reference.

example:
  python scripts/ilvr_sample.py --preset emoji --base_samples ref_imgs
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.baselines import ILVR
from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.cli import sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Peers
from guided_diffusion.run.job import Job, JobOptions
from guided_diffusion.runtime import pick_device
from guided_diffusion.translator import TargetOptions, bind_method, check_flags, load_target


def translate(given: Given, peers: Peers) -> int:
    sampling.say_ignored(given)
    # What the flags alone tell to be wrong is said before anything is loaded.
    method, outputs = given.options(ILVR), given.options(JobOptions)
    wanted, flags = given.options(TargetOptions), given.options(ModelFlags)
    method.check_fit(flags.image_size, check_flags(wanted, flags))
    device = pick_device(wanted.device, peers.local_rank)
    job = Job(outputs, peers, device)

    target = load_target(wanted, flags, device)
    steps = target.diffusion.num_timesteps
    method.check_fit(target.image_size, steps)
    sampler = bind_method(method, target)
    sampling.announce(target, "ILVR", method, given)

    found = {"method": "ilvr", **sampling.resolved(method, steps)}
    settings = sampling.settings(given, target, [method, outputs], peers, **found)
    return sampling.execute(job, sampler, target, method.steps(steps), settings)


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path FILE --base_samples DIR [flags]", spelling={"start": "start_t"})
    sampling.add_first(parser, "ilvr", "down_n", "range_t")
    parser.add(ILVR, title="variants of the method")
    sampling.add_common(parser)
    parser.add_without_effect(use_ddim=None)
    return parser


if __name__ == "__main__":
    command.run(translate, create_parser())
