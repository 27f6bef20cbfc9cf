"""Solvers: how a step of the reverse process is taken. Ancestral sampling, DDIM, DPM-Solver++(2M).

A solver is a class of (diffusion, eta) with two methods. `posterior(out, x, i)` gives the mean and log-variance that
guided steps start from. `step(denoise, x, i, out, noise, state)` takes a whole plain step x_i -> x_{i-1} and returns
it with the state for the next plain step. There, denoise(x, i) evaluates the model and returns the dict of
`GaussianDiffusion.p_mean_variance`; out is `posterior(denoise(x, i), x, i)`; noise is a draw [N, C, H, W]; state is
None at first. takes_eta: whether eta, DDIM's share of noise, has an effect.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from .codec import in_range
from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion, recordable
from .registry import Registry

SOLVERS = Registry("sampler")  # solvers by name: classes of (diffusion, eta)

Prediction = dict[str, Any]
Denoise = Callable[[Tensor, int], Prediction]
Stepped = tuple[Tensor, Any]
Noise = Callable[[torch.Size], Tensor]
State = dict[str, Any]


@SOLVERS.add("ancestral")
class Ancestral:
    """Samples of the model's own p(x_{i-1} | x_i) (Ho et al. 2020)."""

    takes_eta = False

    def __init__(self, diffusion: GaussianDiffusion, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError("it must be from 0 to 1", parameter="eta", value=eta)
        self.diffusion, self.eta = diffusion, eta

    def posterior(self, out: Prediction, x: Tensor, i: int) -> Prediction:
        return out

    def step(self, denoise: Denoise, x: Tensor, i: int, out: Prediction, noise: Tensor, state: Any) -> Stepped:
        return self.diffusion.add_noise(out, at_step(x, i), noise), None


@SOLVERS.add("ddim")
class DDIM(Ancestral):
    """DDIM (Song et al. 2021, equation 12), for fewer steps. eta 0 adds no noise, 1 the posterior's variance."""

    takes_eta = True

    def posterior(self, out: Prediction, x: Tensor, i: int) -> Prediction:
        mean, sigma = self.diffusion.ddim_mean_sigma(out["pred_xstart"], x, at_step(x, i), self.eta)
        return {**out, "mean": mean, "variance": sigma**2, "log_variance": 2 * sigma.log()}


@SOLVERS.add("dpmpp_2m")
class DPMSolverPP2M(DDIM):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), second order with one evaluation a step; guided steps are DDIM's.

    With x = alpha x_0 + sigma eps, lambda = log(alpha / sigma) and h = lambda_{i-1} - lambda_i,
    x_{i-1} = sigma_{i-1} / sigma_i x_i + alpha_{i-1} (1 - e^-h) D, where D extrapolates the predicted x_0 of this step
    and of the one before it, which `state` holds with its h; at both ends D is the prediction.
    """

    def step(self, denoise: Denoise, x: Tensor, i: int, out: Prediction, noise: Tensor, state: Any) -> Stepped:
        alpha_bar = float(self.diffusion.alphas_cumprod[i])
        alpha_bar_prev = float(self.diffusion.alphas_cumprod_prev[i])
        prediction = target = out["pred_xstart"]
        if alpha_bar_prev == 1:
            return prediction, None
        h = (math.log(alpha_bar_prev / (1 - alpha_bar_prev)) - math.log(alpha_bar / (1 - alpha_bar))) / 2
        if state is not None:
            before, h_before = state
            target = prediction + h / (2 * h_before) * (prediction - before)
        ratio = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
        return ratio * x - math.sqrt(alpha_bar_prev) * math.expm1(-h) * target, (prediction, h)


class NotFiniteError(InputError):
    """The model gave NaN or infinite values. x: the result [N, C, H, W]; finite: which images are sound, bool [N]."""

    def __init__(self, x: Tensor, finite: Tensor) -> None:
        super().__init__("the model gave values that are NaN or infinite (too low a precision for it?)")
        self.x, self.finite = x, finite


def check_finite(x: Tensor) -> Tensor:
    """x [N, C, H, W] itself; raises NotFiniteError where it has other values than finite ones."""
    finite = x.isfinite().flatten(1).all(1)
    if not finite.all():
        raise NotFiniteError(x, finite)
    return x


def sampler(steps: Callable[..., Iterator[State]]) -> Callable[..., Tensor]:
    """Make a sampling function of its generator of states, one after each step.

    A state is a dict of the index `i`, `x` after step i, `pred_xstart`, the prediction of x_0 that it was made with,
    and `guided`, a list of what guided evaluations of the step did. The function takes the generator's arguments and
    `callback(state)` or `callback(i, x)`, and returns the last x; `function.steps` is the generator, which may be
    closed at any step. Both raise NotFiniteError in place of a last state that is not finite, and ignore the caller's
    inference mode and autocast.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def generator(
        model: Callable, diffusion: GaussianDiffusion, ref: Tensor, *arguments: Any, **options: Any
    ) -> Iterator[State]:
        device, noise = "cpu", options.get("noise")
        if isinstance(ref, Tensor) and torch.amp.is_autocast_available(ref.device.type):
            device = ref.device.type
        if noise is not None:
            options["noise"] = lambda shape: recordable(noise(shape))
        run = steps(model, diffusion, recordable(ref), *arguments, **options)
        while True:
            with torch.autocast(device, enabled=False):
                state = next(run, None)
            if state is None:
                return
            if state["i"] == 0:
                check_finite(state["x"])
            yield state

    @wraps(steps)
    def sample(*arguments: Any, callback: Callable | None = None, **options: Any) -> Tensor:
        tell, state = _observer(callback), State()
        for state in generator(*arguments, **options):
            tell(state)
        return state["x"]

    sample.steps = wraps(steps)(generator)  # type: ignore[attr-defined]
    return sample


