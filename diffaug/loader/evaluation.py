"""Evaluation: each sample of a dataset once, in order, shared out over the ranks in equal numbers of batches."""

from collections.abc import Iterator, Sized
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler, SequentialSampler

from diffaug.checks import choice, integer, number
from diffaug.loader.batch import Place
from diffaug.loader.training import Loader
from diffaug.order.epoch import count_occurrences, run_sampler
from diffaug.randomness.keys import Purpose
from diffaug.times import Fixed, Grid, Times, Uniform


def choose_times(name: str, at: float, repeats: int) -> Times | None:
    """Return the times of validation by ``data.val_times``, val_at and val_repeats; None for those of evaluation."""
    number("data.val_at", at, at_least=0, below=1)
    choice("data.val_times", name, ("even", "grid", "fixed"))
    if name == "grid":
        return Uniform(coverage=Grid(integer("data.val_repeats", repeats, 1, 1024)))
    return Uniform(coverage=Fixed(at)) if name == "fixed" else None


class EvaluationSampler(DistributedSampler[Any], SequentialSampler):
    """One rank's share of a dataset for evaluation: in order, each sample once, no padding.

    The ranks' shares differ by one sample at most. (To Lightning it is a DistributedSampler and a sequential one, so
    that it is left alone.)

    Arguments:
        repeats: how many views of each sample.
        sampler: the user's own order instead, the same at every evaluation.
        seed: in [0, 2^64), for a sampler that draws.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        repeats: int = 1,
        sampler: Sampler[int] | None = None,
        seed: int = 0,
    ) -> None:
        samples: Any = range(size)  # all that a DistributedSampler asks of a dataset is its length
        super().__init__(samples, num_replicas=ranks, rank=rank, shuffle=False, seed=seed)
        self.length = len(sampler) if isinstance(sampler, Sized) else size
        self.places = range(rank, self.length * repeats, ranks)
        self.repeats, self.sampler = repeats, sampler

    def __iter__(self) -> Iterator[Place]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.sampler is None:
            return (Place(place // self.repeats, place % self.repeats, place, 0) for place in self.places)
        order = np.repeat(run_sampler(self.sampler, (self.seed, Purpose.ORDER, 0), 0, self.length), self.repeats)
        times_before = count_occurrences(order)
        return (Place(int(order[place]), int(times_before[place]), place, 0) for place in self.places)

    def __len__(self) -> int:
        return len(self.places)


class EvaluationBatches(Sampler[list[Place]]):
    """The batches of an `EvaluationSampler`: as many on every rank, though the shares may differ by one sample.

    Whatever waits for all ranks in a validation step (a metric that is reduced, a sharded network's forward) would
    wait for ever on a rank with a batch more. Nothing is padded and no sample counts twice: a rank that would be a
    batch short splits its last.

    Arguments:
        sampler: this rank's share.
        batch_size: the most samples of a batch.
        name: how errors call the dataset.

    Raises:
        ValueError: there are fewer samples than ranks, or batches of one sample that the ranks cannot share out.
    """

    def __init__(self, sampler: EvaluationSampler, batch_size: int, name: str = "the dataset") -> None:
        self.sampler, self.batch_size = sampler, batch_size
        total, ranks = sampler.length * sampler.repeats, sampler.num_replicas
        most, least = -(-total // ranks), total // ranks
        self.count = -(-most // batch_size)
        if least < min(self.count, 1):
            raise ValueError(
                f"{name} has {total} images for {ranks} processes: each must have one at least, as they wait for each "
                "other. Hold out more images (data.val_share for data=image_folder), or use fewer devices."
            )
        if least < self.count:
            raise ValueError(
                f"{name} has {total} images, which {ranks} processes cannot share out in equal numbers of batches of "
                "one image, and they wait for each other at each batch. Set data.batch_size (that of the wrapped "
                "loader) to 2 or more."
            )

    def __iter__(self) -> Iterator[list[Place]]:
        places, left = iter(self.sampler), len(self.sampler)
        for later in reversed(range(self.count)):
            size = min(self.batch_size, left - later)
            left -= size
            yield list(islice(places, size))

    def __len__(self) -> int:
        return self.count


class BucketBatches(Sampler[list[Place]]):
    """The batches of an `EvaluationSampler` over a dataset with buckets: each of one bucket, as many on every rank.

    The batches of all buckets are dealt out in turn. Where their number is no multiple of the ranks, the largest are
    cut in two until it is: nothing is padded and no sample counts twice.

    Arguments:
        sampler, batch_size, name: as in `EvaluationBatches`.
        bucket_of: the bucket of each sample, int64, shape (N,).

    Raises:
        ValueError: there are fewer samples than ranks, or batches of one sample that the ranks cannot share out.
    """

    def __init__(self, sampler: EvaluationSampler, batch_size: int, name: str, bucket_of: NDArray[np.int64]) -> None:
        ranks, repeats = sampler.num_replicas, sampler.repeats
        order = np.repeat(np.argsort(bucket_of, kind="stable"), repeats)
        ends = np.cumsum(np.bincount(bucket_of)) * repeats
        batches = [
            order[low : min(low + batch_size, end)]
            for begin, end in zip([0, *ends], ends, strict=False)
            for low in range(begin, end, batch_size)
        ]
        while len(batches) % ranks:
            largest = max(range(len(batches)), key=lambda number: len(batches[number]))
            whole = batches[largest]
            if len(whole) < 2:
                raise ValueError(
                    f"{name} has {len(order)} images in {len(set(bucket_of.tolist()))} buckets, which {ranks} "
                    "processes cannot share out in equal numbers of batches, and they wait for each other at each "
                    "batch. Hold out more images, use fewer devices, or set data.batch_size to 2 or more."
                )
            batches[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
        begins = np.cumsum([0, *map(len, batches)])
        self.repeats = repeats
        self.batches = [(int(begins[k]), batches[k]) for k in range(sampler.rank, len(batches), ranks)]

    def __iter__(self) -> Iterator[list[Place]]:
        for begin, batch in self.batches:
            yield [Place(index, (begin + n) % self.repeats, begin + n, 0) for n, index in enumerate(batch.tolist())]

    def __len__(self) -> int:
        return len(self.batches)


class EvaluationLoader(Loader):
    """A DataLoader over an `EvaluationSampler`, in `EvaluationBatches`, or in `BucketBatches`."""

    def __init__(
        self,
        *args: Any,
        sampler: EvaluationSampler,
        name: str = "the dataset",
        bucket_of: NDArray[np.int64] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, sampler=sampler, **options)
        batches = EvaluationBatches if bucket_of is None else partial(BucketBatches, bucket_of=bucket_of)
        self._batches = batches(sampler, self.batch_size or 1, name)

    @property
    def _index_sampler(self) -> EvaluationBatches | BucketBatches:  # where torch's DataLoader looks for its batches
        return self._batches


def evaluation_loader(dataset: Any, sampler: EvaluationSampler, stage: str, name: str, **options: Any) -> Loader:
    """Make a loader for evaluation: with equal numbers of batches on all ranks in validation and test.

    In prediction, where nothing is shared between ranks, it is one of which Lightning makes another.
    """
    bucket_of = getattr(dataset.dataset, "bucket_of", None)
    if stage == "predict":
        if bucket_of is not None:
            raise ValueError(f"{name} has buckets, which are not for prediction: give a dataset of one shape.")
        return Loader(dataset, sampler=sampler, **options)
    return EvaluationLoader(dataset, sampler=sampler, name=name, bucket_of=bucket_of, **options)
