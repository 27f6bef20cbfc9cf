"""How a step of the reverse process is taken: ancestral sampling, DDIM, DPM-Solver++(2M).

A solver has `posterior(out, x, t)`, which makes its own mean and log-variance of what
`GaussianDiffusion.p_mean_variance` gave at x [N, C, H, W] and t [N], for guided steps to start from; and
`step(out, x, i, t, noise)`, the whole plain step x_i -> x_{i-1}, where out is from `posterior`, all entries of t are i,
and noise is a draw [N, C, H, W].
"""

import math


class Ancestral:
    """Samples of the model's own p(x_{i-1} | x_i) (Ho et al. 2020)."""

    def __init__(self, diffusion, eta):
        self.diffusion = diffusion

    def posterior(self, out, x, t):
        return out

    def step(self, out, x, i, t, noise):
        return self.diffusion.add_noise(out, t, noise)


class Ddim(Ancestral):
    """DDIM (Song et al. 2021, equation 12): fewer steps do. eta 0 adds no noise, 1 the posterior's variance."""

    def __init__(self, diffusion, eta):
        super().__init__(diffusion, eta)
        self.eta = eta

    def posterior(self, out, x, t):
        mean, sigma = self.diffusion.ddim_mean_sigma(out["pred_xstart"], x, t, self.eta)
        return {**out, "mean": mean, "variance": sigma**2, "log_variance": 2 * sigma.log()}


class DpmSolverPP2M(Ddim):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), second order with one evaluation a step; guided steps are DDIM's.

    With x = alpha x_0 + sigma eps, lambda = log(alpha / sigma) and h = lambda_{i-1} - lambda_i,
    x_{i-1} = sigma_{i-1} / sigma_i x_i + alpha_{i-1} (1 - e^-h) D, where D extrapolates the predicted x_0 of this step
    and the one before it. The first step has none before it, and the last goes to lambda = infinity: there D is the
    prediction.
    """

    def __init__(self, diffusion, eta):
        super().__init__(diffusion, eta)
        self.last = None  # prediction and h of the step before

    def step(self, out, x, i, t, noise):
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


def _log_snr(alpha_bar):
    return math.log(alpha_bar / (1 - alpha_bar))


SOLVERS = {"ancestral": Ancestral, "ddim": Ddim, "dpmpp_2m": DpmSolverPP2M}


def create_solver(name, diffusion, eta=0.0):
    """The solver of that name for one run. eta: DDIM's share of noise in guided and plain steps, 0 to 1."""
    if name not in SOLVERS:
        raise ValueError(f"sampler is {name!r}; it can be {', '.join(SOLVERS)}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be from 0 to 1")
    return SOLVERS[name](diffusion, eta)
