"""Options of a training run, as frozen dataclasses: the loop's, the data's, the loss's and the model's.

A model option that is None takes its value from the checkpoint that training starts from, else the default. Steps are
optimizer steps.
"""

import dataclasses
import math
import os
import re
from typing import Any

from ..errors import InputError
from ..image_datasets import RESIZE_MODES
from ..options import check, option
from ..resample import SCHEDULE_SAMPLERS
from ..runtime import DTYPES
from ..script_util import classifier_defaults, diffusion_defaults, model_and_diffusion_defaults
from .data import CACHES

LONGEST_RATE = 16  # characters of an EMA rate, which stands in the names of its files


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop. Raises InputError for a value that does not fit."""

    save_dir: str = option("output/train", "folder for checkpoints, exports, logs and sample grids", metavar="DIR")
    batch_size: int = option(1, "images per step and process", least=1, most=1 << 16)
    microbatch: int = option(-1, "images per forward pass, to save memory; -1 for the whole batch", least=-1)
    lr: float = option(1e-4, "AdamW's learning rate", above=0)
    lr_anneal_steps: int = option(0, "anneal the learning rate to 0 over so many steps, then end; 0: constant", least=0)
    lr_schedule: str = option("linear", "form of the annealing", choices=("linear", "cosine"))
    lr_warmup_steps: int = option(0, "raise the learning rate linearly over the first steps", least=0)
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", least=0)
    iterations: int = option(0, "end after so many steps; 0: when the rate is annealed, or never", least=0)
    ema_rate: str = option("0.9999", "rates of the averaged weights, comma-separated; the first is exported")
    grad_clip: float = option(0.0, "largest norm of the gradient; 0: not clipped", least=0)
    schedule_sampler: str = option("uniform", "which timesteps to train on", choices=SCHEDULE_SAMPLERS)
    sigma_mean: float = option(-0.3, "lognormal: mean of ln sigma, sigma^2 = (1 - alpha_bar) / alpha_bar")
    sigma_std: float = option(1.2, "lognormal: standard deviation of ln sigma", above=0)
    precision: str = option("fp32", "autocast to this type; fp16 with loss scaling", choices=tuple(DTYPES))
    channels_last: bool = option(True, "convolutions in channels-last memory format")
    compile: bool = option(False, "torch.compile the model")
    deterministic: bool = option(False, "deterministic kernels, where PyTorch has them; slower on a GPU")
    seed: int = option(0, "decides initial weights, order, flips, timesteps, noise and dropout", least=0)
    log_interval: int = option(10, "steps between rows of progress.csv", least=1)
    save_interval: int = option(10000, "steps between checkpoints", least=1)
    sample_interval: int = option(0, "steps between sample grids; 0: none", least=0)
    eval_interval: int = option(1000, "steps between evaluations on held-out data", least=1)
    keep: int = option(0, "checkpoints to keep, the newest; 0: all", least=0)
    resume: str = option(
        "",
        "auto: resume from the newest checkpoint in the save folder, if there is one; empty: start from scratch",
        metavar="{auto}",
    )
    resume_checkpoint: str = option(
        "", "start from this model; a model*.pt resumes at its step, with its ema*.pt and opt*.pt", metavar="FILE"
    )
    export: str = option(
        "", "the .safetensors file for sampling; empty: model.safetensors in the save folder", metavar="FILE"
    )
    export_dtype: str = option("fp16", "precision of the exported weights", choices=("fp16", "fp32"))

    def __post_init__(self) -> None:
        check(self)
        if not self.save_dir:
            raise InputError("give a folder", parameter="save_dir", value=self.save_dir)
        if self.microbatch == 0:
            raise InputError(
                "it must be at least 1, or -1 for the whole batch", parameter="microbatch", value=self.microbatch
            )
        if self.resume not in ("", "auto"):
            raise InputError("it can be auto, or empty", parameter="resume", value=self.resume)
        if self.export and not self.export.endswith(".safetensors"):
            raise InputError("the name must end in .safetensors", parameter="export", value=self.export)
        self.ema_rates()
        for parameter, path in (("save_dir", self.save_dir), ("export", self.export)):
            if "\0" in path:
                raise InputError("it is no path", parameter=parameter, value=path)

    def ema_rates(self) -> dict[str, float]:
        """{text of the rate: rate}, in the order given."""
        rates = {}
        for text in filter(None, (part.strip() for part in self.ema_rate.split(","))):
            if not re.fullmatch(r"0(\.[0-9]+)?", text) or len(text) > LONGEST_RATE or float(text) >= 1:
                raise InputError(
                    f"it is a list of numbers from 0 to below 1, like 0.9999,0.999, of at most {LONGEST_RATE} "
                    "characters each",
                    parameter="ema_rate",
                    value=self.ema_rate,
                )
            rates[text] = float(text)
        if len(rates) > 8:
            raise InputError("more than 8 averages are not supported", parameter="ema_rate", value=self.ema_rate)
        return rates

    def last_step(self) -> int | None:
        """The step after which training ends, or None."""
        return min(filter(None, (self.iterations, self.lr_anneal_steps)), default=None)

    def export_path(self) -> str:
        """Where the model for sampling goes."""
        return self.export or os.path.join(self.save_dir, "model.safetensors")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step + 1, that is after `step` steps: linear warm-up, then constant or annealed to 0."""
    rate = config.lr
    if config.lr_warmup_steps:
        rate *= min(1.0, (step + 1) / config.lr_warmup_steps)
    if config.lr_anneal_steps:
        done = min(1.0, step / config.lr_anneal_steps)
        rate *= 1 - done if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return rate


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images, and how they are read; see `TrainImages`."""

    data_dir: str | None = option(None, "training images, searched recursively", metavar="DIR")
    random_flip: bool = option(True, "mirror half of the images")
    resize: str = option("crop", "how images become square", choices=RESIZE_MODES)
    background: str = option("white", "colour under transparent images", metavar="COLOUR")
    cache: str = option("auto", "where decoded images are kept; auto: up to 2 GiB on the device", choices=CACHES)
    num_workers: int = option(2, "loader processes where images are not cached", least=0, most=256)

    def __post_init__(self) -> None:
        check(self)

    def reading(self) -> dict[str, Any]:
        """The arguments of `TrainImages` that say how images are read."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "data_dir"}


