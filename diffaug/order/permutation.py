"""Keyed permutations: an order of any size that is computed place by place and kept nowhere."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from diffaug.randomness.keys import COUNTED_BITS, EPOCH_BITS, Keys, Purpose
from diffaug.randomness.philox import words

Numbers = NDArray[np.int64]
_ROUNDS = 8
_SMALL = 64


def order_keys(
    seed: int, epoch: int, dataset: int = 0, lap: int = 0, part: int = 0, window: int = 0
) -> NDArray[np.uint64]:
    """Make the round keys of a permutation: of an epoch, or of its lap where it is gone through more than once.

    Arguments:
        part: above 0, the number of a part that has laps of its own (see `diffaug.order.laps`).
        window: above 0, the number of a window of shards that has an order of its own (see `permute_in_windows`).
    """
    number = window << COUNTED_BITS | part << EPOCH_BITS | lap
    key = Keys.pack(torch.full((1,), number, dtype=torch.int64, device="cpu"), seed=seed, epoch=epoch, dataset=dataset)
    w_0, w_1, _, _ = words(key, Purpose.ORDER, torch.arange(_ROUNDS, device="cpu"))
    return ((w_0 << 32) | w_1)[0].numpy().view(np.uint64)


def permute(places: Numbers, size: int, round_keys: NDArray[np.uint64]) -> Numbers:
    """Permute places of [0, size) by a keyed permutation of [0, size).

    Up to 64 places every permutation is equally likely. Beyond, a Feistel network on the smallest even number of bits
    that holds ``size``, walked on until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"): at most four walks on average.
    """
    if size <= _SMALL:
        return _shuffled(size, round_keys)[places]
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = places.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for key in round_keys:
            left, right = right, left ^ (_hashed(right + key) & mask)
        out[todo] = left << half | right
        todo = out >= size
    return out.astype(np.int64)


def permute_in_windows(
    sizes: Numbers, window: int, round_keys: Callable[[int], NDArray[np.uint64]]
) -> Callable[[Numbers], Numbers]:
    """Return a keyed permutation of samples that lie in shards, in which few shards are open at a time.

    The shards are permuted, and cut into windows of so many. One window comes after another, its samples in a
    permutation of their own. What is kept is a few numbers for each shard, none for a sample.

    Arguments:
        sizes: the number of samples of each shard, int64, in the order of the indices.
        window: the shards of a window, 1 at least.
        round_keys: makes the keys of a permutation: 0 that of the shards, i + 1 that of window i.

    Returns:
        A function from places to indices, int64 in [0, sum of the sizes).
    """
    count = len(sizes)
    shards = permute(np.arange(count), count, round_keys(0))
    ends = np.cumsum(sizes[shards])
    shift = (np.cumsum(sizes) - ends[np.argsort(shards)])[shards]  # from a place within a shard to the index there
    edges = np.r_[0, ends[window - 1 : count - 1 : window], ends[-1]]

    def indices(places: Numbers) -> Numbers:
        numbers = np.searchsorted(edges, places, side="right") - 1
        out = np.empty_like(places)
        for number in np.unique(numbers).tolist():
            here, first = numbers == number, edges[number]
            out[here] = first + permute(places[here] - first, int(edges[number + 1] - first), round_keys(number + 1))
        return out + shift[np.searchsorted(ends, out, side="right")]

    return indices


def _shuffled(size: int, round_keys: NDArray[np.uint64]) -> Numbers:
    """Shuffle a small range whole, as Fisher and Yates do; the choices are the digits of one number of 512 bits.

    The choices are the number modulo size!, so no permutation's chance is off by more than a 2^215th of it. (The
    network is too coarse here: 10 to 14 % off for 5 or 6 places, and for 64 it makes fewer than all permutations.)
    """
    number = int.from_bytes(round_keys.astype("<u8").tobytes(), "little")
    order = list(range(size))
    for last in range(size - 1, 0, -1):
        number, other = divmod(number, last + 1)
        order[last], order[other] = order[other], order[last]
    return np.array(order, np.int64)


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
