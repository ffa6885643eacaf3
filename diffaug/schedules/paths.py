"""Further paths in continuous time, by the names of their papers: u in [0, 1], noise at 1."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded
from diffaug.schedules.base import STRAIGHT, Scaling, Schedule
from diffaug.schedules.continuous import VPSDE
from diffaug.schedules.numbers import hypot, log_odds

SUB_VP = Scaling(
    "sub-variance preserving",
    lambda x: (
        2 / ((-x / 2).exp() + hypot((-x / 2).exp(), torch.full_like(x, 2.0))),
        2 / (1 + (4 * x.exp() + 1).sqrt()),
    ),
)
"""alpha^2 + sigma = 1."""


@functools.cache
def straight_from(sigma_min: float) -> Scaling:
    """Return the scaling of the straight path from sigma_min: (1 - sigma_min) alpha + sigma = 1."""
    rest = 1 - sigma_min
    return Scaling(
        "straight from a least noise", lambda x: (1 / (rest + (-x / 2).exp()), 1 / (1 + rest * (x / 2).exp()))
    )


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha(u) = (1 - u)^power, sigma = 1 - alpha: slower at the image's end where power < 1, at the noise's where > 1.

    Lipman et al. 2024, "Flow Matching Guide and Code", PolynomialConvexScheduler of their library flow_matching, whose
    time runs the other way and whose n is ``power``. 1 is `Rectified`.

    Arguments:
        power: in (0, 100].
    """

    power: float = bounded(2.0, above=0, at_most=100)

    @property
    def scaling(self) -> Scaling:
        return STRAIGHT

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return 2 * log_odds(self.power * torch.log1p(-t))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return -torch.expm1(torch.nn.functional.logsigmoid(log_snr / 2) / self.power)


@dataclass(frozen=True)
class LinearAlpha(Schedule):
    """alpha(u) = 1 - u, variance preserving: sigma^2 = u (2 - u).

    Lipman et al. 2024, "Flow Matching Guide and Code", LinearVPScheduler of their library flow_matching.
    """

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.log1p(-t) - torch.log(t) - torch.log(2 - t)

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return -torch.expm1(torch.nn.functional.logsigmoid(log_snr) / 2)


@dataclass(frozen=True)
class SubVPSDE(Schedule):
    """alpha(u) = exp(-B(u) / 2), sigma(u) = 1 - exp(-B(u)), B(u) = beta_min u + (beta_max - beta_min) u^2 / 2.

    Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", section 3.4 and
    appendix C: never more noise than `VPSDE`, whose alpha it has.

    Arguments:
        beta_min: the noise added per unit of time at u = 0, in [0, beta_max].
        beta_max: likewise at u = 1, in (0, 1000].
    """

    beta_min: float = bounded(0.1, at_least=0, at_most="beta_max")
    beta_max: float = bounded(20.0, above=0, at_most=1000)

    @property
    def scaling(self) -> Scaling:
        return SUB_VP

    def compute_log_snr(self, t: Tensor) -> Tensor:
        b = t * (self.beta_min + t * ((self.beta_max - self.beta_min) / 2))
        return -b - 2 * torch.log(-torch.expm1(-b))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        alpha, sigma = SUB_VP.of_log_snr(log_snr)
        # By the log-SNR that VPSDE has at the same alpha: ln(alpha^2 / sigma), as here 1 - alpha^2 is sigma.
        same_alpha = 2 * torch.log(alpha) - torch.log(sigma)
        return VPSDE(self.beta_min, self.beta_max).compute_t_of_log_snr(same_alpha)


@dataclass(frozen=True)
class OptimalTransport(Schedule):
    """alpha(u) = 1 - u, sigma(u) = sigma_min + (1 - sigma_min) u: the straight path from images with a little noise.

    Lipman et al. 2023, "Flow Matching for Generative Modeling", the path of section 4.1, whose time runs from noise at
    0. Its target is `velocity`, (1 - sigma_min) epsilon - x_0. The default is that of shortcut models' code (Frans et
    al. 2024).

    Arguments:
        sigma_min: in (0, 0.5].
    """

    sigma_min: float = bounded(1e-5, above=0, at_most=0.5)

    @property
    def scaling(self) -> Scaling:
        return straight_from(self.sigma_min)

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(self.sigma_min + (1 - self.sigma_min) * t))

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        alpha, sigma = self.scaling.of_log_snr(log_snr)
        return torch.where(alpha < 0.5, 1 - alpha, (sigma - self.sigma_min) / (1 - self.sigma_min)).clamp(0.0, 1.0)
