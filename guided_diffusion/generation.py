"""guided-diffusion's other jobs as functions of tensors: sampling guided by a classifier, and super-resolution.

model(x, t, ...): the diffusion model, t original timesteps; diffusion: its (respaced) process. noise(shape): every
random draw in order, x_T first, then one per step. callback: gets a dict after every step: `i`, `x` (the state),
`pred_xstart` and `guided` (empty, as no step is SDDM's). Both return [N, 3, H, W].
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .caching import WithClass
from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion
from .options import check, option
from .solvers import Noise, gaussian_like


@dataclass(frozen=True)
class GuidanceOptions:
    """How a classifier guides."""

    classifier: str | None = option(None, "checkpoint of the classifier", file=True, metavar="FILE")
    classifier_scale: float = option(1.0, "factor of the classifier's gradient", least=0)
    class_index: int | None = option(None, "make images of this class; not given: of random ones", least=0)
    use_ddim: bool = option(False, "DDIM instead of ancestral sampling")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")
    num_samples: int = option(10000, "images to make", least=1, most=1_000_000, runtime=True)
    npz: bool = option(True, "also write all images and classes as one .npz file", runtime=True)

    def __post_init__(self) -> None:
        check(self)
        if self.classifier is None:
            raise InputError("give the checkpoint of a classifier", parameter="classifier")


@dataclass(frozen=True)
class ClassifierFlags:
    """The classifier's network; what is None is read from its checkpoint."""

    classifier_use_fp16: bool | None = option(None, "compute in half precision")
    classifier_width: int | None = option(None, "base width of the network", least=1, most=1 << 14)
    classifier_depth: int | None = option(None, "residual blocks per level", least=1, most=64)
    classifier_attention_resolutions: str | None = option(None, "sides of the feature maps with attention")
    classifier_use_scale_shift_norm: bool | None = option(None, "scale and shift by the time embedding")
    classifier_resblock_updown: bool | None = option(None, "resample inside residual blocks")
    classifier_pool: str | None = option(None, "how features become one vector, as attention or adaptive")

    def __post_init__(self) -> None:
        check(self)

    def given(self) -> dict[str, Any]:
        """The flags that are not None, for `load_model`."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class EnlargeOptions:
    """What is enlarged, and how."""

    base_samples: str | None = option(None, "folder of small images, or an .npz file", runtime=True, metavar="PATH")
    small_size: int = option(64, "side to which images of a folder are brought first", least=1, most=1 << 14)
    num_samples: int = option(10000, "enlarge only the first so many", least=1, most=1_000_000, runtime=True)
    class_index: int | None = option(None, "class of all images; not given: those of the .npz file", least=0)
    use_ddim: bool = option(False, "DDIM instead of ancestral sampling")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")
    npz: bool = option(True, "also write all images as one .npz file", runtime=True)

    def __post_init__(self) -> None:
        check(self)
        if self.base_samples is None:
            raise InputError("give a folder of small images, or an .npz file", parameter="base_samples")


@torch.no_grad()
def classifier_guided(
    model: Callable[..., torch.Tensor],
    diffusion: GaussianDiffusion,
    ref: torch.Tensor,
    *,
    classifier: torch.nn.Module,
    labels: torch.Tensor,
    scale: float = 1.0,
    class_cond: bool = False,
    use_ddim: bool = False,
    clip_denoised: bool = True,
    noise: Noise | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> torch.Tensor:
    """Images of classes `labels` [N], guided by a classifier of noisy images (Dhariwal & Nichol 2021, section 4).

    Of ref only shape, type and device count. scale: factor of the gradient of the log-probability. class_cond: give the
    labels to the model, too. use_ddim: DDIM, which conditions the score, instead of ancestral steps, whose mean moves.
    """

    def gradient(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            chosen = F.log_softmax(classifier(x, t).float(), dim=-1).gather(1, labels[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0] * scale

    def conditional(x, t):
        return model(x, t, labels) if class_cond else model(x, t)

    return _denoise(conditional, diffusion, ref, gradient, use_ddim, clip_denoised, noise, callback)


@torch.no_grad()
def super_resolution(
    model: Callable[..., torch.Tensor],
    diffusion: GaussianDiffusion,
    ref: torch.Tensor,
    *,
    large_size: int,
    labels: torch.Tensor | None = None,
    use_ddim: bool = False,
    clip_denoised: bool = True,
    noise: Noise | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> torch.Tensor:
    """Images of side large_size of small ones, ref [N, 3, h, w]; model: a `SuperResModel`; labels [N]: its classes."""

    def enlarging(x, t):
        return model(x, t, low_res=ref, **({} if labels is None else {"y": labels}))

    like = ref.new_empty(()).expand(*ref.shape[:2], large_size, large_size)
    return _denoise(enlarging, diffusion, like, None, use_ddim, clip_denoised, noise, callback)


def _denoise(model, diffusion, like, cond_fn, use_ddim, clip_denoised, noise, callback):
    """From noise to an image of like's shape, step by step."""
    noise = noise or gaussian_like(like)
    step = diffusion.ddim_sample if use_ddim else diffusion.p_sample
    x = noise(like.shape)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((like.shape[0],), i, device=like.device, dtype=torch.long)
        out = step(model, x, t, clip_denoised, cond_fn=cond_fn, noise=noise(like.shape))
        x = out["sample"]
        if callback is not None:
            callback({"i": i, "x": x, "pred_xstart": out["pred_xstart"], "guided": ()})
    return x


def with_random_classes(sample: Callable[..., torch.Tensor], num_classes: int) -> Callable[..., torch.Tensor]:
    """A sampler of (model, diffusion, ref, noise=, callback=) that gives every image a class of its own draws."""

    def sample_classes(
        model: Callable, diffusion: GaussianDiffusion, ref: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        labels = draw_labels(options["noise"], len(ref), num_classes, ref.device)
        return sample(WithClass(model, labels), diffusion, ref, **options)

    return sample_classes


def draw_labels(noise: Any, count: int, num_classes: int, device: torch.device) -> torch.Tensor:
    """Random classes [count]: each image's own generator draws its class, before any noise (`run.noise.ImageNoise`)."""
    generators = getattr(noise, "generators", [None] * count)
    drawn = [torch.randint(num_classes, (), generator=generator) for generator in generators]
    return torch.stack(drawn).to(device)
