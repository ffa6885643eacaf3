"""The training loader, which can begin inside an epoch, and the sampler that shares an order out over the ranks.

A global batch holds the same samples on any number of ranks, and what must be kept for a resume is only how many places
of the order are done, the same number on every rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import repeat
from multiprocessing import get_all_start_methods
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, Sampler, SequentialSampler

from diffaug.checks import choice, flag, integer, number, refuse
from diffaug.datasets.mixture import Mixture
from diffaug.loader.batch import Place
from diffaug.order.epoch import Order, Sampled, Unshuffled, shard_sizes, shuffled_order
from diffaug.order.laps import Bucketed, Mixed

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


class EpochSampler(DistributedSampler[Any]):
    """One rank's share of an epoch's global order, as `Place` objects. (Lightning leaves a DistributedSampler alone.)

    Arguments:
        order: of the epochs.
        rank, ranks: this process's number, and how many there are.
        group: how many samples, one after another in the order, are not dealt to different ranks.

    Where the ranks, a group to each, do not divide the order, it goes on from its beginning, as new views. Where an
    epoch goes through the dataset again (a shorter one beside a longer one), each lap has an order of its own, and new
    views.
    """

    def __init__(self, order: Order, *, rank: int = 0, ranks: int = 1, group: int = 1) -> None:
        size: Any = range(order.size)  # all that a DistributedSampler asks of a dataset is its length
        super().__init__(size, num_replicas=ranks, rank=rank, shuffle=False)
        self.order, self.start, self.lap, self.group = order, 0, 0, group
        self.total_size = -(-order.length // (ranks * group)) * ranks * group
        self.num_samples = self.total_size // ranks

    def __iter__(self) -> Iterator[Place]:
        start, self.start = self.start, 0
        visits = self.order.of_epoch(self.epoch, self.lap, self.total_size)
        before = self.lap * self.total_size
        of_order = self.epoch if self.order.batch else -1  # where there are batches, there are laps
        chunk = _CHUNK * self.num_replicas * self.group
        for low in range(start, self.total_size, chunk):
            dealt = np.arange(low, min(low + chunk, self.total_size)).reshape(-1, self.num_replicas, self.group)
            places = dealt[:, self.rank].ravel()
            here = visits(places)
            yield from map(
                Place,
                here.index.tolist(),
                here.view.tolist(),
                (before + places).tolist(),
                _each(here.epoch),
                _each(here.dataset),
                repeat(of_order),
                (self.epoch * self.order.length + places).tolist(),
            )


def _each(numbers: Any) -> Any:
    return repeat(numbers) if isinstance(numbers, int) else numbers.tolist()


class FixedSampler(EpochSampler, SequentialSampler):
    """An `EpochSampler` by a name that Lightning's ``overfit_batches`` leaves alone: its order is to be fixed."""


def choose_order(
    dataset: Any,
    name: str,
    batch: int,
    *,
    seed: int,
    shuffle: bool,
    sampler: Sampler[int] | None,
    shard_window: int | None,
    fixed: bool,
) -> Order:
    """Return the order of a training set's samples.

    Arguments:
        dataset: map-style; a `Mixture`, or one with buckets, has an order that is made of global batches.
        name: how errors call it.
        batch: samples of a global batch.
        seed: in [0, 2^64).
        shuffle, sampler, shard_window: as `diffaug.DiffusionDataModule` takes them.
        fixed: whether every epoch is to be the same, as for ``overfit_batches``.

    Raises:
        ValueError: a mixture, or buckets, with another order.
    """
    bucket_of = getattr(dataset, "bucket_of", None)
    if (bucket_of is not None or isinstance(dataset, Mixture)) and (sampler is not None or not shuffle):
        option = "data.shuffle=false" if sampler is None else "data.sampler"
        raise ValueError(f"{name}, a {type(dataset).__name__}, has batches in an order of its own: leave out {option}.")
    if isinstance(dataset, Mixture):
        sets = [] if shard_window is None else zip(dataset.sets, dataset.names, strict=True)
        found = [shard_sizes(one, f"set {called!r} of the Mixture") for one, called in sets]
        shards = {part: sizes for part, sizes in enumerate(found) if sizes is not None}
        options = {"samples": dataset.samples, "seed": seed, "fixed": fixed}
        return Mixed(dataset.sizes, batch, dataset.weights, shards=shards, window=shard_window or 1, **options)
    if bucket_of is not None:
        return Bucketed(bucket_of, batch, seed=seed, fixed=fixed)
    if sampler is not None and not fixed:
        return Sampled(sampler, len(dataset), seed=seed)
    if fixed or not shuffle:
        return Unshuffled(len(dataset))
    return shuffled_order(dataset, name, shard_window, seed=seed)


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


class TrainingLoader(Loader, ABC):
    """A DataLoader that can begin inside an epoch.

    Its state is the epoch and how many of its batches are done: the same on every rank.

    Attributes:
        cycles: whether it is gone through again and again within an epoch, beside a longer loader.
    """

    cycles = True
    _epoch = -1  # the epoch that the last pass was of
    _done = 0  # batches of that epoch that have been handed out, in all its passes
    _resume: tuple[int, int] | None = None

    @abstractmethod
    def ranks(self) -> int:
        """Return how many processes share the data out."""

    @property
    def global_batch(self) -> int:
        """Samples of a batch, on all ranks together."""
        return (self.batch_size or 1) * self.ranks()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume = state["epoch"], state["batches"]


class EpochLoader(TrainingLoader):
    """A `TrainingLoader` over an `EpochSampler`."""

    sampler: EpochSampler  # pyright: ignore[reportIncompatibleVariableOverride]
    _before = 0  # batches of that epoch before the next pass

    def ranks(self) -> int:
        return self.sampler.num_replicas

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
