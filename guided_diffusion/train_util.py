"""The training loop that the diffusion model and the classifiers share.

A run is a function of its flags: what a step draws depends on the seed and the sample numbers alone (`train_data`), and
a checkpoint holds everything else. A run that is killed and goes on therefore ends with the weights of one never
killed, bit for bit on a CPU (on a GPU with --deterministic True, as far as its kernels are).
"""

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
import os
import re
import signal
import threading
import time

import numpy as np
import torch

from .training import files
from .dist_util import open_store
from .errors import UserError
from .image_datasets import to_uint8
from .nn import update_ema
from .run.files import remove_temporaries, write_png
from .run.grid import contact_sheet
from .training.data import batch_numbers, random_bits, random_uniform, sample_noise
from .training.losses import add_by_quarter, means_by_quarter

log = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. `check` raises UserError for a value that does not fit; steps are optimizer steps."""

    save_dir: str = _flag("output/train", "folder for checkpoints, exports, logs and sample grids")
    batch_size: int = _flag(1, "images per step and process")
    microbatch: int = _flag(-1, "images per forward pass, to save memory; -1 for the whole batch")
    lr: float = _flag(1e-4, "AdamW's learning rate")
    lr_anneal_steps: int = _flag(0, "anneal the learning rate to 0 over so many steps, then end; 0: constant")
    lr_schedule: str = _flag("linear", "form of the annealing: linear or cosine")
    lr_warmup_steps: int = _flag(0, "raise the learning rate linearly over the first steps")
    weight_decay: float = _flag(0.0, "AdamW's decoupled weight decay")
    iterations: int = _flag(0, "end after so many steps; 0: with --lr_anneal_steps, or never")
    ema_rate: str = _flag("0.9999", "rates of the averaged weights, comma-separated; the first is exported")
    grad_clip: float = _flag(0.0, "largest norm of the gradient; 0: not clipped")
    schedule_sampler: str = _flag("uniform", "timesteps: uniform, loss-second-moment or lognormal")
    sigma_mean: float = _flag(-0.3, "lognormal: mean of ln sigma, sigma^2 = (1 - alpha_bar) / alpha_bar")
    sigma_std: float = _flag(1.2, "lognormal: standard deviation of ln sigma")
    precision: str = _flag("fp32", "fp32, bf16 or fp16 (autocast; fp16 with loss scaling)")
    channels_last: bool = _flag(True, "convolutions in channels-last memory format")
    compile: bool = _flag(False, "torch.compile the model")
    deterministic: bool = _flag(False, "deterministic kernels, where PyTorch has them; slower on a GPU")
    seed: int = _flag(0, "decides initial weights, order, flips, timesteps, noise and dropout")
    log_interval: int = _flag(10, "steps between rows of progress.csv")
    save_interval: int = _flag(10000, "steps between checkpoints")
    sample_interval: int = _flag(0, "steps between sample grids; 0: none")
    eval_interval: int = _flag(1000, "steps between evaluations on held-out data")
    keep: int = _flag(0, "checkpoints to keep, the newest; 0: all")
    resume: str = _flag("", "auto: go on from the newest checkpoint in --save_dir, if there is one")
    resume_checkpoint: str = _flag(
        "", "start from this model; a model*.pt goes on at its step, with its ema*.pt and opt*.pt"
    )
    export: str = _flag("", "where the .safetensors file for sampling goes; default model.safetensors in --save_dir")
    export_dtype: str = _flag("fp16", "precision of the exported weights: fp16 or fp32")

    def check(self):
        """Raise UserError, naming the flag, for the first value that does not fit; return the config."""
        least = dict(
            batch_size=1, lr_anneal_steps=0, lr_warmup_steps=0, weight_decay=0, iterations=0, grad_clip=0,
            log_interval=1, save_interval=1, sample_interval=0, eval_interval=1, keep=0, seed=0,
        )  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if not (value >= bound and math.isfinite(value)):
                raise UserError(f"--{name} is {value}; it must be at least {bound}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UserError(f"--lr is {self.lr}; it must be positive, for example 1e-4")
        if self.microbatch != -1 and self.microbatch < 1:
            raise UserError(f"--microbatch is {self.microbatch}; it must be at least 1, or -1 for the whole batch")
        choices = dict(
            precision=tuple(PRECISIONS),
            lr_schedule=("linear", "cosine"),
            resume=("", "auto"),
            export_dtype=("fp16", "fp32"),
        )
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = " or ".join(choice or "empty" for choice in allowed)
                raise UserError(f"--{name} is {getattr(self, name)!r}; it can be {known}")
        if self.export and not self.export.endswith(".safetensors"):
            raise UserError(f"--export {self.export}: the name must end in .safetensors")
        self.ema_rates()
        return self

    def ema_rates(self):
        """{text of the rate: rate}, in the flag's order."""
        rates = {}
        for text in filter(None, (part.strip() for part in self.ema_rate.split(","))):
            if not re.fullmatch(r"0(\.\d+)?", text):
                raise UserError(
                    f"--ema_rate is {self.ema_rate!r}; it is a list of numbers from 0 to below 1, like 0.9999,0.999"
                )
            rates[text] = float(text)
        return rates

    def last_step(self):
        """The step after which training ends, or None."""
        return min(filter(None, (self.iterations, self.lr_anneal_steps)), default=None)

    def export_path(self):
        return self.export or os.path.join(self.save_dir, "model.safetensors")


