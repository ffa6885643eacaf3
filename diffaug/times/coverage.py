"""Coverage: how the samples of an epoch share out the unit interval before a density shapes it.

A coverage gives each sample a point, an integer in [0, 2^53), uniform over that range; a density maps it to a time
through its inverse CDF. Whatever the coverage, each sample's point is uniform, so every average over them is
unbiased; what differs is how evenly a run of samples covers the range.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.noise.philox import Keys, Purpose, points

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, rounded to odd, as a signed number
_SILVER = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1), rounded to odd: another irrational, so that views fall in between


@dataclass(frozen=True)
class Coverage(ABC):
    """How the samples share out the unit interval."""

    @abstractmethod
    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        """Each sample's point, int64, shape (B,), in [0, 2^53).

        Arguments:
            position: the sample's place in the epoch's global order, int64, shape (B,), or None where it is unknown.
        """


@dataclass(frozen=True)
class Independent(Coverage):
    """Every sample draws for itself: its time is a function of its key alone."""

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return points(keys, Purpose.TIME)


@dataclass(frozen=True)
class ByIndex(Coverage):
    """A low-discrepancy sequence in the sample index and the view: what evaluation uses.

    Any prefix of the dataset is evenly covered, on any number of ranks, and each image keeps its point. The start is
    drawn once for each seed, stage and dataset number. (The obvious i / N would tie t to the class in a sorted set.)
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return golden(keys.sample, keys.view * _SILVER + keyed_offset(keys))


def golden(position: Tensor, offset: Tensor | int = 0) -> Tensor:
    """The golden-ratio sequence, as points in [0, 2^53): any run of consecutive positions covers the range evenly.

    The additive recurrence x_n = (n / golden ratio + offset) mod 1 (Weyl 1916), in wrapping 64-bit integers: exact,
    and the same on every device. ``offset`` is in units of 2^-64.
    """
    return (position * _GOLDEN + offset) >> 11 & (2**53 - 1)


def keyed_offset(keys: Keys) -> Tensor:
    """53 random bits at the top of an int64, shape (B,): of seed, stage, dataset number and epoch alone."""
    zero = torch.zeros_like(keys.low)
    return points(keys._replace(low=zero, high=zero), Purpose.COVERAGE) << 11
