"""The sampling commands: flags -> target -> references -> method -> job."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint import ModelFlags, fingerprint
from ..checkpoint.targets import TargetOptions, check_flags, class_number, load_target, num_classes
from ..codec import Autoencoder, Grey
from ..dist_util import Peers
from ..errors import AGAIN, InputError, display_name, log
from ..methods import ENERGIES, METHODS, Method, Translation, energy_names
from ..options import flag_of, option
from ..presets import located
from ..run.files import write_atomically
from ..run.job import MOST_IMAGES, Job, JobOptions, OutputOptions, opened
from ..run.loop import Loop
from ..run.noise import ImageNoise, image_key
from ..run.sources import Numbers, SmallImages, Source
from ..runtime import pick_device
from ..solvers import resolve_step
from ..target import Batch, Target
from .flags import Given, Parser
from .main import DONE, FAILED, INTERRUPTED, cause, say
from .progress import Progress

TRAINING_FLAGS = {"dropout": 0.0, "use_checkpoint": False, "use_kl": False, "rescale_learned_sigmas": False}
"""Flags of the network that concern its training alone, and their defaults."""
ENERGY_HELP = "comma-separated energies, such as dse,low_pass, or none (default vgg if its weights exist, else dct)"

Labels = Callable[[Sequence[str], ImageNoise], torch.Tensor | None]


@dataclass(frozen=True)
class NumberOptions(OutputOptions):
    """Options of a run that makes images without references."""

    num_samples: int = option(16, "number of images to sample", least=1, most=MOST_IMAGES, runtime=True)
    npz: bool = option(False, "also save all images and their classes as an .npz file", runtime=True)

    def source(self, peers: Peers, class_index: Any = None) -> Source:
        """The numbers of the images."""
        return Numbers(self.num_samples)


@dataclass(frozen=True)
class SmallImageOptions(NumberOptions):
    """Options of a run that enlarges images."""

    base_samples: str = option(None, "folder of small images, or an .npz file", runtime=True, metavar="PATH")
    small_size: int = option(64, "size to which images of a folder are resized first", least=1, most=1 << 14)

    def source(self, peers: Peers, class_index: Any = None) -> Source:
        """The small images."""
        return SmallImages(self.base_samples, peers, self.small_size, self.num_samples, class_index)


def translate_command(
    method: str, text: str, *, first: Sequence[str] = (), outputs: type = JobOptions,
    defaults: dict[str, Any] | None = None, spelling: dict[str, str] | None = None,
    without_effect: dict[str, Any] | None = None,
) -> tuple[Callable[[Given, Peers], int], Callable[[], Parser]]:  # fmt: skip
    """The function of a sampling command, and one that makes its parser, for `main.run`.

    method: a name in METHODS. text: the help's description. first: fields of the method that the help begins with.
    outputs: options of what is made, `JobOptions` for translations. defaults, spelling, without_effect: see `Parser`.
    """
    kind = METHODS.pick(method)
    translates = outputs is JobOptions
    energies = tuple(ENERGIES.values()) if kind.takes_energies else ()

    def create_parser() -> Parser:
        base = "" if outputs is NumberOptions else " --base_samples PATH"
        usual = {"weights": located("models/vgg_normalised.pth"), **(defaults or {})}
        parser = Parser(text, usage=f"--model_path PATH{base} [flags]", spelling=spelling, defaults=usual)
        parser.add(kind, ModelFlags, title="method", only=(*first, "timestep_respacing"))
        if translates:
            parser.add_preset(method)
        needed = ("model_path", "base_samples", "save_dir")
        parser.add(TargetOptions, outputs, title="input and output", only=needed)
        parser.add(outputs, title="input and output")
        parser.add(kind, title="variants of the method")
        if energies:
            parser.add_argument_group("energies").add_argument("--energy", metavar="NAMES", help=ENERGY_HELP)
            parser.add(*energies, title="energies")
        add_model(parser)
        parser.add_without_effect(**(without_effect or {}))
        return parser

    def translate(given: Given, peers: Peers) -> int:
        for name, value in given.ignored().items():
            log.info("--%s %s has no effect", name, value)
        # What the flags alone tell to be wrong is said before anything is loaded.
        options, made, wanted = given.options(kind), given.options(outputs), given.options(TargetOptions)
        flags = given.options(ModelFlags)
        names = energy_names(given.energy, given.vgg_path) if energies else []
        chosen = [given.options(ENERGIES[name]) for name in names]
        size = None if flags.image_size is None else (flags.image_size, flags.image_size)
        options.check_fit(None if kind.takes_labels else size, check_flags(wanted, flags))
        device = pick_device(wanted.device, peers.local_rank)
        job = Job(made, peers, device, made.source(peers, wanted.class_index))

        # A method that takes labels gets the class that way. Images of the model's own are of its own size.
        changes = {"class_index": None} if kind.takes_labels else {}
        changes |= {} if translates else {"upscale": False}
        loaded, super_res = dataclasses.replace(wanted, **changes), method == "super_resolution"
        target = load_target(loaded, flags, device, any_class=not translates, super_res=super_res)
        if energies and given.energy is None and isinstance(target.codec, Autoencoder):
            names, chosen = [], []
        translation = Translation(options, target, chosen)
        steps = resolved(options, target)
        announce(translation, names, given, steps)

        found = {"method": method, "energy": names if energies else None, **steps}
        if method in ("sdedit", "egsde"):
            found["clip_denoised"] = None  # never clipped
        settings = given_settings(given, target, [options, *chosen, made], peers, **found)
        labels = labels_of(translation, job.source, wanted.class_index)
        status = execute(job, translation, labels, settings, translates)
        if not translates and made.npz and status == DONE and peers.rank == 0:
            write_npz(job, target.image_size, labels)
        return status

    return translate, create_parser


def add_model(parser: Parser, without: Sequence[str] = ()) -> None:
    """The flags of the model and of how it computes."""
    parser.add(TargetOptions, title="model", without=without)
    description = "By default read from the checkpoint; a flag that contradicts it is an error."
    parser.add(ModelFlags, title="network and diffusion process", description=description, without=TRAINING_FLAGS)
    parser.add_without_effect(**TRAINING_FLAGS)


def resolved(method: Method, target: Target) -> dict[str, int]:
    """The steps of the schedule that a method's options mean, by flag, where shares are given."""
    total, found = target.diffusion.num_timesteps, {}
    for name, ends in {"range_t": (0, total - 1), "start": (1, total)}.items():
        if (value := getattr(method, name, None)) is not None:
            field = next(field for field in dataclasses.fields(method) if field.name == name)
            found[flag_of(field)] = resolve_step(value, total, name, *ends)
    return found


