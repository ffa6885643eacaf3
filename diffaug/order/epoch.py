"""The order of an epoch: which sample stands at which place.

An order is a pure function of (seed, stage, epoch), computed place by place, that needs no memory however large the
dataset. The ranks share it out like cards (`diffaug.loader.training.EpochSampler`): place p goes to rank p mod ranks.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from diffaug.checks import integer, refuse
from diffaug.order.permutation import Numbers, order_keys, permute, permute_in_windows
from diffaug.randomness.keys import Purpose
from diffaug.randomness.user_code import seed_all, untouched_random_state

SHARD_WINDOW = 8  # shards open at a time, unless told otherwise


@dataclass(frozen=True)
class Visits:
    """The samples at some places of an order, and what their draws are keyed by.

    Attributes:
        index, view, epoch, dataset: as in `diffaug.loader.batch.Place`: int64, shape (N,), or one number for all.
    """

    index: Numbers
    view: Numbers
    epoch: Numbers | int
    dataset: Numbers | int = 0


class Order(ABC):
    """An order of epochs.

    Attributes:
        size: the number of samples.
        length: the number of places of an epoch.
        batch: samples of a global batch, where the order is made of these; 0 where any batch will do.
    """

    size: int
    length: int
    batch = 0

    @abstractmethod
    def of_epoch(self, epoch: int, lap: int, total: int) -> Callable[[Numbers], Visits]:
        """Return the function from places of an epoch, int64 in [0, total), to the samples there.

        Arguments:
            lap: how often this epoch has gone through the order before (beside a longer one).
            total: ``length``, rounded up to a multiple of the ranks; an order goes on from its beginning, as new views.
        """

    @abstractmethod
    def describe(self) -> Any:
        """Return what the order depends on, in plain types, for checkpoints."""


class OnceAnEpoch(Order):
    """An order that goes through the dataset once an epoch, and on from its beginning where that is not enough."""

    @abstractmethod
    def indices(self, epoch: int, lap: int) -> Callable[[Numbers], Numbers]:
        """Return the function from places in [0, size) to the samples there."""

    def of_epoch(self, epoch: int, lap: int, total: int) -> Callable[[Numbers], Visits]:
        indices, before = self.indices(epoch, lap), lap * -(-total // self.length)

        def visits(places: Numbers) -> Visits:
            view, within = np.divmod(places, self.length)
            return Visits(indices(within), before + view, epoch)

        return visits


class Shuffled(OnceAnEpoch):
    """Each epoch has an order of its own, a keyed permutation; and so has each lap of one.

    Arguments:
        size: the number of samples.
        seed: in [0, 2^64).
        dataset: the dataset's number within its stage, where there are several: each has an order of its own.
    """

    def __init__(self, size: int, *, seed: int = 0, dataset: int = 0) -> None:
        self.size = self.length = size
        self.seed, self.dataset = seed, dataset

    def indices(self, epoch: int, lap: int) -> Callable[[Numbers], Numbers]:
        return partial(permute, size=self.size, round_keys=order_keys(self.seed, epoch, self.dataset, lap))

    def describe(self) -> Any:
        return "shuffled"


class Sharded(OnceAnEpoch):
    """Each epoch has an order of its own, in which so many shards are open at a time; and so has each lap of one.

    The shards come in a random order, in windows of so many; within a window the samples of its shards are shuffled as
    one. Whoever goes through the order, or through any share of it, needs each shard only while its window lasts.

    Arguments:
        sizes: the number of samples of each shard, in the order of the indices.
        window: how many shards are open at a time, 1 at least.
        seed, dataset: as in `Shuffled`.
    """

    def __init__(self, sizes: Sequence[int] | Numbers, window: int, *, seed: int = 0, dataset: int = 0) -> None:
        self.sizes, self.window, self.seed, self.dataset = np.array(sizes, np.int64), window, seed, dataset
        self.size = self.length = int(self.sizes.sum())

    def indices(self, epoch: int, lap: int) -> Callable[[Numbers], Numbers]:
        round_keys = partial(order_keys, self.seed, epoch, self.dataset, lap, 0)
        return permute_in_windows(self.sizes, self.window, round_keys)

    def describe(self) -> Any:
        return f"shuffled, {describe_shards(self.sizes, self.window)}"


def describe_shards(sizes: Numbers, window: int) -> str:
    """Say what an order by shards depends on."""
    digest = hashlib.blake2b(sizes.astype("<i8").tobytes(), digest_size=8).hexdigest()
    return f"{window} of {len(sizes)} shards at a time, {digest}"


class Unshuffled(OnceAnEpoch):
    """Every epoch is in the dataset's own order.

    Arguments:
        size: the number of samples.
    """

    def __init__(self, size: int) -> None:
        self.size = self.length = size

    def indices(self, epoch: int, lap: int) -> Callable[[Numbers], Numbers]:
        return lambda places: places

    def describe(self) -> Any:
        return "the dataset's"


def shard_sizes(dataset: Any, name: str) -> Numbers | None:
    """Return how many samples each shard of a dataset holds, int64, in the order of the indices; None without shards.

    Arguments:
        dataset: map-style; its attribute ``shard_sizes``, if any, lists them.
        name: how errors call it.

    Raises:
        ValueError: they are no whole numbers, or do not add up to its length.
    """
    sizes: Any = getattr(dataset, "shard_sizes", None)
    if sizes is None:
        return None
    sizes = [integer(f"each of the shard_sizes of {name}", size, 0) for size in sizes]
    if sum(sizes) != len(dataset):
        wanted = f"its length, {len(dataset)}; or set data.shard_window=null"
        raise refuse(f"the sum of the shard_sizes of {name}", sum(sizes), wanted)
    return np.array(sizes, np.int64)


def shuffled_order(dataset: Any, name: str, window: int | None = SHARD_WINDOW, *, seed: int, number: int = 0) -> Order:
    """Return a shuffled order of a dataset: by its shards, where it has some.

    Arguments:
        dataset, name: as in `shard_sizes`.
        window: how many shards are open at a time; None shuffles the dataset as a whole.
        seed: in [0, 2^64).
        number: the dataset's within its stage.
    """
    sizes = None if window is None else shard_sizes(dataset, name)
    if sizes is None or window is None:
        return Shuffled(len(dataset), seed=seed, dataset=number)
    return Sharded(sizes, window, seed=seed, dataset=number)


class Sampled(Order):
    """The order of the user's own sampler, run under a random state keyed by the epoch.

    Arguments:
        sampler: any sampler of indices.
        size: the number of samples.
        seed: in [0, 2^64).
    """

    def __init__(self, sampler: Sampler[int], size: int, *, seed: int = 0) -> None:
        self.sampler, self.size, self.seed = sampler, size, seed
        self.length = len(sampler) if isinstance(sampler, Sized) else size

    def of_epoch(self, epoch: int, lap: int, total: int) -> Callable[[Numbers], Visits]:
        key = (self.seed, Purpose.ORDER, epoch)
        laps = [run_sampler(self.sampler, key, number, self.length) for number in range(lap + 1)]
        order = np.concatenate([np.resize(one, total) for one in laps])
        times_before = count_occurrences(order)

        def visits(places: Numbers) -> Visits:
            places = places + lap * total
            return Visits(order[places], times_before[places], epoch)

        return visits

    def describe(self) -> Any:
        return describe_sampler(self.sampler)


def run_sampler(sampler: Sampler[int], key: tuple[int, ...], lap: int, length: int) -> Numbers:
    """Run a user's sampler for an epoch, under random states of this key, which ends in the epoch.

    Raises:
        ValueError: it does not yield so many whole numbers.
    """
    with untouched_random_state():
        seed_all(*key, *([lap] if lap else []))
        own = getattr(sampler, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(torch.initial_seed())
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(key[-1])
        try:
            order = np.fromiter(sampler, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"data.sampler must yield whole numbers, the indices of samples, but {type(sampler).__name__} yields "
                f"something else: {error}."
            ) from error
    if len(order) != length:
        raise ValueError(f"data.sampler says its length is {length}, but it yielded {len(order)} indices.")
    return order


def count_occurrences(order: Numbers) -> Numbers:
    """Count how often each entry's value has come before in the order."""
    by_value = np.argsort(order, kind="stable")
    values = order[by_value]
    first = np.r_[0, np.flatnonzero(np.diff(values)) + 1]
    count = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    out = np.empty_like(order)
    out[by_value] = count
    return out


def describe_sampler(sampler: Any) -> str:
    """Describe a user's sampler by its class, its length, and a digest of the numbers it holds.

    Single numbers are left out: they count what the sampler has done, or which epoch it was told.
    """
    digest = hashlib.blake2b(digest_size=8)
    parts = vars(sampler) if hasattr(sampler, "__dict__") else {"values": sampler}
    for name, value in sorted(parts.items()):
        if isinstance(value, (Tensor, np.ndarray)):
            digest.update(f"{name}=".encode() + np.asarray(value).tobytes())
        elif isinstance(value, (list, tuple, range)):
            digest.update(f"{name}={list(value)!r}".encode())
    length = f" of {len(sampler)}" if isinstance(sampler, Sized) else ""
    return f"{type(sampler).__qualname__}{length}, {digest.hexdigest()}"
