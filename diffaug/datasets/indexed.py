"""Datasets that libraries iterate, asked for by index instead: litdata's and MosaicML's StreamingDataset.

Both say they are iterable, and share themselves out by rank and worker as they are iterated. Both also have their items
by index: so they keep what a folder has, exact order, noise and resume on any ranks and workers, and nothing of their
own iteration is used: no order, no length (theirs is one rank's), no state. Neither library is imported here.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import numpy as np
from torch.utils.data import Dataset, IterableDataset


def is_stream(dataset: object) -> bool:
    """Return whether a dataset can only be iterated: an IterableDataset without a length, or without items by index."""
    if not isinstance(dataset, IterableDataset):
        return False
    own = getattr(type(dataset), "__getitem__", Dataset.__getitem__)  # torch's says only that there is none
    return own is Dataset.__getitem__ or not hasattr(dataset, "__len__")


class Indexed(Dataset[Any]):
    """Access by index to a dataset that its library iterates.

    Arguments:
        dataset: litdata's or MosaicML's, of a class made from theirs, or any other for which `is_stream` is false.
        name: how errors call it.

    Attributes:
        shard_sizes: how many samples each of its shards holds, in the order of the indices; None where it has none.

    Raises:
        ValueError: it is a mixture, whose shares only its own iteration knows.
    """

    def __init__(self, dataset: Any, name: str = "data.train") -> None:
        self.dataset, self._process = dataset, os.getpid()
        self._litdata = any(base.__module__.partition(".")[0] == "litdata" for base in type(dataset).__mro__)
        sizes = None
        if self._litdata:
            len(dataset)  # it reads its table of chunks; the number is one rank's
            sizes = [last - first for _, first, last, _ in dataset.shuffler.cache.get_chunk_intervals()]
        elif hasattr(dataset, "samples_per_shard"):  # MosaicML's
            sizes = dataset.samples_per_shard.tolist()
            chosen = [int(stream.choose) for stream in dataset.streams]
            if chosen != dataset.samples_per_stream.tolist():
                raise ValueError(
                    f"{name} is a {type(dataset).__name__} whose streams would give {chosen} of their "
                    f"{dataset.samples_per_stream.tolist()} samples to an epoch. diffaug takes each sample once an "
                    "epoch: leave out proportion, repeat, choose and epoch_size."
                )
        self.shard_sizes: Sequence[int] | None = getattr(dataset, "shard_sizes", None) if sizes is None else sizes
        self._length: int = len(dataset) if sizes is None else sum(sizes)
        self._ends = None if sizes is None else np.cumsum(sizes)

    def recipe(self) -> dict[str, Any]:
        return own_recipe(self.dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if self._litdata and self._process != os.getpid():
            # A forked worker has its parent's reader, but not the thread in it that fetches chunks: it would wait.
            self.dataset.cache, self._process = None, os.getpid()
        return self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Read the items of a batch shard after shard, as the shards first come in it: litdata keeps one open."""
        if self._ends is None:
            return [self[index] for index in indices]
        shards = np.searchsorted(self._ends, indices, side="right").tolist()
        first = {shard: row for row, shard in reversed(list(enumerate(shards)))}
        items = {row: self[indices[row]] for row in sorted(range(len(indices)), key=lambda row: first[shards[row]])}
        return [items[row] for row in range(len(indices))]


def is_function(source: object) -> TypeGuard[Callable[[], Any]]:
    """Return whether a source of data is a function that makes a dataset."""
    return not isinstance(source, Dataset) and callable(source)


def index_dataset(dataset: Any, name: str) -> Any:
    """Return a dataset by index where it can be asked so, else as it is: a stream."""
    return Indexed(dataset, name) if isinstance(dataset, IterableDataset) and not is_stream(dataset) else dataset


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """Return a dataset's length, and what it says of itself."""
    return {} if is_stream(dataset) else {"images": len(dataset), **own_recipe(dataset)}


def own_recipe(dataset: Any) -> dict[str, Any]:
    """Return what a dataset says of itself by a method ``recipe``, where it has one."""
    return getattr(dataset, "recipe", dict)()
