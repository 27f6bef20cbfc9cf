"""Start of a run: a new network, a checkpoint of its own, or any file that the sampling scripts read."""

import contextlib
import functools
import inspect
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import load_model
from ..checkpoint.loading import build
from ..checkpoint.reconcile import FLAGS, ModelInfo
from ..checkpoint.reconcile import RUNTIME_FLAGS as FREE
from ..checkpoint.targets import named_classes
from ..errors import InputError, display_name, first_line, log, shown
from ..script_util import channel_multipliers, create_classifier, create_model
from . import files
from .config import TrainConfig, encoder_defaults, unet_defaults
from .data import Label, listed

OF_USE = ("use_checkpoint", "timestep_respacing", "use_kl", "rescale_learned_sigmas")  # not in an exported file


@dataclass(frozen=True)
class Kind:
    """A kind of network that is trained, the model types of its checkpoints, and its names for common flags."""

    word: str
    types: tuple[str, ...]
    defaults: Callable[[], dict[str, Any]]
    size: str = "num_channels"
    attention: str = "attention_resolutions"
    classes: str = "num_classes"
    create: Callable[..., torch.nn.Module] = create_model


DIFFUSION = Kind("diffusion model", ("ADM", "DDPM"), unet_defaults)
SUPER_RES = Kind("super-resolution model", ("ADM",), functools.partial(unet_defaults, image_size=256))
ENCODER = Kind(
    "classifier", ("ENCODER",), encoder_defaults, "classifier_width", "classifier_attention_resolutions", "num_class",
    create_classifier,
)  # fmt: skip


@dataclass
class Start:
    """The network that a run starts with; flags: all of the model's and the process's.

    checkpoint: the file that its weights come from, "" for none. labels, classes: of the images, None for a network
    without classes. texts: metadata of the exported file instead of the flags.
    """

    model: torch.nn.Module
    model_type: str
    flags: dict[str, Any]
    checkpoint: str = ""
    labels: Any = None
    classes: list[str] | None = None
    texts: dict[str, str] | None = None

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.flags.get("in_channels", 3)

    def metadata(self) -> dict[str, str]:
        """Metadata of the exported file."""
        # Sorted, so that a resumed run exports the same bytes.
        stated = {name: value for name, value in sorted(self.flags.items()) if name not in OF_USE}
        texts = {"model_type": self.model_type, "flags": json.dumps(stated)}
        return self.texts or texts | ({"classes": json.dumps(self.classes)} if self.classes is not None else {})


def resume_path(config: TrainConfig) -> str:
    """The model that a run starts from: with resume="auto" the newest in save_dir, else resume_checkpoint, or "".

    Raises InputError where the run would overwrite another's checkpoints, or the file that it starts from.
    """
    start, steps = config.resume_checkpoint, files.saved_steps(config.save_dir)
    if steps and config.resume == "auto":
        return files.checkpoint_path(config.save_dir, "model", steps[-1])
    at = files.step_of_checkpoint(start)
    if steps and (at is None or os.path.realpath(os.path.dirname(start)) != os.path.realpath(config.save_dir)):
        reason = f"it has checkpoints already, the newest of step {steps[-1]}: give `resume` auto, or another folder"
        raise InputError(reason, parameter="save_dir", value=config.save_dir)
    if start and os.path.realpath(start) == os.path.realpath(config.export_path()):
        reason = "the export would overwrite it; give another `export` or another folder"
        raise InputError(reason, parameter="resume_checkpoint", value=start)
    if at is not None and steps and steps[-1] > at:
        reason = "which an automatic resumption would take; move them away"
        log.warning("%s has later checkpoints, up to step %d, %s", display_name(config.save_dir), steps[-1], reason)
    return start


