"""Methods by name: their options, and a method bound to a target, ready to translate batches of pictures.

The functions of tensors are in `sddm` and `baselines`. To add a method, register a subclass of `Method`.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import baselines, energy, sddm
from .caching import cached
from .checkpoint import load_model
from .checkpoint.targets import class_number, num_classes
from .codec import Autoencoder, in_range
from .energy import Energy
from .errors import InputError, check_choice, display_name
from .manifold import MANIFOLDS, check_down_n
from .options import Checked, check_names, near_miss, option
from .registry import Registry
from .respace import matching_timestep
from .sddm import LAMBDA, MERGES, VARIANTS
from .solvers import SOLVERS, Noise, NotFiniteError, State, bind, check_finite, late_start, resolve_step
from .target import Batch, Target

# Options by name: subclasses of `EnergyOptions` and of `Method`.
ENERGIES = Registry("energy", lambda entries: check_names([SDDM, *entries.values()]))
METHODS = Registry("method", lambda entries: [check_names([each]) for each in entries.values()])

Sampler = Callable[..., Tensor]

_step = partial(option, metavar="STEP")
_blocks = partial(option, 16, "number of blocks per side", least=1, flag="area")
_down_n = partial(option, 32, least=1, flag="down_N")
_start = partial(_step, None, "late start: begin with the reference noised to this step, or share", flag="start_t")
_use_ddim = partial(option, False, "use DDIM instead of ancestral sampling")


def _file(help: str, flag: str, default: str | None = None) -> Any:
    return option(default, help, file=True, metavar="FILE", flag=flag)


def _unused(**uses: Any) -> set[str]:
    """The names of the options that are not in use."""
    return {name for name, used in uses.items() if not used}


def _check_files(options: Any, why: str) -> None:
    """Raise InputError where a field that names a file has none, or one that does not exist."""
    for field in dataclasses.fields(options):
        path = getattr(options, field.name)
        if not field.metadata.get("file"):
            continue
        if not path:
            raise InputError(why, parameter=field.name)
        if "://" not in path and not os.path.exists(path):
            where = near_miss(path) or "; models/README.md says where it is published"
            raise InputError(f"no such file, and {why}{where}", parameter=field.name, value=path)


@dataclass(frozen=True, kw_only=True)
class Method(Checked):
    """Options of a method, and the function that they are for.

    A method overrides `bind`, and the others as needed. Fields `range_t`, `details` and `start`, the number of steps,
    are steps of the schedule or shares of it; `down_n` divides the size. takes_energies: it merges energies.
    takes_labels: its function takes `labels`, those of the batch.
    """

    takes_energies: ClassVar[bool] = False
    takes_labels: ClassVar[bool] = False

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return set()

    def steps(self, total: int) -> int:
        """Number of states per picture in a schedule of `total` steps."""
        return late_start(getattr(self, "start", None), total)

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        """Raise InputError where the options do not suit the model's (height, width) or schedule, as far as known."""
        if size is not None and "down_n" not in self.ignored():
            check_down_n(getattr(self, "down_n", 1), size)
        if total is not None:
            for name in ("range_t", "details"):
                if getattr(self, name, None) is not None:
                    resolve_step(getattr(self, name), total, name)
            self.steps(total)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        """A sampling function of (model, diffusion, ref, *, noise, callback), as `solvers.sampler` makes them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cached(Method):
    """Options of methods whose evaluations can share features; see `caching`."""

    cache_interval: int = option(1, "recompute deep levels only every N steps", least=1, most=1000, metavar="N")

    def ignored(self) -> set[str]:
        return _unused(cache_interval=self.cache_interval > 1)


@dataclass(frozen=True, kw_only=True)
class CachedGuidance(Cached):
    """Options of methods that guide some of their steps."""

    cache_guided: bool = option(False, "reuse deep levels in guided steps as well")

    def ignored(self) -> set[str]:
        return super().ignored() | _unused(cache_guided=self.cache_guided and self.cache_interval > 1)


@METHODS.add("sddm")
@dataclass(frozen=True)
class SDDM(CachedGuidance):
    """Options of `sddm.sample`: guided above step T0, the plain diffusion model below it."""

    takes_energies = True

    range_t: int | float = _step(0, "T0: step at which guidance ends, or share of the schedule, e.g. 0.3", least=0)
    blocks: int = _blocks()
    variant: str = option("manifold", "manifold: as in the paper; released: as in the authors' code", choices=VARIANTS)
    start: int | float | None = _start()
    detail_merge: bool = option(False, "merge directions per block instead of per channel")
    moo: str = option("min_norm", "how directions are merged: their minimum-norm point, or their sum", choices=MERGES)
    manifold: str = option("badain", "defined by block statistics, or by low frequencies", choices=MANIFOLDS)
    down_n: int = _down_n("downsampling factor of low_pass, as energy or manifold")
    sampler: str = option("ancestral", "sampling algorithm; ddim and dpmpp_2m need fewer steps", choices=SOLVERS)
    eta: float = option(0.0, "noise of ddim: 0 is deterministic, 1 adds as much as ancestral", least=0, most=1)
    energy_scale: float = option(LAMBDA, "lambda: length of each energy's direction relative to the score's", least=0)
    details: int | float | None = _step(None, "keep thin features (eyes) down to this step or share", flag="details_t")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and "eta" in self.ignored():
            raise InputError(f"`sampler` {self.sampler} has none", parameter="eta", value=self.eta)

    def ignored(self) -> set[str]:
        # A scale as published is left out of records, as version 0.2 had none.
        uses = {"energy_scale": self.energy_scale != LAMBDA, "down_n": self.manifold == "low_pass"}
        return super().ignored() | _unused(eta=getattr(SOLVERS.pick(self.sampler), "takes_eta", True), **uses)

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        super().check_fit(size, total)
        if size is not None:
            MANIFOLDS.pick(self.manifold)(torch.zeros(1, 3, *size), blocks=self.blocks, down_n=self.down_n)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        if self.details is not None and isinstance(target.codec, Autoencoder):
            reason = "it finds thin features of pixels, and the model works on latents"
            raise InputError(reason, parameter="details", value=self.details)
        return bind(sddm.sample, energies=energies, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("ilvr")
@dataclass(frozen=True)
class ILVR(CachedGuidance):
    """Options of `baselines.ilvr`."""

    down_n: int = _down_n("keep the frequencies of an image of 1/N of the size")
    range_t: int | float = _step(20, "guidance ends at this step of the schedule, or share of it as 0.3", least=0)
    start: int | float | None = _start()

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        return bind(baselines.ilvr, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("sdedit")
@dataclass(frozen=True)
class SDEdit(Cached):
    """Options of `baselines.sdedit`."""

    start: int | float = _step(500, "step to which the reference is noised, or share", above=0, flag="t")

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        return bind(baselines.sdedit, variance=_variance(target), **vars(self))


@METHODS.add("egsde")
@dataclass(frozen=True)
class EGSDE(SDEdit, CachedGuidance):
    """Options of `baselines.egsde`."""

    ls: float = option(500.0, "weight of the realism energy; 0 turns it off")
    li: float = option(2.0, "weight of the faithfulness energy; 0 turns it off")
    down_n: int = _down_n("downsampling factor of the faithfulness energy")
    encoder: str | None = _file("checkpoint of the domain-specific extractor", flag="dsepath")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_interval > 1 and not self.cache_guided and (self.ls or self.li):
            reason = "all steps are guided ones; `cache_guided` True is needed"
            raise InputError(reason, parameter="cache_interval", value=self.cache_interval)
        if self.ls:
            _check_files(self, f"`ls` {self.ls:g} needs it; `ls` 0 does without the realism energy")

    def ignored(self) -> set[str]:
        return super().ignored() | _unused(encoder=self.ls, down_n=self.li)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        options = {**vars(self), "variance": _variance(target)}
        if self.ls:
            options["encoder"], options["timestep"], _ = load_encoder("encoder", str(self.encoder), target)
        return bind(baselines.egsde, **options)


def _variance(target: Target) -> str:
    return "fixed_small" if target.sigma_small else "fixed_large"


@METHODS.add("unconditional")
@dataclass(frozen=True)
class Unconditional(Cached):
    """Options of `baselines.unconditional`."""

    use_ddim: bool = _use_ddim()
    eta: float = option(0.0, "noise of DDIM: 0 is deterministic, 1 adds as much as ancestral sampling", least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta and not self.use_ddim:
            raise InputError("it is for `use_ddim` True", parameter="eta", value=self.eta)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        return bind(baselines.unconditional, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("classifier")
@dataclass(frozen=True)
class ClassifierGuided(Method):
    """Options of `baselines.classifier_guided`; classifier_* describe the classifier's network."""

    takes_labels = True

    classifier: str | None = _file("checkpoint of the classifier", flag="classifier_path")
    classifier_scale: float = option(1.0, "scale of the classifier's gradient", least=0)
    use_ddim: bool = _use_ddim()
    classifier_use_fp16: bool | None = option(None, "run the classifier in half precision")
    classifier_width: int | None = option(None, "base width of the classifier", least=1, most=1 << 14)
    classifier_depth: int | None = option(None, "residual blocks per level of the classifier", least=1, most=64)
    classifier_attention_resolutions: str | None = option(None, "its resolutions with attention, e.g. 32,16,8")
    classifier_use_scale_shift_norm: bool | None = option(None, "condition its normalisation on the timestep")
    classifier_resblock_updown: bool | None = option(None, "down- and upsample in its residual blocks")
    classifier_pool: str | None = option(None, "pooling of its features, e.g. attention or adaptive")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier is None:
            raise InputError("give the checkpoint of a classifier", parameter="classifier")

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        own = ("classifier", "classifier_scale", "use_ddim")
        flags = {name: value for name, value in vars(self).items() if name not in own and value is not None}
        network, info = _load_classifier("classifier", str(self.classifier), target, **flags)
        classes, given = info.flags.get("num_class", 0), num_classes(target)
        if given is not None and given < classes:
            reason = f"it has {classes} classes, and the model has {given}"
            raise InputError(reason, parameter="classifier", value=self.classifier)
        options = {"scale": self.classifier_scale, "use_ddim": self.use_ddim, "clip_denoised": target.clip_denoised}
        bound = bind(baselines.classifier_guided, classifier=network, **options)
        bound.num_classes, bound.info = classes, info  # type: ignore[attr-defined]
        return bound


