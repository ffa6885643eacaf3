"""The order of an epoch, and the loader that resumes inside it.

The order of an epoch is a pure function of (seed, stage, epoch): a keyed permutation, computed place by place, that
needs no memory however large the dataset. The ranks share it out like cards: place p goes to rank p mod ranks. So a
global batch holds the same samples on any number of ranks, and what must be kept for a resume is only how many places
of the order are done, the same number on every rank.
"""

from collections.abc import Iterator, Sized
from itertools import repeat
from multiprocessing import get_all_start_methods
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler

from diffaug.checks import choice, flag, integer, number, refuse
from diffaug.data.batch import Place
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import words
from diffaug.randomness.user_code import seed_all, untouched_random_state

LOADER_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""DataLoader's own options that a DiffusionDataModule hands on."""

_CHUNK = 2**14
_ROUNDS = 8
_SMALL = 64


def order_keys(seed: int, epoch: int, dataset: int = 0, lap: int = 0) -> NDArray[np.uint64]:
    """Make the round keys of an epoch's permutation, or of its lap where it is gone through more than once."""
    key = Keys.pack(torch.full((1,), lap, dtype=torch.int64, device="cpu"), seed=seed, epoch=epoch, dataset=dataset)
    w_0, w_1, _, _ = words(key, Purpose.ORDER, torch.arange(_ROUNDS, device="cpu"))
    return ((w_0 << 32) | w_1)[0].numpy().view(np.uint64)


