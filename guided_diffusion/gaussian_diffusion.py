"""Gaussian diffusion in discrete time (Ho et al. 2020; Nichol & Dhariwal 2021): schedules, posterior, sampling loops.

x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Coefficients are float64 arrays with one entry per step; images
are tensors [N, C, H, W] in [-1, 1]; t is a tensor [N] of step indices of *this* process (respaced or not).
"""

import enum
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat

Model = Callable[..., Tensor]
Step = dict[str, Tensor]

SCHEDULES = "linear, cosine, linear:A,B, scaled_linear:A,B, sigmoid:A,B, laplace or betas:B0,B1,…"


def _laplace(u: float) -> float:
    """sqrt(SNR / (1 + SNR)) of the Laplace schedule at time u, which diffusers uses in place of alpha_bar."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BARS = {"cosine": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, "laplace": _laplace}
_BETAS = {
    "linear": lambda low, high, n: np.linspace(low, high, n),
    "scaled_linear": lambda low, high, n: np.linspace(low**0.5, high**0.5, n) ** 2,
    "sigmoid": lambda low, high, n: 1 / (1 + np.exp(-np.linspace(-6, 6, n))) * (high - low) + low,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Return the betas of a noise schedule, float64 [T].

    `linear` (Ho et al.) and `cosine` (Nichol & Dhariwal) as in guided-diffusion; as in diffusers `linear:A,B`,
    `scaled_linear:A,B` and `sigmoid:A,B`, from A to B for any T, and `laplace`; `betas:b0,b1,…` lists T betas.
    Raises InputError for `noise_schedule`.
    """
    n, schedule = num_diffusion_timesteps, str(schedule_name)
    if schedule == "linear":
        # The published end points are for 1000 steps; scaled, the total noise does not depend on their number.
        return np.linspace(1000 / n * 0.0001, 1000 / n * 0.02, n)
    if schedule in _ALPHA_BARS:
        return betas_for_alpha_bar(n, _ALPHA_BARS[schedule])
    name, _, text = schedule.partition(":")
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    wrong: dict = {"parameter": "noise_schedule", "value": schedule_name}
    fits = name == "betas" or (name in _BETAS and len(numbers) == 2)
    if not fits or not numbers or not all(0 < number < 1 for number in numbers):
        raise InputError(f"it can be {SCHEDULES}, with betas above 0 and below 1", **wrong)
    if name == "betas" and len(numbers) != n:
        raise InputError(f"it has {len(numbers)} betas, and `diffusion_steps` is {n}", **wrong)
    betas = np.array(numbers) if name == "betas" else _BETAS[name](numbers[0], numbers[1], n)
    alpha_bars = np.cumprod(1 - betas)
    if not (np.diff(alpha_bars, prepend=1.0) < 0).all() or alpha_bars[-1] < 1e-30:
        raise InputError("its alpha_bar must fall at every step, and stay above 1e-30", **wrong)
    return betas


def betas_for_alpha_bar(num_diffusion_timesteps: int, alpha_bar: Callable[[float], float]) -> np.ndarray:
    """Return betas, float64 [T] and at most 0.999, for alpha_bar given as a function of time in [0, 1]."""
    n = num_diffusion_timesteps
    return np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)])


class ModelMeanType(enum.Enum):
    """Prediction target; VELOCITY: sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022)."""

    START_X = enum.auto()
    EPSILON = enum.auto()
    VELOCITY = enum.auto()


