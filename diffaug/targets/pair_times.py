"""Laws of the two times of a pair: s, and for some laws a t of their own, given the t that the process drew.

| law              | s, in unit time where not said otherwise     | t                      | source                  |
|------------------|----------------------------------------------|------------------------|-------------------------|
| `UniformEarlier` | uniform over all earlier times               | as drawn               |                         |
| `StepEarlier`    | a fixed step before t                        | as drawn               | Song et al. 2023        |
| `TwoDraws`       | the lesser of two draws, or t                | the greater of the two | Geng et al. 2025        |
| `SigmaRatio`     | a share of t that falls with t, in sigma     | as drawn               | Geng et al. 2024        |
| `Neighbours`     | the grid's point below the drawn t           | the point above it     | Song and Dhariwal 2023  |
| `DyadicStep`     | t - 2^-k for a random k, or t                | a multiple of 2^-k     | Frans et al. 2024       |

Every draw is of the sample's own key alone. The law is that of any stage; in evaluation t is drawn evenly.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, refuse
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import indices, points, uniforms
from diffaug.schedules import Schedule
from diffaug.times import Independent, Times


@dataclass(frozen=True)
class PairTimes(ABC):
    """How the two times of a pair are drawn."""

    moves_t: ClassVar[bool] = False
    """Whether t is not the process's own."""
    continuous: ClassVar[bool] = False
    """Whether the law is one of continuous time only."""

    def __post_init__(self) -> None:
        check_fields(self, "process.pair.times")

    def check(self, schedule: Schedule, times: Times) -> None:
        """Refuse a schedule, or times of the process, with which the law makes no sense."""
        if self.continuous and schedule.discrete:
            raise ValueError(
                f"process.pair.times={self!r} is a law of continuous time, but {schedule!r} is discrete. Use a "
                "continuous schedule, such as schedule=edm or schedule=rectified, or another law, such as StepEarlier."
            )
        if self.moves_t and times.learns:
            raise ValueError(
                f"process.pair.times={self!r} makes a t of its own, so that the losses at t would not be those of "
                f"{times!r}, which learns from them. Use other times, such as times=uniform."
            )

    @abstractmethod
    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (t, s), both of t's dtype, shape (B,), on t's device.

        Arguments:
            keys: of the B samples, on t's device.
            schedule: of which t is a native time.
            times: from which t was drawn.
            t: int64, or float32 within the schedule's range.
        """


@dataclass(frozen=True)
class UniformEarlier(PairTimes):
    """s is uniform over all earlier times: in unit time, or over -1, ..., t - 1 if discrete, where -1 is the clean
    image."""

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        if schedule.discrete:
            return t, indices(points(keys, Purpose.SECOND_TIME), t + 1) - 1
        unit = schedule.to_unit(t, torch.float64) * uniforms(points(keys, Purpose.SECOND_TIME))
        return t, _before(schedule.from_unit(unit), t, schedule)


@dataclass(frozen=True)
class StepEarlier(PairTimes):
    """s is a step of unit time before t, held at the clean image (-1) if discrete, at unit time 0 if continuous.

    Adjacent times of N, as in Song et al. 2023, "Consistency Models", but at any t, not only on a grid.

    Arguments:
        steps: how many equal steps unit time has.
    """

    steps: int = bounded(18, at_least=1)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        if schedule.discrete:
            return t, (t - max(1, round(schedule.timesteps / self.steps))).clamp_min(-1)
        unit = (schedule.to_unit(t, torch.float64) - 1 / self.steps).clamp_min(0.0)
        return t, _before(schedule.from_unit(unit), t, schedule)


@dataclass(frozen=True)
class TwoDraws(PairTimes):
    """t is the greater and s the lesser of two independent draws, but for a share of samples whose s is t.

    Geng et al. 2025, "Mean Flows for One-step Generative Modeling", section 4.3 (their r is s): both draws from
    logit-normal(-0.4, 1), then sorted; for a share s is set to t, which is plain flow matching. Its t is the greater
    draw too. (Not checked against the paper's text, but against notes on it and other codes.) What they call the ratio
    is the share where the two differ, 0.25 for ImageNet and 0.75 for CIFAR-10; other codes call the share where they
    are equal so. Here it is ``equal``, and the field ``same`` says which samples are. In their code a share of each
    batch, exactly; here each sample's key says it, whatever the batch. On a discrete schedule more are equal by chance.

    Arguments:
        equal: the share of samples for which s is t, in [0, 1].
        second: the density of the second draw, which must cover independently; None: that of the first.
    """

    moves_t = True
    equal: float = bounded(0.75, at_least=0, at_most=1)
    second: Times | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.second is None:
            return
        instance("process.pair.times.second", self.second, Times, "a Times object or null")
        if self.second.learns or not isinstance(self.second.coverage, Independent):
            raise refuse("process.pair.times.second", self.second, "a density that covers independently and learns not")

    def check(self, schedule: Schedule, times: Times) -> None:
        super().check(schedule, times)
        if self.second is not None:
            self.second.check(schedule)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        other = (self.second or times).of_points(points(keys, Purpose.SECOND_TIME), schedule)
        later = torch.maximum(t, other)
        return later, torch.where(_share(keys, self.equal), later, torch.minimum(t, other))


@dataclass(frozen=True)
class SigmaRatio(PairTimes):
    """s has the noise level r = sigma (1 - (1 + k sigmoid(-b sigma)) / q^stage), at least 0, where t has sigma.

    Geng et al. 2024, "Consistency Models Made Easy", the mapping function of their section 3, with the defaults of
    their code for CIFAR-10 (q = 4 for ImageNet; not checked against the paper's text, but against the code, whose stage
    counts from 0). sigma is sigma(t) / alpha(t), EDM's t, and r is as low as the schedule goes. Their stage rises
    while training goes on; here it is fixed, and each stage is a run of its own, on from the checkpoint of the last.

    Arguments:
        q: the base by which the step shrinks, > 1.
        k: how much longer a step is where sigma is small, >= 0.
        b: how soon that ends as sigma grows, >= 0.
        stage: the exponent, >= 1; the first is mostly plain denoising, r = 0.
    """

    continuous = True
    q: float = bounded(2.0, above=1)
    k: float = bounded(8.0, at_least=0)
    b: float = bounded(1.0, at_least=0)
    stage: int = bounded(1, at_least=1, at_most=64)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = schedule.log_snr(t, torch.float64)
        longer = 1 + self.k * torch.sigmoid(-self.b * (-log_snr / 2).exp())
        ratio = (1 - longer / self.q**self.stage).clamp_min(0.0)
        return t, _before(schedule.t_of_log_snr(log_snr - 2 * ratio.log()), t, schedule)


@dataclass(frozen=True)
class Neighbours(PairTimes):
    """t and s are the two neighbours, of a grid even in unit time, between which the process's own t lies.

    On `EDM` this is the Karras grid. Song et al. 2023, "Consistency Models", algorithm 3 (consistency training): with
    uniform times, each pair alike. Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models",
    section 3.5, p(sigma_i) as erf((ln sigma_{i+1} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i - P_mean) / ...): with
    `LogNormal(-1.1, 2.0, sigma_min=0.002, sigma_max=80)`, whose share of a cell this is. (Equations from memory, not
    checked against the texts.) Both let N grow with training, 10 to 1280 in the latter; here it is fixed.

    Arguments:
        points: N, the points of the grid, ends included, in [2, 65536].
    """

    moves_t, continuous = True, True
    points: int = bounded(18, at_least=2, at_most=2**16)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        return _cell(schedule, t, torch.full_like(t, self.points - 1))


@dataclass(frozen=True)
class DyadicStep(PairTimes):
    """s = t - 2^-k in unit time, k uniform over 0, ..., levels - 1, t a multiple of 2^-k; s = t for a share of samples.

    Frans et al. 2024, "One Step Diffusion via Shortcut Models" (their t is 1 less ours, their d the step): for a
    quarter of each batch the step is learned from two half as long, from t to (t + s) / 2 to s; the rest is plain flow
    matching, at multiples of 2^-levels. t is the upper end of the cell of 2^-k in which the process's own t lies, so
    with uniform times each multiple is alike. (From memory, not checked against the text; in their code k is even over
    each batch and the quarter exact, here each sample's key says both.)

    Arguments:
        levels: how many lengths of step; 2^-levels is the finest half step, in [1, 20].
        equal: the share of samples for which s is t, the plain ones, in [0, 1].
    """

    moves_t, continuous = True, True
    levels: int = bounded(7, at_least=1, at_most=20)
    equal: float = bounded(0.75, at_least=0, at_most=1)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor) -> tuple[Tensor, Tensor]:
        same = _share(keys, self.equal)
        level = torch.where(same, self.levels, indices(points(keys, Purpose.SECOND_TIME), self.levels))
        later, s = _cell(schedule, t, torch.ones_like(level) << level)
        return later, torch.where(same, later, s)


def interval(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Return t - s in unit time, float32, of t's shape: 0 only where they are equal.

    From a discrete t to the clean image, s = -1, it is (t + 1) / T. Beyond the ends of EDM's grid, where unit time
    stands still, it is float32's least normal number.
    """
    if schedule.discrete:
        return (t - s).float() / schedule.timesteps
    span = (schedule.to_unit(t, torch.float64) - schedule.to_unit(s, torch.float64)).float()
    return torch.where(s == t, 0.0, span.clamp_min(torch.finfo(torch.float32).tiny))


def _cell(schedule: Schedule, t: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower ends of the cell, of so many equal ones of unit time, in which t lies: float32."""
    count = count.double()
    cell = torch.minimum((schedule.to_unit(t, torch.float64) * count).floor(), count - 1)
    later = schedule.from_unit((cell + 1) / count).float()
    return later, _before(schedule.from_unit(cell / count), later, schedule)


def _share(keys: Keys, share: float) -> Tensor:
    """Choose a share of samples, each by its key: bool, shape (B,)."""
    return uniforms(points(keys, Purpose.SAME_TIME)) < share


def _before(s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Round float64 times to float32, below t if that is not the lowest time."""
    return torch.minimum(s.float(), torch.nextafter(t, torch.full_like(t, schedule.range[0])))