def announce(translation: Translation, names: Sequence[str], given: Given, found: dict[str, int]) -> None:
    """Say what is about to run: the network, the schedule, and the steps `found` that shares of it stand for."""
    target, method = translation.target, translation.method
    total, steps = target.diffusion.num_timesteps, translation.steps
    counted = f"{total} steps" if steps == total else f"{steps} of {total} steps"
    words = f"{type(method).__name__} {getattr(method, 'variant', '')}".strip()
    if method.takes_energies:
        default = given.energy is None and list(names) == ["dct"]
        words += f", energy {'+'.join(names) or 'none'}" + f" (there is no {given.vgg_path} for vgg)" * default
    log.info("%s, %d px, %s on %s; %s", target.info.model_type, target.image_size, counted, target.device, words)
    for name, step in found.items():
        if getattr(given, name) != step:
            log.info("--%s %s is step %d of %d", name, getattr(given, name), step, total)
    if found.get("range_t", -1) >= steps - 1:
        log.warning("--range_t %s leaves no step to guide: the run begins at step %d", given.range_t, steps - 1)


def given_settings(given: Given, target: Target, used: Sequence[Any], peers: Peers, **found: Any) -> dict[str, Any]:
    """Everything that determines the outputs, by flag, for run.json on rank 0; files are recorded as hashes.

    used: options; those that are None, `runtime` or `ignored` are left out. found: values read from files or resolved.
    """
    if peers.rank:
        return {}
    settings: dict[str, Any] = {}
    for options in (*used, given.options(TargetOptions)):
        left_out = options.ignored() if hasattr(options, "ignored") else ()
        for field in dataclasses.fields(options):
            if field.name not in left_out and not field.metadata.get("runtime"):
                value = getattr(options, field.name)
                if field.metadata.get("file") and value is not None:
                    value = fingerprint(value)
                settings[given.spell(field)] = value
    left_out = (*TRAINING_FLAGS, "use_fp16")
    settings |= {name: value for name, value in target.info.flags.items() if name not in left_out}
    settings |= {name: getattr(target, name) for name in ("precision", "sigma_small", "clip_denoised")}
    return {name: value for name, value in {**settings, **found}.items() if value is not None}


