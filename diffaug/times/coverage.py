"""Coverage: how the samples of an epoch share out the unit interval before a density shapes it.

A coverage gives each sample a point, an integer in [0, 2^53), uniform over that range; a density maps it to a time
through its inverse CDF. Whatever the coverage, each sample's point is uniform, so every average over them is
unbiased; what differs is how evenly several of them lie.

| coverage    | evenly covered by | how                                                                             |
|-------------|-------------------|---------------------------------------------------------------------------------|
| independent | nothing           | each sample draws for itself                                                    |
| stratified  | runs of the order | one sample in each stratum, anywhere in it: no two are tied more than that      |
| antithetic  | runs of the order | equal steps from a random start, as VDM's (u_0 + i / n) mod 1, whatever n is    |
| sobol       | runs of the order | aligned runs of 2^k are exactly equally spaced, and so are their shifts in turn |
| per_image   | an image's epochs | the times that one image gets, epoch after epoch                                |
| by_index    | the dataset       | what evaluation uses                                                            |

A run is any number of consecutive samples of the epoch's global order, from any place: a global batch of any size on
any number of ranks is one. No coverage knows of batches or ranks. Three need to be told a sample's place in that
order, ``position``; that is the named exception in what a draw depends on.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields
from diffaug.randomness.keys import EPOCH_BITS, Keys, Purpose
from diffaug.randomness.philox import philox, points

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, rounded to odd, as a signed number
_SILVER = 0x6A09E667F3BCC909  # 2^64 (sqrt(2) - 1), rounded to odd: another irrational, so that views fall in between
_SPREAD = (  # (s, the places among 64 bits whose number has no bit s)
    (1, 0x5555555555555555),
    (2, 0x3333333333333333),
    (4, 0x0F0F0F0F0F0F0F0F),
    (8, 0x00FF00FF00FF00FF),
    (16, 0x0000FFFF0000FFFF),
    (32, 0x00000000FFFFFFFF),
)
_DEPTH = 29  # of the strata that are kept apart: their nodes are numbered by blocks of the generator, < 2^30


@dataclass(frozen=True)
class Coverage(ABC):
    """How the samples share out the unit interval."""

    def __post_init__(self) -> None:
        check_fields(self, "coverage")

    @abstractmethod
    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        """Return each sample's point, int64, shape (B,), in [0, 2^53).

        Arguments:
            position: the sample's place in the epoch's global order, int64, shape (B,), in [0, 2^53), or None where it
                is unknown.

        Raises:
            ValueError: the coverage goes by position, and there is none.
        """

    def _require(self, position: Tensor | None) -> Tensor:
        if position is None:
            raise ValueError(
                f"coverage {type(self).__name__} spreads the samples by their place in the epoch's order, but got "
                "position=None: pass position=, int64 of shape (B,), which counts an epoch's samples over all ranks "
                "(DiffusionDataModule does), or set coverage@times.coverage=independent."
            )
        return position


@dataclass(frozen=True)
class Independent(Coverage):
    """Every sample draws for itself: its time is a function of its key alone."""

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return points(keys, Purpose.TIME)


@dataclass(frozen=True)
class Stratified(Coverage):
    """One sample in each stratum, at a place of its own there, the strata in random order.

    Cut the range into any 2^k equal strata (k <= 29): of any n consecutive samples, each stratum holds n / 2^k, give
    or take less than 2; of 2^k that begin at a multiple of 2^k, exactly one. Within its stratum each lies anywhere. A
    run's share of an interval [0, x) was never found off by more than (1 + log2(n)) / n; independent draws are off by
    about 0.9 / sqrt(n).

    It is the stratified sampler of k-diffusion, (i + u_i) / n in any order, without having to know n. The digits of the
    position, lowest first, are those of the point, highest first, but for coins: of the digits above it in the
    position, so that each run has an order of its own; then of the digits before it in the point, which is nested
    uniform scrambling (Owen 1995, "Randomly permuted (t,m,s)-nets and (t,s)-sequences").
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        position = self._require(position)[:, None]
        depth = torch.arange(_DEPTH, device=position.device)
        above, shared = position >> (depth + 1), keys.shared(keys.order)
        # (0, 0, 0) is that of `keyed_offset`; no triple is used twice.
        digit = (position >> depth & 1) ^ _coins(shared, depth, above & 0xFFFFFFFF, (above >> 32) + 1)
        before = ((digit << depth).cumsum(1) - (digit << depth)) | (1 << depth)
        digit = digit ^ _coins(shared, before, torch.zeros_like(before), torch.zeros_like(before))
        return (digit << (52 - depth)).sum(1) | (points(keys, Purpose.TIME) & (2 ** (53 - _DEPTH) - 1))


