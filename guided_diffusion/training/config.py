"""Options of a training run as frozen dataclasses: of the loop, the data, the loss and the model.

A model option that is None takes its value from the checkpoint that training starts from, else the default. Steps are
optimizer steps. A change of an option between a run and its resumption is announced, unless the option is `runtime`.
"""

import dataclasses
import math
import os
import re
from typing import Any

from ..checkpoint import ModelFlags
from ..errors import InputError
from ..image_datasets import RESIZE_MODES
from ..options import Checked, option
from ..resample import SCHEDULE_SAMPLERS
from ..runtime import PRECISIONS
from ..script_util import classifier_defaults, diffusion_defaults, model_and_diffusion_defaults
from .data import CACHES


@dataclasses.dataclass(frozen=True)
class TrainConfig(Checked):
    """Settings of the loop."""

    save_dir: str = option("output/train", "output folder", metavar="DIR", runtime=True)
    batch_size: int = option(1, "images per step and process", least=1, most=1 << 16)
    microbatch: int = option(-1, "images per forward pass; -1: the whole batch", least=-1, runtime=True)
    lr: float = option(1e-4, "learning rate of AdamW", above=0)
    lr_anneal_steps: int = option(0, "anneal the rate to 0 over this many steps, then stop; 0: constant", least=0)
    lr_schedule: str = option("linear", "shape of the annealing", choices=("linear", "cosine"))
    lr_warmup_steps: int = option(0, "steps of linear learning-rate warm-up", least=0)
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", least=0)
    iterations: int = option(0, "number of training steps; 0: `lr_anneal_steps`, or no limit", least=0, runtime=True)
    ema_rate: str = option("0.9999", "comma-separated EMA rates of the weights; the average of the first is exported")
    ema_warmup: bool = option(True, "limit the EMA rate to (1 + n) / (10 + n) after n steps, for short runs")
    grad_clip: float = option(0.0, "maximum norm of the gradient; 0: no clipping", least=0)
    schedule_sampler: str = option("uniform", "distribution of training timesteps", choices=SCHEDULE_SAMPLERS)
    sigma_mean: float = option(-0.3, "lognormal: mean of ln sigma, sigma^2 = (1 - alpha_bar) / alpha_bar")
    sigma_std: float = option(1.2, "lognormal: standard deviation of ln sigma", above=0)
    precision: str = option("fp32", "autocast dtype; auto: bf16 where it is native, else fp32", choices=PRECISIONS)
    compile: bool = option(False, "compile the model with torch.compile", runtime=True)
    deterministic: bool = option(False, "use deterministic kernels; slower on a GPU", runtime=True)
    seed: int = option(0, "seed of the initial weights, data order, flips, timesteps, noise and dropout", least=0)
    log_interval: int = option(10, "steps between log rows; the first ten are all logged", least=1, runtime=True)
    save_interval: int = option(10000, "steps between checkpoints", least=1, runtime=True)
    sample_interval: int = option(0, "steps between sample grids; 0: none", least=0, runtime=True)
    eval_interval: int = option(1000, "steps between evaluations on held-out data", least=1, runtime=True)
    keep: int = option(0, "number of latest checkpoints to keep; 0: all", least=0, runtime=True)
    resume: str = option("", "auto: resume from the latest checkpoint in `save_dir`", metavar="{auto}", runtime=True)
    resume_checkpoint: str = option("", "model*.pt to resume, or weights to start from", metavar="FILE", runtime=True)
    export: str = option("", "exported file; empty: model.safetensors in `save_dir`", metavar="FILE", runtime=True)
    export_dtype: str = option("fp16", "dtype of the exported weights", choices=("fp16", "fp32"), runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.export_path().endswith(".safetensors"):
            raise InputError("the name must end in .safetensors", parameter="export", value=self.export)
        self.ema_rates()

    def ema_rates(self) -> dict[str, float]:
        """Rates in the order given, by their names in files: 0.9 for 0.900."""
        texts = [part.strip() for part in self.ema_rate.split(",") if part.strip()]
        if not all(re.fullmatch(r"0(\.[0-9]{1,14})?", text) for text in texts) or len(texts) > 8:
            reason = "it is a list of up to 8 numbers from 0 to below 1, like 0.9999,0.999, of at most 14 decimals"
            raise InputError(reason, parameter="ema_rate", value=self.ema_rate)
        return {str(float(text)): float(text) for text in texts}

    def last_step(self) -> int | None:
        """The step after which training ends, or None."""
        return min(filter(None, (self.iterations, self.lr_anneal_steps)), default=None)

    def export_path(self) -> str:
        """Where the model for sampling goes."""
        return self.export or os.path.join(self.save_dir, "model.safetensors")


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate after `step` steps: linear warm-up, then constant or annealed to 0."""
    rate = config.lr
    if config.lr_warmup_steps:
        rate *= min(1.0, (step + 1) / config.lr_warmup_steps)
    if config.lr_anneal_steps:
        done = min(1.0, step / config.lr_anneal_steps)
        rate *= 1 - done if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return rate


@dataclasses.dataclass(frozen=True)
class DataOptions(Checked):
    """Training images, and how they are read; see `TrainImages`."""

    data_dir: str | None = option(
        None, "training images: a folder, searched recursively, or a .zip file", metavar="DIR"
    )
    random_flip: bool = option(True, "flip half of the images horizontally")
    resize: str = option("crop", "how non-square images are made square", choices=RESIZE_MODES)
    background: str = option("white", "colour behind transparent pixels", metavar="COLOUR")
    skip_damaged: bool = option(False, "replace images that cannot be read by others of the same class")
    cache: str = option("auto", "decoded images; auto: on the device, up to 2 GiB", choices=CACHES, runtime=True)
    num_workers: int = option(2, "threads that load images that are not cached", least=0, most=256, runtime=True)

    def reading(self) -> dict[str, Any]:
        """Arguments of `TrainImages` that say how images are read."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "data_dir"}


@dataclasses.dataclass(frozen=True)
class ClassOptions(Checked):
    """Classes of a classifier, and its held-out images."""

    domains: str | None = option(
        None,
        "comma-separated folders, sources first and the target last, instead of `data_dir`: train the extractor",
        metavar="DIRS",
    )
    val_data_dir: str | None = option(None, "held-out images for `data_dir`", metavar="DIR", runtime=True)
    val_domains: str | None = option(None, "held-out images for `domains`", metavar="DIRS", runtime=True)
    noised: bool = option(True, "train on images noised to random timesteps; False: on clean images")

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong, right = ("val_data_dir", "domains") if self.domains else ("val_domains", "data_dir")
        if value := getattr(self, wrong):
            raise InputError(f"it does not go with `{right}`", parameter=wrong, value=value)


@dataclasses.dataclass(frozen=True)
class LossOptions(Checked):
    """Weights of the diffusion loss over the timesteps; see `losses.loss_weights`."""

    p2_gamma: float = option(
        0.0, "gamma of P2 weighting, 1 / (k + SNR)^gamma; 0: off, 1 in the paper", least=0, most=100
    )
    p2_k: float = option(1.0, "k of P2 weighting", above=0)
    min_snr_gamma: float = option(0.0, "gamma of min-SNR weighting; 0: off, 5 in the paper", least=0)


@dataclasses.dataclass(frozen=True)
class SuperResOptions(Checked):
    """Input of a super-resolution model."""

    small_size: int = option(64, "height and width of the images to enlarge", least=1, most=1 << 14)


@dataclasses.dataclass(frozen=True)
class GridOptions(Checked):
    """Sample grids that are drawn during training."""

    num_samples: int = option(16, "number of images in a grid", least=1, most=4096, runtime=True)
    sample_respacing: str = option("ddim25", "sampling steps; ddimN uses DDIM", metavar="STEPS", runtime=True)


@dataclasses.dataclass(frozen=True)
class RunOptions(Checked):
    """Device of a run, and guided-diffusion's spelling of its precision."""

    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", metavar="NAME", runtime=True)
    use_fp16: bool = option(False, "same as `precision` fp16", runtime=True)


@dataclasses.dataclass(frozen=True)
class ClassifierRunOptions(RunOptions):
    """`RunOptions` with guided-diffusion's spellings for its classifier."""

    classifier_use_fp16: bool = option(False, "same as `use_fp16`", runtime=True)
    anneal_lr: bool = option(False, "same as `lr_anneal_steps` with the value of `iterations`", runtime=True)


# Help texts of models' options that sampling words differently, or does not have.
HELP = {
    "class_cond": "condition on classes, from folders, dataset.json or file names up to the first underscore",
    "classifier_pool": "pooling of the last feature map: attention, adaptive, spatial or spatial_v2",
    "diffusion_steps": "number of diffusion steps",
    "noise_schedule": "noise schedule: linear or cosine",
    "timestep_respacing": "train on these timesteps only",
    "rescale_timesteps": "scale timesteps to the range of 1000 steps",
}


def unet_defaults(**others: Any) -> dict[str, Any]:
    """Defaults of the diffusion model. Weights stay in float32, so use_fp16 is an option of the loop."""
    defaults = {name: value for name, value in model_and_diffusion_defaults().items() if name != "use_fp16"}
    return {**defaults, "predict_v": False, "in_channels": 3, **others}


def encoder_defaults() -> dict[str, Any]:
    """Defaults of classifier and extractor; as in `unet_defaults`, precision is an option of the loop."""
    left_out = ("classifier_use_fp16", "learn_sigma", "use_kl", "predict_xstart", "predict_v", "rescale_learned_sigmas")
    names = {**classifier_defaults(), "channel_mult": "", "num_head_channels": 64, **diffusion_defaults()}
    return {name: value for name, value in names.items() if name not in left_out}


def _optional(name: str, doc: str, defaults: dict[str, Any]) -> type:
    """Make a frozen options dataclass from fields of `ModelFlags`; they are None if not given."""
    known = {field.name: field.metadata for field in dataclasses.fields(ModelFlags)}
    other = {"classifier_width": "num_channels", "classifier_depth": "num_res_blocks"}
    fields: list[Any] = []
    for parameter, default in defaults.items():
        metadata = known.get(other.get(parameter, parameter.removeprefix("classifier_")), {})
        help = f"{HELP.get(parameter) or metadata['help']} (default {'empty' if default == '' else default})"
        bounds: dict[str, Any] = {bound: metadata.get(bound) for bound in ("choices", "least", "most")}
        fields.append((parameter, type(default) | None, option(None, help, **bounds)))
    namespace = {"given": ModelFlags.given}
    cls = dataclasses.make_dataclass(name, fields, bases=(Checked,), frozen=True, namespace=namespace)
    cls.__doc__, cls.__module__ = doc, __name__
    return cls


ModelOptions = _optional("ModelOptions", "The UNet and its diffusion process.", unet_defaults())
EncoderOptions = _optional("EncoderOptions", "The classifier and its diffusion process.", encoder_defaults())
