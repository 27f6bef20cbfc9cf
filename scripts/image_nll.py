"""The likelihood of images under a diffusion model: the variational bound in bits per dimension, with its terms.

Writes guided-diffusion's vb_terms.npz, mse_terms.npz and xstart_mse_terms.npz (means over images by step, from the last
to the first), bpd.csv with a row per image, and every image's terms to terms/.

example:
  python scripts/image_nll.py --model_path my_model.pt --data_dir data/test
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.generate import NetworkOptions, add_network, load_network
from guided_diffusion.cli.progress import image_bar
from guided_diffusion.dist_util import Peers
from guided_diffusion.errors import InputError, display_name
from guided_diffusion.run.likelihood import Likelihood, LikelihoodOptions


def evaluate(given: Given, peers: Peers) -> int:
    options = given.options(LikelihoodOptions)
    images = Likelihood(options, peers)
    target, settings = load_network(given, peers.local_rank)
    if target.info.flags.get("super_res"):
        raise InputError("it is a super-resolution model", parameter="model_path", value=given.model_path)
    images.prepare({**settings, **given.settings([options]), "method": "likelihood"})
    with image_bar(len(images.missing), peers.rank) as bar:
        mean = images.run(
            target.model, target.diffusion, target.image_size, target.device,
            labels=images.labels() if target.info.flags["class_cond"] else None,
            progress=lambda done: bar.update(done - bar.n),
        )  # fmt: skip
    for name, reason in images.failed.items() if peers.rank == 0 else ():
        command.say(f"failed: {display_name(name)}: {reason}")
    if mean is not None:
        done = len(images.references) - len(images.failed)
        command.say(f"{done} images: {mean:.4f} bits per dimension; the terms are in {display_name(options.save_dir)}")
    return command.FAILED if images.failed else command.DONE


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path FILE --data_dir PATH [flags]")
    first = ("model_path", "data_dir", "save_dir")
    parser.add(NetworkOptions, LikelihoodOptions, title="input and output", only=first)
    parser.add(LikelihoodOptions, title="input and output")
    add_network(parser)
    return parser


if __name__ == "__main__":
    command.run(evaluate, create_parser())
