"""What the sampling scripts share: flags, set-up, progress, messages and exit statuses. The work is in the library."""

import argparse
import dataclasses
import logging
import os
import signal
import sys
import textwrap
import time
import warnings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from guided_diffusion.errors import UserError  # noqa: E402
from guided_diffusion.script_util import model_and_diffusion_defaults, str2bool  # noqa: E402

MODEL_HELP = {
    "image_size": "side of the images in pixels",
    "num_channels": "base width of the network",
    "num_res_blocks": "residual blocks per level",
    "num_heads": "attention heads, where --num_head_channels is -1",
    "num_heads_upsample": "the same for the upsampling half, -1 for equal",
    "num_head_channels": "width of an attention head",
    "attention_resolutions": "sides of the feature maps with attention, as 16 or 32,16,8",
    "channel_mult": "width of every level in multiples of --num_channels, as 1,2,4; empty for the usual ones",
    "dropout": "dropout; has no effect when sampling",
    "class_cond": "whether the model is class-conditional (give --class_index then)",
    "use_checkpoint": "activation checkpointing; has no effect when sampling",
    "use_scale_shift_norm": "scale and shift by the time embedding, instead of adding it",
    "resblock_updown": "resample inside residual blocks",
    "use_fp16": "compute in half precision; the release's name for --precision fp16",
    "use_new_attention_order": "order in which the file packs queries, keys and values",
}
DIFFUSION_HELP = {
    "learn_sigma": "whether the model predicts variances",
    "diffusion_steps": "steps that the model was trained with",
    "noise_schedule": "linear or cosine",
    "timestep_respacing": "steps to sample with, as 100, 10,10,5 or ddim25; empty for all",
    "use_kl": "the training loss; has no effect when sampling",
    "predict_xstart": "the model predicts x_0 instead of the noise",
    "rescale_timesteps": "the model was trained with timesteps scaled to 1000",
    "rescale_learned_sigmas": "the training loss; has no effect when sampling",
}
# Flags that say how to run, not what to make: they may change between a run and its restart.
# Paths are among them: the relative paths of references and the hashes of checkpoints count.
CIRCUMSTANCES = (
    "base_samples",
    "batch_size",
    "device",
    "grid",
    "num_samples",
    "overwrite",
    "save_dir",
    "strict",
    "model_path",
    "vgg_path",
    "dsepath",
    "classifier_path",
)


class Parser(argparse.ArgumentParser):
    """Errors are one line and exit status 2; flags cannot be abbreviated."""

    def __init__(self, description):
        super().__init__(
            description=textwrap.dedent(description),
            usage="python scripts/%(prog)s --model_path FILE --base_samples FOLDER [flags]",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def add_model_flags(parser):
    """Flags of the network: what is not given is read from the checkpoint."""
    group = parser.add_argument_group(
        "model", "The network. All but --model_path are read from the file; one that contradicts it is an error."
    )
    group.add_argument("--model_path", required=True, help="checkpoint of the target domain's diffusion model")
    defaults = model_and_diffusion_defaults()
    for name, text in MODEL_HELP.items():
        _add(group, name, defaults[name], text)
    group.add_argument("--class_index", type=int, help="class to make, for a class-conditional model")
    group.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="arithmetic of the network (default fp32)"
    )


def add_diffusion_flags(parser):
    """Flags of the diffusion process."""
    group = parser.add_argument_group("diffusion", "The noise process, as the model was trained with, and its respacing.")
    defaults = model_and_diffusion_defaults()
    for name, text in DIFFUSION_HELP.items():
        _add(group, name, defaults[name], text)
    group.add_argument(
        "--sigma_small",
        type=str2bool,
        default=True,
        metavar="BOOL",
        help="variance of a model that learned none: the posterior's, as the release; False for beta (default True)",
    )
    group.add_argument(
        "--clip_denoised", type=str2bool, default=True, metavar="BOOL", help="keep predicted images in range (default True)"
    )


def add_io_flags(parser):
    """Flags of input, output and the run."""
    group = parser.add_argument_group("input and output", "Where images come from and go, and how they are read.")
    group.add_argument("--base_samples", required=True, help="folder of references (searched recursively), or one image")
    group.add_argument("--save_dir", default="output", help="folder for the translations (default output)")
    group.add_argument("--num_samples", type=positive, help="translate only the first so many references")
    group.add_argument("--samples_per_image", type=positive, default=1, help="translations of every reference (default 1)")
    group.add_argument("--resize", choices=("crop", "pad", "stretch"), default="crop", help="non-square images (default crop)")
    group.add_argument("--background", default="white", help="colour behind transparent pixels (default white)")
    group.add_argument(
        "--save_trajectory", type=str2bool, default=False, metavar="BOOL", nargs="?", const=True,
        help="also write the denoising of every image as an animation to trajectory/",
    )
    group.add_argument("--grid", type=int, default=24, help="references shown in grid.png (default 24)")
    group.add_argument(
        "--overwrite", type=str2bool, default=False, metavar="BOOL", nargs="?", const=True,
        help="start anew where --save_dir holds another run",
    )
    group.add_argument(
        "--strict", type=str2bool, default=False, metavar="BOOL", nargs="?", const=True, help="stop at the first unreadable image"
    )
    run = parser.add_argument_group("run", "How to run; none of these changes what comes out by more than rounding.")
    run.add_argument("--batch_size", type=batch_size, default=4, help="images at once, or auto (default 4)")
    run.add_argument("--seed", type=int, default=0, help="with the reference's relative path, determines its noise (default 0)")
    run.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (default auto)")


