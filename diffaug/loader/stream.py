"""Streams: datasets that are only iterated, whose samples have a place in the stream instead of an index.

Sample n that worker w of W hands out on rank r of R has the place (n W + w) R + r: no two samples of an epoch share
one, on any ranks. So their draws repeat exactly with the same numbers of ranks and workers, and with no others; the
batch size does not matter. Which rank and which worker reads what is the dataset's own to decide (torch's
``get_worker_info``, Hugging Face's ``split_dataset_by_node``).

Where the samples say who they are (``data.key`` names the part), a hash of that stands in the index's place: then a
sample's draws are its own, on any ranks and workers, in any order, after any resume. The order stays the dataset's.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from diffaug.images.items import describe_value, find_part, name_parts
from diffaug.loader.batch import Place
from diffaug.loader.dataset import Keyed, note
from diffaug.loader.training import TrainingLoader
from diffaug.randomness.user_code import seed_all, untouched_random_state

_log = logging.getLogger("diffaug")
_END = object()
_REMEMBERED = 2**16  # keys that a worker has last seen, among which none may come again


def hash_key(key: str | bytes | int) -> int:
    """Hash the key of a sample to 63 bits: BLAKE2b of its bytes, of its decimals where it is a number.

    Of 10^9 samples, 0.054 pairs are expected to share a hash.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(key, str):
        words = b"s" + key.encode()
    elif isinstance(key, bytes):
        words = b"b" + key
    elif isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        words = b"i%d" % int(key)
    else:
        raise TypeError("a key must be text, bytes or a whole number")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little") >> 1


class Stream(IterableDataset[Any]):
    """A user's iterable dataset, as the items of a `Keyed` dataset with their places.

    What the user's code draws from the global random states is a function of the sample's place.

    Arguments:
        items: what becomes of the dataset's items.
        rank, ranks: this process's number, and how many there are.
        train: whether the epoch counts: a dataset with a ``set_epoch`` is told it.
        epoch: a function that gives the epoch; where there is none, each pass is one more lap of epoch 0.
        key: the part of an item, by name or by place in a tuple, that tells it from all others; None: its place does.
    """

    def __init__(
        self,
        items: Keyed,
        *,
        rank: int = 0,
        ranks: int = 1,
        train: bool = True,
        epoch: Callable[[], int] = lambda: 0,
        key: str | int | None = None,
    ) -> None:
        self.items, self.rank, self.ranks, self.train, self.epoch = items, rank, ranks, train, epoch
        self.key = key
        # Shared, so that workers that outlive an epoch see it change.
        self._now = torch.zeros(2, dtype=torch.int64, device="cpu").share_memory_()

    def begin(self, epoch: int, lap: int) -> None:
        """Say which epoch comes, and how often it has gone through the stream before."""
        self._now.copy_(torch.tensor([epoch, lap], device="cpu"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "epoch": None}  # a worker is told by `begin`; it need not have the DataModule

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
        seen: dict[int, None] = {}
        while True:
            index = (count * workers + number) * self.ranks + self.rank
            place = Place(index, lap, index, epoch)
            with untouched_random_state():
                seed_all(*self.items.seeds([place]))
                try:
                    iterator = iter(source) if iterator is None else iterator
                    item = next(iterator, _END)
                except Exception as error:
                    note(error, f"in reading sample {count} of the stream {self.items.name}")
                    raise
                if item is _END:
                    return
                if self.key is not None:
                    place = place._replace(index=self._index_by_key(self.key, item, count, seen))
                    seed_all(*self.items.seeds([place]))
                sample = self.items.finished((place, item))
            yield sample
            count += 1

    def _index_by_key(self, part: str | int, item: Any, count: int, seen: dict[int, None]) -> int:
        """Return the hash of an item's key, as the index of its draws.

        Arguments:
            part: which part of the item is the key.
            count: the samples of this worker before it.
            seen: the hashes of the last of them; its own is added.

        Raises:
            ValueError: it has no such part, the part is no key, or one of these had the same.
        """
        name, parts = self.items.name, name_parts(item)
        key = parts[find_part(item, parts, part, "data.key", f"sample {count} of the stream {name}")]
        try:
            index = hash_key(key)
        except TypeError as error:
            raise ValueError(
                f"data.key={part!r} must name a part of the samples of {name} that is text, bytes or a whole "
                f"number, but that of sample {count} is {describe_value(key)}."
            ) from error
        if index in seen:
            raise ValueError(
                f"data.key={part!r} must tell the samples of {name} apart, but two of one epoch have the key "
                f"{key!r}: they would have the same noise. Name another part, or set data.key=null: then noise is "
                "keyed by rank, worker and count."
            )
        seen[index] = None
        if len(seen) > _REMEMBERED:
            del seen[next(iter(seen))]
        return index


def check_stream(dataset: Any, name: str, key: str | int | None, given: Sequence[str]) -> None:
    """Refuse options that a stream has no use for, and say in the log what its noise is keyed by."""
    if key is None:
        _log.info("%s is a stream, its noise keyed by rank, worker and count; data.key keys it by the sample", name)
    if given:
        raise ValueError(
            f"{name} is a stream ({type(dataset).__name__}), which has an order of its own and is gone through once: "
            f"{given[0]} cannot be set."
        )


def check_no_key(key: str | int | None, name: str, dataset: Any) -> None:
    """Refuse a key of samples for a dataset that has its items by index."""
    if key is not None:
        raise ValueError(
            f"data.key={key!r} is for streams, but {name} ({type(dataset).__name__}) has its items by index, and by "
            "that its noise is keyed. Leave out data.key."
        )


def check_overfit(overfit: bool, name: str) -> None:
    """Refuse a stream under Lightning's ``overfit_batches``, which puts another sampler in its place."""
    if overfit:
        raise ValueError(
            f"trainer.overfit_batches cannot be used with {name}, a stream: it has no order to take the first batches "
            "of. Set trainer.limit_train_batches and trainer.limit_val_batches instead."
        )


class StreamLoader(TrainingLoader):
    """A `TrainingLoader` over a `Stream`, which it tells the epoch.

    A stream has no index: to begin after some batches it is read again from its beginning, and these are left out. So
    it goes on exactly with the same ranks, workers and batch size, at the cost of reading.
    """

    dataset: Stream  # pyright: ignore[reportIncompatibleVariableOverride]
    _lap = -1  # which pass of that epoch the last whole one was
    _left_out = 0  # how many batches of that epoch, of those done, were only read again

    def ranks(self) -> int:
        return self.dataset.ranks

    def __iter__(self) -> Iterator[Any]:
        resumed, self._resume = self._resume, None
        epoch, left_out = resumed or (self.dataset.epoch(), 0)
        if resumed or epoch != self._epoch:
            self._epoch, self._lap, self._done, self._left_out = epoch, -1, 0, left_out
        if left_out:
            _log.info("%s: %d batches are read again, to go on after them", self.dataset.items.name, left_out)
        while True:
            self.dataset.begin(epoch, self._lap + 1)
            before = self._done
            for batch in super().__iter__():
                self._done += 1
                if self._done > self._left_out:
                    yield batch
            self._lap += 1
            # Resumed in a later lap: whoever goes through it must first know that it has come to its end before.
            if resumed or self._done > self._left_out or self._done == before:
                return

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches have been handed out."""
        epoch, batches = self._resume or (max(self._epoch, 0), self._done)
        return {"epoch": epoch, "batches": batches}
