"""Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023).

example: python scripts/ae_sample.py --preset emoji --base_samples ref_imgs
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from dataclasses import dataclass

from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.cli import sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Peers
from guided_diffusion.energy import ENERGIES
from guided_diffusion.options import option
from guided_diffusion.run.job import Job, JobOptions
from guided_diffusion.runtime import pick_device
from guided_diffusion.sddm import SDDM
from guided_diffusion.translator import (
    TargetOptions,
    bind_method,
    check_flags,
    create_energies,
    energy_names,
    load_target,
)

VGG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models", "vgg_normalised.pth")
RELEASED = ("use_ddim", "classifier_scale", "affine", "losstype", "init_with_blockadain", "diffusionmodel")


@dataclass(frozen=True)
class EnergyOptions:
    energy: str | None = option(
        None, "any energies, as dse,low_pass, or none (default vgg where its weights exist, else dct)", metavar="NAMES"
    )


def translate(given: Given, peers: Peers) -> int:
    sampling.say_ignored(given)
    # What the flags alone tell to be wrong is said before anything is loaded.
    method, outputs = given.options(SDDM), given.options(JobOptions)
    wanted, flags = given.options(TargetOptions), given.options(ModelFlags)
    names = energy_names(given.energy, given.vgg_path)
    options = [given.options(ENERGIES[name]) for name in names]
    sampling.check_files(given, options)
    method.check_fit(flags.image_size, check_flags(wanted, flags))
    device = pick_device(wanted.device, peers.local_rank)
    job = Job(outputs, peers, device)

    target = load_target(wanted, flags, device)
    steps = target.diffusion.num_timesteps
    method.check_fit(target.image_size, steps)
    energies = create_energies(options, target)
    sampling.announce(target, f"SDDM {method.variant}, {sampling.energy_words(names, given)}", method, given)

    found = {"method": "sddm", "energy": names, **sampling.resolved(method, steps)}
    settings = sampling.settings(given, target, [method, *options, outputs], peers, **found)
    return sampling.execute(job, bind_method(method, target, energies), target, method.steps(steps), settings)


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path FILE --base_samples DIR [flags]", spelling={"start": "start_t"})
    sampling.add_first(parser, "sddm", "blocks", "range_t")
    parser.add(SDDM, title="variants of the method")
    parser.add(EnergyOptions, *ENERGIES.values(), title="energies", defaults={"weights": VGG})
    sampling.add_common(parser)
    parser.add_without_effect(**dict.fromkeys(RELEASED))
    return parser


if __name__ == "__main__":
    command.run(translate, create_parser())