def permute(places: NDArray[np.uint64], size: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute places of [0, size) by a keyed permutation of [0, size).

    Up to 64 places every permutation is equally likely. Beyond, a Feistel network on the smallest even number of bits
    that holds ``size``, walked on until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains"): at most four walks on average.
    """
    if size <= _SMALL:
        return _shuffled(size, round_keys)[places]
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    out = places.astype(np.uint64, copy=True)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        left, right = out[todo] >> half, out[todo] & mask
        for key in round_keys:
            left, right = right, left ^ (_hashed(right + key) & mask)
        out[todo] = left << half | right
        todo = out >= size
    return out


def _shuffled(size: int, round_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Shuffle a small range whole, as Fisher and Yates do; the choices are the digits of one number of 512 bits.

    The choices are the number modulo size!, so no permutation's chance is off by more than a 2^215th of it. (The
    network is too coarse here: 10 to 14 % off for 5 or 6 places, and for 64 it makes fewer than all permutations.)
    """
    number = int.from_bytes(round_keys.astype("<u8").tobytes(), "little")
    order = list(range(size))
    for last in range(size - 1, 0, -1):
        number, other = divmod(number, last + 1)
        order[last], order[other] = order[other], order[last]
    return np.array(order, dtype=np.uint64)


def _hashed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def count_occurrences(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count how often each entry's value has come before in the order."""
    by_value = np.argsort(order, kind="stable")
    values = order[by_value]
    first = np.r_[0, np.flatnonzero(np.diff(values)) + 1]
    count = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    out = np.empty_like(order)
    out[by_value] = count
    return out


class EpochSampler(DistributedSampler[Any]):
    """One rank's share of an epoch's global order, as `Place` objects. (Lightning leaves a DistributedSampler alone.)

    Arguments:
        size: the number of samples in the dataset.
        seed: in [0, 2^64).
        rank, ranks: this process's number, and how many there are.
        shuffle: whether each epoch has an order of its own, or the dataset's.
        sampler: the user's own order instead: any sampler of indices, run under a random state keyed by the epoch.
        dataset: the dataset's number within its stage, where there are several: each has an order of its own.

    Where the ranks do not divide the order, it goes on from its beginning, as new views. Where an epoch goes through
    the dataset again (a shorter one beside a longer one), each lap has an order of its own, and new views.
    """

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = True,
        sampler: Sampler[int] | None = None,
        dataset: int = 0,
    ) -> None:
        super().__init__(range(size), num_replicas=ranks, rank=rank, shuffle=flag("data.shuffle", shuffle), seed=seed)  # pyright: ignore[reportArgumentType]
        self.sampler, self.start, self.lap = sampler, 0, 0
        self.size, self.number = size, dataset
        self.length = len(sampler) if isinstance(sampler, Sized) else size
        self.total_size = -(-self.length // ranks) * ranks
        self.num_samples = self.total_size // ranks

    def __iter__(self) -> Iterator[Place]:
        start, self.start = self.start, 0
        order = None if self.sampler is None else self._sampled(self.sampler)
        times_before = None if order is None else count_occurrences(order)
        round_keys = order_keys(self.seed, self.epoch, self.number, self.lap)
        before = self.lap * self.total_size
        for low in range(start, self.total_size, _CHUNK * self.num_replicas):
            high = min(low + _CHUNK * self.num_replicas, self.total_size)
            places = np.arange(low + self.rank, high, self.num_replicas)
            if order is None or times_before is None:
                within = places % self.length
                index = permute(within.astype(np.uint64), self.size, round_keys) if self.shuffle else within
                views = places // self.length + self.lap * -(-self.total_size // self.length)
            else:
                index, views = order[before + places], times_before[before + places]
            yield from map(Place, index.tolist(), views.tolist(), (before + places).tolist(), repeat(self.epoch))

    def _sampled(self, sampler: Sampler[int]) -> NDArray[np.int64]:
        """Return the order of the epoch up to the end of this lap."""
        key = (self.seed, Purpose.ORDER, self.epoch)
        laps = [run_sampler(sampler, key, lap, self.length) for lap in range(self.lap + 1)]
        return np.concatenate([np.resize(lap, self.total_size) for lap in laps])


def run_sampler(sampler: Sampler[int], key: tuple[int, ...], lap: int, length: int) -> NDArray[np.int64]:
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


class FixedSampler(EpochSampler, SequentialSampler):
    """An `EpochSampler` in the dataset's own order, by a name that Lightning's ``overfit_batches`` leaves alone."""

    def __init__(self, size: int, **options: Any) -> None:
        super().__init__(size, **{**options, "shuffle": False, "sampler": None})


def check_order(where: str, in_order: bool) -> None:
    """Refuse a training loader whose batches come in any order: which of them are done could not be told."""
    if not in_order:
        raise refuse(where, in_order, "true: a resume goes on after so many batches of the epoch's order")


def check_loader_options(options: dict[str, Any]) -> dict[str, Any]:
    """Check DataLoader's own options, which it would refuse without their keys; drop those that are None."""
    options = {name: value for name, value in options.items() if value is not None}
    workers = integer("data.num_workers", options.get("num_workers", 0), 0)
    for name in ("pin_memory", "persistent_workers", "in_order"):
        flag(f"data.{name}", options.get(name, False))
    check_order("data.in_order", options.get("in_order", True))
    number("data.timeout", options.get("timeout", 0), at_least=0)
    integer("data.prefetch_factor", options.get("prefetch_factor", 2), 1)
    if not callable(options.get("worker_init_fn", int)):
        raise refuse("data.worker_init_fn", options["worker_init_fn"], "a function of the worker's number")
    if isinstance(options.get("multiprocessing_context"), str):
        choice("data.multiprocessing_context", options["multiprocessing_context"], get_all_start_methods())
    for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context"):
        if options.get(name) and not workers:
            raise ValueError(
                f"data.{name}={options[name]!r} is of the processes that read, but data.num_workers=0 makes none: set "
                f"that to 1 or more, or leave out data.{name}."
            )
    return options


class Loader(DataLoader[Any]):
    """A DataLoader that begins on the CPU, whatever torch's default device.

    torch's own draws a seed for its workers on the default device, which its generator, of the CPU, is not for. Started
    so, the workers have the CPU as their default too, as they must: they share memory with this process, no device.
    Only where it is needed: forked workers stay within this guard, and there each of torch's calls goes through it,
    which made reading an image of Fashion-MNIST twice as long.
    """

    def __iter__(self) -> Any:
        if torch.get_default_device().type == "cpu":
            return super().__iter__()
        with torch.device("cpu"):
            return super().__iter__()


class EpochLoader(Loader):
    """A DataLoader over an `EpochSampler` that can begin inside an epoch.

    Its state is the epoch and how many of its batches are done: the same on every rank.

    Attributes:
        cycles: whether it is gone through again and again within an epoch, beside a longer loader.
    """

    sampler: EpochSampler  # pyright: ignore[reportIncompatibleVariableOverride]
    cycles = True
    _epoch = -1  # the epoch that the last pass was of
    _done = 0  # batches of that epoch that have been handed out, in all its passes
    _before = 0  # batches of that epoch before the next pass
    _resume: tuple[int, int] | None = None

    @property
    def global_batch(self) -> int:
        """Samples of a batch, on all ranks together."""
        return (self.batch_size or 1) * self.sampler.num_replicas

    def __iter__(self) -> Iterator[Any]:
        sampler = self.sampler
        if self._resume is not None:
            self._epoch, self._before = self._resume
            self._resume = None
            sampler.set_epoch(self._epoch)
            if self.cycles and self._before >= len(self):
                return  # it had come to its end before, and whoever goes through it must know
        elif self._epoch != sampler.epoch:
            self._epoch, self._before = sampler.epoch, 0
        self._done = self._before
        lap, within = divmod(self._before, len(self)) if self.cycles else (0, min(self._before, len(self)))
        sampler.lap, sampler.start = lap, within * self.global_batch
        for batch in super().__iter__():
            self._done += 1
            yield batch
        self._before = self._done

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches have been handed out."""
        if self._resume is not None:
            epoch, batches = self._resume
        elif self._epoch != self.sampler.epoch:
            epoch, batches = self.sampler.epoch, 0
        else:
            epoch, batches = self._epoch, self._done
        over = batches >= len(self)
        return {"epoch": epoch + over, "batches": 0 if over else batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = state["epoch"], state["batches"]