def begin(config: TrainConfig, kind: Kind, given: Mapping[str, Any], label: Label, **fixed: Any) -> Start:
    """The network of a run, in float32 on the CPU. Raises InputError for flags, files and classes that do not fit.

    given: the model's flags that are given; the others come from the checkpoint that the run starts from, or are the
    defaults. label: labels the images if the network has classes. fixed: flags that the checkpoint must have, too.
    """
    checkpoint = resume_path(config)
    if not checkpoint:
        flags = {**kind.defaults(), **fixed, **given}
        labels, classes = label(None) if kind is ENCODER or flags["class_cond"] else (None, None)
        if kind is ENCODER and len(classes or "") < 2:
            raise InputError(f"all images are of one class, {listed(classes or [])}; give a folder per class")
        if classes is not None:
            flags[kind.classes] = len(classes)
        check_network(kind, flags)
        torch.manual_seed(config.seed)
        return Start(_create(kind, flags), kind.types[0], flags, "", labels, classes)

    record, where = files.read_run(os.path.dirname(checkpoint)), display_name(checkpoint)
    if unknown := sorted(set(record.model) - FLAGS.keys()):
        reason = f"has {shown(unknown[0])} among the model's options, which this version does not know"
        raise InputError(f"{display_name(os.path.join(os.path.dirname(checkpoint), files.NAME))} {reason}")
    # A model of colour pictures can begin a run of grey ones; a run that resumes keeps its channels.
    to_grey = given.get("in_channels") == 1 and files.step_of_checkpoint(checkpoint) is None
    if to_grey:
        given = {name: value for name, value in given.items() if name != "in_channels"}
        record.model.pop("in_channels", None)
    by_meaning = ("channel_mult", kind.attention)  # texts that `load_model` compares with the tensors
    for name in given.keys() & record.model.keys() - {*FREE, *by_meaning}:
        if given[name] != record.model[name]:
            reason = f"it does not fit {where}: that run has {name}={record.model[name]}"
            raise InputError(reason, parameter=name, value=given[name])
    model, info = load_model(checkpoint, dtype=torch.float32, **{**record.model, **given})
    found = ENCODER if info.model_type in ENCODER.types else SUPER_RES if info.flags.get("super_res") else DIFFUSION
    if found is not kind:
        raise InputError(f"{where} is a {found.word}, and a {kind.word} is to be trained")
    if to_grey and info.flags.get("in_channels", 3) == 3:
        model = greyed(model, info)
        log.info("%s is for colour pictures; its first and last layers are reduced to one channel", where)
    # A run keeps to its record; options that are newer than it come from the file.
    newer = {name: value for name, value in info.flags.items() if not record.model or name in kind.defaults()}
    known = {**newer, **record.model, **{name: value for name, value in given.items() if name in FREE}}
    flags = {name: value for name, value in known.items() if not name.endswith("use_fp16")}
    for name, value in fixed.items():
        if flags.get(name) != value:
            raise InputError(f"{where} has {name}={flags.get(name)}, these data need {name}={value}")
    labels, classes = None, None
    if kind is ENCODER or flags["class_cond"]:
        labels, classes = _numbered(checkpoint, label, record.classes or named_classes(info.metadata))
        number = flags[kind.classes]
        if len(classes) > number or (kind is ENCODER and len(classes) != number):
            raise InputError(f"the images have {len(classes)} classes, the model of {where} has {number}")
    return Start(model, info.model_type, flags, checkpoint, labels, classes)


def greyed(model: torch.nn.Module, info: ModelInfo) -> torch.nn.Module:
    """The network for grey pictures that a network for colour pictures becomes; its description `info` is changed, too.

    The first layer's kernels are summed over the input's channels; in the last layer, channels of the mean and of the
    variance are averaged.
    """
    first, last = ("conv_in", "conv_out") if info.model_type == "DDPM" else ("input_blocks.0.0", "out.2")
    state = model.state_dict()
    # A super-resolution network takes the small image's channels after those of x.
    state[f"{first}.weight"] = state[f"{first}.weight"].unflatten(1, (-1, 3)).sum(2)
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = state[name].unflatten(0, (-1, 3)).mean(1)
    info.flags["in_channels"] = 1
    grey = build(info)
    grey.load_state_dict(state, assign=True)
    return grey


def _numbered(checkpoint: str, label: Label, known: list[str] | None) -> tuple[Any, list[str]]:
    """Labels and classes of a run that starts from a checkpoint whose classes are `known`, if they are."""
    (labels, classes), where = label(None), display_name(checkpoint)
    resumed = files.step_of_checkpoint(checkpoint) is not None
    if not known:
        return labels, classes
    if set(known) == set(classes) or (not resumed and set(classes) <= set(known)):
        return label(known)  # versions that sorted texts numbered classes in another order
    if resumed:
        reason = f"the run of {where} was trained with {listed(known)}"
        raise InputError(f"the classes of the images are {listed(classes)}; {reason}")
    log.warning("the classes %s take the places of %s in %s", listed(classes), listed(known), where)
    return labels, classes


def check_network(kind: Kind, flags: Mapping[str, Any]) -> None:
    """Raise InputError for flags of a network that cannot be trained: it is built and run without memory first."""
    mults, size = channel_multipliers(flags["channel_mult"], flags["image_size"]), flags["image_size"]
    multiple = 2 ** (len(mults) - 1)
    if size % multiple:
        below = size // multiple * multiple
        reason = f"for {len(mults)} levels it must be a multiple of {multiple}, like {below or multiple} or "
        reason += f"{below + multiple}; or give fewer `channel_mult`"
        raise InputError(reason, parameter="image_size", value=size)
    if not all(1 <= mult * flags[kind.size] < 1 << 17 for mult in mults):
        reason = f"with `{kind.size}` {flags[kind.size]} some level has no channel, or more than 131071"
        raise InputError(reason, parameter="channel_mult", value=flags["channel_mult"] or f"{mults}")
    try:
        with torch.device("meta"), torch.no_grad():
            model = _create(kind, flags)
            x, t = torch.empty(1, flags.get("in_channels", 3), size, size), torch.zeros(1, dtype=torch.long)
            more = {"y": t} if flags.get("class_cond") else {}
            model.eval()(x, t, **more, **({"low_res": x} if flags.get("super_res") else {}))
    except InputError:
        raise
    except Exception as error:  # whatever a layer raises whose shapes do not fit
        raise InputError(f"the model's options do not go together: {first_line(error)}") from error
    parameters, memory = sum(p.numel() for p in model.parameters()), math.inf
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not a POSIX system
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > memory > 0:
        size = f"{parameters / 1e9:.1f} billion parameters; this machine's memory is {memory / 2**30:.0f} GiB"
        raise InputError(f"the model's options describe a network of {size}")


def _create(kind: Kind, flags: Mapping[str, Any]) -> torch.nn.Module:
    names = set(inspect.signature(kind.create).parameters) - {"use_fp16", "classifier_use_fp16"}
    return kind.create(**{name: flags[name] for name in names if name in flags})
