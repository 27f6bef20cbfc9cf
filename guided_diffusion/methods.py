"""Methods by name: their options, and a method bound to a target, ready to translate batches of pictures.

The functions of tensors are in `sddm`, `baselines` and `generation`; here are the options that commands, `Translator`
and presets share, and the loading of extractors and classifiers. To add a method, register a subclass of `Method`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from . import baselines, energy, generation, sddm
from .caching import cached
from .checkpoint import load_model
from .checkpoint.targets import class_number, num_classes
from .codec import Autoencoder, in_range
from .energy import Energy
from .errors import InputError, display_name
from .manifold import MANIFOLDS, check_down_n
from .options import check, check_names, option
from .registry import Registry, fitting
from .respace import matching_timestep
from .sddm import LAMBDA, MERGES, VARIANTS
from .solvers import SOLVERS, Noise, NotFiniteError, State, bind, late_start, resolve_step
from .target import Batch, Target

ENERGIES = Registry("energy", lambda entries: check_names([SDDM, *entries.values()]))
"""Options of energies by name: dataclasses like `VGG`, whose `create(target)` gives the energy."""

METHODS = Registry("method", lambda entries: [check_names([each]) for each in entries.values()])
"""Methods by name: subclasses of `Method`."""

_blocks = partial(option, 16, "number of blocks per side", least=1, flag="area")
_down_n = partial(option, 32, "low_pass, energy or manifold, keeps 1/N of the resolution", least=1, flag="down_N")
_late = "late start: begin with the reference noised to this step, or share of the schedule"
_start = partial(option, None, _late, metavar="STEP", flag="start_t")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Options of a method, and the function that they are for.

    A method overrides `bind`, and the others as needed. takes_energies: it merges energies (`ENERGIES`). takes_labels:
    its function has an argument `labels`, those of the batch. about: its name in messages.
    """

    takes_energies: ClassVar[bool] = False
    takes_labels: ClassVar[bool] = False
    about: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check(self)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return set()

    def steps(self, total: int) -> int:
        """Number of states per picture in a schedule of `total` steps."""
        return total

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        """Raise InputError where the options do not suit (height, width) of the model's space or a schedule's length.

        None stands for what is not known yet.
        """
        if total is not None:
            self.steps(total)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        """A sampling function of (model, diffusion, ref, *, noise, callback), as `solvers.sampler` makes them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cached(Method):
    """Options of methods whose evaluations can share features; see `caching`."""

    cache_interval: int = option(
        1, "recompute the deep levels of the network only every N steps", least=1, most=1000, metavar="N"
    )

    def ignored(self) -> set[str]:
        return {"cache_interval"} if self.cache_interval == 1 else set()


@dataclass(frozen=True, kw_only=True)
class CachedGuidance(Cached):
    """Options of methods that guide some of their steps."""

    cache_guided: bool = option(False, "reuse deep levels in guided steps, too")

    def ignored(self) -> set[str]:
        return super().ignored() | ({"cache_guided"} if self.cache_interval == 1 or not self.cache_guided else set())


class _Started(Method):
    """A method with an option `start`, the number of steps of a run."""

    start: Any

    def steps(self, total: int) -> int:
        return late_start(self.start, total)


class _Ranged(_Started):
    """A method with an option `range_t` besides."""

    range_t: Any

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        if total is not None:
            resolve_step(self.range_t, total, "range_t")
        super().check_fit(size, total)


@METHODS.add("sddm")
@dataclass(frozen=True)
class SDDM(_Ranged, CachedGuidance):
    """Options of `sddm.sample`: guided above step T0, the plain diffusion model below it."""

    takes_energies = True
    about = "SDDM"

    range_t: int | float = option(
        0, "T0: guidance ends at this step of the respaced schedule, or share of it as 0.3", least=0, metavar="STEP"
    )
    blocks: int = _blocks()
    variant: str = option(
        "manifold",
        "manifold: as the method's authors describe it; released: as their code computes it",
        choices=VARIANTS,
    )
    start: int | float | None = _start()
    detail_merge: bool = option(False, "merge directions per block instead of per channel")
    moo: str = option(
        "min_norm", "merge directions by their minimum-norm point, or add them up (ablation)", choices=MERGES
    )
    manifold: str = option(
        "badain",
        "manifold of the reference's block statistics, or its low frequencies (ablation)",
        choices=MANIFOLDS,
    )
    down_n: int = _down_n()
    sampler: str = option("ancestral", "solver of the steps; ddim and dpmpp_2m need fewer", choices=SOLVERS)
    eta: float = option(0.0, "noise of ddim, from 0 for none to 1 for as much as ancestral", least=0, most=1)
    energy_scale: float = option(LAMBDA, "lambda: length of an energy's direction relative to the score's", least=0)
    details: int | float | None = option(
        None,
        "keep thin features of the reference (eyes) down to this step or share",
        metavar="STEP",
        flag="details_t",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.eta and not self._takes_eta():
            raise InputError(f"`sampler` {self.sampler} has none", parameter="eta", value=self.eta)

    def ignored(self) -> set[str]:
        # A scale as published is left out of records, as version 0.2 had none.
        unused = {"energy_scale"} if self.energy_scale == LAMBDA else set()
        unused |= set() if self._takes_eta() else {"eta"}
        unused |= {"details"} if self.details is None else set()
        return super().ignored() | unused | (set() if self.manifold == "low_pass" else {"down_n"})

    def _takes_eta(self):
        return getattr(SOLVERS.pick(self.sampler), "takes_eta", True)

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        super().check_fit(size, total)
        if total is not None and self.details is not None:
            resolve_step(self.details, total, "details")
        if size is not None:
            MANIFOLDS.pick(self.manifold)(torch.zeros(1, 3, *size), blocks=self.blocks, down_n=self.down_n)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        if self.details is not None and isinstance(target.codec, Autoencoder):
            reason = "it finds thin features of pixels, and the model works on latents"
            raise InputError(reason, parameter="details", value=self.details)
        return bind(sddm.sample, energies=energies, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("ilvr")
@dataclass(frozen=True)
class ILVR(_Ranged, CachedGuidance):
    """Options of `baselines.ilvr`."""

    about = "ILVR"

    down_n: int = option(32, "keep the frequencies of an image of 1/N of the size", least=1, flag="down_N")
    range_t: int | float = option(
        20, "guidance ends at this step of the schedule, or share of it as 0.3", least=0, metavar="STEP"
    )
    start: int | float | None = _start()

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        super().check_fit(size, total)
        if size is not None:
            check_down_n(self.down_n, size)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        return bind(baselines.ilvr, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("sdedit")
@dataclass(frozen=True)
class SDEdit(_Started, Cached):
    """Options of `baselines.sdedit`. Predicted images are not clipped, learned variances are not used."""

    about = "SDEdit"

    start: int | float = option(
        500, "steps from the noised reference to the image, or share of the schedule", above=0, metavar="STEP", flag="t"
    )

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        return bind(baselines.sdedit, variance=_variance(target), **vars(self))


@METHODS.add("egsde")
@dataclass(frozen=True)
class EGSDE(SDEdit, CachedGuidance):
    """Options of `baselines.egsde`. Predicted images are not clipped, learned variances are not used."""

    about = "EGSDE"

    ls: float = option(500.0, "weight of realism, 0 for none")
    li: float = option(2.0, "weight of faithfulness, 0 for none")
    down_n: int = option(32, "faithfulness is to 1/N of the resolution", least=1, flag="down_N")
    encoder: str | None = option(
        None, "checkpoint of the domain-specific extractor", file=True, metavar="FILE", flag="dsepath"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.cache_interval > 1 and not self.cache_guided and (self.ls or self.li):
            reason = "all steps are guided ones; `cache_guided` True is needed"
            raise InputError(reason, parameter="cache_interval", value=self.cache_interval)
        if self.ls and not self.encoder:
            raise InputError(f"`ls` {self.ls:g} needs it; `ls` 0 does without the realism energy", parameter="encoder")
        if self.ls and "://" not in str(self.encoder) and not os.path.exists(str(self.encoder)):
            raise InputError(f"no such file, and `ls` {self.ls:g} needs it", parameter="encoder", value=self.encoder)

    def ignored(self) -> set[str]:
        return super().ignored() | (set() if self.ls else {"encoder"}) | (set() if self.li else {"down_n"})

    def check_fit(self, size: tuple[int, int] | None, total: int | None) -> None:
        super().check_fit(size, total)
        if size is not None and self.li:
            check_down_n(self.down_n, size)

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        options = {**vars(self), "variance": _variance(target)}
        if self.ls:
            options["encoder"], options["timestep"], _ = load_encoder("encoder", str(self.encoder), target)
        return bind(baselines.egsde, **options)


@METHODS.add("unconditional")
@dataclass(frozen=True)
class Unconditional(Cached):
    """Options of `baselines.unconditional`."""

    use_ddim: bool = option(False, "DDIM instead of ancestral sampling")
    eta: float = option(0.0, "noise of DDIM, 0 for none to 1", least=0, most=1)

    def __post_init__(self) -> None:
        check(self)
        if self.eta and not self.use_ddim:
            raise InputError("it is for `use_ddim` True", parameter="eta", value=self.eta)

    @property
    def about(self) -> str:  # type: ignore[override]
        return f"DDIM, eta {self.eta:g}" if self.use_ddim else "ancestral sampling"

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        return bind(baselines.unconditional, clip_denoised=target.clip_denoised, **vars(self))


@METHODS.add("classifier")
@dataclass(frozen=True)
class ClassifierGuided(Method):
    """Options of `generation.classifier_guided`. classifier_flags: known settings of the classifier's network."""

    takes_labels = True
    about = "classifier guidance"

    classifier: str | None = option(
        None, "checkpoint of the classifier", file=True, metavar="FILE", flag="classifier_path"
    )
    classifier_scale: float = option(1.0, "factor of the classifier's gradient", least=0)
    use_ddim: bool = option(False, "DDIM instead of ancestral sampling")
    classifier_use_fp16: bool | None = option(None, "compute the classifier in half precision")
    classifier_width: int | None = option(None, "base width of the classifier", least=1, most=1 << 14)
    classifier_depth: int | None = option(None, "residual blocks per level of the classifier", least=1, most=64)
    classifier_attention_resolutions: str | None = option(None, "sides of its feature maps with attention")
    classifier_use_scale_shift_norm: bool | None = option(None, "scale and shift by its time embedding")
    classifier_resblock_updown: bool | None = option(None, "resample inside its residual blocks")
    classifier_pool: str | None = option(None, "pooling of its features, as attention or adaptive")

    def __post_init__(self) -> None:
        check(self)
        if self.classifier is None:
            raise InputError("give the checkpoint of a classifier", parameter="classifier")

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        own = ("classifier", "classifier_scale", "use_ddim")
        flags = {name: value for name, value in vars(self).items() if name not in own and value is not None}
        network, info = load_model(str(self.classifier), device=target.device, **flags)
        classes, given = info.flags.get("num_class", 0), num_classes(target)
        wrong = {"parameter": "classifier", "value": self.classifier}
        if info.model_type != "ENCODER":
            raise InputError("it is a diffusion model, not a classifier", **wrong)
        if given is not None and given < classes:
            raise InputError(f"it has {classes} classes, and the model has {given}", **wrong)
        options = {"scale": self.classifier_scale, "use_ddim": self.use_ddim, "clip_denoised": target.clip_denoised}
        bound = bind(generation.classifier_guided, classifier=network, **options)
        bound.num_classes, bound.info = classes, info  # type: ignore[attr-defined]
        return bound


