"""Enlarge a folder of small images, or the .npz file of another sampling command, with a super-resolution model.

Outputs keep their names; an output depends on the flags, --seed and its image's relative path alone.

example:
  python scripts/super_res_sample.py --model_path 64_256_upsampler.pt \\
      --base_samples samples_16x64x64x3.npz --timestep_respacing 250
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.checkpoint import ModelFlags
from guided_diffusion.cli import sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.generate import NetworkOptions, add_network, load_network, write_npz
from guided_diffusion.dist_util import Peers
from guided_diffusion.errors import InputError
from guided_diffusion.generation import EnlargeOptions, super_resolution
from guided_diffusion.run.job import Job, OutputOptions
from guided_diffusion.run.sources import SmallImages


def enlarge(given: Given, peers: Peers) -> int:
    options, output = given.options(EnlargeOptions), given.options(OutputOptions)
    source = SmallImages(options.base_samples, peers, options.small_size, options.num_samples, options.class_index)
    target, settings = load_network(given, peers.local_rank)
    info = target.info
    if not info.flags.get("super_res"):
        raise InputError("it is no super-resolution model", parameter="model_path", value=given.model_path)
    if info.flags["class_cond"] and source.labels is None and options.class_index is None:
        raise InputError("the model is class-conditional: give a class", parameter="class_index")

    def sample(model, diffusion, ref, labels=None, **more):
        return super_resolution(
            model, diffusion, ref, labels=labels if info.flags["class_cond"] else None, large_size=target.image_size,
            use_ddim=options.use_ddim, clip_denoised=options.clip_denoised, **more,
        )  # fmt: skip

    job = Job(output, peers, target.device, source)
    settings |= {**given.settings([options, output]), "method": "super_resolution"}
    status = sampling.execute(job, sample, target, target.diffusion.num_timesteps, settings, sampling.IMAGES)
    if options.npz and status == 0 and peers.rank == 0:
        write_npz(job, target.image_size, None)
    return status


def create_parser() -> Parser:
    usage = "--model_path FILE --base_samples PATH [flags]"
    parser = Parser(__doc__, usage=usage, spelling={"image_size": "large_size"})
    parser.add(EnlargeOptions, title="super-resolution", without=["base_samples"])
    parser.add(ModelFlags, title="super-resolution", only=[sampling.STEPS])
    first = ("model_path", "base_samples", "save_dir")
    parser.add(NetworkOptions, EnlargeOptions, OutputOptions, title="input and output", only=first)
    parser.add(OutputOptions, title="input and output", defaults={"batch_size": 16})
    add_network(parser)
    return parser


if __name__ == "__main__":
    command.run(enlarge, create_parser())