def learning_rate(config, step):
    """The learning rate of step + 1, that is after `step` steps: linear warm-up, then constant or annealed to 0."""
    rate = config.lr
    if config.lr_warmup_steps:
        rate *= min(1.0, (step + 1) / config.lr_warmup_steps)
    if config.lr_anneal_steps:
        done = min(1.0, step / config.lr_anneal_steps)
        rate *= 1 - done if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return rate


# ---- processes ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(ranks, device):
    """Connect the processes of a run: NCCL on GPUs, gloo on CPUs. Nothing happens for a single process."""
    if ranks.world_size == 1:
        yield
        return
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=open_store(ranks),
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    yield
    # Reached only if all went well: after an error the others may never come to a common end.
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def stop_on_signals():
    """An event that SIGINT (Ctrl-C) or SIGTERM (a scheduler) sets; a second signal of the kind ends the program."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {}

    def handle(number, frame):
        stop.set()
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ---- the loop -------------------------------------------------------------------------------------------------------


class TrainLoop:
    """Trains `model`; `run` is the loop, `train_step` one step of it.

    losses: see `train_losses`. images: a `train_data.TrainImages`. schedule_sampler: see `resample`. metadata: texts
    for the exported file. ranks: a `dist_util.Ranks`, the process group being connected. checkpoint: the file that the
    model's weights come from, if any; with a name like model010000.pt the run goes on at that step, with the averages
    and the optimizer's state that lie beside it.
    evaluate(model) -> totals (see `train_losses.evaluate`) and sample(model) -> uint8 images [N, H, W, 3] get a copy of
    the model with the weights that are exported. progress: show a bar.
    """

    def __init__(
        self,
        model,
        losses,
        images,
        config,
        schedule_sampler,
        *,
        device,
        ranks,
        checkpoint="",
        metadata=None,
        evaluate=None,
        sample=None,
        progress=False,
    ):
        self.config = config.check()
        self.device = torch.device(device)
        self.ranks = ranks
        self.is_main = ranks.rank == 0
        self.losses = losses
        self.images = images
        self.schedule_sampler = schedule_sampler
        self.metadata = metadata or {}
        self.evaluate, self.sample, self.progress = evaluate, sample, progress

        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=self.memory_format).train().requires_grad_(True)
        self.params = list(self.model.parameters())
        self.ema = {rate: [p.detach().clone() for p in self.params] for rate in config.ema_rates()}
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(self.params, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = 0  # optimizer steps done
        self.samples = 0  # images seen, over all processes
        self.totals = {}  # of the loss terms since the last logged step
        self._resume(checkpoint)
        self.ddp, self.forward = None, self.model
        if ranks.world_size > 1:
            self.ddp = self.forward = torch.nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        if config.compile:
            self.forward = torch.compile(self.forward)
        self._averaged = None

    # -- going on from a checkpoint --

    def _resume(self, path):
        step = files.parse_resume_step_from_filename(path)
        if step is None:
            return
        self.step = step
        self.samples = step * self.config.batch_size * self.ranks.world_size
        folder = os.path.dirname(path)
        for rate, averaged in self.ema.items():
            ema_path = files.checkpoint_path(folder, f"ema_{rate}_", step)
            if os.path.exists(ema_path):
                self._load_ema(ema_path, averaged)
            elif self.is_main:
                log.warning("%s does not exist: the average starts from the model's weights", ema_path)
        opt_path = files.checkpoint_path(folder, "opt", step)
        if os.path.exists(opt_path):
            self._load_optimizer(opt_path)
        elif self.is_main:
            log.warning("%s does not exist: the optimizer starts afresh", opt_path)

    def _load_ema(self, path, averaged):
        from .checkpoint import load_state_dict

        state = load_state_dict(path)
        for (name, _), target in zip(self.model.named_parameters(), averaged):
            if name not in state or state[name].shape != target.shape:
                raise UserError(f"{path} does not fit the model: {name} is missing or has another shape")
            target.copy_(state[name])

    def _load_optimizer(self, path):
        content = files.load_optimizer_file(path)
        state = content.pop("train", {})
        try:
            self.optimizer.load_state_dict(content)
        except (ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path} does not fit the model's parameters; move it away to start the optimizer afresh"
            ) from error
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.config.weight_decay
        self.samples = state.get("samples", self.samples)
        self.scaler.load_state_dict(state.get("scaler") or self.scaler.state_dict())
        self.schedule_sampler.load_state_dict(state.get("schedule_sampler", {}))
        if self.is_main:
            self.totals = {name: table.to(self.device) for name, table in state.get("totals", {}).items()}
            for name, now in (("seed", self.config.seed), ("data", self.images.digest())):
                if state.get(name, now) != now:
                    log.warning("the run has another %s than before: it goes on, but not as it would have", name)

    # -- one step --

    def autocast(self):
        """The context in which the model computes."""
        dtype = PRECISIONS[self.config.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not torch.float32)

    def train_step(self, numbers, x, y):
        """One optimizer step on images x [N, 3, H, W] with labels y [N] or None and sample numbers [N]."""
        config = self.config
        self.backward(numbers, x, y)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.params, config.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for rate, averaged in zip(config.ema_rates().values(), self.ema.values()):
            update_ema(averaged, self.params, rate=rate)
        if self.is_main:
            add_by_quarter(
                self.totals, {"grad_norm": norm.reshape(1)}, torch.zeros(1, dtype=torch.long, device=self.device), 1
            )
        self.step += 1
        self.samples += len(numbers) * self.ranks.world_size

    def backward(self, numbers, x, y):
        """Add the gradient of the mean loss over the joint batch of all processes; the loss's terms are recorded."""
        seed, steps = self.config.seed, self.schedule_sampler.num_timesteps
        # Dropout is all that draws from PyTorch's own generator.
        torch.manual_seed(int(random_bits(seed, "dropout", numbers[:1])[0]))
        uniform = random_uniform(seed, "timestep", numbers)
        t, importance = self.schedule_sampler.sample(len(x), self.device, uniform)
        noise = sample_noise(seed, numbers, x.shape[1:], self.device)
        x, noise = (tensor.contiguous(memory_format=self.memory_format) for tensor in (x, noise))
        size = len(x) if self.config.microbatch == -1 else self.config.microbatch
        parts = [slice(at, at + size) for at in range(0, len(x), size)]
        observed = []
        for part in parts:
            waiting = self.ddp is not None and part is not parts[-1]
            with self.ddp.no_sync() if waiting else contextlib.nullcontext():
                with self.autocast():
                    terms = self.losses(self.forward, x[part], t[part], noise[part], None if y is None else y[part])
                loss = (terms["loss"] * importance[part]).sum() / len(x)
                self.scaler.scale(loss).backward()
            add_by_quarter(self.totals, terms, t[part], steps)
            observed.append(terms["loss"].detach())
        if self.schedule_sampler.needs_losses:
            self.schedule_sampler.update_with_all_losses(
                *self._gather(t.cpu().numpy(), torch.cat(observed).cpu().numpy())
            )

    def _gather(self, *arrays):
        """Arrays of all processes joined in the order of ranks, as sample numbers go."""
        return [np.concatenate(parts) for parts in zip(*self._all(arrays))]

    def _all(self, item):
        """What every process has for `item`, a list in the order of ranks."""
        if self.ranks.world_size == 1:
            return [item]
        import torch.distributed as dist

        gathered = [None] * self.ranks.world_size
        dist.all_gather_object(gathered, item)
        return gathered

    def _any(self, flag):
        """Whether the flag is set in any process."""
        if self.ranks.world_size == 1:
            return flag
        import torch.distributed as dist

        votes = torch.tensor(int(flag))
        dist.all_reduce(votes)
        return bool(votes)

    def _sum_over_ranks(self, totals):
        result = {}
        for part in self._all({name: table.cpu() for name, table in totals.items()}):
            for name, table in part.items():
                result[name] = result[name] + table if name in result else table
        return result

    # -- the run --

    def run(self):
        """Train to the end: True, or False if a signal stopped the run. Either way the last step is saved."""
        config = self.config
        last = config.last_step()
        if last is not None and self.step >= last:
            if self.is_main:
                log.info("nothing to do: the run has its %d steps", self.step)
            return True
        if self.is_main:
            remove_temporaries(config.save_dir)
            tensorboard = files.find_tensorboard()
            if tensorboard is None:
                log.info("tensorboard is not installed: progress goes to progress.csv only")
            self.progress_log = files.ProgressLog(config.save_dir, self.step, tensorboard)
        numbers, ahead = itertools.tee(
            batch_numbers(self.samples, config.batch_size, self.ranks.rank, self.ranks.world_size)
        )
        bar = self._bar(last)
        self._clock, self._logged_samples = time.perf_counter(), self.samples
        with stop_on_signals() as stop, bar, deterministic_kernels(config.deterministic):
            for current, (x, y) in zip(numbers, self.images.batches(ahead, self.device)):
                self._guarded_step(current, x, y)
                bar.update(1)
                stopped = self._any(stop.is_set())
                finished = self.step == last
                # What belongs to a step is written before its checkpoint: a run that goes on does not look back.
                self._report(bar, finished)
                if self.sample and config.sample_interval and (finished or self.step % config.sample_interval == 0):
                    self._save_samples()
                if finished or stopped or self.step % config.save_interval == 0:
                    self.save()
                if finished or stopped:
                    break
        if self.is_main:
            self.progress_log.close()
            if not finished:
                log.info("stopped after step %d; the same command with --resume auto goes on from there", self.step)
        return finished

    def _guarded_step(self, numbers, x, y):
        try:
            self.train_step(numbers, x, y)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--batch_size {self.config.batch_size}: out of memory on {self.device}; "
                "give a smaller --microbatch, or --use_checkpoint True"
            ) from error
        except RuntimeError as error:
            # Dynamo's errors are RuntimeErrors; their module is imported only where something was compiled.
            if not self.config.compile or "torch._" not in type(error).__module__:
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--compile True: torch.compile does not work here ({reason[:200]}); leave it out"
            ) from error

    def _bar(self, last):
        from tqdm.auto import tqdm

        return tqdm(
            total=last, initial=self.step, unit="step", dynamic_ncols=True, disable=not (self.progress and self.is_main)
        )

    def _report(self, bar, finished):
        """Write a row of progress.csv where one is due."""
        config, row = self.config, {}
        if self.step % config.log_interval == 0:
            totals = self._sum_over_ranks(self.totals)
            self.totals = {}
            row = means_by_quarter(totals)
            self._check_finite(totals)
            row.pop("grad_norm_q0", None)
            seconds = time.perf_counter() - self._clock
            speed = (self.samples - self._logged_samples) / seconds
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
            self.progress_log.write({"step": self.step, **row})
            if not self.progress:
                shown = [f"{name} {row[name]:.4g}" for name in ("loss", "acc", "val_loss", "val_acc") if name in row]
                log.info("step %d: %s", self.step, ", ".join(shown))

    def _check_finite(self, totals):
        """End a run that has diverged, before it is saved. fp16's occasional overflows are skipped steps."""
        lost = "loss" in totals and totals["loss"][:, 1].sum() == 0
        if lost or not torch.stack([p.isfinite().all() for p in self.params]).all():
            raise UserError(
                f"the loss is not finite any more at step {self.step}: go on from an older checkpoint with a lower "
                f"--lr than {self.config.lr}, or with --grad_clip 1"
            )

    # -- files --

    def _state(self, params):
        """State dict of the model with other values of its parameters, on the CPU."""
        state = self.model.state_dict()
        state.update((name, value) for (name, _), value in zip(self.model.named_parameters(), params))
        return {name: value.detach().cpu() for name, value in state.items()}

    def _exported(self):
        """The parameters to sample with: the first average, or the model's own where there is none."""
        return next(iter(self.ema.values()), self.params)

    def averaged_model(self):
        """A copy of the model, in eval mode, with the weights that are exported."""
        if self._averaged is None:
            self._averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        with torch.no_grad():
            for target, value in zip(self._averaged.parameters(), self._exported()):
                target.copy_(value)
        return self._averaged

    def save(self):
        """Write a checkpoint and the exported model; all processes must call it."""
        config = self.config
        totals = self._sum_over_ranks(self.totals)
        if not self.is_main:
            return
        self._check_finite(totals)
        train_state = {
            "samples": self.samples,
            "seed": config.seed,
            "data": self.images.digest(),
            "scaler": self.scaler.state_dict(),
            "schedule_sampler": self.schedule_sampler.state_dict(),
            "totals": totals,
        }
        files.save_checkpoint(
            config.save_dir,
            self.step,
            self._state(self.params),
            {rate: self._state(averaged) for rate, averaged in self.ema.items()},
            {**self.optimizer.state_dict(), "train": train_state},
        )
        average = f"EMA {next(iter(self.ema))}" if self.ema else "no EMA"
        metadata = {
            **self.metadata,
            "training": f"{self.step} steps, {self.samples} images, AdamW {config.lr:g}, {average}, {config.precision}",
        }
        dtype = PRECISIONS[config.export_dtype]
        files.export_model(config.export_path(), self._state(self._exported()), metadata, dtype)
        files.remove_old_checkpoints(config.save_dir, config.keep)

    def _save_samples(self):
        if not self.is_main:
            return
        with self.autocast():
            images = self.sample(self.averaged_model())
        sheet = contact_sheet([[image] for image in images], images.shape[1], math.ceil(math.sqrt(len(images))))
        write_png(os.path.join(self.config.save_dir, "samples", f"{self.step:06d}.png"), sheet)


