"""Train a classifier of noised images, or EGSDE's domain-specific extractor: the energies `classifier`, `dse`."""

import dataclasses
import json
import logging
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory

import _training as training
import torch

from guided_diffusion import train_data, train_files, train_util
from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import Reference
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_diffusion,
    diffusion_defaults,
    str2bool,
)
from guided_diffusion.train_losses import classifier_loss, evaluate

log = logging.getLogger("classifier_train")

EPILOG = """examples:
  python scripts/classifier_train.py --data_dir data/train --val_data_dir data/val --image_size 128 --lr 3e-4
  python scripts/classifier_train.py --domains data/emoji/twitter/train,data/emoji/fluent3d/train \\
      --val_domains data/emoji/twitter/test,data/emoji/fluent3d/test --image_size 64 --channel_mult 1,2,4,4 \\
      --classifier_width 32 --save_dir output/extractor
  python scripts/ae_sample.py --energy dse --dsepath output/extractor/model.safetensors ...

Classes are the folders in --data_dir, or the parts of file names before the first underscore.
"""


def defaults():
    """The classifier's flags; classifier_use_fp16 is the loop's, since weights are kept in float32."""
    names = {**classifier_defaults(), "channel_mult": "", "num_head_channels": 64, **diffusion_defaults()}
    left_out = ("classifier_use_fp16", "learn_sigma", "use_kl", "predict_xstart", "rescale_learned_sigmas")
    return {name: value for name, value in names.items() if name not in left_out}


def parse_flags():
    parser = training.make_parser(
        __doc__,
        EPILOG,
        without="sample_interval",
        save_dir="output/classifier",
        iterations=150000,
        lr=3e-4,
        batch_size=4,
        ema_rate="",
    )
    data = parser.add_argument_group("classes")
    data.add_argument(
        "--domains", metavar="SOURCE,TARGET", help="two folders instead of --data_dir: train the extractor"
    )
    data.add_argument("--val_data_dir", metavar="DIR", help="held-out images for --data_dir")
    data.add_argument("--val_domains", metavar="SOURCE,TARGET", help="held-out images for --domains")
    training.add_flag(data, "noised", True, "noised images at random timesteps; False: clean ones at timestep 0")
    training.add_flag(data, "random_crop", False, "read images 5/4 as large and cut out random windows")
    training.add_flag(data, "anneal_lr", False, "the same as --lr_anneal_steps with the value of --iterations")
    data.add_argument(
        "--classifier_use_fp16", dest="use_fp16", type=str2bool, metavar="BOOL", help="the same as --use_fp16"
    )
    training.add_model_flags(parser, "classifier and diffusion", defaults())
    args = parser.parse_args()
    if args.anneal_lr:
        args.lr_anneal_steps = args.iterations
    return args


def labelled_images(args, classes=None, held_out=False):
    """References, labels and names of the classes of the training data, or of the held-out data with known classes."""
    folder_flag, domains_flag = ("val_data_dir", "val_domains") if held_out else ("data_dir", "domains")
    folder, domains = getattr(args, folder_flag), getattr(args, domains_flag)
    if domains is None:
        references = train_data.list_images(folder, f"--{folder_flag}")
        return references, *train_data.class_labels(references, classes)
    folders = [part for part in domains.split(",") if part]
    if len(folders) != 2:
        raise UserError(f"--{domains_flag} is {domains!r}; it is two folders, source,target")
    references = [
        Reference(image.path, f"{name}/{image.name}")
        for name, part in zip(("source", "target"), folders)
        for image in train_data.list_images(part, f"--{domains_flag}")
    ]
    return references, *train_data.class_labels(references, ["source", "target"])


def train(args, ranks):
    if (args.data_dir is None) == (args.domains is None):
        raise UserError("--data_dir (a folder per class) or --domains (source,target) is needed, and only one of them")
    wrong = "val_domains" if args.domains is None else "val_data_dir"
    if getattr(args, wrong) is not None:
        raise UserError(
            f"--{wrong} {getattr(args, wrong)} does not go with {'--data_dir' if args.data_dir else '--domains'}"
        )
    config = training.loop_config(args)
    device = training.find_device(args.device, ranks)
    references, labels, classes = labelled_images(args)
    if len(classes) < 2:
        raise UserError(f"--data_dir {args.data_dir} has one class only, {classes[0]!r}; it needs a folder per class")
    head = "out" if args.domains is None else "I2Iout"

    start = train_util.resume_path(config)
    flags = training.model_flags(args, defaults(), start)
    torch.manual_seed(config.seed)
    if start:
        model, info = load_model(start, dtype=torch.float32, **flags)
        if info.model_type != "ENCODER":
            raise UserError(f"--resume_checkpoint {start} is a diffusion model; scripts/image_train.py trains these")
        flags = info.flags
        if flags["num_class"] != len(classes) or flags["head"] != head:
            raise UserError(
                f"--resume_checkpoint {start} has {flags['num_class']} classes and the head {flags['head']}; "
                f"these data need {len(classes)} and {head}"
            )
    else:
        flags = {**defaults(), "num_class": len(classes), "head": head, **flags}
        names = create_classifier.__code__.co_varnames[: create_classifier.__code__.co_argcount]
        model = training.build(create_classifier, **{name: flags[name] for name in names if name in flags})
    shared = dict(
        random_crop=args.random_crop,
        seed=config.seed,
        num_workers=args.num_workers,
        resize=args.resize,
        background=args.background,
    )
    images = train_data.TrainImages(
        references, flags["image_size"], labels=labels, random_flip=args.random_flip, cache=args.cache, **shared
    )
    diffusion = training.build(
        create_diffusion, **{name: flags[name] for name in diffusion_defaults() if name in flags}
    )
    losses = classifier_loss(diffusion, args.noised)

    measure = None
    if args.val_data_dir or args.val_domains:
        held_out, held_out_labels, _ = labelled_images(args, classes, held_out=True)
        val_images = train_data.TrainImages(held_out, flags["image_size"], labels=held_out_labels, **shared)

        def measure(averaged):
            return evaluate(
                averaged,
                losses,
                val_images,
                diffusion.num_timesteps,
                device=device,
                batch_size=config.batch_size,
                seed=config.seed,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )

    if ranks.rank == 0:
        counts = ", ".join(f"{name} {int((labels == i).sum())}" for i, name in enumerate(classes[:8]))
        more = f", … ({len(classes)} classes)" if len(classes) > 8 else ""
        log.info("%d images: %s%s; %s, %s", len(images), counts, more, device, config.precision)
        train_files.write_run(config.save_dir, flags, {**vars(args), **dataclasses.asdict(config), "classes": classes})
    stated = {name: value for name, value in flags.items() if not name.endswith("use_fp16")}
    with train_util.process_group(ranks, device):
        loop = train_util.TrainLoop(
            model,
            losses,
            images,
            config,
            create_named_schedule_sampler(config.schedule_sampler, diffusion, config.sigma_mean, config.sigma_std),
            device=device,
            ranks=ranks,
            checkpoint=start,
            metadata={"model_type": "ENCODER", "flags": json.dumps(stated), "classes": json.dumps(classes)},
            evaluate=measure,
            progress=sys.stderr.isatty(),
        )
        return loop.run()


if __name__ == "__main__":
    training.run(train, parse_flags)
