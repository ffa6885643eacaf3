"""A mixture of two densities of t."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaug.checks import bounded, instance, refuse
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep
from diffaug.times.densities import Times, Uniform
from diffaug.times.unit_densities import LogitNormal

_KNOTS = 2**13
_LEAST, _MOST = 2.0**-54, 1 - 2.0**-53


@dataclass(frozen=True)
class MixedTimes(Times):
    """A share of the draws from one density, the rest from another; of more than two, a mixture within a mixture.

    "A tenth uniform" is the usual one, so that no noise level is left untrained. It is the inverse CDF of the sum, not
    a choice between the two for each draw: a greater point is more noise here too, and a coverage covers the mixture.

    Discrete: exact. Continuous: linear in t between 2^13 points of each density, and more in the tails, at which it is
    exact: within 1.3e-4 of the law everywhere, 1e-6 where the density is smooth.

    Arguments:
        first: a density of the kinds in `diffaug.times`, but none that learns. Its own coverage is not used.
        second: another.
        share: of the draws that are the first's, in (0, 1).
    """

    first: Times = field(default_factory=LogitNormal)
    second: Times = field(default_factory=Uniform)
    share: float = bounded(0.9, above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, each in (("times.first", self.first), ("times.second", self.second)):
            if instance(where, each, Times, "a Times object").learns:
                raise refuse(where, each, "a density that does not learn")

    def quantile(self, q: Tensor, schedule: Schedule) -> Tensor:
        cdf, t = _table(self, schedule, q.device)
        right = torch.searchsorted(cdf, q.contiguous())
        if schedule.discrete:
            return right.clamp_max(len(t) - 1)
        right = right.clamp(1, len(t) - 1)
        left = right - 1
        into = (q - cdf[left]) / (cdf[right] - cdf[left]).clamp_min(2.0**-60)
        return torch.lerp(t[left], t[right], into.clamp(0.0, 1.0))

    def check(self, schedule: Schedule) -> None:
        for each in (self.first, self.second):
            each.quantile(torch.tensor([0.5], dtype=torch.float64, device="cpu"), schedule)  # which says what is wrong
        super().check(schedule)


@keep
def _table(times: MixedTimes, schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the CDF of a mixture, float64, at rising native times, and these: both of shape (K,)."""
    parts = (times.first, times.second)
    if schedule.discrete:
        t = torch.arange(schedule.timesteps)
    else:
        tail = 2.0 ** torch.arange(-53, -15, dtype=torch.float64)
        middle = torch.arange(1, _KNOTS, dtype=torch.float64) / _KNOTS
        q = torch.cat([torch.tensor([_LEAST, _MOST], dtype=torch.float64), tail, middle, 1 - tail])
        t = torch.cat([each.quantile(q, schedule) for each in parts]).sort().values
    first, second = (_cdf(each, schedule, t) for each in parts)
    return (times.share * first + (1 - times.share) * second).to(device), t.to(device)


def _cdf(times: Times, schedule: Schedule, t: Tensor) -> Tensor:
    """Return the share of draws at or below each native time, by bisection of the inverse CDF."""
    low, high = torch.zeros(t.shape, dtype=torch.float64), torch.ones(t.shape, dtype=torch.float64)
    for _ in range(54):
        middle = ((low + high) / 2).clamp(_LEAST, _MOST)
        within = times.quantile(middle, schedule) <= t
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return low
