"""Schedules in continuous time, by the names of their papers.

t is the papers' u in [0, 1], noise at 1, except that of `EDM`, which is sigma itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded
from diffaug.schedules.base import STRAIGHT, VARIANCE_EXPLODING, Scaling, Schedule
from diffaug.schedules.numbers import in_float64, log_odds, power, sigmoid

LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class VPSDE(Schedule):
    """alpha(u)^2 = exp(-B(u)), B(u) = beta_min u + (beta_max - beta_min) u^2 / 2: DDPM in the limit of many steps.

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix C.

    Arguments:
        beta_min: the noise added per unit of time at u = 0, in [0, beta_max].
        beta_max: likewise at u = 1, in (0, 1000].
    """

    beta_min: float = bounded(0.1, at_least=0, at_most="beta_max")
    beta_max: float = bounded(20.0, above=0, at_most=1000)

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return log_odds(-t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2)))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        total = (self.beta_min + self.beta_max) / 2
        b = (-torch.nn.functional.logsigmoid(log_snr)).clamp_max(total)
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * b)
        return torch.where(b == 0, 0.0, 2 * b / (self.beta_min + root)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class LinearLogSNR(Schedule):
    """log_snr(u) falls linearly from ``log_snr_max`` to ``log_snr_min``; variance preserving.

    Kingma et al. 2021, "Variational Diffusion Models", where -log_snr is gamma; the defaults are their code's for
    CIFAR-10, gamma from -13.3 to 5.

    Arguments:
        log_snr_max: at u = 0, in [-100, 100].
        log_snr_min: at u = 1, in [-100, log_snr_max).
    """

    log_snr_max: float = bounded(13.3, at_least=-100, at_most=100)
    log_snr_min: float = bounded(-5.0, at_least=-100, at_most=100, below="log_snr_max")

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return self.log_snr_max - t * (self.log_snr_max - self.log_snr_min)

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((self.log_snr_max - log_snr) / (self.log_snr_max - self.log_snr_min)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class VE(Schedule):
    """sigma(u) = sigma_min (sigma_max / sigma_min)^u, alpha = 1: the variance exploding SDE.

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix C. The
    defaults are Karras et al. 2022's, table 1.

    Arguments:
        sigma_min: the noise at u = 0, in (0, sigma_max).
        sigma_max: the noise at u = 1, in (0, 1e30].
    """

    sigma_min: float = bounded(0.02, above=0, at_most=1e30, below="sigma_max")
    sigma_max: float = bounded(100.0, above=0, at_most=1e30)

    @property
    def scaling(self) -> Scaling:
        return VARIANCE_EXPLODING

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return ((-log_snr / 2 - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class EDM(Schedule):
    """x_t = x_0 + t epsilon: t is sigma itself. Unit time is the grid on which EDM samples.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1 and equation 5.
    from_unit(u) = (sigma_min^(1/rho) + u (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho. EDM trains with ln sigma ~
    N(-1.2, 1.2^2), not with a uniform u: that is ``times=log_normal``.

    Any finite t >= 0 is legal, also beyond the grid, as a log-normal draw may be; t = 0 is the clean image. ``to_unit``
    gives 0 and 1 beyond the grid's ends.

    Arguments:
        sigma_min: where the grid begins, in (0, sigma_max).
        sigma_max: where it ends, in (0, 1e30].
        rho: how the grid is bent toward small sigma, in [1, 100]; 1 is even in sigma.
    """

    sigma_min: float = bounded(0.002, above=0, at_most=1e30, below="sigma_max")
    sigma_max: float = bounded(80.0, above=0, at_most=1e30)
    rho: float = bounded(7.0, at_least=1, at_most=100)

    @property
    def scaling(self) -> Scaling:
        return VARIANCE_EXPLODING

    @property
    def range(self) -> tuple[float, float]:
        return 0.0, LARGEST

    @property
    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def from_unit(self, u: Tensor) -> Tensor:
        low, high = self._roots
        # Rounding must not carry the ends beyond themselves.
        return in_float64(
            lambda u: power(low + u * (high - low), self.rho).clamp(self.sigma_min, self.sigma_max),
            u,
            torch.float64,
        )

    def to_unit(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        low, high = self._roots
        return in_float64(lambda t: ((power(t, 1 / self.rho) - low) / (high - low)).clamp(0.0, 1.0), t, dtype)

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(t)

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2).clamp(0.0, LARGEST)


@dataclass(frozen=True)
class Rectified(Schedule):
    """x_u = (1 - u) x_0 + u epsilon: the straight path of rectified flow and flow matching.

    Liu, Gong and Liu 2023, "Flow Straight and Fast", equation 1 (data and noise exchanged: theirs is noise at 0);
    Lipman et al. 2023, "Flow Matching for Generative Modeling", section 4.1.
    """

    @property
    def scaling(self) -> Scaling:
        return STRAIGHT

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Trigonometric(Schedule):
    """alpha(u) = cos(pi u / 2), sigma(u) = sin(pi u / 2).

    Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models"; Ma et al. 2024, "SiT", where
    it is GVP; Lu and Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", where it is
    TrigFlow, with data of standard deviation 1 and t = pi u / 2. Simple diffusion's cosine schedule (Hoogeboom et al.
    2023) is this one, `Truncated` to log-SNRs within 15 of 0.
    """

    def compute_log_snr(self, t: Tensor) -> Tensor:
        # Of the angle and its complement the smaller: near pi / 2 the tangent itself has lost its digits.
        tangent = torch.tan(torch.where(t <= 0.5, t, 1 - t) * (math.pi / 2))
        return torch.where(t <= 0.5, -2.0, 2.0) * torch.log(tangent)

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        nearer = torch.atan(torch.exp(-log_snr.abs() / 2)) * (2 / math.pi)
        return torch.where(log_snr >= 0, nearer, 1 - nearer)
