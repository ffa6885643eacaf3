"""Orders of several parts, buckets of one shape or sets of a mixture, whose samples come in laps.

Each part is an endless stream of laps: place p of a part of n samples lies in lap L = p div n, at place p mod n of a
keyed permutation of that lap. An epoch takes global batches of G samples from the streams, each from where the last
one ended: nothing is dropped and nothing padded, what a lap has left opens the next epoch, and after any number of
batches the visits of two samples of a part differ by 1 at most. Which part a batch, or a place in it, is of is computed
from its number. So there is no state but the number of batches.

A sample's draws are those of its visit: the lap stands in the epoch's place of their key.
"""

import hashlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffaug.order.epoch import Order, Visits, describe_shards
from diffaug.order.permutation import Numbers, order_keys, permute, permute_in_windows
from diffaug.randomness.keys import EPOCH_BITS

_WHOLE = 2**32
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, rounded to odd


class Laps(Order):
    """An order whose global batches are taken from endless streams, one for each part.

    Arguments:
        sizes: the number of samples of each part, 1 at least.
        batch: samples of a global batch, G.
        samples: how many samples an epoch has at least; None takes as many as the parts hold. It is rounded up to whole
            batches, so that every epoch has as many.
        seed: in [0, 2^64).
        fixed: whether every epoch has the samples of the first, as Lightning's ``overfit_batches`` wants.
        shards: the sizes of the shards in which a part's samples lie, by its number.
        window: how many shards of a part are open at a time.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch: int,
        *,
        samples: int | None = None,
        seed: int,
        fixed: bool,
        shards: Mapping[int, Numbers] = MappingProxyType({}),
        window: int = 1,
    ) -> None:
        self.shards, self.window = shards, window
        self.sizes, self.size = np.array(sizes, np.int64), int(sum(sizes))
        self.batch, self.seed, self.fixed = batch, seed, fixed
        self.steps = -(-(samples or self.size) // batch)
        self.length = self.steps * batch

    @abstractmethod
    def streams(self, epoch: int, lap: int) -> Callable[[Numbers], tuple[Numbers, Numbers]]:
        """Return the function from places of an epoch to the part there, and the place in that part's stream."""

    def of_part(self, part: Numbers, index: Numbers) -> tuple[Numbers, Numbers | int]:
        """Return the sample index, and the number of the dataset, of samples numbered within their parts."""
        return index, part

    def of_epoch(self, epoch: int, lap: int, total: int) -> Callable[[Numbers], Visits]:
        streams = self.streams(0 if self.fixed else epoch, lap)

        def visits(places: Numbers) -> Visits:
            part, place = streams(places)
            turn, within = np.divmod(place, self.sizes[part])
            index, dataset = self.of_part(part, self._permuted(part, turn, within))
            if self.fixed:
                return Visits(index, turn, epoch, dataset)
            view, turn = np.divmod(turn, 2**EPOCH_BITS)
            return Visits(index, view + lap * 2**10, turn, dataset)

        return visits

    def _permuted(self, part: Numbers, turn: Numbers, within: Numbers) -> Numbers:
        """Permute places within laps, each lap by keys of its own."""
        out = np.zeros_like(within)
        order = np.lexsort((turn, part))
        ends = np.flatnonzero((np.diff(part[order]) != 0) | (np.diff(turn[order]) != 0)) + 1
        for group in np.split(order, ends):
            number, lap = int(part[group[0]]), int(turn[group[0]])
            size = int(self.sizes[number])
            if size > 1:
                later, lap = divmod(lap, 2**EPOCH_BITS)
                round_keys = partial(order_keys, self.seed, lap, 0, later, number + 1)
                if number in self.shards:
                    out[group] = permute_in_windows(self.shards[number], self.window, round_keys)(within[group])
                else:
                    out[group] = permute(within[group], size, round_keys())
        return out


class Bucketed(Laps):
    """Each global batch is of one bucket; the batches of an epoch come in an order of its own.

    A bucket of n of all N samples is due e S n / N of the first e S batches. So many or one more or less it has had
    after each epoch, less than 1 from what is due.

    Arguments:
        bucket_of: the bucket of each sample, int64, shape (N,), in [0, K), each with one sample at least.
        batch, seed, fixed: as in `Laps`.
    """

    def __init__(self, bucket_of: Numbers, batch: int, *, seed: int, fixed: bool) -> None:
        sizes = np.bincount(bucket_of).tolist()
        super().__init__(sizes, batch, seed=seed, fixed=fixed)
        self._members = np.argsort(bucket_of, kind="stable")
        self._first = np.cumsum([0, *sizes])[:-1]
        self._buckets = hashlib.blake2b(np.asarray(bucket_of, "<i8").tobytes(), digest_size=8).hexdigest()
        self._known = (0, [0] * len(sizes))  # an epoch, and the batches of each bucket before it

    def batches_before(self, epoch: int) -> list[int]:
        """Count the global batches of each bucket before an epoch: from those before the last that was asked for."""
        known, counts = self._known if self._known[0] <= epoch else (0, [0] * len(self.sizes))
        while known < epoch:
            known += 1
            counts = share_out(counts, self.sizes.tolist(), known * self.steps)
        self._known = known, counts
        return counts

    def streams(self, epoch: int, lap: int) -> Callable[[Numbers], tuple[Numbers, Numbers]]:
        counts = self.batches_before(epoch)
        before, after = np.array([counts, share_out(counts, self.sizes.tolist(), (epoch + 1) * self.steps)], np.int64)
        edges = np.r_[0, np.cumsum(after - before)]
        round_keys = order_keys(self.seed, epoch, lap=lap)

        def streams(places: Numbers) -> tuple[Numbers, Numbers]:
            number, row = np.divmod(places, self.batch)
            number = permute(number, self.steps, round_keys)
            part = np.searchsorted(edges, number, side="right") - 1
            return part, (before[part] + number - edges[part]) * self.batch + row

        return streams

    def of_part(self, part: Numbers, index: Numbers) -> tuple[Numbers, int]:
        return self._members[self._first[part] + index], 0

    def describe(self) -> Any:
        return {"buckets": self._buckets, "global batch": self.batch}


