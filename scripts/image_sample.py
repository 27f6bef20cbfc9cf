"""Make images of a diffusion model's own, without references."""

import io
import math
import os
from functools import partial

import common
import numpy as np
from guided_diffusion import baselines, engine, outputs
from guided_diffusion.engine import Item, Job, Options, Summary
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import Reference, load_image
from guided_diffusion.script_util import create_diffusion


def create_parser():
    parser = common.Parser(
        """\
        Make --num_samples images of a diffusion model: 000000.png, 000001.png, ... in --save_dir. An image depends on
        the flags, --seed and its number alone.

        example: python scripts/image_sample.py --model_path models/fluent3d_64.safetensors --num_samples 64 \\
                     --timestep_respacing ddim50 --use_ddim True --save_dir output"""
    )
    parser.usage = "python scripts/%(prog)s --model_path FILE [flags]"
    common.add_model_flags(parser)
    common.add_diffusion_flags(parser)
    method = parser.add_argument_group("method")
    boolean = {"type": common.str2bool, "default": False, "metavar": "BOOL", "nargs": "?", "const": True}
    method.add_argument("--use_ddim", **boolean, help="DDIM instead of ancestral sampling")
    method.add_argument("--eta", type=float, default=0.0, help="noise of DDIM, 0 for none to 1 (default 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--num_samples", type=common.positive, default=16, help="images to make (default 16)")
    output.add_argument("--save_dir", default="output", help="folder for the images (default output)")
    output.add_argument("--npz", **boolean, help="also write all images as one array, as guided-diffusion does")
    output.add_argument("--save_trajectory", **boolean, help="also write every image's denoising to trajectory/")
    output.add_argument("--grid", type=common.natural, default=64, help="images shown in grid.png (default 64)")
    output.add_argument("--overwrite", **boolean, help="start anew where --save_dir holds another run")
    run = parser.add_argument_group("run", "How to run; none of these changes what comes out by more than rounding.")
    run.add_argument("--batch_size", type=common.batch_size, default=4, help="images at once, or auto (default 4)")
    run.add_argument("--seed", type=int, default=0, help="with an image's number, determines its noise (default 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default auto)")
    return parser


class Generation(Job):
    """The engine's job with numbers in place of references: nothing is listed, read or shown beside its source."""

    def __init__(self, options, peers):
        self.options, self.peers, self.summary, self._limit = options, peers, Summary(), None
        engine._check_folders(options)
        names = [f"{number:06d}.png" for number in range(options.num_samples)]
        self.references = [Reference(name, name) for name in names]
        items = [Item(reference, 0) for reference in self.references]
        self.items = {item.key: item for item in items}

    def _read(self, batch):
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        return [(self.items[key], blank) for key in batch]

    def _write_grid(self):
        made = [item for item in self.items.values() if self._exists(item)][: self.options.grid]
        if made:
            rows = [[load_image(self.path(item), self.image_size)] for item in made]
            sheet = outputs.contact_sheet(rows, min(256, self.image_size), math.ceil(len(rows) ** 0.5))
            outputs.write_png(os.path.join(self.options.save_dir, "grid.png"), sheet)


def write_npz(job, class_index):
    """All images as arr_0, uint8 [N, H, W, 3], and the class as arr_1 [N], where there is one."""
    images = np.stack([load_image(job.path(item), job.image_size) for item in job.items.values()])
    labels = [] if class_index is None else [np.full(len(images), class_index)]
    buffer = io.BytesIO()
    np.savez(buffer, images, *labels)
    path = os.path.join(job.options.save_dir, f"samples_{'x'.join(map(str, images.shape))}.npz")
    outputs.write_atomically(path, lambda file: file.write(buffer.getbuffer()))
    print(f"all images are in {path}")


def generate(args, peers):
    common.say_without_effect(args, ())
    # What the flags alone tell to be wrong is said before anything is loaded.
    common.precision_of(args)
    common.steps_of(args)
    if not 0 <= args.eta <= 1:
        raise UserError(f"--eta is {args.eta:g}; it can be 0 to 1")
    if args.eta and not args.use_ddim:
        raise UserError(f"--eta {args.eta:g} is for --use_ddim True")
    device = common.pick_device(args.device, peers)
    names = ("save_dir", "batch_size", "seed", "num_samples", "overwrite", "save_trajectory", "grid")
    options = {name: getattr(args, name) for name in names}
    job = Generation(Options(base_samples=os.devnull, device=device, **options), peers)

    model, info = common.load_network(args, device)
    diffusion = create_diffusion(**{**info.flags, "sigma_small": args.sigma_small})
    size, steps = info.flags["image_size"], diffusion.num_timesteps
    kind = f"DDIM, eta {args.eta:g}" if args.use_ddim else "ancestral sampling"
    common.log.info("%s UNet, %d px, %d steps on %s; %s", info.model_type, size, steps, device, kind)
    settings = common.settings_of(
        args, peers, {"model_path": args.model_path}, **{**info.flags, "npz": None, "method": "unconditional"}
    )
    sampler = partial(
        baselines.unconditional, use_ddim=args.use_ddim, eta=args.eta, clip_denoised=args.clip_denoised
    )
    made = ("images", "an overview of them")
    status = common.run_method(job, size, settings, sampler, model, diffusion, steps, made=made)
    if args.npz and status == 0 and peers.rank == 0:
        write_npz(job, args.class_index)
    return status


if __name__ == "__main__":
    common.main(generate, create_parser())
