"""Streams: datasets that are only iterated, whose samples have a place in the stream instead of an index.

Sample n that worker w of W hands out on rank r of R has the place (n W + w) R + r: no two samples of an epoch share
one, on any ranks. So their draws repeat exactly with the same numbers of ranks and workers, and with no others; the
batch size does not matter. Which rank and which worker reads what is the dataset's own to decide (torch's
``get_worker_info``, Hugging Face's ``split_dataset_by_node``).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffaug.images import Keyed, Place, note
from diffaug.noise.guard import sample_seed, untouched_random_state

_END = object()


class Stream(IterableDataset[Any]):
    """A user's iterable dataset, as the items of a `Keyed` dataset with their places.

    What the user's code draws from the global random states is a function of the sample's place.

    Arguments:
        items: what becomes of the dataset's items.
        rank, ranks: this process's number, and how many there are.
        train: whether the epoch counts: a dataset with a ``set_epoch`` is told it.
    """

    def __init__(self, items: Keyed, *, rank: int = 0, ranks: int = 1, train: bool = True) -> None:
        self.items, self.rank, self.ranks, self.train = items, rank, ranks, train
        self._now = torch.zeros(2, dtype=torch.int64).share_memory_()  # workers that outlive an epoch see it change

    def begin(self, epoch: int, lap: int) -> None:
        """Say which epoch comes, and how often it has gone through the stream before."""
        self._now.copy_(torch.tensor([epoch, lap]))

    def __len__(self) -> int:
        return len(self.items.dataset)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        epoch, lap = self._now.tolist() if self.train else (0, 0)
        source: Any = self.items.dataset
        if self.train and hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        iterator, count = None, 0
        while True:
            index = (count * workers + number) * self.ranks + self.rank
            place = Place(index, lap, index, epoch)
            with untouched_random_state():
                sample_seed(*self.items.seeds([place]))
                try:
                    iterator = iter(source) if iterator is None else iterator
                    item = next(iterator, _END)
                except Exception as error:
                    note(error, f"in reading sample {count} of the stream {self.items.name}")
                    raise
                if item is _END:
                    return
                sample = self.items.finished((place, item))
            yield sample
            count += 1


class StreamLoader(DataLoader[Any]):
    """A DataLoader over a `Stream` that tells it the epoch.

    Attributes:
        epoch: a function that gives the epoch; where there is none, each pass is one more lap of epoch 0.
    """

    dataset: Stream  # pyright: ignore[reportIncompatibleVariableOverride]
    epoch: Callable[[], int] | None = None
    _over: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        epoch = self.epoch() if self.epoch is not None else 0
        lap = self._over[1] + 1 if self._over and self._over[0] == epoch else 0
        self.dataset.begin(epoch, lap)
        yield from super().__iter__()
        self._over = (epoch, lap)
