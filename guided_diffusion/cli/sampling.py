"""What the sampling commands share: their flags, and a job run with progress, its report and its exit status."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..checkpoint import ModelFlags
from ..dist_util import Peers
from ..energy import ENERGIES, class_number
from ..errors import InputError, display_name
from ..generation import draw_labels
from ..options import near_miss
from ..run.job import Job, JobOptions
from ..run.loop import Loop, Summary
from ..run.noise import ImageNoise, image_key
from ..run.opening import open_plan
from ..script_util import NUM_CLASSES, model_and_diffusion_defaults
from ..sddm import METHODS
from ..solvers import resolve_step
from ..target import Batch, counted
from ..translator import Target, TargetOptions
from .flags import NO_EFFECT, Given, Parser
from .main import AGAIN, DONE, FAILED, INTERRUPTED, cause, say
from .progress import Progress

TRANSLATIONS = ("translations", "side by side with their sources")
IMAGES = ("images", "an overview of them")

# Flags of the network that say how it is run or trained; what is said of those given in vain.
TRAINING_FLAGS = ("dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas")
STEPS = "timestep_respacing"

log = logging.getLogger("sddm")


def add_first(parser: Parser, method: str, *fields: str) -> None:
    """What a method's help begins with: the flags that matter, the presets, input and output."""
    parser.add(METHODS[method], ModelFlags, title="method", only=(*fields, STEPS))
    parser.add_preset(method)
    add_outputs(parser, JobOptions)


def add_outputs(parser: Parser, outputs: type, title: str = "input and output") -> None:
    """The flags of what is read and written, those that a run needs before the others."""
    parser.add(TargetOptions, outputs, title=title, only=("model_path", "base_samples", "save_dir"))
    parser.add(outputs, title=title)


def add_common(parser: Parser) -> None:
    """The other flags that all sampling commands have besides the method's."""
    parser.add(TargetOptions, title="model")
    description = "read from the checkpoint where they are not given; one that contradicts it is an error"
    parser.add(ModelFlags, title="network and diffusion process", description=description, without=TRAINING_FLAGS)
    parser.add(ModelFlags, title=NO_EFFECT, only=TRAINING_FLAGS)


def say_ignored(given: Given) -> None:
    """Report given flags that do nothing here; those of training only where they differ from the usual."""
    usual = model_and_diffusion_defaults()
    ignored = given.ignored()
    training = {name: getattr(given, name) for name in TRAINING_FLAGS}
    ignored |= {name: value for name, value in training.items() if value is not None and value != usual[name]}
    for name, value in ignored.items():
        log.info("--%s %s has no effect", name, value)


def check_files(given: Given, options: Sequence[Any]) -> None:
    """Raise InputError for a file of options that is given and does not exist, before anything is loaded."""
    for each in options:
        names = [name for name, kind in ENERGIES.items() if type(each) is kind]
        needed = f", and `energy` {names[0]} needs it" if names else ""
        for field in dataclasses.fields(each):
            value = getattr(each, field.name)
            if field.metadata.get("file") and value and "://" not in value and not os.path.exists(value):
                raise InputError(f"no such file{needed}{near_miss(value)}", parameter=field.name, value=value)


def announce(target: Target, words: str, method: Any, given: Given) -> None:
    """Say what is about to run: the network, the schedule, and the steps that shares of it stand for."""
    total = target.diffusion.num_timesteps
    steps = method.steps(total)
    counted = f"{total} steps" if steps == total else f"{steps} of {total} steps"
    network = target.info.model_type
    log.info("%s UNet, %d px, %s on %s; %s", network, target.image_size, counted, target.device, words)
    found = resolved(method, total)
    for name, step in found.items():
        if getattr(given, name) != step:
            log.info("--%s %s is step %d of %d", name, getattr(given, name), step, total)
    if found.get("range_t", -1) >= steps - 1:
        log.warning("--range_t %s leaves no step to guide: the run begins at step %d", given.range_t, steps - 1)


def energy_words(names: Sequence[str], given: Given) -> str:
    """What a run says of its energies, and why it took dct where none was asked for."""
    default = given.energy is None and list(names) == ["dct"]
    return f"energy {'+'.join(names) or 'none'}" + (f" (there is no {given.vgg_path} for vgg)" if default else "")


