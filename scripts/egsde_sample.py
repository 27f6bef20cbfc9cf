"""Translate a folder of images into the domain of a diffusion model with EGSDE."""

import math
import os
from functools import partial

import common
from guided_diffusion import baselines
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import is_url
from guided_diffusion.script_util import create_diffusion


def create_parser():
    parser = common.Parser(
        """\
        Translate every image under --base_samples into the domain of --model_path (EGSDE, NeurIPS 2022): noise it by
        --t steps, then denoise it under two energies. Without --timestep_respacing, all steps that the model was
        trained with count; --ls and --li are made for these.

        example: python scripts/egsde_sample.py --model_path models/afhq_dog_4m.pt --dsepath models/cat2dog_dse.pt \\
                     --base_samples data/afhq/val/cat --t 500 --ls 500 --li 2 --save_dir output"""
    )
    common.add_model_flags(parser)
    common.add_diffusion_flags(parser)
    parser.set_defaults(clip_denoised=None)
    method = parser.add_argument_group("method", "Predicted images are not clipped, learned variances are not used.")
    method.add_argument(
        "--t", type=common.positive, default=500, help="steps from the noised reference to the image (default 500)"
    )
    method.add_argument("--ls", type=weight, default=500.0, help="weight of realism, 0 for none (default 500)")
    method.add_argument("--li", type=weight, default=2.0, help="weight of faithfulness, 0 for none (default 2)")
    method.add_argument(
        "--down_N", type=common.positive, default=32, help="faithfulness is to 1/N of the resolution (default 32)"
    )
    method.add_argument("--dsepath", help="checkpoint of the domain-specific extractor, which the realism energy needs")
    common.add_io_flags(parser)
    return parser


def weight(text):
    """A finite number, for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def check_method(args, image_size, steps):
    """Raise UserError for a flag that does not suit; image_size or steps is None as long as it is not known."""
    if steps is not None:
        baselines.check_start(args.t, steps)
    if image_size is not None and args.li and image_size % args.down_N:
        raise UserError(f"--down_N is {args.down_N}; it must divide the image size {image_size}")
    if args.ls and not args.dsepath:
        raise UserError(f"--ls {args.ls:g} needs --dsepath; --ls 0 goes without the realism energy")
    if args.ls and not is_url(args.dsepath) and not os.path.exists(args.dsepath):
        raise UserError(f"--dsepath {args.dsepath} does not exist, and --ls {args.ls:g} needs it")


def translate(args, peers):
    common.say_without_effect(args, ("clip_denoised",))
    # What the flags alone tell to be wrong is said before anything is loaded.
    common.precision_of(args)
    check_method(args, args.image_size, common.steps_of(args))
    device = common.pick_device(args.device, peers)
    job = common.create_job(args, peers, device)

    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**info.flags)
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    check_method(args, size, steps)
    encoder = common.load_encoder("dsepath", args.dsepath, size, device) if args.ls else None
    common.log.info(
        "%s UNet, %d px, %d of %d steps on %s; EGSDE, ls %g, li %g",
        *(info.model_type, size, args.t, steps, device, args.ls, args.li),
    )
    unused = ["clip_denoised", *(["dsepath"] if not args.ls else []), *(["down_N"] if not args.li else [])]
    files = {"model_path": args.model_path, **({"dsepath": args.dsepath} if args.ls else {})}
    found = {**info.flags, **dict.fromkeys(unused), "method": "egsde"}
    settings = common.settings_of(args, peers, files, **found)
    sampler = partial(
        baselines.egsde,
        start=args.t,
        ls=args.ls,
        li=args.li,
        encoder=encoder,
        down_n=args.down_N,
        variance="fixed_small" if args.sigma_small else "fixed_large",
    )
    return common.run_method(job, size, settings, sampler, model, diffusion, args.t)


if __name__ == "__main__":
    common.main(translate, create_parser())
