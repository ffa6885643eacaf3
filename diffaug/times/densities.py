"""Densities of t: what noise levels a recipe trains on.

A density is an inverse CDF: it maps points that are uniform over [0, 2^53) to times of a schedule. It is evaluated
in float64; a continuous time is rounded to float32 once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from diffaug.noise.philox import Keys, indices, uniforms
from diffaug.schedules import Schedule
from diffaug.times.coverage import Coverage, Independent


@dataclass(frozen=True)
class Times(ABC):
    """How t is drawn: a density, and how the samples cover it.

    Arguments:
        coverage: see `diffaug.times.coverage`.
    """

    coverage: Coverage = field(default_factory=Independent, kw_only=True)

    @abstractmethod
    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        """The inverse CDF: the time below which a share q of all draws lies.

        Arguments:
            q: float64 in (0, 1).

        Returns:
            Native times of the schedule, int64 if it is discrete, float64 if continuous, of q's shape.
        """

    def of_points(self, points: Tensor, schedule: Schedule) -> Tensor:
        """The time at each point in [0, 2^53): int64 or float32."""
        t = self.quantile(uniforms(points), schedule)
        return t if schedule.discrete else t.float()

    def draw(self, keys: Keys, schedule: Schedule, position: Tensor | None = None) -> Tensor:
        """One time for each of B samples: int64 or float32, shape (B,)."""
        return self.of_points(self.coverage.points(keys, position), schedule)


@dataclass(frozen=True)
class Uniform(Times):
    """Every t alike: uniform over [0, T) or over the unit interval (Ho, Jain and Abbeel 2020, algorithm 1)."""

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        return schedule.from_unit(q)

    def of_points(self, points: Tensor, schedule: Schedule) -> Tensor:
        if not schedule.discrete:
            return super().of_points(points, schedule)
        return indices(points, schedule.timesteps)