def labels_of(translation: Translation, source: Source, class_index: int | str | None) -> Labels:
    """Function of (names, noise) that gives the classes of a batch, long [N]: given, the source's or drawn, or None."""
    target, device = translation.target, translation.target.device
    classes = getattr(translation.sampler, "num_classes", None) or num_classes(target)
    if classes is None:
        if class_index is not None:
            raise InputError("the model is not class-conditional", parameter="class_index", value=class_index)
        return lambda names, noise: None
    if isinstance(source, SmallImages):
        if not source.labels:
            raise InputError("the model is class-conditional: give a class", parameter="class_index")
        return lambda names, noise: torch.tensor([source.labels[name] for name in names], device=device)
    fixed = None
    if class_index is not None:
        fixed = class_number(class_index, getattr(translation.sampler, "info", target.info), "class_index")
    draws = isinstance(source, Numbers) and (translation.method.takes_labels or fixed is None)

    def labels(names: Sequence[str], noise: ImageNoise) -> torch.Tensor | None:
        drawn = noise.labels(classes) if draws else None  # by each image's own generator, before any noise
        return drawn if fixed is None else torch.full((len(names),), fixed, device=device)

    return labels


def execute(
    job: Job, translation: Translation, labels: Labels, settings: dict[str, Any], translates: bool = True
) -> int:
    """Do a job with progress and report how it ended; returns the exit status of this rank."""
    steps, total, save_dir = translation.steps, len(job.items), job.options.save_dir

    def sample(batch: Batch, /, *, noise: ImageNoise, callback: Callable) -> torch.Tensor:
        batch = dataclasses.replace(batch, labels=labels(batch.names, noise))
        return translation(batch, noise=noise, callback=callback)

    grey = isinstance(translation.target.codec, Grey)
    try:
        with opened(job, translation.target.image_size, settings) as plan:
            if plan.skipped:
                log.info("%d of %d images are already present", plan.skipped, total)
            with Progress(0 if job.peers.rank else plan.image_steps(steps), total, plan.skipped) as progress:
                loop = Loop(job, plan, sample, steps, progress, translation.picture, grey)
                loop.run()
            loop.finish()
    except KeyboardInterrupt as error:
        if job.peers.interrupted():
            again = "run the same command without --overwrite to resume" if job.options.overwrite else AGAIN
            say(f"{cause(error, job.peers)}: {job.made()} of {total} images are done; {again}")
        return INTERRUPTED
    if job.peers.rank:
        return DONE  # rank 0 reports on all; a launcher would end it if another status came first
    for name, reason in sorted(loop.failed.items()):
        say(f"failed: {display_name(name)}: {reason}")
    say(f"{loop.done} done, {loop.skipped} already present, {len(loop.failed)} failed", sys.stdout)
    if loop.done + loop.skipped:
        kind, shown = ("translations", "side by side with their sources") if translates else ("images", "an overview")
        grid = os.path.join(save_dir, "grid.png")
        say(f"{kind} are in {save_dir}" + f", {shown} in {grid}" * os.path.exists(grid), sys.stdout)
    return FAILED if loop.failed else DONE


def write_npz(job: Job, image_size: int, labels: Labels) -> None:
    """Write guided-diffusion's file: images as arr_0, uint8 [N, H, W, 3], and their classes, if any, as arr_1 [N]."""
    images = np.stack([job.image(key, image_size) for key in job.items])
    arrays, names = [images], [reference.name for reference in job.items.values()]
    if not isinstance(job.source, SmallImages):
        keys = [image_key(job.options.seed, name) for name in names]
        classes = labels(names, ImageNoise(keys, torch.device("cpu")))
        arrays += [] if classes is None else [classes.cpu().numpy()]
    path = os.path.join(job.options.save_dir, f"samples_{'x'.join(map(str, images.shape))}.npz")
    write_atomically(path, lambda file: np.savez(file, *arrays))
    say(f"all images are in {display_name(path)}")
