"""The training loop that the diffusion model and the classifiers share.

A run is a function of its options: what a step draws depends on the seed and the sample numbers alone (`data`), and a
checkpoint holds everything else. A run that was killed and resumes therefore ends with the weights of one never killed,
bit for bit on a CPU (on a GPU with deterministic=True, as far as its kernels are).
"""

import contextlib
import copy
import math
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import distributed
from tqdm.auto import tqdm

from ..checkpoint import load_state_dict
from ..checkpoint.loading import contiguous, write_safetensors
from ..dist_util import Ranks, Stopped, join_ranks
from ..errors import InputError, display_name, first_line, log, reading, renaming
from ..image_datasets import to_uint8
from ..nn import update_ema
from ..resample import LossAwareSampler, ScheduleSampler
from ..run.files import remove_temporaries, write_png
from ..run.grid import contact_sheet
from ..runtime import DTYPES, is_out_of_memory, memory_format, pick_precision
from ..script_util import create_diffusion
from . import files
from .config import GridOptions, TrainConfig, learning_rate
from .data import TrainImages, batch_numbers, random_bits, random_uniform, sample_noise
from .losses import Loss, Terms, add_by_quarter, in_float32, means_by_quarter
from .start import Start

FIRST = 10  # steps at the start of a run that are logged whatever `log_interval` is