@METHODS.add("super_resolution")
@dataclass(frozen=True)
class SuperResolution(Method):
    """Options of `baselines.super_resolution`."""

    takes_labels = True

    use_ddim: bool = _use_ddim()

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Sampler:
        sides = {"large_size": target.image_size, "clip_denoised": target.clip_denoised}
        return bind(baselines.super_resolution, use_ddim=self.use_ddim, **sides)


# ---- energies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyOptions(Checked):
    """Options of an energy, which needs all files that they name.

    pixels: it is for models of pixels alone, not of latents.
    """

    pixels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_files(self, f"`energy` {self.name} needs it")

    @property
    def name(self) -> str:
        """The name of these options in `ENERGIES`."""
        return next((name for name, kind in ENERGIES.items() if type(self) is kind), type(self).__name__)

    def create(self, target: Target) -> Energy:
        """The energy for a target. Raises InputError."""
        raise NotImplementedError


@ENERGIES.add("vgg")
@dataclass(frozen=True)
class VGG(EnergyOptions):
    """Options of `energy.vgg`."""

    pixels = True

    weights: str | None = _file("weights of AdaIN's VGG", default="models/vgg_normalised.pth", flag="vgg_path")
    level: int = option(1, "N of the VGG layer reluN_1 that vgg compares", least=1, most=5, flag="vggdepth")
    blocks: int = _blocks()
    vgg_bf16: bool = option(False, "compute vgg and its gradient in bf16; requires `precision` bf16")

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return _unused(vgg_bf16=self.vgg_bf16)

    def create(self, target: Target) -> Energy:
        if self.vgg_bf16 and target.precision != "bf16":
            reason = f"it needs `precision` bf16, and that is {target.precision}"
            raise InputError(reason, parameter="vgg_bf16", value=True)
        return energy.vgg(str(self.weights), self.blocks, self.level, bf16=self.vgg_bf16, channels_last=target.fuse)


