"""Train a diffusion model on a folder of images, or go on from any checkpoint that the sampling scripts read."""

import dataclasses
import json
import logging
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

import _training as training
import torch

from guided_diffusion import train_data, train_files, train_util
from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import UserError
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_diffusion, create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_losses import diffusion_loss, loss_weights

log = logging.getLogger("image_train")

EPILOG = """examples:
  python scripts/image_train.py --data_dir data/emoji/fluent3d/train --save_dir output/fluent3d --image_size 64 \\
      --num_channels 32 --channel_mult 1,2,4,4 --batch_size 16 --lr 5e-4 --ema_rate 0.999 --lr_anneal_steps 15000 \\
      --resume auto
  python scripts/ae_sample.py --model_path output/fluent3d/model.safetensors --base_samples ref_imgs
  torchrun --nproc_per_node 8 scripts/image_train.py --precision bf16 --p2_gamma 1 ...
"""
# Flags of a use of the model, which an exported file does not state.
OF_USE = ("use_checkpoint", "timestep_respacing", "use_kl", "rescale_learned_sigmas")


def defaults():
    """The UNet's flags; use_fp16 is the loop's, since weights are kept in float32."""
    return {name: value for name, value in model_and_diffusion_defaults().items() if name != "use_fp16"}


def parse_flags():
    parser = training.make_parser(__doc__, EPILOG, without="eval_interval")
    loss = parser.add_argument_group("loss")
    training.add_flag(
        loss, "p2_gamma", 0.0, "P2 weighting, 1 / (p2_k + SNR)^p2_gamma; 0: none, published models have 1"
    )
    training.add_flag(loss, "p2_k", 1.0, "k of the P2 weighting")
    training.add_flag(loss, "min_snr_gamma", 0.0, "min-SNR weighting; 0: none, its paper has 5")
    grid = parser.add_argument_group("sample grids")
    training.add_flag(grid, "num_samples", 16, "images in a grid")
    training.add_flag(
        grid, "sample_respacing", "ddim25", "steps as --timestep_respacing writes them; ddimN samples with DDIM"
    )
    training.add_model_flags(parser, "model and diffusion", defaults())
    return parser.parse_args()


def grid_sampler(args, config, flags, num_classes):
    """The function that draws the images of a sample grid with a given model."""
    try:
        diffusion = create_diffusion(**{**flags, "timestep_respacing": args.sample_respacing})
    except UserError as error:
        raise UserError(str(error).replace("--timestep_respacing", "--sample_respacing")) from error

    def sample(model):
        return train_util.draw_samples(
            model,
            diffusion,
            args.num_samples,
            flags["image_size"],
            use_ddim=args.sample_respacing.startswith("ddim"),
            seed=config.seed,
            num_classes=num_classes or None,
        )

    return sample


def train(args, ranks):
    if args.data_dir is None:
        raise UserError("--data_dir is needed: the folder of training images")
    if args.num_samples < 1:
        raise UserError(f"--num_samples is {args.num_samples}; it must be at least 1")
    config = training.loop_config(args)
    device = training.find_device(args.device, ranks)
    references = train_data.list_images(args.data_dir)

    start = train_util.resume_path(config)
    flags = training.model_flags(args, defaults(), start)
    labels, classes = None, []
    torch.manual_seed(config.seed)
    if start:
        model, info = load_model(start, dtype=torch.float32, **flags)
        kind, flags = info.model_type, {name: value for name, value in info.flags.items() if name != "use_fp16"}
        if kind == "ENCODER":
            raise UserError(f"--resume_checkpoint {start} is a classifier; scripts/classifier_train.py trains these")
    else:
        kind, flags = "ADM", {**defaults(), **flags}
    if flags["class_cond"]:
        labels, classes = train_data.class_labels(references)
        flags.setdefault("num_classes", len(classes))
        if len(classes) > flags["num_classes"]:
            raise UserError(
                f"--data_dir {args.data_dir} has {len(classes)} classes, the model of {start} {flags['num_classes']}"
            )
    if not start:
        model, _ = training.build(create_model_and_diffusion, **flags)
    images = train_data.TrainImages(
        references,
        flags["image_size"],
        labels=labels,
        random_flip=args.random_flip,
        seed=config.seed,
        cache=args.cache,
        num_workers=args.num_workers,
        resize=args.resize,
        background=args.background,
    )
    diffusion = training.build(create_diffusion, **flags)
    weights = loss_weights(diffusion, args.p2_gamma, args.p2_k, args.min_snr_gamma)
    sample = grid_sampler(args, config, flags, len(classes)) if config.sample_interval else None
    if ranks.rank == 0:
        parameters = sum(p.numel() for p in model.parameters())
        log.info("%d images, %.2f M parameters, %s, %s", len(images), parameters / 1e6, device, config.precision)
        train_files.write_run(config.save_dir, flags, {**vars(args), **dataclasses.asdict(config)})
    stated = {name: value for name, value in flags.items() if name not in OF_USE}
    with train_util.process_group(ranks, device):
        loop = train_util.TrainLoop(
            model,
            diffusion_loss(diffusion, weights),
            images,
            config,
            create_named_schedule_sampler(config.schedule_sampler, diffusion, config.sigma_mean, config.sigma_std),
            device=device,
            ranks=ranks,
            checkpoint=start,
            metadata={"model_type": kind, "flags": json.dumps(stated)},
            sample=sample,
            progress=sys.stderr.isatty(),
        )
        return loop.run()


if __name__ == "__main__":
    training.run(train, parse_flags)
