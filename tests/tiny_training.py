"""Training runs so small that they take a fraction of a second, and what tests read of them."""

import csv
import os
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from scripts_in_process import ROOT, load_script

from guided_diffusion.dist_util import Ranks
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.data import TrainImages, batch_numbers, list_images
from guided_diffusion.training.loop import Trainer
from guided_diffusion.training.losses import diffusion_loss, loss_weights

FLAGS = {
    "image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "4",
    "diffusion_steps": 100,
}  # fmt: skip


def words(text):
    return text.split()


MODEL = words("--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 4")
RUN = [
    *MODEL,
    *words("--diffusion_steps 30 --batch_size 2 --device cpu --ema_rate 0.9 --save_interval 1 --log_interval 1"),
]
EXTRACTOR = words(
    "--image_size 8 --classifier_width 32 --classifier_depth 1 --channel_mult 1,2 --device cpu --diffusion_steps 100"
    " --classifier_attention_resolutions 4 --batch_size 8"
)


def draw(path, seed=0, low=0, high=256):
    """A picture of four random squares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    squares = np.random.default_rng(seed).integers(low, high, (2, 2, 3), dtype=np.uint8)
    Image.fromarray(squares).resize((8, 8), Image.Resampling.NEAREST).save(path)


def draw_pets(folder):
    """Four pictures in each of two folders; returns the folder."""
    for i in range(8):
        draw(folder / ("cat" if i < 4 else "dog") / f"{i}.png", i)
    return folder


def train(script, *flags):
    """Call a script's function in this process, as the script itself would; with one thread, for the same rounding."""
    module, threads = load_script(script), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return module.train(module.create_parser().parse([str(flag) for flag in flags]), Ranks())
    finally:
        torch.set_num_threads(threads)


def start(*command):
    """The same as a process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def finish(process, status=0):
    """The text that the process wrote to stderr; its exit status must be as expected."""
    _, text = process.communicate(timeout=600)
    assert process.returncode == status, text
    return text


def end_at(process, checkpoint, number):
    """Send a signal once a checkpoint is there."""
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)


def make_loop(folder, save_dir, flags=FLAGS, weighting=None, images=None, nonzero=True, ranks=Ranks(), **config):
    """A Trainer, and its diffusion process."""
    torch.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    for parameter in model.parameters() if nonzero else ():  # layers that start at zero would hide gradients
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    config = TrainConfig(save_dir=str(save_dir), **config)
    losses = diffusion_loss(diffusion, loss_weights(diffusion, **(weighting or {})))
    sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion)
    images = images or TrainImages(list_images(folder), 8)
    return Trainer(model, losses, images, config, sampler, device="cpu", ranks=ranks), diffusion


def train_step(loop, numbers):
    """One step of a Trainer on the images of sample numbers."""
    loop.train_step(*next(loop.images.batches(iter([numbers]), "cpu")))


def gradients(loop):
    """The gradients of a Trainer's first step, the sample numbers and the images."""
    numbers = next(batch_numbers(0, loop.config.batch_size, loop.ranks.rank, loop.ranks.world_size))
    _, x, y = next(loop.images.batches(iter([numbers]), "cpu"))
    loop.backward(numbers, x, y)
    return [p.grad.clone() for p in loop.params], numbers, x


def rows(save_dir):
    """The rows of progress.csv, without the speed."""
    with open(save_dir / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]
