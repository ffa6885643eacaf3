"""EncodingBase: the LightningModule whose predict_step writes a store, run by a Trainer on any number of ranks.

A shard is written by one rank, its rows in order, so that ranks share no file, and any number of them write the same
bytes. Which shards are missing rank 0 says to all; which row comes next is diffaug's own count, not Lightning's
``batch_indices``. Nothing is kept: a batch is written and forgotten.
"""

import hashlib
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from diffaug.datasets.indexed import is_stream
from diffaug.datasets.mixture import Mixture
from diffaug.loader.batch import Batch, Place, collate
from diffaug.loader.dataset import Images
from diffaug.loader.training import Loader
from diffaug.randomness.user_code import call_keyed, detect_draws, mix_key
from diffaug.store.latents import Latents
from diffaug.store.layout import Field, Split
from diffaug.store.reader import Rows
from diffaug.store.shards import ShardWriter

OF_IMAGES = ("image", "mean", "std", "pixels")
"""The fields of a store's images, or of what is made of them."""

VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda image: image,
    "hflip": lambda image: image.flip(-1),
}
"""What a training image may be stored as, by name; beside these, draws of what is random in reading it, by number."""


class Source(NamedTuple):
    """A dataset to be stored, and the split that it becomes.

    Attributes:
        images: the dataset.
        split: of the store.
        files: what the items are read from, as `diffaug.encoding.fingerprint.list_files` has it.
        before: of a store that is updated, the rows of that; None of a new one.
        kept: int64, the number that each item had there; -1 of what is read anew.
        bucket_bytes: of a row of images in buckets, or of latents of them, on average.
    """

    images: Images
    split: Split
    files: list[str] | None
    before: Rows | None = None
    kept: NDArray[np.int64] | None = None
    bucket_bytes: float = 0.0

    @property
    def row_bytes(self) -> float:
        """Bytes of a row, on average, but for texts and what else differs from row to row."""
        return sum(field.bytes for field in self.split.fields.values()) + self.bucket_bytes

    def read(self, item: int, variant: int = 0) -> Any:
        """Read an item as one of the split's variants, by its place among them, has it."""
        name = str(item) if self.files is None else json.loads(self.files[item])[0]
        return read_row(self.images, item, self.split.variants[variant], name)


class Some(NamedTuple):
    """Some rows of a batch: those of one shape, or those that an earlier store holds.

    Attributes:
        places: where in the batch they are.
        batch: what was read, of one shape; None of rows that an earlier store holds.
        rows: what that holds, by name.
    """

    places: list[int]
    batch: Batch | None
    rows: dict[str, Any]


def _join(some: list[tuple[list[int], dict[str, Any]]], fields: dict[str, Field]) -> dict[str, Any]:
    """Put rows in their order; lists of texts and of what differs in shape, else tensors."""
    first = some[0][1]
    whole = all(isinstance(rows, Tensor) or isinstance(rows[0], str) for rows in first.values())
    if whole and len(some) == 1 and not any(field.varies for field in fields.values()):
        return first
    joined = {}
    for name in first:
        by_place = {place: row for places, rows in some for place, row in zip(places, rows[name], strict=True)}
        values = [by_place[place] for place in sorted(by_place)]
        if not isinstance(values[0], str):
            dtype = first[name][0].dtype  # of latents, that of before they are rounded: what was made is first
            values = [value.cpu().to(dtype) for value in values]
            # What differs and was not said to, the writer refuses.
            values = values if fields[name].varies or len({v.shape for v in values}) > 1 else torch.stack(values)
        joined[name] = values
    return joined


