"""Translate a folder of images into the domain of a diffusion model with SDEdit."""

from functools import partial

import common
from guided_diffusion import baselines
from guided_diffusion.script_util import create_diffusion


def create_parser():
    parser = common.Parser(
        """\
        Translate every image under --base_samples into the domain of --model_path (SDEdit, ICLR 2022): noise it by --t
        steps, then denoise it. Without --timestep_respacing, all steps that the model was trained with count.

        example: python scripts/sdedit_sample.py --model_path models/fluent3d_64.safetensors --base_samples ref_imgs \\
                     --t 500 --save_dir output"""
    )
    common.add_model_flags(parser)
    common.add_diffusion_flags(parser)
    parser.set_defaults(clip_denoised=None)
    method = parser.add_argument_group("method", "Predicted images are not clipped, learned variances are not used.")
    method.add_argument(
        "--t", type=common.positive, default=500, help="steps from the noised reference to the image (default 500)"
    )
    common.add_io_flags(parser)
    return parser


def translate(args, peers):
    common.say_without_effect(args, ("clip_denoised",))
    # What the flags alone tell to be wrong is said before anything is loaded.
    common.precision_of(args)
    if common.steps_of(args) is not None:
        baselines.check_start(args.t, common.steps_of(args))
    device = common.pick_device(args.device, peers)
    job = common.create_job(args, peers, device)

    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**info.flags)
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    baselines.check_start(args.t, steps)
    common.log.info(
        "%s UNet, %d px, %d of %d steps on %s; SDEdit", info.model_type, size, args.t, steps, device
    )
    found = {**info.flags, "clip_denoised": None, "method": "sdedit"}
    settings = common.settings_of(args, peers, {"model_path": args.model_path}, **found)
    variance = "fixed_small" if args.sigma_small else "fixed_large"
    sampler = partial(baselines.sdedit, start=args.t, variance=variance)
    return common.run_method(job, size, settings, sampler, model, diffusion, args.t)


if __name__ == "__main__":
    common.main(translate, create_parser())
