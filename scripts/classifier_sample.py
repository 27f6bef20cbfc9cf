"""Make images of random or one chosen class, guided by a classifier of noisy images, as guided-diffusion does.

000000.png, 000001.png, ... in --save_dir; an image depends on the flags, --seed and its number alone.

example:
  python scripts/classifier_sample.py --model_path 256x256_diffusion.pt \\
      --classifier_path 256x256_classifier.pt --num_samples 64 \\
      --timestep_respacing 250
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

from functools import partial

import torch

from guided_diffusion.checkpoint import ModelFlags, load_model
from guided_diffusion.cli import sampling
from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.cli.generate import NetworkOptions, add_network, load_network, write_npz
from guided_diffusion.dist_util import Peers
from guided_diffusion.errors import InputError
from guided_diffusion.generation import ClassifierFlags, GuidanceOptions, classifier_guided, draw_labels
from guided_diffusion.run.job import Job, Numbers, OutputOptions
from guided_diffusion.run.noise import ImageNoise, image_key


def generate(given: Given, peers: Peers) -> int:
    guidance, output = given.options(GuidanceOptions), given.options(OutputOptions)
    network = given.options(ClassifierFlags)
    target, settings = load_network(given, peers.local_rank)
    classifier, found = load_model(guidance.classifier, device=target.device, **network.given())
    classes = found.flags.get("num_class", 0)
    has = target.info.flags.get("num_classes", 1000) if target.info.flags["class_cond"] else classes
    needed = classes if guidance.class_index is None else guidance.class_index + 1
    if found.model_type != "ENCODER" or not 0 < needed <= min(classes, has):
        raise InputError(f"it must be a classifier that has the classes asked for; it has {classes}, the model {has}",
                         parameter="classifier", value=guidance.classifier)  # fmt: skip
    options = {"scale": guidance.classifier_scale, "use_ddim": guidance.use_ddim}
    run = partial(classifier_guided, classifier=classifier, class_cond=target.info.flags["class_cond"],
                  clip_denoised=guidance.clip_denoised, **options)  # fmt: skip

    def labels(noise: ImageNoise, count: int) -> torch.Tensor:
        drawn = draw_labels(noise, count, classes, target.device)
        return drawn if guidance.class_index is None else torch.full_like(drawn, guidance.class_index)

    def sample(model, diffusion, ref, noise, callback):
        return run(model, diffusion, ref, labels=labels(noise, len(ref)), noise=noise, callback=callback)

    job = Job(output, peers, target.device, Numbers(guidance.num_samples))
    settings |= {**given.settings([guidance, network, output]), "method": "classifier"}
    status = sampling.execute(job, sample, target, target.diffusion.num_timesteps, settings, sampling.IMAGES)
    if guidance.npz and status == 0 and peers.rank == 0:
        keys = [image_key(output.seed, item.reference.name, item.sample) for item in job.items.values()]
        write_npz(job, target.image_size, labels(ImageNoise(keys, torch.device("cpu")), len(keys)).tolist())
    return status


def create_parser() -> Parser:
    parser = Parser(__doc__, usage="--model_path FILE --classifier_path FILE [flags]")
    parser.add(GuidanceOptions, title="guidance", without=["classifier"])
    parser.add(ModelFlags, title="guidance", only=[sampling.STEPS])
    first = ("model_path", "classifier", "save_dir")
    parser.add(NetworkOptions, GuidanceOptions, OutputOptions, title="input and output", only=first)
    parser.add(OutputOptions, title="input and output", defaults={"batch_size": 16})
    parser.add(ClassifierFlags, title="classifier", description="read from its checkpoint where they are not given")
    add_network(parser)
    return parser


if __name__ == "__main__":
    command.run(generate, create_parser())
