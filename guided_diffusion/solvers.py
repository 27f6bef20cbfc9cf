"""How a step of the reverse process is taken: ancestral sampling, DDIM, DPM-Solver++(2M).

A solver has `posterior(out, x, t)`, which makes its own mean and log-variance of what
`GaussianDiffusion.p_mean_variance` gave at x [N, C, H, W] and t [N], for guided steps to start from; and
`step(out, x, i, t, noise)`, the whole plain step x_i -> x_{i-1}, where out is from `posterior`, all entries of t are i,
and noise is a draw [N, C, H, W].
"""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch

from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion
from .options import Registry

SOLVERS = Registry("sampler")
"""How a step is taken, by name: a class of (diffusion, eta) like `Ancestral`."""


@SOLVERS.add("ancestral")
class Ancestral:
    """Samples of the model's own p(x_{i-1} | x_i) (Ho et al. 2020)."""

    takes_eta = False

    def __init__(self, diffusion: GaussianDiffusion, eta: float) -> None:
        self.diffusion = diffusion

    def posterior(self, out: dict[str, Any], x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        return out

    def step(self, out: dict[str, Any], x: torch.Tensor, i: int, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.diffusion.add_noise(out, t, noise)


@SOLVERS.add("ddim")
class DDIM(Ancestral):
    """DDIM (Song et al. 2021, equation 12), for fewer steps. eta 0 adds no noise, 1 the posterior's variance."""

    takes_eta = True

    def __init__(self, diffusion: GaussianDiffusion, eta: float) -> None:
        super().__init__(diffusion, eta)
        self.eta = eta

    def posterior(self, out: dict[str, Any], x: torch.Tensor, t: torch.Tensor) -> dict[str, Any]:
        mean, sigma = self.diffusion.ddim_mean_sigma(out["pred_xstart"], x, t, self.eta)
        return {**out, "mean": mean, "variance": sigma**2, "log_variance": 2 * sigma.log()}


@SOLVERS.add("dpmpp_2m")
class DPMSolverPP2M(DDIM):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), second order with one evaluation a step; guided steps are DDIM's.

    With x = alpha x_0 + sigma eps, lambda = log(alpha / sigma) and h = lambda_{i-1} - lambda_i,
    x_{i-1} = sigma_{i-1} / sigma_i x_i + alpha_{i-1} (1 - e^-h) D, where D extrapolates the predicted x_0 of this step
    and the one before it. The first step has none before it, and the last goes to lambda = infinity: there D is the
    prediction.
    """

    def __init__(self, diffusion: GaussianDiffusion, eta: float) -> None:
        super().__init__(diffusion, eta)
        self.last: tuple[torch.Tensor, float] | None = None  # prediction and h of the step before

    def step(self, out: dict[str, Any], x: torch.Tensor, i: int, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        alpha_bar = float(self.diffusion.alphas_cumprod[i])
        alpha_bar_prev = float(self.diffusion.alphas_cumprod_prev[i])
        prediction = out["pred_xstart"]
        if alpha_bar_prev == 1:
            return prediction
        h = (_log_snr(alpha_bar_prev) - _log_snr(alpha_bar)) / 2
        target = prediction
        if self.last is not None:
            before, h_before = self.last
            target = prediction + h / (2 * h_before) * (prediction - before)
        self.last = prediction, h
        ratio = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
        return ratio * x - math.sqrt(alpha_bar_prev) * math.expm1(-h) * target


def _log_snr(alpha_bar: float) -> float:
    return math.log(alpha_bar / (1 - alpha_bar))


def create_solver(name: str, diffusion: GaussianDiffusion, eta: float = 0.0) -> Any:
    """The solver of that name for one run. eta: DDIM's share of noise in guided and plain steps, 0 to 1."""
    if not 0 <= eta <= 1:
        raise InputError("it must be from 0 to 1", parameter="eta", value=eta)
    return SOLVERS.pick(name)(diffusion, eta)


# ---- what samplers have in common -----------------------------------------------------------------------------------

Noise = Callable[[torch.Size], torch.Tensor]
State = dict[str, Any]


def sampler(steps: Callable[..., Iterator[State]]) -> Callable[..., torch.Tensor]:
    """A sampling function from its generator of states, one after each step.

    The function takes the generator's arguments and `callback`, and returns the last state's x. A callback of one
    parameter gets every state, a dict with the index `i`, the state `x` after step i, `pred_xstart`, the prediction of
    x_0 that it was made with, and `guided`, a list of what guided evaluations of the step did; a callback of two
    parameters gets (i, x). `function.steps` is the generator, which may be closed at any step.
    """
    generator = torch.no_grad()(steps)

    @wraps(steps)
    def sample(*arguments: Any, callback: Callable | None = None, **options: Any) -> torch.Tensor:
        tell = _observer(callback)
        state: State = {}
        for state in generator(*arguments, **options):
            tell(state)
        return state["x"]

    sample.steps = generator  # type: ignore[attr-defined]
    return sample


def bind(sample: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    """A sampling function with some of its options given; its generator `steps` has them, too."""
    bound = partial(sample, **options)
    bound.steps = partial(sample.steps, **options)  # type: ignore[attr-defined]
    return bound


def _observer(callback: Callable | None) -> Callable[[State], Any]:
    if callback is None:
        return lambda state: None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(callback).parameters.values()
        needed = [p for p in parameters if p.kind in kinds and p.default is p.empty]
    except (TypeError, ValueError):
        needed = []
    return (lambda state: callback(state["i"], state["x"])) if len(needed) == 2 else callback


def gaussian_like(ref: torch.Tensor) -> Noise:
    """Standard normal draws on the device and in the type of `ref`."""
    return lambda shape: torch.randn(shape, device=ref.device, dtype=ref.dtype)


def at_step(ref: torch.Tensor, i: int) -> torch.Tensor:
    """The index i for every image of a batch, long [N]."""
    return torch.full((ref.shape[0],), i, device=ref.device, dtype=torch.long)


def check_references(ref: torch.Tensor) -> None:
    """Raise InputError unless ref is a batch of images in [-1, 1]."""
    if not isinstance(ref, torch.Tensor) or ref.ndim != 4 or not ref.is_floating_point():
        what = f"{ref.dtype} {list(ref.shape)}" if isinstance(ref, torch.Tensor) else type(ref).__name__
        raise InputError("it must be a floating-point tensor [N, C, H, W] in [-1, 1]", parameter="ref", value=what)
    if ref.numel() == 0:
        raise InputError("it has no image", parameter="ref", value=f"a tensor {list(ref.shape)}")
    low, high = (float(end) for end in ref.aminmax())
    if not (low >= -1.001 and high <= 1.001):
        reason = "it must lie in [-1, 1]: image_datasets.to_tensor converts 8-bit pixels"
        raise InputError(reason, parameter="ref", value=f"a tensor with values from {low:g} to {high:g}")


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