@dataclasses.dataclass(frozen=True)
class ClassOptions:
    """What a classifier tells apart."""

    domains: str | None = option(
        None,
        "folders, sources first and the target last, instead of `data_dir`: train the extractor",
        metavar="DIRS",
    )
    val_data_dir: str | None = option(None, "held-out images for `data_dir`", metavar="DIR")
    val_domains: str | None = option(None, "held-out images for `domains`", metavar="DIRS")
    noised: bool = option(True, "noised images at random timesteps; False: clean ones at timestep 0")
    random_crop: bool = option(False, "read images 5/4 as large and cut out random windows")

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Weights of the diffusion loss over the timesteps; see `losses.loss_weights`."""

    p2_gamma: float = option(
        0.0, "P2 weighting, 1 / (p2_k + SNR)^p2_gamma; 0: none, published models have 1", least=0, most=100
    )
    p2_k: float = option(1.0, "k of the P2 weighting", above=0)
    min_snr_gamma: float = option(0.0, "min-SNR weighting; 0: none, its paper has 5", least=0)

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class SuperResOptions:
    """What a super-resolution model enlarges."""

    small_size: int = option(64, "side of the images to enlarge", least=1, most=1 << 14)

    def __post_init__(self) -> None:
        check(self)

    def check_large(self, large_size: int) -> None:
        """Raise InputError unless images of side large_size are larger."""
        if self.small_size >= large_size:
            raise InputError(
                f"it must be below that of the images to make, {large_size}",
                parameter="small_size",
                value=self.small_size,
            )


@dataclasses.dataclass(frozen=True)
class GridOptions:
    """Sample grids, drawn while training."""

    num_samples: int = option(16, "images in a grid", least=1, most=4096)
    sample_respacing: str = option(
        "ddim25", "steps as `timestep_respacing` writes them; ddimN samples with DDIM", metavar="STEPS"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to run it; the last two are other spellings for users of guided-diffusion."""

    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps", metavar="NAME")
    use_fp16: bool = option(False, "the same as `precision` fp16")

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class ClassifierRunOptions(RunOptions):
    """The classifier's own old spellings besides."""

    classifier_use_fp16: bool = option(False, "the same as `use_fp16`")
    anneal_lr: bool = option(False, "the same as `lr_anneal_steps` with the value of `iterations`")


def precision(run: RunOptions, given: str) -> str:
    """The precision that `precision` and the old spellings mean together."""
    half = next((name for name in ("use_fp16", "classifier_use_fp16") if getattr(run, name, False)), None)
    if half and given == "bf16":
        raise InputError(f"`{half}` True contradicts it; give one of them", parameter="precision", value=given)
    return "fp16" if half else given


# ---- the model's options --------------------------------------------------------------------------------------------