def resume_path(config):
    """The model that a run starts from: the newest in --save_dir with --resume auto, else --resume_checkpoint, or "".

    Raises UserError where a run would silently overwrite another's checkpoints.
    """
    steps = files.saved_steps(config.save_dir)
    if steps and config.resume == "auto":
        return files.checkpoint_path(config.save_dir, "model", steps[-1])
    same_run = os.path.realpath(os.path.dirname(config.resume_checkpoint)) == os.path.realpath(config.save_dir)
    if steps and not (config.resume_checkpoint and same_run):
        raise UserError(
            f"--save_dir {config.save_dir} has checkpoints already, the newest of step {steps[-1]}: "
            "give --resume auto to go on, or another folder"
        )
    return config.resume_checkpoint


@contextlib.contextmanager
def deterministic_kernels(wanted):
    """Ask PyTorch for deterministic kernels within the context; where it has none, it warns."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not wanted
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.backends.cudnn.benchmark = before[1]


# ---- sample grids ---------------------------------------------------------------------------------------------------


def draw_samples(model, diffusion, number, image_size, *, use_ddim, seed=0, num_classes=None, batch_size=16):
    """Unconditional samples (classes in turn with num_classes) as uint8 [number, H, W, 3], from fixed noise."""
    device = next(model.parameters()).device
    loop = diffusion.ddim_sample_loop if use_ddim else diffusion.p_sample_loop
    torch.manual_seed(seed)
    images = []
    for at in range(0, number, batch_size):
        numbers = np.arange(at, min(at + batch_size, number))
        noise = sample_noise(f"{seed}/samples", numbers, (3, image_size, image_size), device)
        labels = {"y": torch.from_numpy(numbers % num_classes).to(device)} if num_classes else {}

        def in_float32(x, t, **kwargs):
            return model(x, t, **kwargs).float()

        # An average over the first steps can still be far off: what is not a number is shown as grey.
        x = loop(in_float32, noise.shape, noise=noise, model_kwargs=labels).nan_to_num(0.0)
        images.append(to_uint8(x))
    return np.concatenate(images)
