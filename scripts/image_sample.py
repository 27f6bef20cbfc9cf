"""Make images of a diffusion model's own, without references: 000000.png, 000001.png, ... in --save_dir.

An image depends on the flags, --seed and its number alone. A class-conditional model makes images of random classes,
or of --class_index.

example:
  python scripts/image_sample.py --model_path models/fluent3d_64.safetensors \\
      --num_samples 64 --timestep_respacing ddim50 --use_ddim True
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from dataclasses import dataclass

from guided_diffusion.baselines import Unconditional
from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.cli import generate, sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.dist_util import Peers
from guided_diffusion.generation import with_random_classes
from guided_diffusion.options import check, option
from guided_diffusion.run.job import MOST_IMAGES, Job, Numbers, OutputOptions
from guided_diffusion.runtime import pick_device
from guided_diffusion.translator import TargetOptions, bind_method, check_flags, load_target


@dataclass(frozen=True)
class Images:
    num_samples: int = option(16, "images to make", least=1, most=MOST_IMAGES, runtime=True)
    npz: bool = option(False, "also write all images as one array, as guided-diffusion does", runtime=True)

    def __post_init__(self) -> None:
        check(self)


def sample(given: Given, peers: Peers) -> int:
    sampling.say_ignored(given)
    # What the flags alone tell to be wrong is said before anything is loaded.
    method, images, outputs = given.options(Unconditional), given.options(Images), given.options(OutputOptions)
    wanted, flags = given.options(TargetOptions), given.options(ModelFlags)
    check_flags(wanted, flags)
    device = pick_device(wanted.device, peers.local_rank)
    job = Job(outputs, peers, device, Numbers(images.num_samples))

    target = load_target(wanted, flags, device, any_class=True)
    sampler, classes = bind_method(method, target), sampling.random_classes(target, wanted)
    if classes is not None:
        sampler = with_random_classes(sampler, classes)
    kind = f"DDIM, eta {method.eta:g}" if method.use_ddim else "ancestral sampling"
    sampling.announce(target, kind, method, given)

    settings = sampling.settings(given, target, [method, outputs], peers, method="unconditional")
    steps = target.diffusion.num_timesteps
    status = sampling.execute(job, sampler, target, steps, settings, sampling.IMAGES)
    if images.npz and status == 0 and peers.rank == 0:
        generate.write_npz(job, target.image_size, sampling.labels_of(job, target, wanted))
    return status


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path FILE [flags]")
    parser.add(Images, Unconditional, title="images")
    parser.add(ModelFlags, title="images", only=[sampling.STEPS])
    sampling.add_outputs(parser, OutputOptions)
    sampling.add_common(parser)
    return parser


if __name__ == "__main__":
    command.run(sample, create_parser())