def bind(sample: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A sampling function with some of its options given; its generator `steps` has them, too."""
    bound = partial(sample, **options)
    bound.steps = partial(sample.steps, **options)  # type: ignore[attr-defined]
    return bound


def _observer(callback: Callable | None) -> Callable[[State], Any]:
    """A callback as a function of states."""
    if callback is None:
        return lambda state: None
    try:
        inspect.signature(callback).bind(State())
    except TypeError:  # it needs two arguments
        return lambda state: callback(state["i"], state["x"])
    return callback


def gaussian_like(ref: Tensor) -> Noise:
    """Standard normal draws on the device and in the type of `ref`."""
    return lambda shape: torch.randn(shape, device=ref.device, dtype=ref.dtype)


def at_step(ref: Tensor, i: int) -> Tensor:
    """The index i for every image of a batch, long [N]."""
    return torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)


LARGEST = 100.0  # No latents are as large as this in magnitude; pixels from 0 to 255 are.


def check_references(ref: Any, clip_denoised: bool | float = False) -> Tensor:
    """References as a sampling function takes them: a floating-point tensor [N, C, H, W], finite and not empty.

    Where predictions are clipped to [-1, 1], references are pixels in that range: those that overshoot it by up to a
    tenth are clipped. Raises InputError for `ref`.
    """
    if not isinstance(ref, Tensor) or ref.ndim != 4 or not ref.is_floating_point() or not ref.numel():
        found = f"{ref.dtype} {list(ref.shape)}" if isinstance(ref, Tensor) else type(ref).__name__
        reason = "it must be a floating-point tensor [N, C, H, W] in [-1, 1] of one image at least"
        raise InputError(reason, parameter="ref", value=found)
    low, high = (float(end) for end in ref.aminmax())
    if not -LARGEST <= low <= high <= LARGEST:
        reason = "it must lie in [-1, 1], or be latents of about unit variance"
        raise InputError(reason, parameter="ref", value=f"a tensor with values from {low:g} to {high:g}")
    return in_range(ref) if clip_denoised and float(clip_denoised) == 1 else ref


def resolve_step(value: int | float, steps: int, parameter: str, first: int = 0, last: int | None = None) -> int:
    """A step of a schedule of `steps` steps: a whole number as it is, a number below 1 as a share of the schedule.

    first, last: the steps that fit, 0 to steps - 1 by default. Raises InputError for the parameter.
    """
    last = steps - 1 if last is None else last
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Every share fits: one so near to an end that it rounds beyond the steps is that end.
    found = min(max(round(value * steps), first), last) if number and 0 < value < 1 else value
    if not number or not first <= found <= last or found != int(found):
        reason = f"a schedule of {steps} steps takes {first} to {last}, or a share of it below 1 such as 0.3"
        raise InputError(reason, parameter=parameter, value=value)
    return int(found)


def late_start(start: int | float | None, steps: int) -> int:
    """The number of steps of a run that begins late, `start` None for a whole one."""
    return steps if start is None else resolve_step(start, steps, "start", 1, steps)


def first_state(
    diffusion: GaussianDiffusion, ref: Tensor, start: int | float | None, noise: Noise
) -> tuple[int, Tensor]:
    """The number of steps of a run, and its first state: noise, or the reference noised to step start - 1."""
    steps, x = late_start(start, diffusion.num_timesteps), noise(ref.shape)
    return steps, x if start is None else diffusion.q_sample(ref, at_step(ref, steps - 1), x)