class _Rows(Dataset[Any]):
    """The rows of all sources, asked for by (source, shard, rows)."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(source.split.rows for source in self.sources)

    def __getitem__(self, where: tuple[int, int, range]) -> tuple[int, int, int, list[Some]]:
        number, shard, rows = where
        source = self.sources[number]
        split, before, kept = source.split, source.before, source.kept
        read: dict[tuple[int, ...], dict[int, Any]] = {}  # by shape, samples by place
        known: dict[int, int] = {}  # rows of the earlier store by place
        varies = split.bucket_shapes is not None
        for place, row in enumerate(rows):
            item, variant = divmod(row, len(split.variants))
            old = -1 if kept is None else int(kept[item])
            if old >= 0:
                known[place] = old * len(split.variants) + variant
            else:
                sample = source.read(item, variant)
                read.setdefault(tuple(sample[0].shape) if varies else (), {})[place] = sample
        some = [Some([*samples], collate([*samples.values()]), {}) for samples in read.values()]
        if before is not None and known:
            held = {name: before.read(name, [*known.values()]) for name in split.fields}
            some.append(Some([*known], None, held))
        return number, shard, len(rows), some


def check_storable(images: Images) -> None:
    """Refuse a dataset that has no rows of its own."""
    if is_stream(images.dataset):
        raise ValueError(f"{images.name} is a stream, whose items have no index to be stored by.")
    if isinstance(images.dataset, Mixture):
        raise ValueError(f"{images.name} is a mixture: make a store of each of its datasets, and mix the stores.")
    if images.aligned.beside and hasattr(images.dataset, "bucket_shapes"):
        raise ValueError(
            f"{images.name} has buckets, and data.images names {list(images.aligned.beside)} beside the image: a store "
            "of buckets holds one image of each item. Train on the dataset itself, or store it in one size."
        )


def read_row(images: Images, row: int, variant: str, name: str) -> Any:
    """Read one row as a variant has it: its image, and those that keep in step with it.

    Arguments:
        variant: of `VARIANTS`, which must not depend on chance; or the number of a draw, which is keyed.
        name: what the draw is keyed by, beside the dataset's own key: of an item that is read from a file the file's,
            so that others that come or go before it do not change it.

    Raises:
        ValueError: reading it draws random numbers, and no draw is asked for.
    """
    place = Place(row, 0, 0, 0)
    if variant.isdecimal():
        digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
        key = mix_key(*images.domain, int.from_bytes(digest, "little"), int(variant))
        return call_keyed(images.read, [place], [key])[0]
    (image, place, extra), drew = detect_draws(lambda: images.read(place))
    if drew:
        raise ValueError(
            f"Reading {images.name}[{row}] draws random numbers, in the dataset or in data.transform: a store would "
            "keep one draw of it for ever. Say how many draws of each training image are stored, as variants=8; or "
            "leave it out here, and set it as data.transform of data=store, where it is drawn anew at every visit."
        )
    make = VARIANTS[variant]
    return make(image), place, {**extra, **{key: make(extra[key]) for key in images.aligned.beside if key in extra}}


class _Batches(Sampler[Any]):
    """The batches of some shards, none of them across two shards."""

    def __init__(self, sources: list[Source], shards: list[tuple[int, int]], batch_size: int) -> None:
        self.sources, self.shards, self.batch_size = sources, shards, batch_size

    def __iter__(self) -> Iterator[tuple[int, int, range]]:
        for number, shard in self.shards:
            rows = self.sources[number].split.rows_of(shard)
            for start in range(0, len(rows), self.batch_size):
                yield number, shard, rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return sum(
            -(-len(self.sources[number].split.rows_of(shard)) // self.batch_size) for number, shard in self.shards
        )


class _Plain:
    """A loader that is no DataLoader to Lightning, which would put a sampler of its own in it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)


class EncodingBase:
    """What a LightningModule needs so that ``trainer.predict`` writes a store.

    Arguments:
        root: the store's folder.
        sources: what is stored.
        batch_size: rows that are read, and encoded, together.
        options: of DataLoader.
        latents: from a batch of images on the device to rows by name; None stores the images as they are.
    """

    allow_zero_length_dataloader_with_multiple_devices = True  # ranks may be more than shards

    def __init__(
        self,
        root: Path,
        sources: list[Source],
        *,
        batch_size: int,
        options: dict[str, Any],
        latents: Latents | None = None,
    ) -> None:
        super().__init__()
        self.root, self.sources, self.batch_size, self.options = root, sources, batch_size, options
        self.latents = latents
        self._writer: ShardWriter | None = None

    def shards(self) -> list[tuple[int, int]]:
        """List all shards, as (source, shard)."""
        return [(number, shard) for number, one in enumerate(self.sources) for shard in range(one.split.shards)]

    def missing(self) -> list[tuple[int, int]]:
        """List those that are not there in full."""
        return [
            (number, shard) for number, shard in self.shards() if self.sources[number].split.fault(self.root, shard)
        ]

    def predict_dataloader(self: Any) -> _Plain:
        missing = self.trainer.strategy.broadcast(self.missing())
        ours = missing[self.trainer.global_rank :: self.trainer.world_size]
        batches = _Batches(self.sources, ours, self.batch_size)
        options = {**self.options, "generator": torch.Generator(), "batch_size": None}
        return _Plain(Loader(_Rows(self.sources), sampler=batches, **options))

    def predict_step(self: Any, batch: tuple[int, int, int, list[Some]], batch_idx: int) -> tuple[()]:
        if self.trainer.received_sigterm:  # a flag of Lightning's, which itself looks at it in training alone
            raise SystemExit(128 + signal.SIGTERM)
        number, shard, count, several = batch
        some: list[tuple[list[int], dict[str, Any]]] = []
        for places, read, known in several:
            made = known
            if read is not None:
                with torch.autocast(read.image.device.type, enabled=False):  # as where a live encoder is called
                    encoded = {"image": read.image} if self.latents is None else self.latents.encode(read.image)
                made = {**read.extra, **encoded}
            some.append((places, made))
        made = _join(some, self.sources[number].split.fields)
        if self.latents is not None:
            made = {**made, **self.latents.rows(made)}
        rows = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in made.items()}
        writer = self._writer = self._writer or ShardWriter(self.root, self.sources[number].split, shard)
        writer.write(rows, count)
        if writer.rows == len(writer.split.rows_of(shard)):
            writer.finish(self.latents and self.latents.take_sums())
            self._writer = None
        return ()  # not None, of which Lightning would warn

    def abandon(self) -> None:
        """Remove what was begun of a shard, where something went wrong."""
        if self._writer is not None:
            self._writer.abandon()

    def on_predict_end(self: Any) -> None:
        self.trainer.strategy.barrier()
