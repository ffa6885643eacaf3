"""The noise level at some times, and its rate of change, in float64."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.schedules.base import STRAIGHT, VARIANCE_EXPLODING, VARIANCE_PRESERVING, Schedule
from diffaug.schedules.numbers import keep, where_float64_is

Mix = tuple[Tensor, Tensor]
"""(p, q) of p x_0 + q epsilon, each float64, of t's shape."""

SIGMA_DATA = 0.5
"""The standard deviation of images in [-1, 1] that EDM assumes (Karras et al. 2022, table 1)."""

LOG_SNR_TOLD = 48 * math.log(2)
"""The greatest log-SNR, either way, that a batch tells: 33.27, where sigma / alpha is 2^-24 or 2^24.

Beyond it float32 tells no levels apart: the weaker of signal and noise, if both are of size 1, is lost in the rounding
of x_t. It is also where `Rectified`'s float32 time ends, 1 - 2^-24. `Schedule.log_snr` itself is infinite where alpha
or sigma is 0; a network that is told infinity answers nan.
"""

LOG_SNR_LIMIT = 300.0
_EDGE = 1e-12


def split_clean(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of the times of parts are a clean one's, -1 (discrete) or 0 (continuous), and t, the schedule's own
    least time in their place: t itself, on the host, where there are none."""
    clean = t < 0 if schedule.discrete else t <= 0
    if clean.device.type == "cpu" and not clean.any():
        return clean, t
    return clean, torch.where(clean, schedule.range[0], t)


@dataclass(eq=False)
class Level:
    """The noise level at times t, on t's device or, where that has no float64, on the CPU.

    Arguments:
        schedule: whose alpha(t) and sigma(t).
        t: native times, any shape.
        sigma_data: the standard deviation of the images, for F, x_in and the EDM weight.
        limit: hold log_snr within +-300. Where SNR is 0 or infinite, a quotient like min(SNR, gamma) / SNR is 0/0; at
            log_snr = -300 it is its limit to within e^-300, and a limit of 0 or infinity is just that in float32.
    """

    schedule: Schedule
    t: Tensor
    sigma_data: float = SIGMA_DATA
    limit: bool = False

    def __post_init__(self) -> None:
        self.t = where_float64_is(self.t)

    @functools.cached_property
    def log_snr(self) -> Tensor:
        """Return ln(alpha^2 / sigma^2)."""
        log_snr = self.schedule.log_snr(self.t, torch.float64)
        return log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT) if self.limit else log_snr

    @functools.cached_property
    def coefficients(self) -> Mix:
        """Return (alpha, sigma)."""
        if self.limit:
            return self.schedule.scaling.of_log_snr(self.log_snr)
        return self.schedule.alpha_sigma(self.t, torch.float64)

    @property
    def alpha(self) -> Tensor:
        """The coefficient of x_0 in x_t."""
        return self.coefficients[0]

    @property
    def sigma(self) -> Tensor:
        """The coefficient of epsilon in x_t."""
        return self.coefficients[1]

    @functools.cached_property
    def slope(self) -> Tensor:
        """The derivative of log_snr by unit time, of a continuous schedule: exact, and 1e-12 inside the two ends."""
        return _slope(self.schedule, self.t)[1]

    @functools.cached_property
    def rates(self) -> Mix:
        """(alpha', sigma'): the derivatives by unit time, so that t = 0 .. T - 1 and u = 0 .. 1 have the same units.

        Continuous: exact, from the derivative of log_snr. At the two ends, where alpha or sigma may be 0 and log_snr
        infinite, it is taken 1e-12 inside; a derivative that is infinite there (sigma' of vp_sde at u = 0) is large.

        Discrete: central differences over the table, (a[t+1] - a[t-1]) T / 2, and one-sided ones at t = 0 and T - 1.
        """
        if self.schedule.discrete:
            alpha, sigma = _rate_table(self.schedule, self.t.device)[:, self.t]
            return alpha, sigma
        return _continuous_rates(self.schedule, self.t)


@keep
def _rate_table(schedule: Schedule, device: torch.device) -> Tensor:
    if schedule.timesteps < 2:
        raise ValueError(
            f"velocity is a derivative by t, and schedule.timesteps={schedule.timesteps} has no two steps to take it "
            "from. Use another target, such as v, or more timesteps."
        )
    table = torch.stack(schedule.alpha_sigma(torch.arange(schedule.timesteps), torch.float64))
    (rates,) = torch.gradient(table, spacing=1 / schedule.timesteps, dim=1)
    return rates.to(device)


def _slope(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return log_snr and its derivative by unit time, at continuous times held 1e-12 inside the ends."""
    with torch.inference_mode(False), torch.enable_grad():
        unit = schedule.to_unit(t, torch.float64).clamp(_EDGE, 1 - _EDGE).detach().clone()
        # Where a formula changes its form, autograd may give 0 (torch.minimum at a tie): then the slope just beside it.
        both = torch.stack((unit, unit + 1e-9 * unit * (1 - unit))).requires_grad_()
        log_snr = schedule.log_snr(schedule.from_unit(both), torch.float64)
        (slopes,) = torch.autograd.grad(log_snr.sum(), both)
    return log_snr[0].detach(), torch.where(slopes[0] == 0, slopes[1], slopes[0])


def _continuous_rates(schedule: Schedule, t: Tensor) -> Mix:
    log_snr, slope = _slope(schedule, t)
    alpha, sigma = schedule.scaling.of_log_snr(log_snr)
    # log_snr' = 2 (alpha' / alpha - sigma' / sigma), and the scaling's identity differentiated.
    if schedule.scaling is VARIANCE_PRESERVING:
        return alpha * sigma.square() * slope / 2, -sigma * alpha.square() * slope / 2
    if schedule.scaling is STRAIGHT:
        return alpha * sigma * slope / 2, -alpha * sigma * slope / 2
    if schedule.scaling is VARIANCE_EXPLODING:
        return torch.zeros_like(sigma), -sigma * slope / 2
    with torch.inference_mode(False), torch.enable_grad():
        level = log_snr.clone().requires_grad_()
        coefficients = schedule.scaling.of_log_snr(level)
        alpha, sigma = (torch.autograd.grad(one.sum(), level, retain_graph=True)[0] * slope for one in coefficients)
    return alpha, sigma
