"""The chain behind the closed form: one step, the posterior, and how far the end is from the prior.

    q(x_t | x_s) = N(r x_s, (sigma_t^2 - r^2 sigma_s^2) I)        one step from s to t, with r = alpha_t / alpha_s
    q(x_s | x_t, x_0)                                             the posterior, a Gaussian too

With d = log_snr(t) - log_snr(s) <= 0, the step's variance is sigma_t^2 (1 - e^d), and the posterior has mean
alpha_s (1 - e^d) x_0 + r (sigma_s / sigma_t)^2 x_t and variance sigma_s^2 (1 - e^d): no difference of nearly equal
numbers is ever taken. (DDPM, equations 2, 6 and 7, are the discrete, variance preserving case.)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffaug.checks import refuse
from diffaug.noise import gaussian
from diffaug.process.arguments import check_states
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys, Purpose
from diffaug.schedules import Schedule
from diffaug.schedules.base import STRAIGHT, VARIANCE_EXPLODING, VARIANCE_PRESERVING
from diffaug.schedules.numbers import per_sample


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(mean, variance I): the mean of x_t's shape, the variance of shape (B, 1, ...)."""

    mean: Tensor
    variance: Tensor


class Gap(NamedTuple):
    """Two times of a schedule, s < t, float64: their coefficients, and the share of t's noise that is new since s."""

    alpha_s: Tensor
    sigma_s: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    fresh: Tensor

    @property
    def ratio(self) -> Tensor:
        """alpha_t / alpha_s: what is left at t of x_s."""
        return torch.where(self.alpha_t == 0, 0.0, self.alpha_t / self.alpha_s)


def gap(schedule: Schedule, s: Tensor, t: Tensor) -> Gap:
    """Return what lies between s and t; a discrete s of -1 or a continuous one of 0 is the clean image."""
    if t.device.type == "cpu" and not bool((s < t).all()):
        at_s, at_t = ([time.item() for time in times] for times in (s, t))
        raise ValueError(f"s must be less than t (noise grows with t), but got s={at_s} and t={at_t}.")
    alpha_s, sigma_s, log_snr_s = _level(schedule, s)
    alpha_t, sigma_t, log_snr_t = _level(schedule, t)
    # Where all signal is gone at s already, the step adds fresh noise: the share that is new is all of it.
    fall = torch.where(torch.isneginf(log_snr_s), -torch.inf, log_snr_t - log_snr_s)
    return Gap(alpha_s, sigma_s, alpha_t, sigma_t, -torch.expm1(fall))


def _level(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    clean = t < 0 if schedule.discrete else t <= 0
    inside = torch.where(clean, schedule.ends[0].item(), t)  # a number: a tensor of the host's would halt a device
    alpha, sigma = schedule.alpha_sigma(inside, torch.float64)
    log_snr = schedule.log_snr(inside, torch.float64)
    return torch.where(clean, 1.0, alpha), torch.where(clean, 0.0, sigma), torch.where(clean, torch.inf, log_snr)


def step(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, epsilon: Tensor) -> Tensor:
    """Draw from q(x_t | x_s); see `ForwardProcess.step`."""
    check_states({"x_s": x_s, "epsilon": epsilon}, {"s": s, "t": t})
    between = gap(schedule, s, t)
    return _times(between.ratio, x_s) + _times(between.sigma_t * between.fresh.sqrt(), epsilon)


def path(schedule: Schedule, x_0: Tensor, times: object, key: Keys) -> Tensor:
    """Draw one joint path through times that rise; see `ForwardProcess.trajectory`."""
    if not isinstance(times, Tensor) or times.ndim != 1:
        raise refuse("times", times, "a tensor of shape (K,), of times that rise")
    elements = (x_0[0].numel() + 3) // 4 * 4
    x, s = x_0, torch.full((len(x_0),), -1 if schedule.discrete else 0.0, dtype=times.dtype, device=x_0.device)
    states: list[Tensor] = []
    for k, time in enumerate(move([times], x.device)[0].unbind()):
        t = time.expand(len(x))
        x = step(schedule, x, s, t, gaussian(key, tuple(x.shape[1:]), Purpose.TRAJECTORY, k * elements))
        states.append(x)
        s = t
    return torch.stack(states, 1)


def posterior(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor | None) -> Posterior:
    """Return q(x_s | x_t, x_0); see `ForwardProcess.posterior`."""
    if s is None:
        if not schedule.discrete:
            raise ValueError("posterior needs s= for a continuous schedule: there is no step just before t.")
        s = t - 1
    check_states({"x_0": x_0, "x_t": x_t}, {"t": t, "s": s})
    between = gap(schedule, s, t)
    of_x_t = between.ratio * (between.sigma_s / between.sigma_t).square()
    mean = _times(between.alpha_s * between.fresh, x_0) + _times(of_x_t, x_t)
    return Posterior(mean, _shaped(between.sigma_s.square() * between.fresh, x_t))


def prior_kl(schedule: Schedule, mean_square: float) -> float:
    """Compute KL(q(x_T | x_0) || prior) in nats per dimension, for images of this mean square.

    With variance v = sigma_T^2 and prior variance 1 it is (alpha_T^2 x_0^2 + v - 1 - ln v) / 2; for a variance
    exploding schedule, whose prior has variance v, alpha_T^2 x_0^2 / (2 v).
    """
    _, end = schedule.ends
    log_snr = schedule.log_snr(end[None], torch.float64).item()
    if schedule.scaling is VARIANCE_EXPLODING:
        return math.exp(log_snr) * mean_square / 2
    alpha, sigma = (c.item() for c in schedule.alpha_sigma(end[None], torch.float64))
    # v - 1 without the cancellation: -alpha^2, or, where straight, (1 - alpha)^2 - 1.
    exact = {VARIANCE_PRESERVING: -(alpha**2), STRAIGHT: alpha * (alpha - 2)}
    less = exact.get(schedule.scaling, (sigma - 1) * (sigma + 1))
    return (alpha**2 * mean_square + less - math.log1p(less)) / 2 if sigma > 0 else math.inf


def _shaped(coefficient: Tensor, x: Tensor) -> Tensor:
    return per_sample(coefficient.float(), x)


def _times(coefficient: Tensor, x: Tensor) -> Tensor:
    return _shaped(coefficient, x) * x.float()
