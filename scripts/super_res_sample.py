"""Enlarge a folder of small images, or the .npz file of another sampling command, with a super-resolution model.

Outputs keep their names; an output depends on the flags, --seed and its image's relative path alone.

example: python scripts/super_res_sample.py --model_path 64_256_upsampler.pt --base_samples samples_16x64x64x3.npz \\
             --timestep_respacing 250 --save_dir output
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

import torch

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.generate import add_network, load_network, make, write_npz
from guided_diffusion.dist_util import Peers
from guided_diffusion.errors import InputError
from guided_diffusion.generation import EnlargeOptions, super_resolution
from guided_diffusion.run.job import Job, OutputOptions
from guided_diffusion.run.sources import SmallImages
from guided_diffusion.script_util import create_diffusion


def enlarge(given: Given, peers: Peers) -> int:
    options, output = given.options(EnlargeOptions), given.options(OutputOptions)
    source = SmallImages(options.base_samples, options.small_size, options.num_samples)
    model, info, device, settings = load_network(given, peers.local_rank)
    if not info.flags.get("super_res"):
        raise InputError("it is no super-resolution model", parameter="model_path", value=given.model_path)
    if info.flags["class_cond"] and source.labels is None and options.class_index is None:
        raise InputError("the model is class-conditional: give a class", parameter="class_index")
    diffusion = create_diffusion(**{**info.flags, "sigma_small": given.sigma_small})
    large = info.flags["image_size"]

    def sample(ref, noise, callback):
        labels = None
        if info.flags["class_cond"]:
            names = [name.split("/", 1)[1].rsplit("#", 1)[0] for name in noise.names]  # of "SEED/NAME#SAMPLE"
            known = source.labels or {}
            chosen = [known[name] if options.class_index is None else options.class_index for name in names]
            labels = torch.tensor(chosen, device=device)
        return super_resolution(model, diffusion, ref, large_size=large, labels=labels, use_ddim=options.use_ddim,
                                clip_denoised=options.clip_denoised, noise=noise, callback=callback)  # fmt: skip

    job = Job(output, peers, device, source)
    settings |= {**given.settings([options, output]), "method": "super_resolution"}
    status = make(job, large, settings, sample, diffusion.num_timesteps, peers.rank)
    if options.npz and status == 0 and peers.rank == 0:
        write_npz(job, None)
    return status


def create_parser() -> Parser:
    usage = "--model_path FILE --base_samples PATH [flags]"
    parser = Parser(__doc__, usage=usage, spelling={"image_size": "large_size"})
    parser.add(EnlargeOptions, title="super-resolution")
    parser.add(OutputOptions, title="output and run", defaults={"batch_size": 16})
    add_network(parser)
    return parser


if __name__ == "__main__":
    command.run(enlarge, create_parser())
