"""The interface of loss weights: what a squared error at each noise level counts.

A paper states its weight on the loss of one target. The losses of all targets are one another's multiples: with
x_t given, an error d in x_0 is an error -(alpha q - sigma p) / sigma d in a target p x_0 + q epsilon. So a weight
stated on target A acts on target B as

    w_B = w_A ([x_t, A] / [x_t, B])^2,    [x_t, target] = alpha q - sigma p,

which is -sigma for x_0, alpha for epsilon, alpha^2 + sigma^2 for v, alpha + sigma for flow. Every weight here is a
function of log_snr alone (the EDM one also of sigma_data), so it means the same under every schedule and scaling;
but for the ELBO's, which is how fast the schedule goes through its noise levels.

All is computed in float64 on `Level` with its ``limit``: where SNR is 0 or infinite a weight is its limit there, and
a limit that is infinite (SNR^-1/2 on epsilon at SNR 0) is inf; `Weight.check` refuses it where it would be met.

The other way round, a limit of 0 at the last step of a zero-terminal schedule means that the step at which sampling
starts is never learned. The code of Hang et al. 2023 sets the weight there to 1, whatever the target, for min-SNR and
for plain SNR alike: ``without_signal`` follows it for these and for soft-min-SNR, which is min-SNR but for its corner.
The other weights keep to their papers, which say nothing of it, and `Weight.check` warns.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaug.checks import check_fields, choice
from diffaug.schedules import Schedule
from diffaug.schedules.level import SIGMA_DATA, Level, split_clean
from diffaug.schedules.numbers import keep
from diffaug.targets.fields import IMAGE_FIELDS, TARGETS

_log = logging.getLogger("diffaug")


@dataclass(frozen=True)
class Weight(ABC):
    """A weight of the loss. A subclass defines ``stated_on`` and `at`.

    Attributes:
        stated_on: the target on whose loss the paper states the weight; None: on whichever target is trained.
        without_signal: the weight where SNR is exactly 0, on the loss of any target; None: the limit there.
    """

    stated_on: ClassVar[str | None] = None
    without_signal: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_fields(self, "weight")

    @abstractmethod
    def at(self, level: Level) -> Tensor:
        """Return the weight on the loss of ``stated_on``, float64, of level's shape."""

    def of(self, schedule: Schedule, target: str, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
        """Return the weight on the loss of a target, float32, of t's shape and device.

        Arguments:
            target: what the network predicts, a name of `TARGETS`.
            t: native times; of clean parts, which are not learned, the weight is that of the least noise.
            sigma_data: the standard deviation of the images in [-1, 1].
        """
        choice("target", target, TARGETS)
        if t.ndim > 1:
            _, t = split_clean(schedule, t)
        if schedule.discrete:
            return _tabulate(self, schedule, target, sigma_data, t.device)[t]
        return _convert(self, schedule, target, t, sigma_data)

    def check(self, schedule: Schedule, target: str, sigma_data: float = SIGMA_DATA) -> None:
        """Refuse a weight that is infinite at a step of the schedule; warn, once, of one that is 0 at its last.

        The ends of a continuous schedule are never drawn.
        """
        if not schedule.discrete:
            return
        times = torch.arange(schedule.timesteps, device="cpu")
        weights = self.of(schedule, target, times, sigma_data)
        bad = times[~weights.isfinite()]
        if len(bad):
            snr = schedule.log_snr(bad[:1]).exp().item()
            raise ValueError(
                f"weight={self!r} on the loss of {target} is infinite at t = {bad[0].item()} of {schedule!r}, where "
                f"SNR is {snr:g}. Set model.target to v, x_0, flow or F, or weight to one that is bounded there, such "
                "as min_snr."
            )
        if weights[-1] == 0 and schedule.log_snr(times[-1:]).isneginf():
            _warn_of_no_weight(self, schedule, target)


@keep
def _warn_of_no_weight(weight: Weight, schedule: Schedule, target: str) -> None:
    _log.warning(
        "weight=%r on the loss of %s is 0 at t = %d of %r, where SNR is 0: the step at which sampling starts is never "
        "learned. Set weight to min_snr, soft_min_snr or snr, which are 1 there, or to none.",
        weight,
        target,
        schedule.timesteps - 1,
        schedule,
    )


def _convert(weight: Weight, schedule: Schedule, target: str, t: Tensor, sigma_data: float) -> Tensor:
    level = Level(schedule, t, sigma_data, limit=True)
    value = on_target(weight, level, target)
    if weight.without_signal is not None:
        value = torch.where(schedule.log_snr(level.t, torch.float64).isneginf(), weight.without_signal, value)
    return value.float().to(t.device)


def on_target(weight: Weight, level: Level, target: str) -> Tensor:
    """Return the weight on the loss of a target, float64, of level's shape."""
    value = weight.at(level)
    if weight.stated_on in (None, target):
        return value
    return value * (_determinant(level, weight.stated_on) / _determinant(level, target)).square()


def _determinant(level: Level, target: str) -> Tensor:
    p, q = IMAGE_FIELDS[target](level)
    return level.alpha * q - level.sigma * p


@keep
def _tabulate(weight: Weight, schedule: Schedule, target: str, sigma_data: float, device: torch.device) -> Tensor:
    return _convert(weight, schedule, target, torch.arange(schedule.timesteps), sigma_data).to(device)