@ENERGIES.add("dct")
@dataclass(frozen=True)
class DCT(EnergyOptions):
    """Options of `energy.dct`."""

    blocks: int = _blocks()

    def create(self, target: Target) -> Energy:
        return energy.dct(self.blocks)


@ENERGIES.add("dse")
@dataclass(frozen=True)
class DSE(EnergyOptions):
    """Options of `energy.dse`."""

    pixels = True

    encoder: str | None = _file("checkpoint of the domain-specific extractor, for dse", flag="dsepath")

    def create(self, target: Target) -> Energy:
        encoder, timestep, _ = load_encoder("encoder", str(self.encoder), target)
        return energy.dse(encoder, timestep)


@ENERGIES.add("low_pass")
@dataclass(frozen=True)
class LowPass(EnergyOptions):
    """Options of `energy.low_pass`."""

    down_n: int = _down_n("downsampling factor of low_pass, as energy or manifold")

    def create(self, target: Target) -> Energy:
        return energy.low_pass(self.down_n)


@ENERGIES.add("classifier")
@dataclass(frozen=True)
class Classifier(EnergyOptions):
    """Options of `energy.classifier`."""

    pixels = True

    classifier: str | None = _file("classifier of noised images, for classifier", flag="classifier_path")
    target_class: int | str | None = option(None, "class to guide towards, by number or name", metavar="CLASS")

    def create(self, target: Target) -> Energy:
        if self.target_class is None:
            raise InputError("`energy` classifier needs it", parameter="target_class")
        model, timestep, info = load_encoder("classifier", str(self.classifier), target)
        return energy.classifier(model, class_number(self.target_class, info, "target_class"), timestep)


