"""What image_train.py and classifier_train.py have in common: flags, messages, exit status."""

import argparse
import dataclasses
import logging
import os
import sys

import torch

from guided_diffusion import dist_util, train_files
from guided_diffusion.checkpoint import FREE
from guided_diffusion.errors import UserError
from guided_diffusion.memory import keep_freed_memory
from guided_diffusion.script_util import str2bool
from guided_diffusion.train_data import CACHES
from guided_diffusion.train_util import TrainConfig


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def make_parser(doc, epilog, without, **defaults):
    """A parser with the flags of loop and data, but for one; defaults: other values for some of the loop's."""
    parser = Parser(
        description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", metavar="DIR", help="training images, searched recursively")
    data.add_argument(
        "--random_flip", type=str2bool, default=True, metavar="BOOL", help="mirror half of the images (default True)"
    )
    data.add_argument("--resize", default="crop", help="how images become square: crop, pad or stretch (default crop)")
    data.add_argument("--background", default="white", help="colour under transparent images (default white)")
    data.add_argument(
        "--cache",
        default="auto",
        metavar="WHERE",
        help=f"where decoded images are kept: {', '.join(CACHES)} (default auto: up to 2 GiB on the device)",
    )
    data.add_argument(
        "--num_workers",
        type=int,
        default=2,
        metavar="N",
        help="loader processes where images are not cached (default 2)",
    )
    loop = parser.add_argument_group("training")
    for field in dataclasses.fields(TrainConfig):
        if field.name == without:
            continue
        default = defaults.get(field.name, field.default)
        if field.name == "save_dir":
            default = os.environ.get("OPENAI_LOGDIR") or default
        add_flag(loop, field.name, default, field.metadata["help"])
    add_flag(loop, "use_fp16", False, "the same as --precision fp16")
    add_flag(loop, "device", "auto", "auto, cpu, cuda, cuda:1, ...")
    return parser


def add_flag(group, name, default, text):
    kind = str2bool if isinstance(default, bool) else type(default)
    metavar = {str2bool: "BOOL", int: "N", float: "X", str: "TEXT"}[kind]
    shown = "empty" if default == "" else default
    group.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text} (default {shown})")


def add_model_flags(parser, title, defaults):
    """Flags that stay None if not given: their value is then the checkpoint's, if there is one, else the default."""
    group = parser.add_argument_group(
        title, "if not given: as in the checkpoint that training starts from, or the default"
    )
    for name, default in defaults.items():
        add_flag(group, name, default, "")
    parser.set_defaults(**dict.fromkeys(defaults))


def loop_config(args):
    """The TrainConfig of parsed flags, checked; its folders are made."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig) if field.name in args}
    if args.use_fp16:
        if args.precision == "bf16":
            raise UserError("--use_fp16 True contradicts --precision bf16; give one of them")
        values["precision"] = "fp16"
    config = TrainConfig(**values).check()
    train_files.make_folder(config.save_dir, "--save_dir")
    train_files.make_folder(os.path.dirname(config.export_path()) or ".", "--export")
    return config


def model_flags(args, defaults, start):
    """The model flags that are given, joined with those of the run that the checkpoint file `start` belongs to."""
    given = {name: value for name in defaults if (value := getattr(args, name)) is not None}
    stored = train_files.read_run_flags(os.path.dirname(start)) if start else {}
    for name, value in given.items():
        if name in stored and name not in FREE and stored[name] != value:
            raise UserError(f"--{name} {value} does not fit {start}: that run has {name}={stored[name]}")
    return {**stored, **given}


def build(create, *args, **flags):
    """Call a function that builds a network; sizes that do not go together become one error line."""
    try:
        return create(*args, **flags)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"the model's flags do not go together: {error}") from error


def find_device(name, ranks):
    """The torch.device that --device names."""
    if name == "auto":
        return dist_util.default_device(ranks.local_rank)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here; try auto or cpu") from error
    return device


def run(train, parse_flags):
    """Run train(flags, ranks) and end the process: 0 done, 2 after an error line, 130 stopped by a signal."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    keep_freed_memory()
    ranks = dist_util.Ranks()
    try:
        ranks = dist_util.ranks()
        finished = train(parse_flags(), ranks)
    except UserError as error:
        # All processes find the same mistake in the flags: one line is enough until they go separate ways.
        if ranks.rank == 0 or torch.distributed.is_initialized():
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist_util.abort(ranks)
        sys.exit(2)
    except KeyboardInterrupt:
        # Within the loop a first Ctrl-C is handled there; here is one before it, or a second one.
        print("interrupted: nothing was saved since the last checkpoint", file=sys.stderr)
        sys.exit(130)
    sys.exit(0 if finished else 130)