# The largest image size, and the bounds of the others. Beyond them a network cannot be trained on any machine, and
# merely building it could take hours.
LARGEST_SIDE = 8192
BOUNDS: dict[str, dict[str, Any]] = {
    "image_size": {"least": 1, "most": LARGEST_SIDE},
    "num_channels": {"least": 1, "most": 1 << 14},
    "classifier_width": {"least": 1, "most": 1 << 14},
    "num_res_blocks": {"least": 1, "most": 64},
    "classifier_depth": {"least": 1, "most": 64},
    "num_heads": {"least": 1, "most": 1 << 14},
    "num_heads_upsample": {"least": -1, "most": 1 << 14},
    "num_head_channels": {"least": -1, "most": 1 << 14},
    "dropout": {"least": 0, "most": 1},
    "diffusion_steps": {"least": 1, "most": 1_000_000},
}
HELP = {
    "image_size": "side of the images in pixels",
    "num_channels": "channels of the first level",
    "classifier_width": "channels of the first level",
    "channel_mult": "channels of every level as multiples of the first's; empty: the image size's usual ones",
    "num_res_blocks": "residual blocks per level",
    "classifier_depth": "residual blocks per level",
    "attention_resolutions": "sides of the feature maps with attention",
    "classifier_attention_resolutions": "sides of the feature maps with attention",
    "num_heads": "attention heads; `num_head_channels` counts instead where it is given",
    "num_heads_upsample": "attention heads of the decoder; -1: as in the encoder",
    "num_head_channels": "channels of an attention head",
    "dropout": "dropout within residual blocks",
    "class_cond": "condition on classes: a folder each, or the file names' part before the first underscore",
    "use_checkpoint": "compute activations again instead of keeping them: less memory, a third slower",
    "use_scale_shift_norm": "timesteps scale and shift the normalised features",
    "classifier_use_scale_shift_norm": "timesteps scale and shift the normalised features",
    "resblock_updown": "residual blocks change the resolution, not convolutions",
    "classifier_resblock_updown": "residual blocks change the resolution, not convolutions",
    "use_new_attention_order": "split queries, keys and values before the heads",
    "classifier_pool": "how the last feature map becomes one vector: attention, adaptive, spatial or spatial_v2",
    "learn_sigma": "learn the variance of the reverse steps, too",
    "diffusion_steps": "steps of the diffusion process",
    "noise_schedule": "noise levels of the steps: linear or cosine",
    "timestep_respacing": "train on a part of the timesteps only",
    "use_kl": "minimise the variational bound instead of the squared error",
    "predict_xstart": "predict the clean image instead of the noise",
    "predict_v": "predict the velocity instead of the noise",
    "rescale_timesteps": "the network gets timesteps scaled to 0 to 1000",
    "rescale_learned_sigmas": "weight the bound of learned variances as for 1000 steps",
}


def unet_defaults() -> dict[str, Any]:
    """Defaults of the diffusion model; use_fp16 is the loop's, since weights are kept in float32."""
    defaults = {name: value for name, value in model_and_diffusion_defaults().items() if name != "use_fp16"}
    return {**defaults, "predict_v": False}


def super_res_defaults() -> dict[str, Any]:
    """Defaults of the super-resolution model; image_size is the side of what it makes."""
    return {**unet_defaults(), "image_size": 256}


def encoder_defaults() -> dict[str, Any]:
    """Defaults of classifier and extractor; classifier_use_fp16 is the loop's, since weights are kept in float32."""
    left_out = ("classifier_use_fp16", "learn_sigma", "use_kl", "predict_xstart", "predict_v", "rescale_learned_sigmas")
    names = {**classifier_defaults(), "channel_mult": "", "num_head_channels": 64, **diffusion_defaults()}
    return {name: value for name, value in names.items() if name not in left_out}


def _optional(name: str, doc: str, defaults: dict[str, Any]) -> type:
    """A frozen options dataclass whose fields are None if not given."""

    def given(self) -> dict[str, Any]:
        """The options that are given."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    fields = [
        (
            parameter,
            type(default) | None,
            option(None, f"{HELP.get(parameter, '')} (default {'empty' if default == '' else default})".strip(),
                   **BOUNDS.get(parameter, {})),
        )
        for parameter, default in defaults.items()
    ]  # fmt: skip
    cls = dataclasses.make_dataclass(name, fields, frozen=True, namespace={"__post_init__": check, "given": given})
    cls.__doc__, cls.__module__ = doc, __name__
    return cls


ModelOptions = _optional("ModelOptions", "The UNet and its diffusion process.", unet_defaults())
EncoderOptions = _optional("EncoderOptions", "The classifier and its diffusion process.", encoder_defaults())
