"""Translate a folder of images into the domain of a diffusion model with ILVR."""

from functools import partial

import common
from guided_diffusion import baselines
from guided_diffusion.errors import UserError
from guided_diffusion.script_util import create_diffusion


def create_parser():
    parser = common.Parser(
        """\
        Translate every image under --base_samples into the domain of --model_path (ILVR, ICCV 2021): the result keeps
        the reference's low frequencies.

        example: python scripts/ilvr_sample.py --model_path models/fluent3d_64.safetensors --base_samples ref_imgs \\
                     --timestep_respacing 100 --down_N 8 --range_t 20 --save_dir output"""
    )
    common.add_model_flags(parser)
    common.add_diffusion_flags(parser)
    method = parser.add_argument_group("method")
    method.add_argument(
        "--down_N", type=common.positive, default=32, help="keep what an image of 1/N of the size shows (default 32)"
    )
    method.add_argument(
        "--range_t", type=common.natural, default=20, help="guidance ends at this step of the schedule (default 20)"
    )
    method.add_argument("--use_ddim", metavar="BOOL", help="a flag of the release that has no effect")
    common.add_io_flags(parser)
    return parser


def check_method(args, image_size, steps):
    """Raise UserError for a flag that does not suit; image_size or steps is None as long as it is not known."""
    if image_size is not None and image_size % args.down_N:
        raise UserError(f"--down_N is {args.down_N}; it must divide the image size {image_size}")
    if steps is not None and not args.range_t < steps:
        raise UserError(f"--range_t is {args.range_t}; a schedule of {steps} steps takes 0 to {steps - 1}")


def translate(args, peers):
    common.say_without_effect(args, ("use_ddim",))
    # What the flags alone tell to be wrong is said before anything is loaded.
    common.precision_of(args)
    check_method(args, args.image_size, common.steps_of(args))
    device = common.pick_device(args.device, peers)
    job = common.create_job(args, peers, device)

    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**{**info.flags, "sigma_small": args.sigma_small})
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    check_method(args, size, steps)
    common.log.info("%s UNet, %d px, %d steps on %s; ILVR", info.model_type, size, steps, device)
    found = {**info.flags, "use_ddim": None, "method": "ilvr"}
    settings = common.settings_of(args, peers, {"model_path": args.model_path}, **found)
    sampler = partial(baselines.ilvr, down_n=args.down_N, range_t=args.range_t, clip_denoised=args.clip_denoised)
    return common.run_method(job, size, settings, sampler, model, diffusion, steps)


if __name__ == "__main__":
    common.main(translate, create_parser())