@METHODS.add("super_resolution")
@dataclass(frozen=True)
class SuperResolution(Method):
    """Options of `generation.super_resolution`."""

    takes_labels = True
    about = "super-resolution"

    use_ddim: bool = option(False, "DDIM instead of ancestral sampling")

    def bind(self, target: Target, energies: Sequence[Energy] = ()) -> Callable[..., torch.Tensor]:
        options = {"use_ddim": self.use_ddim, "clip_denoised": target.clip_denoised}
        return bind(generation.super_resolution, large_size=target.image_size, **options)


def _variance(target: Target) -> str:
    return "fixed_small" if target.sigma_small else "fixed_large"


# ---- energies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnergyOptions:
    """Options of an energy. pixels: it is for models of pixels alone, not of latents."""

    pixels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def create(self, target: Target) -> Energy:
        """The energy for a target. Raises InputError."""
        raise NotImplementedError


@ENERGIES.add("vgg")
@dataclass(frozen=True)
class VGG(EnergyOptions):
    """Options of `energy.vgg`."""

    pixels = True

    weights: str | None = option(
        "models/vgg_normalised.pth", "AdaIN's VGG weights, for vgg", file=True, metavar="FILE", flag="vgg_path"
    )
    level: int = option(1, "VGG feature reluN_1, for vgg", least=1, most=5, flag="vggdepth")
    blocks: int = _blocks()
    vgg_bf16: bool = option(False, "compute vgg and its gradient in bf16; needs `precision` bf16")

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values."""
        return set() if self.vgg_bf16 else {"vgg_bf16"}

    def create(self, target: Target) -> Energy:
        path = _needed(self.weights, "weights", "vgg")
        if self.vgg_bf16 and target.precision != "bf16":
            reason = f"it needs `precision` bf16, and that is {target.precision}"
            raise InputError(reason, parameter="vgg_bf16", value=True)
        return energy.vgg(path, self.blocks, self.level, bf16=self.vgg_bf16, channels_last=target.fuse)


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

    encoder: str | None = option(
        None, "checkpoint of the domain-specific extractor, for dse", file=True, metavar="FILE", flag="dsepath"
    )

    def create(self, target: Target) -> Energy:
        encoder, timestep, _ = load_encoder("encoder", _needed(self.encoder, "encoder", "dse"), target)
        return energy.dse(encoder, timestep)


@ENERGIES.add("low_pass")
@dataclass(frozen=True)
class LowPass(EnergyOptions):
    """Options of `energy.low_pass`."""

    down_n: int = _down_n()

    def create(self, target: Target) -> Energy:
        return energy.low_pass(self.down_n)


@ENERGIES.add("classifier")
@dataclass(frozen=True)
class Classifier(EnergyOptions):
    """Options of `energy.classifier`."""

    pixels = True

    classifier: str | None = option(
        None,
        "checkpoint of a noisy-image classifier, for classifier",
        file=True,
        metavar="FILE",
        flag="classifier_path",
    )
    target_class: int | str | None = option(
        None, "class to move to, for classifier: a number or a name", metavar="CLASS"
    )

    def create(self, target: Target) -> Energy:
        path = _needed(self.classifier, "classifier", "classifier")
        if self.target_class is None:
            raise InputError("`energy` classifier needs it", parameter="target_class")
        model, timestep, info = load_encoder("classifier", path, target)
        y = class_number(self.target_class, info, "target_class")
        return energy.classifier(model, y, timestep)


def _needed(path: str | None, parameter: str, name: str) -> str:
    """The path, which must be given and exist."""
    if not path:
        raise InputError(f"`energy` {name} needs it", parameter=parameter)
    if "://" not in path and not os.path.exists(path):
        reason = f"no such file, and `energy` {name} needs it; models/README.md says where it is published"
        raise InputError(reason, parameter=parameter, value=path)
    return path


def load_encoder(parameter: str, path: str, target: Target) -> tuple[nn.Module, Callable[[float], float] | None, Any]:
    """An extractor or classifier for a target, its timestep of a noise level (`matching_timestep`), and its info.

    parameter: the option that names it, for errors. Raises InputError for a file that does not suit the target.
    """
    encoder, info = load_model(path, device=target.device)
    wrong = {"parameter": parameter, "value": path}
    if info.model_type != "ENCODER":
        raise InputError("it is a diffusion model, not a classifier or extractor", **wrong)
    if info.flags["image_size"] != target.shape[-1]:
        raise InputError(f"it is for {info.flags['image_size']} pixels, the model has {target.shape[-1]}", **wrong)
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
        if name not in ENERGIES:
            raise InputError(fitting(name, [*ENERGIES, "none"]), parameter="energy", value=name)
    if len(set(names)) < len(names):
        raise InputError("it names an energy twice", parameter="energy", value=given)
    return names


def create_energies(options: Sequence[EnergyOptions], target: Target) -> list[Energy]:
    """The energies that options like `VGG` describe, tried out at the model's size."""
    for each in options:
        if each.pixels and isinstance(target.codec, Autoencoder):
            name = next(name for name, kind in ENERGIES.items() if type(each) is kind)
            raise InputError("it compares pixels, and the model works on latents", parameter="energy", value=name)
    energies = [each.create(target) for each in options]
    energy.prepared(energies, torch.zeros(1, *target.shape, device=target.device))
    return energies