class ModelVarType(enum.Enum):
    """Variance of the reverse step; LEARNED_RANGE interpolates between the two fixed ones."""

    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """Training loss: mean squared error (with or without the rescaled bound for learned variances) or the bound."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    RESCALED_KL = enum.auto()


def _last_sample(steps: Callable[..., Iterator[Step]]) -> Callable[..., Tensor]:
    """The method that runs a generator method to its end, with the same parameters, and returns the last sample."""

    def loop(self: "GaussianDiffusion", *args: Any, **kwargs: Any) -> Tensor:
        sample = torch.empty(0)
        for out in getattr(self, steps.__name__)(*args, **kwargs):
            sample = out["sample"]
        return sample

    loop.__doc__ = f"Return the last sample of `{steps.__name__}`, whose parameters it has."
    loop.__signature__ = inspect.signature(steps)  # type: ignore[attr-defined]
    return loop


def _with_prediction(cond_fn, out, t):
    """cond_fn(x, t, out, **model_kwargs) as a function without `out`, called with step indices."""
    return lambda x, _, **model_kwargs: cond_fn(x, t, out, **model_kwargs)


def _nonzero(t, x):
    """1 for images at t > 0, 0 for those at 0, of x's dtype and shaped to broadcast over x."""
    return (t != 0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def recordable(value: Any) -> Any:
    """A tensor that autograd can record: a copy of one that was made in inference mode. Other values as they are."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


class GaussianDiffusion:
    """The forward process and its approximate reversal.

    betas: float64 [T], in (0, 1]. rescale_timesteps: the model gets t * 1000 / T. alpha_bars: see `from_alpha_bars`.
    The arrays `alphas_cumprod`, `posterior_variance`, `posterior_mean_coef1`, … keep guided-diffusion's names.
    `timestep_map` [T] holds the original timesteps, which the model is called with.
    """

    def __init__(
        self, *, betas: Any, model_mean_type: ModelMeanType, model_var_type: ModelVarType,
        loss_type: LossType = LossType.MSE, rescale_timesteps: bool = False, alpha_bars: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one-dimensional with values in (0, 1]")
        self.num_timesteps = self.original_num_steps = len(betas)
        self.timestep_map: list[int] | list[float] = list(range(len(betas)))
        # Small values of one are rounded away in the other two.
        alphas = 1.0 - betas if alpha_bars is None else alpha_bars / np.append(1.0, alpha_bars[:-1])
        self.betas, self.alphas = betas, alphas
        self.alphas_cumprod = np.cumprod(alphas) if alpha_bars is None else alpha_bars
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)
        # q(x_{t-1} | x_t, x_0); its variance is 0 at t = 0, where the logarithm takes the next entry instead.
        self.posterior_share = betas / (betas + alphas * (1.0 - self.alphas_cumprod_prev))
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        second = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        self.fixed_large_variance = np.append(second, betas[1:])
        self._tables = {}

    @staticmethod
    def from_alpha_bars(
        alpha_bars: Sequence[float] | np.ndarray, *, model_mean_type: ModelMeanType,
        model_var_type: ModelVarType = ModelVarType.FIXED_SMALL,
        timesteps: Sequence[float] | np.ndarray | None = None,
    ) -> "GaussianDiffusion":  # fmt: skip
        """The process with given alpha_bars [T]: from image to noise, strictly falling, above 0 and below 1.

        timesteps: [T], what the model is called with at each step (`timestep_map`), 0 to T - 1 by default; the model
        gets them as int64 where they are integers, otherwise as float32. Raises InputError for either.
        """
        alpha_bars = np.array(alpha_bars, dtype=np.float64)
        before = np.append(1.0, alpha_bars.ravel()[:-1])
        if alpha_bars.ndim != 1 or not alpha_bars.size or not ((alpha_bars > 0) & (alpha_bars < before)).all():
            reason = "it must be a list of numbers below 1 and above 0, each smaller than the one before"
            raise InputError(reason, parameter="alpha_bars", value=alpha_bars.tolist())
        types = {"model_mean_type": model_mean_type, "model_var_type": model_var_type}
        diffusion = GaussianDiffusion(betas=1 - alpha_bars / before, alpha_bars=alpha_bars, **types)
        if timesteps is not None:
            diffusion.timestep_map = np.asarray(timesteps).tolist()
            if np.shape(timesteps) != alpha_bars.shape:
                reason = f"it must have one number for each of the {len(alpha_bars)} entries of `alpha_bars`"
                raise InputError(reason, parameter="timesteps", value=diffusion.timestep_map)
        return diffusion

    def extract(self, name: str, t: Tensor, ndim: int = 4) -> Tensor:
        """Entries of a coefficient array at t [N], float32, shaped to broadcast over data of `ndim` axes.

        name: an attribute, perhaps after `sqrt_`, `log_` and `one_minus_`, which are computed in float64.
        """
        return self._table(name, t.device)[t].reshape(-1, *[1] * (ndim - 1))

    def _table(self, name, device):
        """The array `name` on a device, in float32, or int64 where it holds integers."""
        if (name, device) not in self._tables:
            values = np.asarray(self._array(name))
            # A tensor made in inference mode could not be used in training later; MPS has no float64.
            with torch.inference_mode(False):
                dtype = torch.int64 if values.dtype.kind in "iu" else torch.float32
                self._tables[name, device] = torch.from_numpy(values).to(dtype).to(device)
        return self._tables[name, device]

    def _array(self, name):
        for prefix, function in (("sqrt_", np.sqrt), ("log_", np.log), ("one_minus_", lambda values: 1 - values)):
            if not hasattr(self, name) and name.startswith(prefix):
                return function(self._array(name.removeprefix(prefix)))
        return getattr(self, name)

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Step indices t [N] as what the model is called with: original timesteps, long or float32."""
        timesteps = self._table("timestep_map", t.device)[t]
        return timesteps.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else timesteps

    # ---- the forward process: data of any rank, [N, ...] ----

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and log-variance of q(x_t | x_0), each of x_start's shape."""
        mean = self.extract("sqrt_alphas_cumprod", t, x_start.ndim) * x_start
        variance = self.extract("one_minus_alphas_cumprod", t, x_start.ndim).expand_as(x_start)
        return mean, variance, self.extract("log_one_minus_alphas_cumprod", t, x_start.ndim).expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Sample x_t given x_0: sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self.extract("sqrt_alphas_cumprod", t, x_start.ndim)
        return signal * x_start + self.extract("sqrt_one_minus_alphas_cumprod", t, x_start.ndim) * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), each of x_t's shape."""
        n = x_t.ndim
        mean = self.extract("posterior_mean_coef1", t, n) * x_start + self.extract("posterior_mean_coef2", t, n) * x_t
        log_variance = self.extract("posterior_log_variance_clipped", t, n).expand_as(x_t)
        return mean, self.extract("posterior_variance", t, n).expand_as(x_t), log_variance

    # ---- one step of the reversal ----

    def p_mean_variance(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool | float = True,
        denoised_fn: Callable | None = None, model_kwargs: dict | None = None,
    ) -> Step:  # fmt: skip
        """Return p(x_{t-1} | x_t) as `mean`, `variance`, `log_variance` and the prediction `pred_xstart`, of x's shape.

        clip_denoised: clip the prediction to [-1, 1], or to that range if it is a number. denoised_fn: applied to the
        prediction before. model_kwargs: further arguments of the model.
        """
        model_output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        prediction, variance, log_variance = self._variance(model_output, x, t)
        pred_xstart = self._pred_xstart(prediction, x, t)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-float(clip_denoised), float(clip_denoised))
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        variances = {"variance": variance.expand_as(x), "log_variance": log_variance.expand_as(x)}
        return {"mean": mean, **variances, "pred_xstart": pred_xstart}

    def _variance(self, model_output, x, t):
        """Split the model's output into the prediction, the variance of the reverse step and its logarithm."""
        channels, given = x.shape[1], model_output.shape[1]
        learned = self.model_var_type is ModelVarType.LEARNED_RANGE
        if given != (wanted := 2 * channels if learned else channels):
            reason = f"the model gives {given} channels for {channels} image channels"
            raise ValueError(f"{reason}; learn_sigma={learned} needs {wanted}")
        low = self.extract("posterior_log_variance_clipped", t, x.ndim)
        if learned:
            prediction, values = model_output.split(channels, dim=1)
            fraction = (values + 1) / 2
            values = fraction * self.extract("log_betas", t, x.ndim) + (1 - fraction) * low
            return prediction, values.exp(), values
        if self.model_var_type is ModelVarType.FIXED_SMALL:  # 0 at t = 0, where only its logarithm is clipped
            return model_output, self.extract("posterior_variance", t, x.ndim), low
        variance = self.extract("fixed_large_variance", t, x.ndim)
        return model_output, variance, self.extract("log_fixed_large_variance", t, x.ndim)

    def _pred_xstart(self, prediction, x, t):
        if self.model_mean_type is ModelMeanType.START_X:
            return prediction
        if self.model_mean_type is ModelMeanType.EPSILON:
            return self.xstart_from_eps(x, t, prediction)
        # Not through the noise, which would divide by sqrt(alpha_bar), close to 0 at the last steps.
        return self.q_sample(x, t, -prediction)

    def xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return the x_0 of given x_t and noise."""
        signal = self.extract("sqrt_recip_alphas_cumprod", t, x_t.ndim)
        return signal * x_t - self.extract("sqrt_recipm1_alphas_cumprod", t, x_t.ndim) * eps

    def eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """Return the noise of given x_t and x_0."""
        signal = self.extract("sqrt_alphas_cumprod", t, x_t.ndim)
        return (x_t - signal * pred_xstart) / self.extract("sqrt_one_minus_alphas_cumprod", t, x_t.ndim)

    def condition_mean(
        self, cond_fn: Callable, p_mean_var: Step, x: Tensor, t: Tensor, model_kwargs: dict | None = None
    ) -> Tensor:
        """Shift the mean of an ancestral step towards a condition y: mean + variance grad log p(y | x_t).

        cond_fn(x, t, **model_kwargs) returns that gradient; its t are the model's timesteps. Sohl-Dickstein et al.
        2015; Dhariwal & Nichol 2021, algorithm 1.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self, cond_fn: Callable, p_mean_var: Step, x: Tensor, t: Tensor, model_kwargs: dict | None = None
    ) -> Step:
        """Shift the score towards a condition y: eps - sqrt(1 - alpha_bar) grad log p(y | x_t).

        cond_fn: as in `condition_mean`. Returns `p_mean_var` with the `mean` and `pred_xstart` of that noise, which is
        not clipped again. Song et al. 2020; Dhariwal & Nichol 2021, algorithm 2.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        eps = self.eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self.extract("sqrt_one_minus_alphas_cumprod", t, x.ndim) * gradient
        pred_xstart = self.xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}

    def p_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool | float = True,
        denoised_fn: Callable | None = None, cond_fn: Callable | None = None, model_kwargs: dict | None = None,
        *, noise: Tensor | None = None, cond_fn_with_grad: bool = False,
    ) -> Step:  # fmt: skip
        """Take an ancestral step x_t -> x_{t-1}, without noise where t = 0. Returns {"sample", "pred_xstart"}.

        cond_fn: see `condition_mean`. cond_fn_with_grad: see `p_sample_loop_progressive`; x must require gradients.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = torch.randn_like(x) if noise is None else noise
        if cond_fn is not None:
            cond_fn = _with_prediction(cond_fn, out, t) if cond_fn_with_grad else cond_fn
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        return {"sample": self.add_noise(out, t, noise), "pred_xstart": out["pred_xstart"]}

    def add_noise(self, out: Step, t: Tensor, noise: Tensor) -> Tensor:
        """Return mean + sigma noise for a posterior `out`, without noise where t = 0."""
        return out["mean"] + _nonzero(t, noise) * torch.exp(0.5 * out["log_variance"]) * noise

    def ddim_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool | float = True,
        denoised_fn: Callable | None = None, cond_fn: Callable | None = None, model_kwargs: dict | None = None,
        eta: float = 0.0, *, noise: Tensor | None = None, cond_fn_with_grad: bool = False,
    ) -> Step:  # fmt: skip
        """Take a DDIM step (Song et al. 2021, equation 12) with eta times the ancestral standard deviation, 0 to 1.

        cond_fn: see `condition_score`. Returns {"sample", "pred_xstart"}, the prediction after guidance, or with
        cond_fn_with_grad (as in `p_sample`) before it.
        """
        if not 0 <= eta <= 1:
            raise InputError("it must be from 0 to 1", parameter="eta", value=eta)
        plain = out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            cond_fn = _with_prediction(cond_fn, out, t) if cond_fn_with_grad else cond_fn
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        mean, sigma = self.ddim_mean_sigma(out["pred_xstart"], x, t, eta)
        noise = torch.randn_like(x) if noise is None else noise
        pred_xstart = (plain if cond_fn_with_grad else out)["pred_xstart"]
        return {"sample": mean + _nonzero(t, x) * sigma * noise, "pred_xstart": pred_xstart}

    def ddim_mean_sigma(self, pred_xstart: Tensor, x: Tensor, t: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Return mean [N, C, H, W] and standard deviation [N, 1, 1, 1] of a DDIM step with a prediction of x_0."""
        eps = self.eps_from_xstart(x, t, pred_xstart)
        # sigma^2 is eta^2 s (1 - alpha_bar_prev) with s = beta / (1 - alpha_bar); this share of the noise is left.
        left = (1 - eta**2 * self.extract("posterior_share", t, x.ndim)).sqrt()
        noise = left * self.extract("sqrt_one_minus_alphas_cumprod_prev", t, x.ndim)
        mean = self.extract("sqrt_alphas_cumprod_prev", t, x.ndim) * pred_xstart + noise * eps
        return mean, eta * self.extract("sqrt_posterior_variance", t, x.ndim)

    def ddim_reverse_sample(
        self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool | float = True,
        denoised_fn: Callable | None = None, model_kwargs: dict | None = None, eta: float = 0.0,
    ) -> Step:  # fmt: skip
        """Take a step x_t -> x_{t+1} of DDIM's deterministic path: {"sample", "pred_xstart"}."""
        if eta != 0:
            raise InputError("only the deterministic path, 0, can be reversed", parameter="eta", value=eta)
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        eps = self.eps_from_xstart(x, t, out["pred_xstart"])
        signal = self.extract("sqrt_alphas_cumprod_next", t, x.ndim)
        sample = signal * out["pred_xstart"] + self.extract("sqrt_one_minus_alphas_cumprod_next", t, x.ndim) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    # ---- from noise to image ----

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool | float = True, denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None, model_kwargs: dict | None = None,
        device: torch.device | str | None = None, progress: bool = False, skip_timesteps: int = 0,
        init_image: Tensor | None = None, randomize_class: bool = False, cond_fn_with_grad: bool = False,
    ) -> Iterator[Step]:  # fmt: skip
        """Run ancestral sampling; yield the dict of `p_sample` after each step, from the last index to 0.

        noise: x_T, drawn if None. progress: show a bar. The next four are those of crowsonkb's fork. skip_timesteps:
        number of steps to leave out at the noisy end; init_image [N, C, H, W]: start from this image, noised (zeros if
        None and steps are left out). randomize_class: draw new labels `y` in model_kwargs at each step, below
        model.num_classes. cond_fn_with_grad: call cond_fn(x, t, out, **model_kwargs) with step indices t and the result
        `out` of `p_mean_variance`, a function of x that can be differentiated.
        """
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        step = functools.partial(self.p_sample, model, **options, cond_fn_with_grad=cond_fn_with_grad)
        start = self._start(model, shape, noise, device, skip_timesteps, init_image)
        return self._loop(step, *start, model, model_kwargs, progress, randomize_class, cond_fn_with_grad)

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None,
        clip_denoised: bool | float = True, denoised_fn: Callable | None = None,
        cond_fn: Callable | None = None, model_kwargs: dict | None = None,
        device: torch.device | str | None = None, progress: bool = False, eta: float = 0.0,
        skip_timesteps: int = 0, init_image: Tensor | None = None, randomize_class: bool = False,
        cond_fn_with_grad: bool = False,
    ) -> Iterator[Step]:  # fmt: skip
        """Run DDIM sampling with `ddim_sample`'s eta; otherwise as `p_sample_loop_progressive`."""
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "eta": eta}
        step = functools.partial(self.ddim_sample, model, **options, cond_fn_with_grad=cond_fn_with_grad)
        start = self._start(model, shape, noise, device, skip_timesteps, init_image)
        return self._loop(step, *start, model, model_kwargs, progress, randomize_class, cond_fn_with_grad)

    p_sample_loop = _last_sample(p_sample_loop_progressive)
    ddim_sample_loop = _last_sample(ddim_sample_loop_progressive)

    def _start(self, model, shape, noise, device, skip_timesteps, init_image):
        """x_T, or an image with its noise, and the step indices from there to 0."""
        if not 0 <= skip_timesteps < self.num_timesteps:
            reason = f"the process has {self.num_timesteps} steps, so it can be 0 to {self.num_timesteps - 1}"
            raise InputError(reason, parameter="skip_timesteps", value=skip_timesteps)
        if noise is None:
            parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
            device = parameter.device if device is None and parameter is not None else device
            noise = torch.randn(*shape, device=device, dtype=torch.float32)
        indices = range(self.num_timesteps - skip_timesteps - 1, -1, -1)
        if not skip_timesteps and init_image is None:
            return noise, indices
        init_image = torch.zeros_like(noise) if init_image is None else init_image
        return self.q_sample(init_image, torch.full(shape[:1], indices[0], device=noise.device), noise), indices

    def _loop(self, step, x, indices, model, model_kwargs, progress, randomize_class, with_grad):
        """Yield step(x, t, model_kwargs=…) at each of the indices."""
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices)
        for i in indices:
            # Neither cond_fn nor the model could be differentiated in inference mode.
            with torch.inference_mode(False), torch.set_grad_enabled(with_grad):
                kwargs = {name: recordable(value) for name, value in (model_kwargs or {}).items()}
                if randomize_class and "y" in kwargs:
                    kwargs["y"] = torch.randint(model.num_classes, kwargs["y"].shape, device=kwargs["y"].device)
                t = torch.full(x.shape[:1], i, device=x.device)
                out = step(recordable(x).detach().requires_grad_(with_grad), t, model_kwargs=kwargs)
                out = {name: value.detach() for name, value in out.items()}
            yield out
            x = out["sample"]

    # ---- training and likelihood ----

    def training_losses(
        self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: dict | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return the training loss per image: a dict with `loss` [N] and, where they apply, its terms `mse`, `vb`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise=noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))

        def bound(output):
            return self._vb_terms_bpd(lambda *_: output, x_start, x_t, t, clip_denoised=False)["output"]

        if self.loss_type is LossType.RESCALED_KL:
            return {"loss": bound(output) * self.num_timesteps}
        terms, prediction = {}, output
        if self.model_var_type is ModelVarType.LEARNED_RANGE:
            # The bound trains the variance only: the mean is detached in it.
            prediction, values = output.split(x_t.shape[1], dim=1)
            terms["vb"] = bound(torch.cat([prediction.detach(), values], dim=1))
            if self.loss_type is LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
        target = {ModelMeanType.EPSILON: noise, ModelMeanType.START_X: x_start}.get(self.model_mean_type)
        if target is None:  # the velocity: x_t's formula for (noise, -x_0) in place of (x_0, noise)
            target = self.q_sample(noise, t, -x_start)
        terms["mse"] = mean_flat((target - prediction) ** 2)
        terms["loss"] = sum(terms.values())
        return terms

    def calc_bpd_loop(
        self, model: Model, x_start: Tensor, clip_denoised: bool | float = True,
        model_kwargs: dict | None = None, *, noise: Callable[[torch.Size], Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Compute the variational bound of images x_0 [N, C, H, W] on the 8-bit grid, in bits per dimension.

        noise: function of a shape, called at every step; standard normal draws if None. Returns `total_bpd` and
        `prior_bpd` [N], the bound and its term without the model; `vb`, `xstart_mse` and `mse` [N, T], from the last
        step to the first: its other terms, and the mean squared errors of the predictions of x_0 and of the noise.
        """
        terms = []
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((x_start.shape[0],), i, device=x_start.device, dtype=torch.long)
            drawn = torch.randn_like(x_start) if noise is None else noise(x_start.shape)
            x_t = self.q_sample(x_start, t, noise=drawn)
            with torch.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self.eps_from_xstart(x_t, t, out["pred_xstart"])
            errors = (mean_flat((value - true) ** 2) for value, true in ((out["pred_xstart"], x_start), (eps, drawn)))
            terms.append([out["output"], *errors])
        vb, xstart_mse, mse = (torch.stack(values, dim=1) for values in zip(*terms))
        prior = self._prior_bpd(x_start)
        total = vb.sum(dim=1) + prior
        return {"total_bpd": total, "prior_bpd": prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}

    # ---- guided-diffusion's private names that published code calls ----

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised: bool | float = True, model_kwargs=None):
        """Return the bound's terms `output` [N] in bits: KL divergences, at t = 0 the grey levels' -log-likelihood."""
        out = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"]))
        log_scales = 0.5 * out["log_variance"]
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=log_scales))
        return {"output": torch.where(t == 0, nll, kl) / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """Return KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=torch.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    _predict_xstart_from_eps = xstart_from_eps
    _predict_eps_from_xstart = eps_from_xstart

    def _scale_timesteps(self, t):
        return GaussianDiffusion.model_timesteps(self, t)
