"""Translate a folder of images into the domain of a diffusion model with SDDM."""

import os
from functools import partial

import common
from guided_diffusion.errors import UserError

ENERGIES = ("vgg", "dct", "dse", "low_pass", "classifier")
WITHOUT_EFFECT = ("use_ddim", "classifier_scale", "affine", "losstype", "init_with_blockadain", "diffusionmodel")


def create_parser():
    parser = common.Parser(
        """\
        Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023).

        example: python scripts/ae_sample.py --model_path models/fluent3d_64.safetensors --base_samples ref_imgs \\
                     --timestep_respacing 100 --range_t 30 --area 16 --save_dir output"""
    )
    common.add_model_flags(parser)
    common.add_diffusion_flags(parser)
    method = parser.add_argument_group("method", "SDDM: guided above step T0, the plain diffusion model below it.")
    method.add_argument(
        "--range_t", type=int, default=0, help="T0: guidance ends at this step of the respaced schedule (default 0)"
    )
    method.add_argument("--area", type=common.positive, default=16, help="cut the image into area x area blocks (default 16)")
    method.add_argument(
        "--variant",
        choices=("manifold", "released"),
        default="manifold",
        help="the method as described, or the arithmetic of the public release (default manifold)",
    )
    method.add_argument(
        "--detail_merge",
        type=common.str2bool,
        default=False,
        metavar="BOOL",
        help="merge directions per block instead of per channel (default False)",
    )
    method.add_argument(
        "--init_with_blockadain",
        metavar="BOOL",
        help="has no effect: --variant manifold starts on the manifold, released does not",
    )
    energies = parser.add_argument_group("energies", "What the reference asks for besides its block statistics.")
    energies.add_argument(
        "--energy",
        help=f"any of {', '.join(ENERGIES)}, or several as dse,low_pass, or none "
        "(default vgg where --vgg_path exists, else dct)",
    )
    energies.add_argument(
        "--vgg_path", default=os.path.join(common.ROOT, "models", "vgg_normalised.pth"), help="AdaIN's VGG weights"
    )
    energies.add_argument("--vggdepth", type=int, default=1, help="VGG feature relu{depth}_1 (default 1)")
    energies.add_argument("--dsepath", help="checkpoint of the domain-specific extractor, for dse")
    energies.add_argument("--down_N", type=common.positive, default=32, help="low_pass keeps 1/N of the resolution (default 32)")
    energies.add_argument("--classifier_path", help="checkpoint of the noisy-image classifier, for classifier")
    energies.add_argument("--target_class", type=int, help="class to move to, for classifier")
    energies.add_argument("--classifier_scale", help="has no effect: directions are scaled to the score's")
    for name in ("use_ddim", "affine", "losstype", "diffusionmodel"):
        energies.add_argument(f"--{name}", help="a flag of the release that has no effect")
    common.add_io_flags(parser)
    return parser


def chosen_energies(args, log):
    """The names that --energy lists, or the default for the files that are there."""
    if args.energy is None:
        if os.path.exists(args.vgg_path):
            return ["vgg"]
        log.info("energy: dct (there is no %s for vgg)", args.vgg_path)
        return ["dct"]
    names = [name for name in args.energy.split(",") if name not in ("", "none")]
    for name in names:
        if name not in ENERGIES:
            raise UserError(f"--energy {args.energy}: {name!r} is none of {', '.join(ENERGIES)}, none")
    if len(set(names)) < len(names):
        raise UserError(f"--energy {args.energy} names an energy twice")
    needs = {"vgg": "vgg_path", "dse": "dsepath", "classifier": "classifier_path"}
    for name in names:
        if name in needs and not getattr(args, needs[name]):
            raise UserError(f"--energy {name} needs --{needs[name]}")
    if "classifier" in names and args.target_class is None:
        raise UserError("--energy classifier needs --target_class")
    return names


def create_energy(name, args, image_size, device):
    """The energy of that name, its networks loaded."""
    from guided_diffusion import energy
    from guided_diffusion.checkpoint import load_model

    if name == "vgg":
        return energy.vgg(args.vgg_path, args.area, args.vggdepth)
    if name == "dct":
        return energy.dct(args.area)
    if name == "low_pass":
        return energy.low_pass(args.down_N)
    flag, path = ("dsepath", args.dsepath) if name == "dse" else ("classifier_path", args.classifier_path)
    encoder, info = load_model(path, device=device)
    if info.model_type != "ENCODER":
        raise UserError(f"--{flag} {path} is a diffusion model, not a classifier or extractor")
    if info.flags["image_size"] != image_size:
        raise UserError(f"--{flag} {path} is for {info.flags['image_size']} pixels, the model makes {image_size}")
    if name == "dse":
        return energy.dse(encoder)
    if not 0 <= args.target_class < encoder.out_channels:
        raise UserError(f"--target_class {args.target_class}: {path} has classes 0 to {encoder.out_channels - 1}")
    return energy.classifier(encoder, args.target_class)


def translate(args, me):
    import logging

    from guided_diffusion import sddm
    from guided_diffusion.manifold import check_blocks
    from guided_diffusion.script_util import create_diffusion

    log = logging.getLogger("sddm")
    for name in WITHOUT_EFFECT:
        if getattr(args, name) is not None:
            log.info("--%s %s has no effect", name, getattr(args, name))
            setattr(args, name, None)
    names = chosen_energies(args, log)
    device = common.pick_device(args.device, me)
    job = common.create_job(args, me, device)
    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**{**info.flags, "sigma_small": args.sigma_small})
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    try:
        check_blocks((size, size), args.area)
    except ValueError as error:
        raise UserError(f"--area {args.area} does not suit --image_size {size}: {error}") from None
    if not 0 <= args.range_t < steps:
        raise UserError(f"--range_t is {args.range_t}; a schedule of {steps} steps takes 0 to {steps - 1}")
    energies = [create_energy(name, args, size, device) for name in names]
    log.info(
        "%s UNet, %d px, %d steps on %s; SDDM %s, energy %s",
        *(info.model_type, size, steps, device, args.variant, "+".join(names) or "none"),
    )
    paths = {"vgg": args.vgg_path, "dse": args.dsepath, "classifier": args.classifier_path}
    files = [args.model_path] + [paths[name] for name in names if name in paths]
    job.prepare(size, common.settings_of(args, files, method="sddm", energy=names, **info.flags))
    sampler = partial(
        sddm.sample,
        model,
        diffusion,
        blocks=args.area,
        range_t=args.range_t,
        energies=energies,
        variant=args.variant,
        detail_merge=args.detail_merge,
        clip_denoised=args.clip_denoised,
    )
    return common.run_sampling(job, sampler, steps)


if __name__ == "__main__":
    common.main(translate, create_parser())