def _add(group, name, default, text):
    """A flag of guided-diffusion without default: None tells that it was not given."""
    kind = str2bool if isinstance(default, bool) else type(default)
    metavar = "BOOL" if isinstance(default, bool) else None
    group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def batch_size(text):
    """A batch size or "auto", for argparse."""
    return text if text == "auto" else positive(text)


def pick_device(name, me):
    """The torch device that --device names; checked, so that a missing GPU is one line."""
    import torch

    from guided_diffusion.dist_util import default_device

    if name == "auto":
        return default_device(me.local_rank)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = default_device(me.local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_network(args, device):
    """The model of --model_path on its device, in --precision, and what was found out about it."""
    import torch

    from guided_diffusion.checkpoint import load_model

    precision = args.precision or ("fp16" if args.use_fp16 else "fp32")
    if args.precision and args.use_fp16 and args.precision != "fp16":
        raise UserError(f"--use_fp16 True contradicts --precision {args.precision}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    flags = {name: getattr(args, name) for name in (*MODEL_HELP, *DIFFUSION_HELP)}
    model, info = load_model(args.model_path, device=device, dtype=dtype, **flags)
    model.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPUs and GPUs
    if info.model_type == "ENCODER":
        raise UserError(f"--model_path {args.model_path} is a classifier or extractor, not a diffusion model")
    if not info.flags["class_cond"]:
        if args.class_index is not None:
            raise UserError(f"--class_index {args.class_index}: {args.model_path} is not class-conditional")
        return model, info
    classes = model.num_classes
    if args.class_index is None or not 0 <= args.class_index < classes:
        raise UserError(
            f"--class_index is {args.class_index}; {args.model_path} is class-conditional and needs 0 to {classes - 1}"
        )

    def conditioned(x, t):
        return model(x, t, torch.full((x.shape[0],), args.class_index, device=x.device))

    return conditioned, info


def create_job(args, me, device):
    """The job that the flags of input and output describe, before any model is loaded."""
    from guided_diffusion.dist_util import open_store
    from guided_diffusion.engine import Job, Options

    names = [field.name for field in dataclasses.fields(Options)]
    options = {name: getattr(args, name) for name in names if name != "device"}
    return Job(Options(**options, device=device), me, open_store(me))


def run_sampling(job, sampler, steps):
    """Do a prepared job with a progress bar and say what became of it; returns the exit status.

    sampler(ref, noise, callback): see `sddm.sample`; it calls back `steps` times.
    """
    from tqdm.auto import tqdm

    from guided_diffusion.image_datasets import display_name

    total = job.image_steps(steps)
    quiet = job.me.rank != 0 or total == 0
    with tqdm(
        total=total,
        disable=quiet,
        smoothing=0,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        bar_format="{percentage:3.0f}%|{bar}| {desc}, step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        desc=f"0/{total // steps} images",
    ) as bar:

        def progress(image_steps):
            bar.set_description_str(f"{(bar.n + image_steps) // steps}/{total // steps} images", refresh=False)
            bar.update(image_steps)

        try:
            summary = job.run(sampler, steps, progress)
        except KeyboardInterrupt:
            bar.close()
            if job.me.rank == 0:
                made = job.summary.done + job.summary.skipped
                print(
                    f"interrupted: {made} of {len(job.items)} images are done; run the same command again to go on",
                    file=sys.stderr,
                )
            return 130
    job.finish()
    if job.me.rank == 0:
        for name, reason in sorted(summary.failed.items()):
            print(f"failed: {display_name(name)}: {reason}", file=sys.stderr)
        folder = job.options.save_dir
        print(f"{summary.done} done, {summary.skipped} skipped (were there), {len(summary.failed)} failed")
        if summary.done + summary.skipped:
            print(f"translations are in {folder}, side by side with their sources in {os.path.join(folder, 'grid.png')}")
    return 1 if summary.failed else 0


def settings_of(args, files, **found):
    """The flags that determine the outputs, for run.json, with the hashes of the checkpoint files that take part.

    found: values that were read from files or resolved, in place of the flags'.
    """
    from guided_diffusion.run_record import sha256

    settings = {name: value for name, value in vars(args).items() if name not in CIRCUMSTANCES}
    return {**settings, **found, "checkpoints": {os.path.basename(path): sha256(path) for path in files}}


def main(function, parser):
    """Parse flags, call function(args), and turn its errors into one line and an exit status.

    0: all is well; 1: an image failed; 2: bad input; 130: interrupted.
    """
    from guided_diffusion import dist_util

    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, which does not concern the pixels
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    args = parser.parse_args()
    me = None
    try:
        me = dist_util.ranks()
        if me.rank:
            logging.getLogger().setLevel(logging.ERROR)
        status = function(args, me)
    except UserError as error:
        if me is not None and me.rank:
            # Most errors are everyone's: rank 0 says them, unless this one is still here to tell.
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted before any image was made", file=sys.stderr)
        status = 130
    except BaseException:
        if me is not None and me.world_size > 1:
            import traceback

            print(f"rank {me.rank} of {me.world_size} failed; run the same command again to go on", file=sys.stderr)
            traceback.print_exc()
            dist_util.abort(me)
        raise
    if status == 2 and me is not None:
        dist_util.abort(me)
    sys.stdout.flush()
    sys.exit(status)