@contextlib.contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Connect the processes of a run: NCCL on GPUs, gloo on CPUs. Nothing happens for a single process."""
    if ranks.world_size > 1:
        join_ranks(ranks, device)
    yield
    # Reached only if all went well: after an error the others may never come to a common end.
    if ranks.world_size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT (Ctrl-C) or SIGTERM (a scheduler) sets; a second signal of the kind ends the program."""
    stop = threading.Event()
    # No other thread may set handlers.
    numbers = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    previous = {number: signal.getsignal(number) for number in numbers}

    def handle(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    try:
        for number in numbers:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """Trains `model`; `run` is the loop, `train_step` one step of it. Raises InputError for files that do not fit.

    losses, evaluate: see the module `losses`. metadata: of the exported file. checkpoint: where the weights come from;
    a model010000.pt resumes at that step, with the files beside it. evaluate(model) and sample(model) -> uint8
    [N, H, W, 3] get a copy of the model with the weights that are exported. progress: show a bar.
    """

    def __init__(
        self, model: torch.nn.Module, losses: Loss, images: TrainImages, config: TrainConfig,
        schedule_sampler: ScheduleSampler, *, device: str | torch.device, ranks: Ranks, checkpoint: str = "",
        metadata: Mapping[str, str] | None = None, evaluate: Callable[[torch.nn.Module], Terms] | None = None,
        sample: Callable[[torch.nn.Module], np.ndarray] | None = None, progress: bool = False,
    ) -> None:  # fmt: skip
        self.losses, self.images, self.config, self.schedule_sampler = losses, images, config, schedule_sampler
        self.device, self.ranks, self.is_main = torch.device(device), ranks, ranks.rank == 0
        self.metadata, self.evaluate, self.sample, self.progress = dict(metadata or {}), evaluate, sample, progress
        self.precision = pick_precision(config.precision, self.device)
        self.memory_format = memory_format(self.device, config.compile)
        self.model = model.to(self.device, memory_format=self.memory_format).train().requires_grad_(True)  # type: ignore[call-overload]
        self.params = list(self.model.parameters())
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in config.ema_rates()}
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.params, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step, self.samples = 0, 0  # optimizer steps done, and images seen by all processes
        self.totals: Terms = {}  # of the loss terms since the last logged step
        self.ema_warmup = config.ema_warmup
        self.failure: InputError | None = None  # why an image could not be read, or a file not be written
        self._resume(checkpoint)
        self.saved = self.step
        self.ddp: Any = None
        if ranks.world_size > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            ddp = torch.nn.parallel.DistributedDataParallel
            self.ddp = ddp(self.model, device_ids=gpu, gradient_as_bucket_view=True)
        self.forward: Any = self.ddp or self.model
        if config.compile:
            self.forward = torch.compile(self.forward)

    def _resume(self, path: str) -> None:
        """Go back to the state of a checkpoint; nothing happens for a file of another name than model*.pt."""
        step = files.step_of_checkpoint(path)
        if step is None:
            return
        self.step, self.samples = step, step * self._identity()["joint batch"]
        folder = os.path.dirname(path)
        for rate, averaged in self.ema.items():
            # Before version 0.3, names had the rate as it was spelt.
            spelt = [
                text for text in self.config.ema_rate.replace(" ", "").split(",") if text and float(text) == float(rate)
            ]
            paths = [files.checkpoint_path(folder, f"ema_{text}_", step) for text in (rate, *spelt)]
            ema_path = next(filter(os.path.lexists, paths), paths[0])
            if not os.path.lexists(ema_path):
                log.warning("%s does not exist: the average starts from the model's weights", display_name(ema_path))
                continue
            state = load_state_dict(ema_path)
            with reading(ema_path, "an average of this model"):
                for (name, _), target in zip(self.model.named_parameters(), averaged):
                    files.check_like(name, state[name], target)
                    target.copy_(state[name])
        path = files.checkpoint_path(folder, "opt", step)
        if not os.path.lexists(path):
            log.warning("%s does not exist: the optimizer starts from scratch", display_name(path))
            return
        moments, saved = files.load_optimizer_file(path, self.params)
        with reading(path, files.OPTIMIZER):
            files.check_like("samples", saved.get("samples", 0), 0)
            self.samples = int(saved.get("samples", self.samples))
            for name, part in (("scaler", self.scaler), ("schedule_sampler", self.schedule_sampler)):
                if saved.get(name) and part.state_dict():
                    files.check_like(name, saved[name], part.state_dict())
                    part.load_state_dict(saved[name])
            totals = saved.get("totals", {})
            files.check_like("totals", totals, {name: torch.zeros(4, 2) for name in totals})
            self.totals = {name: table.to(self.device) for name, table in totals.items() if self.is_main}
        # The options of this run count, not those in the file.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        # Older runs, and guided-diffusion's, have no warm-up, and go on without.
        self.ema_warmup = self.config.ema_warmup and saved.get("ema_warmup") is True
        for name, now in self._identity().items():
            if saved.get(name, now) != now:
                log.warning("the run has another %s than before: it resumes, but not as it would have continued", name)

    def _identity(self) -> dict[str, Any]:
        """Properties of the data that a resumed run compares, besides its options."""
        batch = self.config.batch_size * self.ranks.world_size
        return {"data": self.images.digest(), "size of the data": self.images.bytes, "joint batch": batch}

    def autocast(self) -> Any:
        """The context in which the model computes."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def train_step(self, numbers: np.ndarray, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """One optimizer step on images x [N, C, H, W] with labels y [N] or None and sample numbers [N]."""
        config = self.config
        self.backward(numbers, x, y)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.params, config.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        most = (1 + self.step) / (10 + self.step) if self.ema_warmup else 1.0
        for rate, averaged in zip(config.ema_rates().values(), self.ema.values()):
            update_ema(averaged, self.params, rate=min(rate, most))
        if self.is_main:
            add_by_quarter(self.totals, {"grad_norm": norm.reshape(1)}, torch.zeros_like(norm.reshape(1)), 1)
        self.step += 1
        self.samples += len(numbers) * self.ranks.world_size

    def backward(self, numbers: np.ndarray, x: torch.Tensor, y: torch.Tensor | None) -> None:
        """Add the gradient of the mean loss over the joint batch of all processes; the loss's terms are recorded."""
        seed, steps = self.config.seed, self.schedule_sampler.num_timesteps
        # Dropout is all that draws from PyTorch's own generator.
        torch.manual_seed(int(random_bits(seed, "dropout", numbers[:1])[0]))
        t, importance = self.schedule_sampler.sample(len(x), self.device, random_uniform(seed, "timestep", numbers))
        noise = sample_noise(seed, numbers, x.shape[1:], self.device)
        x, noise = (tensor.contiguous(memory_format=self.memory_format) for tensor in (x, noise))
        size = self.config.microbatch if self.config.microbatch > 0 else len(x)
        parts = [slice(at, at + size) for at in range(0, len(x), size)]
        observed = []
        for part in parts:
            # Gradients are exchanged once, with the last part.
            alone = self.ddp is None or part is parts[-1]
            with contextlib.nullcontext() if alone else self.ddp.no_sync():  # type: ignore[union-attr]
                with self.autocast():  # which covers the forward pass alone
                    terms = self.losses(self.forward, x[part], t[part], noise[part], None if y is None else y[part])
                loss = (terms["loss"] * importance[part]).sum() / len(x)
                self.scaler.scale(loss).backward()
            add_by_quarter(self.totals, terms, t[part], steps)
            observed.append(terms["loss"].detach())
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, torch.cat(observed))  # in the order of sample numbers

    def _any(self, *flags: bool) -> list[bool]:
        """Whether each of the flags is set in any process."""
        votes = torch.tensor(flags, dtype=torch.int)
        if self.ranks.world_size > 1:
            distributed.all_reduce(votes)
        return votes.bool().tolist()

    def _sum_over_ranks(self, totals: Terms) -> Terms:
        parts: list[Terms] = [{name: table.cpu() for name, table in totals.items()}] * self.ranks.world_size
        if self.ranks.world_size > 1:
            distributed.all_gather_object(parts, parts[0])
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) for name in names}

    def run(self) -> bool:
        """Train to the end: True, or False if a signal stopped the run. Either way the last step is saved.

        Raises InputError; where an image cannot be read, or a log not be written, the last step is saved first.
        """
        config, last = self.config, self.config.last_step()
        if self.is_main:
            remove_temporaries(config.save_dir)
            self.progress_log = files.ProgressLog(config.save_dir, self.step)
            if last is not None and self.step >= last:
                log.info("nothing to train: the run has its %d steps", self.step)
        self._clock, self._logged_samples = time.perf_counter(), self.samples
        hidden = not (self.progress and self.is_main)
        bar = tqdm(total=last, initial=self.step, unit="step", dynamic_ncols=True, disable=hidden)
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:  # where PyTorch has no such kernel, it warns
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        with stop_on_signals() as stop, bar, self._in_one_line():
            numbers = batch_numbers(self.samples, config.batch_size, self.ranks.rank, self.ranks.world_size)
            batches = self.images.batches(numbers, self.device)
            while True:
                finished = last is not None and self.step >= last
                batch = None
                with self._failing_later():
                    batch = None if finished else next(batches)
                # One rank that fails or is stopped stops all: each has its next batch, or knows that there is none.
                stopped, failed = self._any(stop.is_set(), self.failure is not None)
                due = stopped or failed or self.step % config.save_interval == 0
                # A run that was killed between its last checkpoint and its end still has to export.
                if finished or (due and self.step > self.saved):
                    with self._failing_later():
                        self.save()
                    (failed,) = self._any(self.failure is not None)
                if failed:
                    raise self.failure or Stopped
                if batch is None or stopped:
                    break
                self.train_step(*batch)
                bar.update(1)
                # What belongs to a step is written before its checkpoint: a resumed run does not look back.
                self._report(bar, self.step == last)
        if self.images.damaged:
            log.warning("%d images could not be read and were skipped", len(self.images.damaged))
        if self.is_main and not finished:
            log.info("stopped after step %d, which is saved", self.step)
        return finished

    @contextlib.contextmanager
    def _failing_later(self) -> Iterator[None]:
        """Keep an InputError of a file: the loop ends the run in all processes after the step is saved."""
        try:
            yield
        except InputError as error:
            self.failure = self.failure or error

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Turn what PyTorch raises for a lack of memory, of a compiler or of a process into InputErrors."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            text = first_line(error)
            if is_out_of_memory(error):
                reason = f"out of memory on {self.device}; give a smaller `microbatch`, or `use_checkpoint` True"
                raise InputError(reason, parameter="batch_size", value=self.config.batch_size) from error
            if self.ranks.world_size > 1 and re.search("(?i)gloo|nccl|(closed|reset) by peer", str(error)):
                raise InputError(f"contact with the other processes is lost: {text}") from error
            # Dynamo's errors are RuntimeErrors; their module is imported only where something was compiled.
            if self.config.compile and "torch._" in type(error).__module__:
                reason = f"torch.compile does not work here ({text}); leave it out"
                raise InputError(reason, parameter="compile", value=True) from error
            raise

    def _report(self, bar: Any, finished: bool) -> None:
        """Write the row of progress.csv and the sample grid that are due after a step."""
        config, row = self.config, {}
        if self.step % config.log_interval == 0 or self.step <= FIRST:
            totals, self.totals = self._sum_over_ranks(self.totals), {}
            self._check_finite(totals)
            row = means_by_quarter(totals)
            row.pop("grad_norm_q0", None)
            speed = (self.samples - self._logged_samples) / (time.perf_counter() - self._clock)
            self._clock, self._logged_samples = time.perf_counter(), self.samples
            row |= {"samples": self.samples, "lr": learning_rate(config, self.step - 1), "images_per_second": speed}
            if self.scaler.is_enabled():
                row["loss_scale"] = self.scaler.get_scale()
            bar.set_postfix_str(f"loss {row['loss']:.4f}, {speed:.1f} images/s")
        if self.evaluate and (finished or self.step % config.eval_interval == 0):
            with self.autocast():
                totals = self.evaluate(self.averaged_model())
            row |= means_by_quarter(self._sum_over_ranks(totals), prefix="val_")
        if row and self.is_main:
            with self._failing_later():
                self.progress_log.write({"step": self.step, **row})
            if not self.progress:  # the log has the time left, too
                last = config.last_step()
                shown = [f"{name} {row[name]:.4g}" for name in ("loss", "acc", "val_loss", "val_acc") if name in row]
                if last and self.step < last and "images_per_second" in row:
                    images = (last - self.step) * config.batch_size * self.ranks.world_size
                    shown.append(f"{tqdm.format_interval(images / row['images_per_second'])} left")
                log.info("step %d%s: %s", self.step, f" of {last}" if last else "", ", ".join(shown))
        due = config.sample_interval and (finished or self.step % config.sample_interval == 0)
        if due and self.sample and self.is_main:
            with self.autocast():
                images = self.sample(self.averaged_model())
            sheet = contact_sheet([[image] for image in images], images.shape[1], math.ceil(len(images) ** 0.5))
            with self._failing_later():
                write_png(os.path.join(config.save_dir, "samples", f"{self.step:06d}.png"), sheet)

    def _check_finite(self, totals: Terms) -> None:
        """End a run that has diverged, before it is saved. fp16's occasional overflows are skipped steps."""
        lost = "loss" in totals and totals["loss"][:, 1].sum() == 0
        if lost or not torch.stack([p.isfinite().all() for p in self.params]).all():
            better = "start from an older checkpoint with a lower one, or with `grad_clip` 1"
            reason = f"the loss is not finite any more at step {self.step}: {better}"
            raise InputError(reason, parameter="lr", value=self.config.lr)

    def _state(self, params: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """State dict of the model with other values of its parameters, on the CPU."""
        values = dict(zip((name for name, _ in self.model.named_parameters()), params))
        return {name: value.detach().cpu() for name, value in {**self.model.state_dict(), **values}.items()}

    def averaged_model(self) -> torch.nn.Module:
        """A copy of the model, in eval mode, with the weights that are exported: the first average, if there is one."""
        averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        for target, value in zip(averaged.parameters(), next(iter(self.ema.values()), self.params)):
            target.copy_(value.detach())
        return averaged

    def save(self) -> None:
        """Write a checkpoint, unless the step has one, and the file to sample with; all processes must call it."""
        config, totals = self.config, self._sum_over_ranks(self.totals)
        self._check_finite(totals)
        if self.is_main and self.step > self.saved:
            train_state = {
                "samples": self.samples,
                "ema_warmup": self.ema_warmup,
                **self._identity(),
                "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                "totals": totals,
            }
            averages = {rate: self._state(averaged) for rate, averaged in self.ema.items()}
            optimizer = {**self.optimizer.state_dict(), "train": train_state}
            files.save_checkpoint(config.save_dir, self.step, self._state(self.params), averages, optimizer)
        self.saved = self.step
        if self.is_main:
            average = f"EMA {next(iter(self.ema))}" if self.ema else "no EMA"
            done = f"{self.step} steps, {self.samples} images, AdamW {config.lr:g}, {average}, {self.precision}"
            state = self._state(next(iter(self.ema.values()), self.params))
            metadata = {"format": "pt", **self.metadata, "training": done}
            write_safetensors(config.export_path(), contiguous(state, DTYPES[config.export_dtype]), metadata)
            files.remove_old_checkpoints(config.save_dir, config.keep)


def grid_sampler(start: Start, grid: GridOptions, seed: int) -> Callable[[torch.nn.Module], np.ndarray]:
    """Function from a model to the images of a sample grid, uint8 [num_samples, H, W, 3].

    The noise is the same in every call, and classes are taken in turn. Raises InputError for the respacing.
    """
    with renaming({"timestep_respacing": "sample_respacing"}):
        diffusion = create_diffusion(**{**start.flags, "timestep_respacing": grid.sample_respacing})
    loop = diffusion.ddim_sample_loop if grid.sample_respacing.startswith("ddim") else diffusion.p_sample_loop
    shape = start.channels, start.flags["image_size"], start.flags["image_size"]

    def draw(model: torch.nn.Module) -> np.ndarray:
        device = next(model.parameters()).device
        torch.manual_seed(seed)
        images = []
        for numbers in np.split(np.arange(grid.num_samples), range(16, grid.num_samples, 16)):
            noise = sample_noise(f"{seed}/samples", numbers, shape, device)
            labels = {"y": torch.from_numpy(numbers % len(start.classes)).to(device)} if start.classes else {}
            # An average over the first steps can still be far off: what is not a number is shown as grey.
            x = loop(in_float32(model), noise.shape, noise=noise, model_kwargs=labels).nan_to_num(0.0)
            images.append(to_uint8(x.expand(-1, 3, -1, -1)))
        return np.concatenate(images)

    return draw
