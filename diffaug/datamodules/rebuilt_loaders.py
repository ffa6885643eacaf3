"""Rebuilding of another DataModule's loaders, so that each sample carries its Place; and the limits of that.

A loader can be made again honestly where it is torch's own DataLoader: its parts are attributes. It keeps its dataset,
its collate function, its workers and its batch size. Only the order is diffaug's, keyed and shared out over the ranks,
and the user's own sampler runs inside it.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from diffaug.datasets.indexed import Indexed, index_dataset
from diffaug.datasets.mixture import Mixture
from diffaug.loader.batch import PlacedCollate
from diffaug.loader.dataset import Keyed
from diffaug.loader.evaluation import EvaluationSampler, evaluation_loader
from diffaug.loader.stream import Stream, StreamLoader, check_overfit
from diffaug.loader.training import LOADER_OPTIONS, EpochLoader, EpochSampler, FixedSampler, Loader, check_order
from diffaug.order.epoch import Order, Sampled, Shuffled, Unshuffled, shuffled_order
from diffaug.randomness.keys import STAGES

_log = logging.getLogger("diffaug")
BY_PLACE = (
    "noise keyed by rank, batch number and row (it repeats only with the same ranks and batches), as %s. Exact on any "
    "ranks would be a plain torch DataLoader over a map-style dataset."
)


def rebuild(
    loader: Any,
    *,
    stage: str,
    number: int,
    seed: int,
    rank: int,
    ranks: int,
    name: str,
    overfit: bool = False,
    epoch: Callable[[], int] = lambda: 0,
) -> Any:
    """Rebuild a loader so that each sample carries its Place; return it unchanged where that is impossible. Logs which.

    Arguments:
        loader: what the user's ``*_dataloader`` returned.
        stage, number: which it is.
        seed: of its order.
        rank, ranks: this process's number, and how many there are.
        name: how the log and errors call it.
        overfit: whether Lightning's ``overfit_batches`` is at work.
        epoch: a function that gives the epoch.
    """
    why_not = _why_not(loader)
    if why_not:
        _log.warning("%s: " + BY_PLACE, name, why_not)
        return loader
    if isinstance(loader.dataset, Mixture) or getattr(loader.dataset, "bucket_of", None) is not None:
        raise ValueError(
            f"{name} goes through a {type(loader.dataset).__name__}, whose batches have an order of their own, which a "
            "wrapped loader has not: give it to DiffusionDataModule(train=...) instead."
        )
    train, domain = stage == "train", (seed, STAGES[stage], number)
    if train:
        check_order(f"{name}.in_order", loader.in_order)
    # A loader cannot say whether an iterable dataset is shuffled: litdata's and MosaicML's do, so theirs is no secret.
    said = getattr(loader.dataset, "shuffle", None)
    dataset = index_dataset(loader.dataset, name) if isinstance(said, bool) else loader.dataset
    items = Keyed(dataset, name=f"{name}.dataset", domain=domain)
    options = {option: getattr(loader, option) for option in LOADER_OPTIONS}
    options |= {"collate_fn": PlacedCollate(loader.collate_fn, domain), "generator": torch.Generator()}
    if isinstance(dataset, IterableDataset):
        check_overfit(overfit, name)
        stream = Stream(items, rank=rank, ranks=ranks, train=train, epoch=epoch)
        kind = StreamLoader if train else Loader
        _log.warning("%s: noise keyed by rank, worker and count, as it is a stream.", name)
        return kind(stream, batch_size=loader.batch_size, drop_last=loader.drop_last, **options)
    batches: Any = loader.batch_sampler  # with batch_sampler=BatchSampler(...), the loader's own batch_size is None
    options |= {"batch_size": batches.batch_size, "drop_last": batches.drop_last}
    size = len(dataset)
    _log.info("%s: noise keyed by sample index, order: %s", name, type(batches.sampler).__name__)
    if isinstance(dataset, Indexed):
        order = shuffled_order(dataset, name, seed=seed, number=number) if said else Unshuffled(size)
    else:
        order = _order(batches.sampler, size, seed=seed, dataset=number)
    if train:
        kind, order = (FixedSampler, Unshuffled(size)) if overfit else (EpochSampler, order)
        return EpochLoader(items, sampler=kind(order, rank=rank, ranks=ranks), **options)
    own = order.sampler if isinstance(order, Sampled) else None
    sampler = EvaluationSampler(size, rank=rank, ranks=ranks, seed=seed, sampler=own)
    return evaluation_loader(items, sampler, stage, name, **options)


def _why_not(loader: Any) -> str:
    """Say why a loader cannot be rebuilt; empty if it can."""
    if type(loader) is not DataLoader:
        return f"the loader is a {type(loader).__module__}.{type(loader).__qualname__}"
    if loader.batch_sampler is None:
        return "the loader has batch_size=None: its dataset makes whole batches"
    if isinstance(loader.dataset, IterableDataset):
        return ""
    if type(loader.batch_sampler) is not BatchSampler:
        return f"the loader has a batch_sampler of its own, {type(loader.batch_sampler).__qualname__}"
    sampler = loader.batch_sampler.sampler
    if isinstance(sampler, DistributedSampler) and type(sampler) is not DistributedSampler:
        return f"its sampler, {type(sampler).__qualname__}, yields one rank's share of an order that cannot be known"
    if not hasattr(sampler, "__len__"):
        return f"its sampler, {type(sampler).__qualname__}, has no length"
    return ""


def _order(sampler: Any, size: int, *, seed: int, dataset: int) -> Order:
    """Return the order that a user's sampler makes: our own where it is in order or shuffles, else by running it."""
    in_order = type(sampler) is SequentialSampler or (type(sampler) is DistributedSampler and not sampler.shuffle)
    if in_order:
        return Unshuffled(size)
    shuffles = type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == size
    if shuffles or type(sampler) is DistributedSampler:
        return Shuffled(size, seed=seed, dataset=dataset)
    return Sampled(sampler, size, seed=seed)