# ---- a method on a target --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Translation:
    """A method bound to a target: batches of pictures in, pictures out.

    Raises InputError where the method does not suit the target.
    """

    method: Method
    target: Target
    energies: Sequence[Energy] = ()
    sampler: Callable[..., torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.method.check_fit(self.target.shape[1:], self.target.diffusion.num_timesteps)
        cached(self.target.model, getattr(self.method, "cache_interval", 1))  # refuses networks that cannot share
        object.__setattr__(self, "sampler", self.method.bind(self.target, self.energies))

    @classmethod
    def of(cls, method: Method, target: Target, energies: Sequence[EnergyOptions] = ()) -> "Translation":
        """A method on a target, with the energies that options describe."""
        method.check_fit(target.shape[1:], target.diffusion.num_timesteps)
        return cls(method, target, create_energies(energies, target))

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
        yield from self.sampler.steps(target.model, target.diffusion, ref, noise=noise, **labels)  # type: ignore

    @torch.no_grad()
    def picture(self, x: torch.Tensor) -> torch.Tensor:
        """States [N, C, H, W] of the model's space as pictures [N, 3, S, S]."""
        return self.target.codec.decode(x)

    def __call__(
        self, batch: Batch, *, noise: Noise | None = None, callback: Callable[[State], Any] | None = None
    ) -> torch.Tensor:
        """Translate a batch; returns pictures [N, 3, S, S]. callback: sees the state after each step.

        Raises NotFiniteError, with the pictures, where the model gives values that are not finite.
        """
        state: State = {}
        try:
            for state in self.states(batch, noise):
                if callback is not None:
                    callback(state)
        except NotFiniteError as error:
            raise NotFiniteError(self.picture(error.x.nan_to_num()), error.finite) from None
        pictures = self.picture(state["x"])
        finite = pictures.isfinite().flatten(1).all(1)
        if not finite.all():
            raise NotFiniteError(pictures, finite)
        return pictures