def share_out(counts: Sequence[int], weights: Sequence[int], total: int) -> list[int]:
    """Raise whole counts to a new total, each to less than 1 from its due, total times its share of the weights.

    Of the buckets that may have one more, those get it whose next one is due first: the earliest deadline, by which
    whatever can be shared out so is (Tijdeman 1980, "The chairman assignment problem", has that it can).

    Arguments:
        counts: what this function gave for an earlier total, or zeros.
    """
    whole = sum(weights)
    shares = [max(count, total * weight // whole) for count, weight in zip(counts, weights, strict=True)]
    more = [part for part, weight in enumerate(weights) if -(-total * weight // whole) > shares[part]]
    more.sort(key=lambda part: Fraction(shares[part] + 1, weights[part]))
    for part in more[: total - sum(shares)]:
        shares[part] += 1
    return shares


class Mixed(Laps):
    """Each global batch holds every set by its weight, to less than one sample; within it they are shuffled.

    Lay the weights, times G, side by side on a line of length G. Set m gets the whole numbers on its stretch, the line
    moved on by u_g: so many as its stretch is long, rounded down or up. u_g = (g / golden ratio) mod 1 for batch g, so
    that over the batches each set gets its weight, and how many it has had is a sum that Euclid's algorithm gives.

    Arguments:
        sizes, batch, samples, seed, fixed, shards, window: as in `Laps`.
        weights: those of the sets from an epoch on, by that epoch, one of which is 0; each >= 0, not all 0.
    """

    def __init__(
        self, sizes: Sequence[int], batch: int, weights: Mapping[int, Sequence[float]], **options: Any
    ) -> None:
        super().__init__(sizes, batch, **options)
        self._weights = {epoch: [float(weight) for weight in weights[epoch]] for epoch in sorted(weights)}
        self._begins = list(self._weights)
        self._ends = [self._ends_of(of_epoch) for of_epoch in self._weights.values()]

    def _ends_of(self, weights: Sequence[float]) -> NDArray[np.int64]:
        """Return where each set's stretch of the line ends, in units of 2^-32, shape (K + 1,)."""
        parts = [Fraction(weight) for weight in weights]
        sums = [sum(parts[:number], Fraction(0)) for number in range(len(parts) + 1)]
        return np.array([round(part / sums[-1] * self.batch * _WHOLE) for part in sums], np.int64)

    def samples_before(self, batch: int) -> Numbers:
        """Count the samples of each set in the global batches before this one, int64, shape (K,)."""
        counts = np.zeros(len(self.sizes), np.int64)
        begins = [epoch * self.steps for epoch in self._begins]
        for begin, end, ends in zip(begins, [*begins[1:], batch], self._ends, strict=True):
            end = min(end, batch)
            if begin < end:
                counts += np.diff([_count_whole(int(x), end) - _count_whole(int(x), begin) for x in ends])
        return counts

    def streams(self, epoch: int, lap: int) -> Callable[[Numbers], tuple[Numbers, Numbers]]:
        ends = self._ends[bisect_right(self._begins, epoch) - 1][:, None]
        round_keys = order_keys(self.seed, epoch, lap=lap)

        def streams(places: Numbers) -> tuple[Numbers, Numbers]:
            number, row = np.divmod(places, self.batch)
            row = permute(row, self.batch, round_keys)
            low = int(number.min()) if len(number) else 0
            batches = np.arange(epoch * self.steps + low, epoch * self.steps + int(number.max(initial=low)) + 1)
            edges = ends + (batches.astype(np.uint64) * np.uint64(_GOLDEN) % np.uint64(_WHOLE)).astype(np.int64) >> 32
            counts = np.diff(edges, axis=0)
            before = self.samples_before(int(batches[0]))[:, None] + np.cumsum(counts, axis=1) - counts
            which = number - low
            part = (row >= edges[1:, which]).sum(0)
            return part, before[part, which] + row - edges[part, which]

        return streams

    def describe(self) -> Any:
        shards = {str(part): describe_shards(sizes, self.window) for part, sizes in self.shards.items()}
        order = {"sizes": self.sizes.tolist(), "weights": repr(self._weights), "global batch": self.batch}
        return {**order, "shards": shards} if shards else order


def _count_whole(end: int, batches: int) -> int:
    """Sum, over the first batches, the whole numbers on a line up to ``end``, which u_g moves on: floor(end + u_g)."""
    whole, rest = divmod(end, _WHOLE)
    moved = sum_floors(batches, _WHOLE, _GOLDEN, rest) - sum_floors(batches, _WHOLE, _GOLDEN, 0)
    return batches * whole + moved


def sum_floors(count: int, divisor: int, factor: int, offset: int) -> int:
    """Sum floor((factor i + offset) / divisor) over i in [0, count), by Euclid's algorithm.

    The whole parts of factor / divisor and offset / divisor sum by themselves. What is left counts the lattice points
    under a line of slope less than 1, which are those beside a line of the inverse slope: the same sum, of less.
    """
    total = 0
    while count:
        total += count * (count - 1) // 2 * (factor // divisor) + count * (offset // divisor)
        factor, offset = factor % divisor, offset % divisor
        count, offset = divmod(factor * count + offset, divisor)
        divisor, factor = factor, divisor
    return total