def _load_classifier(parameter: str, path: str, target: Target, **flags: Any) -> tuple[nn.Module, Any]:
    """A classifier or extractor and its info. parameter: the option that names it, for errors."""
    network, info = load_model(path, device=target.device, **flags)
    if info.model_type != "ENCODER":
        raise InputError("it is a diffusion model, not a classifier or extractor", parameter=parameter, value=path)
    return network, info


def load_encoder(parameter: str, path: str, target: Target) -> tuple[nn.Module, Callable[[float], float] | None, Any]:
    """An extractor or classifier for a target, its timestep of a noise level (`matching_timestep`), and its info.

    parameter: the option that names it, for errors. Raises InputError for a file that does not suit the target.
    """
    encoder, info = _load_classifier(parameter, path, target)
    size, wanted = info.flags["image_size"], target.shape[-1]
    if size != wanted:
        raise InputError(f"it is for {size} pixels, the model has {wanted}", parameter=parameter, value=path)
    timestep = matching_timestep(target.info.flags, info.flags, assumed=info.assumed, name=display_name(path))
    return encoder, timestep, info


def energy_names(given: str | Sequence[str] | None, weights: str | None = None) -> list[str]:
    """The energies that are asked for: a comma-separated text or a list, "none" for none.

    None chooses vgg where the file `weights` exists, else dct. Raises InputError for an unknown or repeated name.
    """
    if given is None:
        return ["vgg"] if weights and os.path.exists(weights) else ["dct"]
    names = [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]
    names = [name for name in names if name not in ("", "none")]
    for name in names:
        check_choice("energy", name, [*ENERGIES, "none"])
    if len(set(names)) < len(names):
        raise InputError("it names an energy twice", parameter="energy", value=given)
    return names


def create_energies(energies: Sequence[EnergyOptions | Energy], target: Target) -> list[Energy]:
    """The energies that options like `VGG` describe, or that are there already, tried out at the model's size."""
    for each in energies:
        if isinstance(each, EnergyOptions) and each.pixels and isinstance(target.codec, Autoencoder):
            reason = "it compares pixels, and the model works on latents"
            raise InputError(reason, parameter="energy", value=each.name)
    made = [each.create(target) if isinstance(each, EnergyOptions) else each for each in energies]
    energy.prepared(made, torch.zeros(1, *target.shape, device=target.device))
    return made


# ---- a method on a target --------------------------------------------------------------------------------------------


class Translation:
    """A method bound to a target: batches of pictures in, pictures out.

    energies: options such as `VGG`, or energies. sampler: the bound sampling function. Raises InputError where the
    parts do not suit each other.
    """

    def __init__(self, method: Method, target: Target, energies: Sequence[EnergyOptions | Energy] = ()) -> None:
        method.check_fit(target.shape[1:], target.diffusion.num_timesteps)
        cached(target.model, getattr(method, "cache_interval", 1))  # refuses networks that cannot share
        self.method, self.target, self.energies = method, target, create_energies(energies, target)
        self.sampler: Any = method.bind(target, self.energies)

    def __reduce__(self) -> tuple:
        return Translation, (self.method, self.target, self.energies)  # the sampling function is bound again

    @property
    def steps(self) -> int:
        """Number of states per picture."""
        return self.method.steps(self.target.diffusion.num_timesteps)

    def states(self, batch: Batch, noise: Noise | None = None) -> Iterator[State]:
        """The states of `solvers.sampler` after each step, in the model's space; `picture` decodes them."""
        target = self.target.conditioned(batch)
        with torch.inference_mode(False), torch.no_grad():
            ref = target.codec.encode(in_range(batch.ref))
        labels = {"labels": batch.labels} if self.method.takes_labels else {}
        yield from self.sampler.steps(target.model, target.diffusion, ref, noise=noise, **labels)

    @torch.no_grad()
    def picture(self, x: Tensor) -> Tensor:
        """States [N, C, H, W] of the model's space as pictures [N, 3, S, S]."""
        return self.target.codec.decode(x)

    def __call__(
        self, batch: Batch, *, noise: Noise | None = None, callback: Callable[[State], Any] | None = None
    ) -> Tensor:
        """Translate a batch; returns pictures [N, 3, S, S]. callback: sees the state after each step.

        Raises NotFiniteError, with the pictures, where the model or the codec gives values that are not finite.
        """
        state: State = {}
        try:
            for state in self.states(batch, noise):
                if callback is not None:
                    callback(state)
        except NotFiniteError as error:
            raise NotFiniteError(self.picture(error.x.nan_to_num()), error.finite) from None
        return check_finite(self.picture(state["x"]))
