"""The interface of densities of t: the noise levels on which a recipe trains.

A density is an inverse CDF: it maps points that are uniform over [0, 2^53) to times of a schedule, more noise for a
greater point, always. It is evaluated in float64; a continuous time is rounded to float32 once. A density is stated
in one of two ways, and so goes with any schedule:

| stated in   | class                            | what it is on another schedule                                |
|-------------|----------------------------------|---------------------------------------------------------------|
| unit time   | `UnitTimes` (`unit_densities`)   | another distribution of noise levels: u moves with t          |
| noise level | `LevelTimes` (`level_densities`) | the same distribution of log-SNR, as far as the schedule goes |
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaug.checks import check_fields, instance, integer, refuse
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys
from diffaug.randomness.philox import indices, uniforms
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep, where_float64_is
from diffaug.times.coverage import Coverage, Independent

_log = logging.getLogger("diffaug")
_SELDOM = 1e-3
"""A timestep that has less than this share of a uniform density's draws counts as never drawn."""
ndtri: Callable[[Tensor], Tensor] = torch.special.ndtri  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
"""The standard normal's inverse CDF, with the type that torch does not give it."""


@dataclass(frozen=True)
class Times(ABC):
    """How t is drawn: a density, and how the samples cover it.

    Arguments:
        coverage: see `diffaug.times.coverage`.
    """

    coverage: Coverage = field(default_factory=Independent, kw_only=True)
    learns: ClassVar[bool] = False
    """Whether it learns from the losses, which are where the images are."""

    def __post_init__(self) -> None:
        instance("times.coverage", self.coverage, Coverage, "a Coverage object")
        check_fields(self, "times")

    @abstractmethod
    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        """Return the time below which a share q of all draws lies: the inverse CDF. It never falls as q grows.

        Arguments:
            q: float64 in (0, 1).

        Returns:
            Native times of the schedule, int64 if it is discrete, float64 if continuous, of q's shape.
        """

    def check(self, schedule: Schedule) -> None:
        """Refuse a schedule on which this density makes no sense; warn, once, of a last step that it never draws.

        That is, where the schedule ends without signal (zero terminal SNR): sampling starts there, so it must be
        trained on. A density over noise levels cannot draw it, its log-SNR being -inf; one over unit time may hardly
        ever do.

        Raises:
            ValueError: with the reason, and what to do instead.
        """
        _warn_if_the_end_is_not_drawn(self, schedule)

    def of_points(self, points: Tensor, schedule: Schedule) -> Tensor:
        """Return the time at each point in [0, 2^53): int64, or float32 strictly inside the schedule's range."""
        t = self.quantile(uniforms(where_float64_is(points)), schedule)
        return (t if schedule.discrete else t.float().clamp(*_inside(*schedule.range))).to(points.device)

    def draw(
        self,
        keys: Keys,
        schedule: Schedule,
        position: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Draw one time for each of B samples: int64 or float32, shape (B,), where the keys are.

        Arguments:
            position: each sample's place in the epoch's global order, int64, shape (B,), where the coverage needs it.
            device: the images', where it is another: there a density that learns has what it learned, and draws.
        """
        points = self.coverage.points(keys, position)
        if self.learns and device is not None:
            (points,) = move([points], device)
        return self.of_points(points, schedule)

    def importance_weight(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Return what a loss at t is multiplied by for the mean to be that of uniform times: float32, of t's shape.

        One for every density but `Importance`: another density is a choice of what to train on, not to be undone.
        """
        return torch.ones(t.shape, dtype=torch.float32, device=t.device)

    def clear(self) -> None:  # noqa: B027 - most keep nothing
        """Forget what was learned in an earlier run."""

    def begin_batch(self, *, again: bool) -> None:  # noqa: B027 - most keep nothing
        """Note that a training batch begins; ``again``: the one before it was not finished, and comes again."""

    def state_dict(self, *, unfinished: bool = False) -> dict[str, Any]:
        """Return what a checkpoint must keep: nothing, unless the density learns.

        Arguments:
            unfinished: whether the batch at hand is not done, and will come again.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most keep nothing
        """Restore a `state_dict`."""

    def histogram(self, schedule: Schedule, edges: Tensor, resolution: int = 2**16) -> Tensor:
        """Return the share of all draws in each bin of log-SNR: what a recipe trains on.

        Arguments:
            edges: log-SNRs that rise, infinities among them if wanted, shape (K + 1,). A bin holds its lower edge.
            resolution: a share is exact to about 1 / resolution.

        Returns:
            float64 on the CPU, shape (K,). Draws beyond the outer edges are in no bin.
        """
        integer("resolution", resolution, 1)
        edges = edges.double().cpu()
        if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
            raise refuse("edges", edges.numpy(force=True).tolist(), "log-SNRs that rise, at least two")
        q = (torch.arange(resolution, dtype=torch.float64, device="cpu") + 0.5) / resolution
        log_snr = schedule.log_snr(self.quantile(q, schedule), torch.float64)
        place = torch.searchsorted(edges, log_snr, right=True)
        return torch.bincount(place, minlength=len(edges) + 1)[1:-1].double() / resolution


@dataclass(frozen=True)
class UnitTimes(Times):
    """A density over unit time: a subclass defines `unit`."""

    @abstractmethod
    def unit(self, q: Tensor) -> Tensor:
        """Return the inverse CDF of unit time: float64 in (0, 1) to float64 in [0, 1], of q's shape."""

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        return schedule.from_unit(self.unit(q))


@dataclass(frozen=True)
class LevelTimes(Times):
    """A density over the noise level: a subclass defines `log_snr`.

    Where a paper states it in sigma, that is the sigma of variance exploding noise, sigma(t) / alpha(t) on any other
    schedule; its log-SNR is -2 ln sigma. A discrete schedule takes the nearest index. What lies beyond an end of the
    schedule falls on that end: see `Times.histogram` for how much.
    """

    @abstractmethod
    def log_snr(self, q: Tensor) -> Tensor:
        """Return the log-SNR above which a share q of draws lies: float64 in (0, 1) to finite float64, falling in q."""

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        _check_overlap(self, schedule)
        t = schedule.t_of_log_snr(self.log_snr(q))
        return (t + 0.5).long() if schedule.discrete else t

    def check(self, schedule: Schedule) -> None:
        _check_overlap(self, schedule)
        super().check(schedule)


@dataclass(frozen=True)
class Uniform(UnitTimes):
    """Every t alike: uniform over [0, T) or over the unit interval (Ho, Jain and Abbeel 2020, algorithm 1)."""

    def unit(self, q: Tensor) -> Tensor:
        return q

    def of_points(self, points: Tensor, schedule: Schedule) -> Tensor:
        if not schedule.discrete:
            return super().of_points(points, schedule)
        return indices(points, schedule.timesteps)


@keep
def _inside(low: float, high: float) -> tuple[float, float]:
    """Return the least and greatest float32 strictly between two numbers, no denormal (a GPU may take it for 0)."""
    ends = torch.tensor([low, high], dtype=torch.float32)
    first, last = map(float, torch.nextafter(ends, ends.flip(0)))
    return (max(first, torch.finfo(torch.float32).tiny) if low == 0 else first), last


@keep
def _check_overlap(times: LevelTimes, schedule: Schedule) -> None:
    ends = torch.tensor(schedule.range, dtype=torch.int64 if schedule.discrete else torch.float64)
    most, least = map(float, schedule.log_snr(ends, torch.float64))
    high, low = map(float, times.log_snr(torch.tensor([0.001, 0.999], dtype=torch.float64)))
    if low >= most or high <= least:
        raise ValueError(
            f"times: {times!r} is a density over noise levels, of log-SNR {low:.3g} to {high:.3g}, but "
            f"{schedule!r} has none of them: its log-SNR goes from {least:.3g} to {most:.3g}, and every draw would "
            "fall on one end. Move the density (its fields are in sigma(t) / alpha(t), and log-SNR is "
            "-2 ln sigma; `laplace` is in log-SNR itself), or use one over unit time, such as times=uniform."
        )


@keep
def _warn_if_the_end_is_not_drawn(times: Times, schedule: Schedule) -> None:
    if not schedule.discrete or not schedule.log_snr(schedule.ends[1]).isneginf():
        return
    last = schedule.timesteps - 1
    t = int(times.quantile(torch.tensor([1 - _SELDOM / schedule.timesteps], dtype=torch.float64), schedule))
    if t < last:
        _log.warning(
            "times=%r hardly ever draws t = %d of %r, where no signal is left and sampling starts: less than once in "
            "%d draws, and else no t above %d. So that step is not learned. Use a density over unit time that reaches "
            "it, such as times=uniform, or sample from an earlier t.",
            times,
            last,
            schedule,
            schedule.timesteps / _SELDOM,
            t,
        )