@dataclass(frozen=True)
class Antithetic(Coverage):
    """Equal steps from a random start, round and round: (u_0 + i g) mod 1, with g the golden ratio's inverse.

    The low-discrepancy sampler of Kingma et al. 2021, "Variational Diffusion Models" (antithetic in their code), takes
    steps of 1 / n in a batch of n. The golden step needs no n: of any n consecutive samples, neighbours are never more
    than 1.9 / n nor less than 0.44 / n apart (round the circle), and no run's share of any interval [0, x) is off by
    more than (1 + log2(n)) / n. Each epoch starts elsewhere.
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return golden(self._require(position), keyed_offset(keys, keys.order))


@dataclass(frozen=True)
class Sobol(Coverage):
    """Sobol's sequence, shifted digitally: one random number an epoch, everything else is fixed.

    Of any 2^k consecutive samples that begin at a multiple of 2^k, the points are exactly equally spaced; what holds of
    the strata of `Stratified` and of intervals holds here too. Sobol 1967, the dimension of the polynomial x + 1: in
    the first, van der Corput's, every second sample lies in the same half, so one of two ranks would see one half of
    the times for a whole epoch. On 3, 6, ... ranks the share of one rank alone is still uneven within an epoch (every
    third number of the Thue-Morse sequence is mostly 0); a global batch, and the gradient, is even on any number.
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        digits = _reverse_bits(sobol(self._require(position))) >> 11 & (2**53 - 1)
        return digits ^ (keyed_offset(keys, keys.order) >> 11 & (2**53 - 1))


@dataclass(frozen=True)
class PerImage(Coverage):
    """Each image's times spread evenly over the epochs, and over its views within them.

    The golden-ratio sequence in the epoch, from a start that is the image's own: of any n consecutive epochs, the
    points of one image are never more than 1.9 / n nor less than 0.44 / n apart (round the circle). Ten
    independent draws leave a third of all tenths of the range unseen. Between images nothing is tied: within a batch
    it is as `Independent`.
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        epoch = keys.domain & (2**EPOCH_BITS - 1)
        return golden(epoch, keys.view * _SILVER + (points(keys.of_image(), Purpose.COVERAGE) << 11))


@dataclass(frozen=True)
class ByIndex(Coverage):
    """A low-discrepancy sequence in the sample index and the view: what evaluation uses.

    Any prefix of the dataset is evenly covered, on any number of ranks, and each image keeps its point. The start is
    drawn once for each seed, stage and dataset number, and in training for each epoch. (The obvious i / N would tie t
    to the class in a sorted set.)
    """

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return golden(keys.sample, keys.view * _SILVER + keyed_offset(keys, keys.domain))


@dataclass(frozen=True)
class Grid(Coverage):
    """Every image at the same points, (view + 1/2) / views: with as many views, each image at every one of them.

    Arguments:
        views: how many points, in [1, 1024].
    """

    views: int = bounded(1, at_least=1, at_most=1024)

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return (2 * (keys.view % self.views) + 1) * 2**52 // self.views


@dataclass(frozen=True)
class Fixed(Coverage):
    """Every image at one and the same point.

    Arguments:
        at: where in unit time, in [0, 1).
    """

    at: float = bounded(0.5, at_least=0, below=1)

    def points(self, keys: Keys, position: Tensor | None) -> Tensor:
        return torch.full_like(keys.low, math.ceil(self.at * 2**53))


def golden(position: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Return the golden-ratio sequence, as points in [0, 2^53): any run of positions covers the range evenly.

    The additive recurrence x_n = (n / golden ratio + offset) mod 1 (Weyl 1916), in wrapping 64-bit integers: exact,
    and the same on every device. ``offset`` is in units of 2^-64.
    """
    return (position * _GOLDEN + offset) >> 11 & (2**53 - 1)


def _coins(keys: Keys, word_0: Tensor, word_1: Tensor, word_2: Tensor) -> Tensor:
    """Draw one bit for each epoch and triple of words, the last below 2^28: int64, of the words' shape, (B, N)."""
    counter = (word_0, word_1, word_2 + (Purpose.COVERAGE << 28), keys.order[:, None])
    return philox(counter, (keys.key_0[:, None], keys.key_1[:, None]))[0] & 1


def sobol(position: Tensor) -> Tensor:
    """Return the binary digits of Sobol's sequence in the dimension of x + 1: int64, the first digit in the lowest bit.

    Digit d is the parity of the position's bits j for which C(j, d) is odd, that is, for which j has every bit of d:
    Pascal's triangle modulo 2, in six steps.
    """
    for step, places in _SPREAD:
        position = position ^ (position >> step & places)
    return position


def _reverse_bits(x: Tensor) -> Tensor:
    """Return the 64 bits of each number in reverse."""
    for step, places in _SPREAD:
        x = (x >> step & places) | ((x & places) << step)
    return x


def keyed_offset(keys: Keys, domain: Tensor) -> Tensor:
    """Draw 53 random bits at the top of an int64, shape (B,): of seed, stage, dataset number and epoch alone.

    Arguments:
        domain: ``keys.order``, for who spreads the samples of an order, or ``keys.domain``.
    """
    return points(keys.shared(domain), Purpose.COVERAGE) << 11
