"""Laws of the times of a pair: s, for some laws a t of their own and a third time, given the t that the process drew.

| law                 | s, in unit time where not said otherwise | t                      | source                     |
|---------------------|------------------------------------------|------------------------|----------------------------|
| `UniformEarlier`    | uniform over all earlier times           | as drawn               |                            |
| `StepEarlier`       | a fixed step before t                    | as drawn               | Song et al. 2023           |
| `TwoDraws`          | the lesser of two draws, or t            | the greater of the two | MeanFlow                   |
| `DyadicStep`        | t - 2^-k for some k, or t                | a multiple of 2^-k     | shortcut models            |
| `SigmaRatio`        | a share of t that falls with t, in sigma | as drawn               | ECT                        |
| `Neighbours`        | the grid's point below the drawn t       | the point above it     | consistency training, iCT  |
| `ConstantDecrement` | uniform over all earlier times           | one for a group        | IMM                        |

The last three, stated in the noise level, are in `diffaug.times.pair_level_laws`. A sample's times are of its own key,
and for some laws of its place in the epoch's order (`DyadicStep`, `ConstantDecrement`) or of how many samples the run
has handed out before it (a curriculum of `SigmaRatio` or `Neighbours`): never of the batch, its size or the optimiser's
steps. In evaluation t is drawn evenly, and a curriculum has come to its end.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, refuse
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import indices, points, uniforms
from diffaug.schedules import Schedule
from diffaug.times.coverage import Independent, Sobol
from diffaug.times.densities import Times

_ROLES = 0x5C4F3E2D  # of the key: the roles' shift of Sobol's sequence is not that of another use of it


class PairPlaces(NamedTuple):
    """Where samples stand, for the laws that go by it: int64, shape (B,), on t's device; None where it is unknown.

    Attributes:
        position: the place in the epoch's global order.
        handed: how many samples the run has handed out before.
    """

    position: Tensor | None = None
    handed: Tensor | None = None

    def to(self, device: torch.device) -> "PairPlaces":
        """Move them to a device."""
        return PairPlaces(*(None if one is None else move([one], device)[0] for one in self))


NOWHERE = PairPlaces()
TwoTimes = tuple[Tensor, Tensor]
"""t and an earlier s, of one dtype and shape."""


@dataclass(frozen=True)
class PairTimes(ABC):
    """How the times of a pair are drawn."""

    moves_t: ClassVar[bool] = False
    """Whether t is not the process's own."""
    continuous: ClassVar[bool] = False
    """Whether the law is one of continuous time only."""
    third: ClassVar[bool] = False
    """Whether there is a time r between s and t, a function of both."""

    def __post_init__(self) -> None:
        check_fields(self, "pair.times")

    @property
    def together(self) -> int:
        """How many samples, one after another in the order, share their times."""
        return 1

    def check(self, schedule: Schedule, times: Times) -> None:
        """Refuse a schedule, or times of the process, with which the law makes no sense."""
        if self.continuous and schedule.discrete:
            raise ValueError(
                f"pair.times={self!r} is a law of continuous time, but {schedule!r} is discrete. Use a continuous "
                "schedule, such as schedule=edm or schedule=rectified, or another law, such as pair=step_earlier."
            )
        if self.moves_t and times.learns:
            raise ValueError(
                f"pair.times={self!r} makes a t of its own, so that the losses at t would not be those of {times!r}, "
                "which learns from them. Use other times, such as times=uniform."
            )

    @abstractmethod
    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        """Return (t, s), both of t's dtype, shape (B,), on t's device.

        Arguments:
            keys: of the B samples, on t's device.
            schedule: of which t is a native time.
            times: from which t was drawn.
            t: int64, or float32 within the schedule's range.
            places: of the samples.
        """

    def between(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        """Return r, s <= r < t, of t's dtype and shape."""
        raise TypeError(f"{self!r} has two times only.")

    def weight(self, schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
        """Return the weight of each pair's loss at the law's source, float32, of t's shape: 1 unless it states one."""
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)


@dataclass(frozen=True)
class UniformEarlier(PairTimes):
    """s is uniform over all earlier times: in unit time, or over -1, ..., t - 1 if discrete, where -1 is the clean
    image."""

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        if schedule.discrete:
            return t, indices(points(keys, Purpose.SECOND_TIME), t + 1) - 1
        unit = schedule.to_unit(t, torch.float64) * uniforms(points(keys, Purpose.SECOND_TIME))
        return t, round_below(schedule.from_unit(unit), t, schedule)


@dataclass(frozen=True)
class StepEarlier(PairTimes):
    """s is a step of unit time before t, held at the clean image (-1) if discrete, at unit time 0 if continuous.

    Adjacent times of N, as in Song et al. 2023, "Consistency Models", but at any t, not only on a grid.

    Arguments:
        steps: how many equal steps unit time has.
    """

    steps: int = bounded(18, at_least=1)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        if schedule.discrete:
            return t, (t - max(1, round(schedule.timesteps / self.steps))).clamp_min(-1)
        unit = (schedule.to_unit(t, torch.float64) - 1 / self.steps).clamp_min(0.0)
        return t, round_below(schedule.from_unit(unit), t, schedule)


@dataclass(frozen=True)
class TwoDraws(PairTimes):
    """t is the greater and s the lesser of two independent draws, but for a share of samples whose s is t.

    Geng et al. 2025, "Mean Flows for One-step Generative Modeling", section 4.3 (their r is s): both draws from
    logit-normal(-0.4, 1), then sorted; for a share s is set to t, which is plain flow matching. Its t is the greater
    draw too. What the paper calls the ratio is the share where the two differ, 0.25 for ImageNet and 0.75 for CIFAR-10;
    other codes call the share where they are equal so. Here it is ``equal``, and the field ``same`` says which samples
    are. Checked against their code (Gsunshine/meanflow, meanflow.py, where it is ``data_proportion``), not against the
    paper's text: there the share is of each batch, exactly; here each sample's key says it, whatever the batch. On a
    discrete schedule more are equal by chance.

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
        instance("pair.times.second", self.second, Times, "a Times object or null")
        if self.second.learns or not isinstance(self.second.coverage, Independent):
            raise refuse("pair.times.second", self.second, "a density that covers independently and learns not")

    def check(self, schedule: Schedule, times: Times) -> None:
        super().check(schedule, times)
        if self.second is not None:
            self.second.check(schedule)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        other = (self.second or times).of_points(points(keys, Purpose.SECOND_TIME), schedule)
        later = torch.maximum(t, other)
        same = uniforms(points(keys, Purpose.SAME_TIME)) < self.equal
        return later, torch.where(same, later, torch.minimum(t, other))


@dataclass(frozen=True)
class DyadicStep(PairTimes):
    """s = t - 2^-k in unit time, k of 0, ..., levels - 1, t a multiple of 2^-k; s = t for a share of samples.

    Frans et al. 2024, "One Step Diffusion via Shortcut Models" (their t is 1 less ours, their d the step): for some
    samples the step is learned from two half as long, from t to (t + s) / 2 to s, which is self-consistency; the rest,
    which the field ``same`` tells, is plain flow matching, at multiples of 2^-levels. t is the upper end of the cell of
    2^-k in which the process's own t lies, so with uniform times each multiple is alike.

    Both roles, and the k of the first, are spread evenly over the places of the epoch's order, by Sobol's sequence: of
    2^m samples from a multiple of 2^m on each role has its share exactly, where that is a multiple of 2^-m (as 16 of
    64), and so has what each of 2^j ranks gets of them; any other run is off by 1 + log2(n) of n at most. Checked
    against their code (kvfrans/shortcut-models, targets_shortcut.py), not against the paper's text: there the first
    eighth of a batch is self-consistency (``bootstrap_every=8``; the paper has a quarter), each k as often, and what
    the division leaves over has k = 0.

    Arguments:
        levels: how many lengths of step; 2^-levels is the finest half step, in [1, 20].
        equal: the share of samples for which s is t, the plain ones, in [0, 1].
    """

    moves_t, continuous = True, True
    levels: int = bounded(7, at_least=1, at_most=20)
    equal: float = bounded(0.75, at_least=0, at_most=1)

    def check(self, schedule: Schedule, times: Times) -> None:
        super().check(schedule, times)
        if isinstance(times.coverage, Sobol):
            raise ValueError(
                f"pair.times={self!r} spreads its roles by Sobol's sequence, and {times!r} its t, so that one would "
                "tell the other: set coverage@times.coverage to stratified, or to another."
            )

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        rows = keys.rows.clone()
        rows[1] ^= _ROLES
        share = uniforms(Sobol().points(Keys(rows), require(self, places, "position")))
        same = share < self.equal
        level = ((share - self.equal) / max(1 - self.equal, 2.0**-53) * self.levels).long().clamp(0, self.levels - 1)
        later, s = grid_cell(schedule, t, torch.ones_like(level) << torch.where(same, self.levels, level))
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


def grid_cell(schedule: Schedule, t: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the upper and lower ends of the cell, of so many equal ones of unit time, in which t lies: float32."""
    count = count.double()
    cell = torch.minimum((schedule.to_unit(t, torch.float64) * count).floor(), count - 1)
    later = schedule.from_unit((cell + 1) / count).float()
    return later, round_below(schedule.from_unit(cell / count), later, schedule)


def require(law: PairTimes, places: PairPlaces, name: str) -> Tensor:
    """Return the samples' places of this name, position or handed, or say that they are needed."""
    numbers: Tensor | None = getattr(places, name)
    if numbers is None:
        handed = "how many samples the run has handed out before"
        what = "the sample's place in the epoch's order" if name == "position" else handed
        raise ValueError(
            f"pair.times={law!r} goes by {what}, but got {name}=None: pass {name}=, int64 of shape (B,). "
            "DiffusionDataModule does for a dataset with a length; a stream's samples it cannot count."
        )
    return numbers


def round_below(s: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Round float64 times to float32, below t if that is not the lowest time."""
    return torch.minimum(s.float(), torch.nextafter(t, torch.full_like(t, schedule.range[0])))
