"""Schedules of T steps, by the names of their papers. At t = 0 one step of noise has been added (the papers' t = 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffaug.checks import bounded
from diffaug.schedules.base import BetaSchedule, betas_of


@dataclass(frozen=True)
class LinearBeta(BetaSchedule):
    """beta_t rises linearly from ``beta_start`` to ``beta_end``.

    Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models", section 4.

    Arguments:
        timesteps: T, at least 1.
        beta_start: in (0, beta_end].
        beta_end: in (0, 1).
        rescale: whether both ends are stated for T = 1000 and multiplied by 1000 / T, so that the noise at the end
            hardly depends on T. The field disagrees: the code of Nichol and Dhariwal 2021 does it, diffusers does not.
            beta_end must stay below 1: with the default, T > 20.
    """

    beta_start: float = bounded(1e-4, above=0, below=1, at_most="beta_end")
    beta_end: float = bounded(0.02, above=0, below=1)
    rescale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale * self.beta_end >= 1:
            raise ValueError(
                f"schedule.timesteps must be > {1000 * self.beta_end:g} where schedule.rescale is true and "
                f"schedule.beta_end is {self.beta_end}, but got {self.timesteps}: beta_end * 1000 / timesteps would be "
                f"{self.scale * self.beta_end:g}, and a beta must be in (0, 1). Take more steps or rescale=false."
            )

    @property
    def scale(self) -> float:
        """What both ends are multiplied by."""
        return 1000 / self.timesteps if self.rescale else 1.0

    def compute_betas(self) -> Tensor:
        start, end = self.scale * self.beta_start, self.scale * self.beta_end
        return torch.linspace(start, end, self.timesteps, dtype=torch.float64)


@dataclass(frozen=True)
class ScaledLinearBeta(BetaSchedule):
    """sqrt(beta_t) rises linearly: the schedule of latent diffusion and Stable Diffusion.

    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (their code calls it linear).

    Arguments:
        timesteps: T, at least 1.
        beta_start: in (0, beta_end].
        beta_end: in (0, 1).
    """

    beta_start: float = bounded(0.00085, above=0, below=1, at_most="beta_end")
    beta_end: float = bounded(0.012, above=0, below=1)

    def compute_betas(self) -> Tensor:
        root = torch.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.timesteps, dtype=torch.float64)
        return root.square()


@dataclass(frozen=True)
class SigmoidBeta(BetaSchedule):
    """beta_t = beta_start + (beta_end - beta_start) sigmoid(x), x evenly spaced from -6 to 6.

    Xu et al. 2022, "GeoDiff: a Geometric Diffusion Model for Molecular Conformation Generation", in its code.

    Arguments:
        timesteps: T, at least 1.
        beta_start: in (0, beta_end]; approached to within 0.25 % of beta_end - beta_start.
        beta_end: in (0, 1); likewise.
    """

    beta_start: float = bounded(1e-4, above=0, below=1, at_most="beta_end")
    beta_end: float = bounded(0.02, above=0, below=1)

    def compute_betas(self) -> Tensor:
        x = torch.linspace(-6.0, 6.0, self.timesteps, dtype=torch.float64)
        return x.sigmoid() * (self.beta_end - self.beta_start) + self.beta_start


@dataclass(frozen=True)
class Cosine(BetaSchedule):
    """alpha_bar falls as a squared cosine; beta_t is clipped at ``max_beta``.

    Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", equation 17.

    Arguments:
        timesteps: T, at least 1.
        s: the offset that keeps the first betas from being too small, in [0, 100].
        max_beta: in (0, 1).
    """

    s: float = bounded(0.008, at_least=0, at_most=100)
    max_beta: float = bounded(0.999, above=0, below=1)

    def compute_betas(self) -> Tensor:
        # 1 - cos^2(b) / cos^2(a) = sin(b - a) sin(b + a) / cos^2(a): no cancellation, unlike the ratio itself. Angles
        # are taken from the end, where cos(pi/2 - x) = sin(x) keeps its digits.
        step = math.pi / 2 / (1 + self.s) / self.timesteps
        left = torch.arange(self.timesteps, 0, -1, dtype=torch.float64) * step
        betas = math.sin(step) * torch.sin(2 * left - step) / torch.sin(left).square()
        return betas.clamp_max(self.max_beta)


@dataclass(frozen=True)
class SigmoidAlphaBar(BetaSchedule):
    """alpha_bar(u) = (g(1) - g(u)) / (g(1) - g(0)) at u = (t + 1) / T.

    Here g(u) = sigmoid((start + u (end - start)) / tau).
    Jabri, Fleet and Chen 2022, "Scalable Adaptive Computation for Iterative Generation", figure 8; Chen 2023, "On the
    Importance of Noise Scheduling for Diffusion Models". beta_t is clipped to [0, max_beta].

    Arguments:
        timesteps: T, at least 1.
        start: in [-1000, end).
        end: in [-1000, 1000].
        tau: the temperature, in [1e-6, 1e6].
        max_beta: in (0, 1).
    """

    start: float = bounded(-3.0, at_least=-1000, at_most=1000, below="end")
    end: float = bounded(3.0, at_least=-1000, at_most=1000)
    tau: float = bounded(1.0, at_least=1e-6, at_most=1e6)
    max_beta: float = bounded(0.999, above=0, below=1)

    def compute_betas(self) -> Tensor:
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)), so that no two near numbers are subtracted
        # in 1 - alpha_bar(u) / alpha_bar(before) = (g(u) - g(before)) / (g(1) - g(before)), where sigmoid(-b) cancels.
        step = (self.end - self.start) / self.tau / self.timesteps
        left = torch.arange(self.timesteps, 0, -1, dtype=torch.float64) * step
        end = torch.tensor(self.end / self.tau, dtype=torch.float64)
        log_ratio = logsigmoid(end - left + step) - logsigmoid(end)
        betas = log_ratio.exp() * (math.expm1(-step) / torch.expm1(-left))
        return betas.clamp(0.0, self.max_beta)


@dataclass(frozen=True)
class Inverse(BetaSchedule):
    """beta_t = 1 / (T - t): each step erases the same share of the signal, alpha_bar_t = 1 - (t + 1) / T.

    Sohl-Dickstein et al. 2015, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", section 2.4.1, state
    it for binomial diffusion; for Gaussian noise it is the schedule "jsd" in the code of Ho, Jain and Abbeel 2020. The
    last beta is 1: x_T is exactly N(0, I), so train on x_0 or v there, not on epsilon.

    Arguments:
        timesteps: T, at least 1.
    """

    def compute_betas(self) -> Tensor:
        return 1.0 / torch.arange(self.timesteps, 0, -1, dtype=torch.float64)


@dataclass(frozen=True)
class Laplace(BetaSchedule):
    """The log-SNR has a Laplace distribution: log_snr(u) = mu - b sgn(1/2 - u) ln(1 - 2 |1/2 - u|) at u = (t + 1) / T.

    Hang and Gu 2024, "Improved Noise Schedule for Diffusion Training", table 1. The last beta, which would be 1, is
    clipped at ``max_beta``.

    Arguments:
        timesteps: T, at least 1.
        mu: the log-SNR on which training centres, in [-100, 100].
        b: the spread around it, > 0 and at most 100.
        max_beta: in (0, 1).
    """

    mu: float = bounded(0.0, at_least=-100, at_most=100)
    b: float = bounded(0.5, above=0, at_most=100)
    max_beta: float = bounded(0.999, above=0, below=1)

    def compute_betas(self) -> Tensor:
        done = torch.arange(1, self.timesteps + 1, dtype=torch.float64)
        nearer = torch.minimum(done, self.timesteps - done) / self.timesteps  # 1 - 2 |1/2 - u| is twice this
        log_snr = self.mu - self.b * torch.sign(self.timesteps - 2 * done) * torch.log(2 * nearer)
        return betas_of(log_snr).clamp(0.0, self.max_beta)
