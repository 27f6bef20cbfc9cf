"""Translate a folder of images into the domain of a diffusion model with SDDM."""

import os
from functools import partial

import common
import torch
from guided_diffusion import energy, sddm
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import is_url
from guided_diffusion.manifold import check_blocks
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.solvers import SOLVERS

ENERGIES = ("vgg", "dct", "dse", "low_pass", "classifier")
WITHOUT_EFFECT = ("use_ddim", "classifier_scale", "affine", "losstype", "init_with_blockadain", "diffusionmodel")
# Flags of single energies: they count where the energy takes part.
FLAGS_OF = {"vgg": ("vggdepth",), "low_pass": ("down_N",), "classifier": ("target_class",)}
FILES_OF = {"vgg": "vgg_path", "dse": "dsepath", "classifier": "classifier_path"}


def create_parser():
    parser = common.Parser(
        """\
        Translate every image under --base_samples into the domain of --model_path (SDDM, ICML 2023).

        example: python scripts/ae_sample.py --model_path models/fluent3d_64.safetensors --base_samples ref_imgs \\
                     --timestep_respacing 100 --range_t 20 --area 32 --save_dir output"""
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
        "--moo",
        choices=sddm.CHOICES["moo"],
        default="min_norm",
        help="ablation: merge directions by their minimum-norm point, or add them up (default min_norm)",
    )
    method.add_argument(
        "--manifold",
        choices=sddm.CHOICES["manifold"],
        default="badain",
        help="ablation: images with the reference's block statistics, or low frequencies (--down_N) (default badain)",
    )
    method.add_argument(
        "--sampler",
        choices=tuple(SOLVERS),
        default="ancestral",
        help="how steps are taken; ddim and dpmpp_2m (second order below T0, ddim above) need fewer (default ancestral)",
    )
    method.add_argument(
        "--eta", type=float, default=0.0, help="noise of ddim's steps, 0 for none, 1 for as much as ancestral (default 0)"
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
    energies.add_argument(
        "--down_N",
        type=common.positive,
        default=32,
        help="low_pass, energy or manifold, keeps 1/N of the resolution (default 32)",
    )
    energies.add_argument("--classifier_path", help="checkpoint of the noisy-image classifier, for classifier")
    energies.add_argument("--target_class", type=int, help="class to move to, for classifier")
    energies.add_argument("--classifier_scale", help="has no effect: directions are scaled to the score's")
    for name in ("use_ddim", "affine", "losstype", "diffusionmodel"):
        energies.add_argument(f"--{name}", help="a flag of the release that has no effect")
    common.add_io_flags(parser)
    return parser


def chosen_energies(args):
    """The names that --energy lists, or the default for the files that are there."""
    if args.energy is None:
        if os.path.exists(args.vgg_path):
            return ["vgg"]
        common.log.info("energy: dct (there is no %s for vgg)", args.vgg_path)
        return ["dct"]
    names = [name for name in args.energy.split(",") if name not in ("", "none")]
    for name in names:
        if name not in ENERGIES:
            raise UserError(f"--energy {args.energy}: {name!r} is none of {', '.join(ENERGIES)}, none")
        path = getattr(args, FILES_OF[name]) if name in FILES_OF else None
        if name in FILES_OF and not path:
            raise UserError(f"--energy {name} needs --{FILES_OF[name]}")
        if path and not is_url(path) and not os.path.exists(path):
            raise UserError(f"--{FILES_OF[name]} {path} does not exist, and --energy {name} needs it")
    if len(set(names)) < len(names):
        raise UserError(f"--energy {args.energy} names an energy twice")
    if "classifier" in names and args.target_class is None:
        raise UserError("--energy classifier needs --target_class")
    return names


def check_method(args, image_size, steps):
    """Raise UserError where --area or --range_t does not suit; image_size or steps is None as long as it is not known."""
    if image_size is not None:
        try:
            check_blocks((image_size, image_size), args.area)
        except ValueError as error:
            raise UserError(f"--area {args.area} does not suit --image_size {image_size}: {error}") from None
    if image_size is not None and args.manifold == "low_pass" and image_size % args.down_N:
        raise UserError(f"--down_N is {args.down_N}; it must divide the image size {image_size}")
    if steps is not None and not 0 <= args.range_t < steps:
        raise UserError(f"--range_t is {args.range_t}; a schedule of {steps} steps takes 0 to {steps - 1}")


def create_energy(name, args, image_size, device):
    """The energy of that name, its networks loaded."""
    if name == "vgg":
        return energy.vgg(args.vgg_path, args.area, args.vggdepth)
    if name == "dct":
        return energy.dct(args.area)
    if name == "low_pass":
        return energy.low_pass(args.down_N)
    path = getattr(args, FILES_OF[name])
    encoder = common.load_encoder(FILES_OF[name], path, image_size, device)
    if name == "dse":
        return energy.dse(encoder)
    if not 0 <= args.target_class < encoder.out_channels:
        raise UserError(f"--target_class {args.target_class}: {path} has classes 0 to {encoder.out_channels - 1}")
    return energy.classifier(encoder, args.target_class)


def translate(args, peers):
    common.say_without_effect(args, WITHOUT_EFFECT)
    names = chosen_energies(args)
    # What the flags alone tell to be wrong is said before anything is loaded.
    common.precision_of(args)
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta is {args.eta:g}; it can be 0 to 1")
    if args.eta and args.sampler == "ancestral":
        raise UserError(f"--eta {args.eta:g} is for --sampler ddim or dpmpp_2m")
    check_method(args, args.image_size, common.steps_of(args))
    device = common.pick_device(args.device, peers)
    job = common.create_job(args, peers, device)

    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**{**info.flags, "sigma_small": args.sigma_small})
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    check_method(args, size, steps)
    energies = [create_energy(name, args, size, device) for name in names]
    for each in energies:
        # Finds out whether the energy can be had at this size before the work begins.
        each.prepare(torch.zeros(1, 3, size, size, device=device))
    common.log.info(
        "%s UNet, %d px, %d steps on %s; SDDM %s, energy %s",
        *(info.model_type, size, steps, device, args.variant, "+".join(names) or "none"),
    )
    unused = [*WITHOUT_EFFECT, *(["eta"] if args.sampler == "ancestral" else []), *FILES_OF.values()]
    used = {*names, args.manifold}
    unused += [flag for name, flags in FLAGS_OF.items() if name not in used for flag in flags]
    files = {"model_path": args.model_path, **{FILES_OF[n]: getattr(args, FILES_OF[n]) for n in names if n in FILES_OF}}
    found = {**info.flags, **dict.fromkeys(unused), "method": "sddm", "energy": names}
    settings = common.settings_of(args, peers, files, **found)
    sampler = partial(
        sddm.sample,
        blocks=args.area,
        range_t=args.range_t,
        energies=energies,
        variant=args.variant,
        detail_merge=args.detail_merge,
        moo=args.moo,
        manifold=args.manifold,
        down_n=args.down_N,
        clip_denoised=args.clip_denoised,
        sampler=args.sampler,
        eta=args.eta,
    )
    return common.run_method(job, size, settings, sampler, model, diffusion, steps, guided=True)


if __name__ == "__main__":
    common.main(translate, create_parser())
