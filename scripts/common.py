"""What the sampling scripts share: flags, set-up, progress, messages and exit statuses. The work is in the library."""

import argparse
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import sys
import textwrap
import time
import traceback
import warnings


def _interrupted_early(number, frame):
    os.write(2, b"interrupted; run the same command again to go on\n")
    os._exit(130)


# Importing torch takes seconds, in which an interrupt would end in a traceback.
signal.signal(signal.SIGINT, _interrupted_early)
signal.signal(signal.SIGTERM, _interrupted_early)
# Where a rank is lost, torch's store would write stack traces of its own to stderr.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from guided_diffusion import dist_util  # noqa: E402
from guided_diffusion.errors import UserError  # noqa: E402
from guided_diffusion.memory import keep_freed_memory  # noqa: E402
from guided_diffusion.script_util import model_and_diffusion_defaults, str2bool  # noqa: E402

log = logging.getLogger("sddm")

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
# Flags of training that the release's command lines carry along.
OF_TRAINING = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")
# Flags that say how to run, not what to make: they may change between a run and its restart.
CIRCUMSTANCES = (
    *("base_samples", "batch_size", "compile", "device", "grid", "num_samples", "overwrite", "save_dir", "strict"),
    *("use_fp16", *OF_TRAINING),  # what use_fp16 means is in `precision`
)
TRANSLATIONS = ("translations", "side by side with their sources")


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
        with contextlib.suppress(UserError):
            if dist_util.ranks().rank:
                self.exit(2)  # all ranks have the same flags, and rank 0 says what is wrong
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
        "--precision",
        choices=("fp32", "bf16", "fp16", "auto"),
        help="arithmetic of the network; auto: bf16 where the device computes in it, else fp32 (default fp32)",
    )
    group.add_argument(
        "--compile", type=str2bool, default=False, metavar="BOOL", nargs="?", const=True,
        help="compile the network first, which takes a minute and pays over many batches on a GPU (default False)",
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
    group.add_argument("--grid", type=natural, default=24, help="references shown in grid.png, 0 for none (default 24)")
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


def natural(text):
    """A whole number from 0 on, for argparse."""
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def batch_size(text):
    """A batch size or "auto", for argparse."""
    try:
        return text if text == "auto" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor auto") from None


def say_without_effect(args, names):
    """Tell of given flags that do nothing here; those of training only where they differ from the usual."""
    usual = model_and_diffusion_defaults()
    for name in (*names, *OF_TRAINING):
        value = getattr(args, name)
        if value is not None and value != usual.get(name):
            log.info("--%s %s has no effect", name, value)


def pick_device(name, peers):
    """The torch device that --device names; checked, so that a missing GPU is one line."""
    import torch

    from guided_diffusion.dist_util import default_device

    if name == "auto":
        return default_device(peers.local_rank)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = default_device(peers.local_rank)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def precision_of(args):
    """The precision that --precision and --use_fp16 ask for together."""
    if args.precision and args.use_fp16 and args.precision != "fp16":
        raise UserError(f"--use_fp16 True contradicts --precision {args.precision}")
    return args.precision or ("fp16" if args.use_fp16 else "fp32")


def steps_of(args):
    """Number of steps of the respaced schedule as far as the flags alone tell it, else None."""
    from guided_diffusion.respace import space_timesteps

    if args.diffusion_steps is not None and args.diffusion_steps < 1:
        raise UserError(f"--diffusion_steps is {args.diffusion_steps}; it must be at least 1")
    if args.diffusion_steps is None or not args.timestep_respacing:
        return args.diffusion_steps
    return len(space_timesteps(args.diffusion_steps, args.timestep_respacing))


def load_network(args, device):
    """The model of --model_path on its device, in --precision, and what was found out about it.

    A precision left to the device is known from here on: args get it, since it counts when a run is gone on with.
    """
    import torch

    from guided_diffusion.checkpoint import load_model
    from guided_diffusion.compiled import Compiled
    from guided_diffusion.precision import best_precision

    if precision_of(args) == "auto":
        args.precision = best_precision(device)
        log.info("--precision auto is %s on %s", args.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision_of(args)]
    flags = {name: getattr(args, name) for name in (*MODEL_HELP, *DIFFUSION_HELP)}
    model, info = load_model(args.model_path, device=device, dtype=dtype, **flags)
    model.to(memory_format=torch.channels_last)  # what convolutions are fastest in, on CPUs and GPUs
    if info.model_type == "ENCODER":
        raise UserError(f"--model_path {args.model_path} is a classifier or extractor, not a diffusion model")
    classes = getattr(model, "num_classes", None)
    if args.compile:
        model = Compiled(model)
    if not info.flags["class_cond"]:
        if args.class_index is not None:
            raise UserError(f"--class_index {args.class_index}: {args.model_path} is not class-conditional")
        return model, info
    if args.class_index is None or not 0 <= args.class_index < classes:
        raise UserError(
            f"--class_index is {args.class_index}; {args.model_path} is class-conditional and needs 0 to {classes - 1}"
        )

    def conditioned(x, t):
        return model(x, t, torch.full((x.shape[0],), args.class_index, device=x.device))

    return conditioned, info


def create_job(args, peers, device):
    """The job that the flags of input and output describe, before any model is loaded."""
    from guided_diffusion.engine import Job, Options

    names = [field.name for field in dataclasses.fields(Options)]
    options = {name: getattr(args, name) for name in names if name != "device"}
    return Job(Options(**options, device=device), peers)


def load_encoder(flag, path, image_size, device):
    """The classifier or extractor that a flag names, for images of the model's size."""
    from guided_diffusion.checkpoint import load_model

    encoder, info = load_model(path, device=device)
    if info.model_type != "ENCODER":
        raise UserError(f"--{flag} {path} is a diffusion model, not a classifier or extractor")
    if info.flags["image_size"] != image_size:
        raise UserError(f"--{flag} {path} is for {info.flags['image_size']} pixels, the model makes {image_size}")
    return encoder


def run_method(job, image_size, settings, method, model, diffusion, steps, guided=False, made=TRANSLATIONS):
    """Do a job with a method and write to run.json what it cost; returns the exit status.

    method(model, diffusion, ref, noise, callback): a sampler with its options, which calls back `steps` times; guided:
    it takes an argument `monitor` too. made: see `run_sampling`. The rest goes to `Job.prepare`.
    """
    from guided_diffusion.monitor import Monitor

    monitor = Monitor(job)
    job.prepare(image_size, settings)
    monitor.begin()
    sampler = functools.partial(method, monitor.counted(model), diffusion)
    status = run_sampling(job, monitor.watch(sampler, guided), steps, made)
    monitor.finish()
    return status


def settings_of(args, peers, files, **found):
    """All that determines the outputs, for run.json, rank 0's only: flags, and hashes in place of checkpoints' paths.

    files: flag -> path of the checkpoint files that take part. found: values that were read from files or resolved, in
    place of the flags'; None for flags that do not count.
    """
    from guided_diffusion.run_record import sha256

    if peers.rank:
        return {}
    settings = {**vars(args), "precision": precision_of(args), **found}
    settings |= {flag: f"sha256 {sha256(path)}" if os.path.isfile(path) else path for flag, path in files.items()}
    return {name: value for name, value in settings.items() if value is not None and name not in CIRCUMSTANCES}


def run_sampling(job, sampler, steps, made=TRANSLATIONS):
    """Do a prepared job with a progress bar and say what became of it; returns the exit status of this rank.

    sampler(ref, noise, callback): see `sddm.sample`; it calls back `steps` times. made: words for the outputs and for
    what grid.png shows.
    """
    from guided_diffusion.image_datasets import display_name

    wanted, skipped = len(job.items), job.summary.skipped
    if skipped:
        log.info("%d of %d images are there already", skipped, wanted)
    progress = Progress(job.image_steps(steps), steps) if job.peers.rank == 0 else None
    try:
        try:
            summary = job.run(sampler, steps, progress)
        finally:
            if progress is not None:
                progress.close()
        job.finish()
    except KeyboardInterrupt as error:
        if job.peers.interrupted():
            command = "the same command without --overwrite" if job.options.overwrite else "the same command"
            print(f"{_cause(error, job.peers)}: {job.made()} of {wanted} images are done; run {command} again to go on",
                  file=sys.stderr)
        return 130
    if job.peers.rank:
        return 0  # rank 0 tells of all; a launcher would end it if another status came first
    for name, reason in sorted(summary.failed.items()):
        print(f"failed: {display_name(name)}: {reason}", file=sys.stderr)
    folder = job.options.save_dir
    print(f"{summary.done} done, {summary.skipped} skipped (were there), {len(summary.failed)} failed")
    grid = os.path.join(folder, "grid.png")
    if summary.done + summary.skipped:
        shown = f", {made[1]} in {grid}" if os.path.exists(grid) else ""
        print(f"{made[0]} are in {folder}{shown}")
    return 1 if summary.failed else 0


class Progress:
    """Shows images, steps and time left, which is the time per step so far times the steps to come.

    The first step is left out of it once there are others, because it takes the time that loading and compiling takes.
    On a terminal it is a bar. In a log file it is a line after each half minute in which the run got on by a hundredth at
    least: a hundred lines at most. steps: of one image; total: image-steps of the run.
    """

    interval, share = 30.0, 0.01

    def __init__(self, total, steps, file=None):
        from tqdm import tqdm

        self.total, self.steps, self.done = total, steps, 0
        self.file = file or sys.stderr
        self.started = self.told_at = time.monotonic()
        self.told = 0
        self.first = None  # when the first steps were done, and how many
        self.bar = None
        if total and self.file.isatty():
            layout = "{percentage:3.0f}%|{bar}| {desc}, step {n_fmt}/{total_fmt} [{elapsed} gone{postfix}]"
            self.bar = tqdm(total=total, smoothing=0, bar_format=layout, desc=self._images(), file=self.file)

    def _images(self):
        return f"{self.done // self.steps}/{self.total // self.steps} images"

    def seconds_left(self):
        """The estimate; None before the first step."""
        if self.done <= 0:
            return None
        since, before = self.first if self.done > self.first[1] else (self.started, 0)
        return (time.monotonic() - since) / (self.done - before) * (self.total - self.done)

    def __call__(self, image_steps):
        self.done += image_steps
        if self.first is None and image_steps > 0:
            self.first = (time.monotonic(), self.done)
        if self.bar is not None:
            self.bar.set_description_str(self._images(), refresh=False)
            left = self.seconds_left()
            self.bar.set_postfix_str("" if left is None else f"{self.bar.format_interval(left)} left", refresh=False)
            self.bar.update(image_steps)
        elif (
            time.monotonic() - self.told_at >= self.interval
            and self.done - self.told >= self.share * self.total
            and self.done < self.total
        ):
            self._line()

    def _line(self):
        from tqdm import tqdm

        self.told_at, self.told = time.monotonic(), self.done
        elapsed, left = (tqdm.format_interval(t) for t in (time.monotonic() - self.started, self.seconds_left()))
        share = f"{100 * self.done // self.total}%"
        print(
            f"{share}, {self._images()}, step {self.done}/{self.total}, {elapsed} gone, {left} left",
            file=self.file,
            flush=True,
        )

    def close(self):
        """Leave the bar as it stands; a log gets its last line."""
        if self.bar is not None:
            self.bar.close()
        elif self.done > self.told:
            self._line()


def _raise_once():
    """A handler that turns the first signal into KeyboardInterrupt and leaves the clean-up alone for a while.

    Ctrl-C under a launcher comes twice, from the terminal and from the launcher. Whoever insists ends the process.
    """
    first = None

    def handle(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise KeyboardInterrupt(signal.Signals(number).name)
        if time.monotonic() - first > 2:
            os._exit(130)

    return handle


def _cause(interrupt, me):
    """What a KeyboardInterrupt of `_raise_once` was."""
    if "SIGTERM" not in interrupt.args:
        return "interrupted"
    return "ended by SIGTERM" + ", as launchers do when another process has died" * (me.world_size > 1)


def main(function, parser):
    """Parse flags, call function(args, peers), and turn its errors into one line and an exit status.

    0: all is well; 1: an image failed; 2: bad input; 3: a defect, with its traceback; 130: interrupted.
    """
    warnings.filterwarnings("ignore", module="PIL")  # about damaged metadata, which does not concern the pixels
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    keep_freed_memory()
    args = parser.parse_args()
    peers = me = dist_util.Ranks()
    handler = _raise_once()
    try:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)
        me = dist_util.ranks()
        if me.rank:
            logging.getLogger().setLevel(logging.ERROR)
        peers = dist_util.connect(me)
        status = function(args, peers)
    except BaseException as error:
        status = _explain(error, me, peers)
    if isinstance(peers, dist_util.Peers):
        peers.leave()
    sys.stdout.flush()
    if status not in (0, 1):
        dist_util.abort(me, status)
    sys.exit(status)


def _explain(error, me, peers):
    """Say what ended the run, once for all ranks; returns the exit status."""
    from guided_diffusion.engine import is_out_of_memory

    connected = isinstance(peers, dist_util.Peers)
    if isinstance(error, SystemExit):
        raise error
    if isinstance(error, dist_util.Stopped):
        return 2
    if isinstance(error, KeyboardInterrupt):
        if peers.interrupted() if connected else me.rank == 0:
            print(f"{_cause(error, me)}; run the same command again to go on", file=sys.stderr)
        return 130
    if isinstance(error, Exception) and is_out_of_memory(error):
        error = UserError(f"out of memory: {str(error).splitlines()[0]}")
    if isinstance(error, UserError):
        # Ranks that are not connected have the same flags and environment: rank 0 speaks for them.
        if peers.stop(str(error)) if connected else me.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if connected:
        peers.stop(repr(error))
    if me.world_size > 1:
        print(f"rank {me.rank} of {me.world_size} failed; run the same command again to go on", file=sys.stderr)
    traceback.print_exception(error)
    return 3