def resolved(method: Any, total: int) -> dict[str, int]:
    """The steps of a schedule of `total` steps that a method's options mean, by flag, where shares are given."""
    found = {}
    for name, flag in (("range_t", "range_t"), ("start", "start_t" if hasattr(method, "range_t") else "t")):
        value = getattr(method, name, None)
        if value is not None:
            found[flag] = resolve_step(value, total, name, *((1, total) if name == "start" else (0, total - 1)))
    return found


def settings(given: Given, target: Target, used: list[Any], peers: Peers, **found: Any) -> dict[str, Any]:
    """All that determines the outputs, for run.json, on rank 0; used: the options that count."""
    if peers.rank:
        return {}
    values = {**target.info.flags, "precision": target.precision, "sigma_small": target.sigma_small}
    values |= {"clip_denoised": target.clip_denoised}
    for name in (*TRAINING_FLAGS, "use_fp16"):
        values.pop(name, None)
    return given.settings([*used, given.options(TargetOptions)], **{**values, **found})


def execute(
    job: Job,
    sampler: Callable,
    target: Target,
    steps: int,
    settings: dict[str, Any],
    made: tuple[str, str] = TRANSLATIONS,
) -> int:
    """Do a job with progress and say what came of it; returns the exit status of this rank.

    sampler(model, diffusion, ref, noise=, callback=): calls back `steps` times an image; gets labels=, too, where the
    references have classes. made: words for the outputs and for what grid.png shows.
    """
    model = counted(target.model)

    def sample(batch: Batch, /, **options: Any) -> Any:
        labels = {} if batch.labels is None else {"labels": batch.labels}
        return sampler(model, target.diffusion, batch.ref, **labels, **options)

    plan = open_plan(job, target.image_size, settings)
    if plan.skipped:
        log.info("%d of %d images are already present", plan.skipped, len(job.items))
    progress = Progress(plan.image_steps(steps), steps, len(job.items), plan.skipped) if job.peers.rank == 0 else None
    loop = Loop(job, plan, sample, steps, progress or (lambda image_steps, images: None))
    try:
        try:
            summary = loop.run()
        finally:
            if progress is not None:
                progress.close()
        loop.finish()
    except KeyboardInterrupt as error:
        if job.peers.interrupted():
            again = "run the same command without --overwrite to resume" if job.options.overwrite else AGAIN
            say(f"{cause(error, job.peers)}: {job.made()} of {len(job.items)} images are done; {again}")
        return INTERRUPTED
    if job.peers.rank:
        return DONE  # rank 0 reports on all; a launcher would end it if another status came first
    return report(job, summary, made)


def report(job: Job, summary: Summary, made: tuple[str, str]) -> int:
    """Say how a run ended; returns the exit status."""
    for name, reason in sorted(summary.failed.items()):
        say(f"failed: {display_name(name)}: {reason}")
    done, skipped, failed = summary.done, summary.skipped, len(summary.failed)
    say(f"{done} done, {skipped} already present, {failed} failed", sys.stdout)
    grid = os.path.join(job.options.save_dir, "grid.png")
    if done + skipped:
        shown = f", {made[1]} in {grid}" if os.path.exists(grid) else ""
        say(f"{made[0]} are in {job.options.save_dir}{shown}", sys.stdout)
    return FAILED if failed else DONE


def random_classes(target: Target, options: TargetOptions) -> int | None:
    """How many classes are drawn from; None where the model has none or a class is given."""
    flags = target.info.flags
    drawn = flags["class_cond"] and options.class_index is None
    return flags.get("num_classes", NUM_CLASSES) if drawn else None


def labels_of(job: Job, target: Target, options: TargetOptions) -> list[int] | None:
    """The class of every output, in order; None for a model without classes."""
    if not target.info.flags["class_cond"]:
        return None
    if options.class_index is not None:
        return [class_number(options.class_index, target.info, "class_index")] * len(job.items)
    keys = [image_key(job.options.seed, item.reference.name, item.sample) for item in job.items.values()]
    noise = ImageNoise(keys, torch.device("cpu"))
    classes = target.info.flags.get("num_classes", NUM_CLASSES)
    return draw_labels(noise, len(keys), classes, torch.device("cpu")).tolist()
