"""EncodingBase: the LightningModule whose predict_step writes a store, run by a Trainer on any number of ranks.

A shard is written by one rank, its rows in order, so that ranks share no file, and any number of them write the same
bytes. Which shards are missing rank 0 says to all; which row comes next is diffaug's own count, not Lightning's
``batch_indices``. Nothing is kept: a batch is written and forgotten.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from diffaug.data.batch import Batch, Place, collate
from diffaug.data.dataset import Images
from diffaug.data.latents import Latents
from diffaug.data.layout import Part
from diffaug.data.loader import Loader
from diffaug.data.shards import ShardWriter
from diffaug.data.store import Rows
from diffaug.randomness.user_code import detect_draws

VARIANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda image: image,
    "hflip": lambda image: image.flip(-1),
}
"""What a training image may be stored as, by name."""


class Source(NamedTuple):
    """A dataset to be stored, and the part that it becomes.

    Attributes:
        images: the dataset.
        part: of the store.
        before: of a store that is updated, the rows of that; None of a new one.
        kept: int64, the number that each item had there; -1 of what is read anew.
    """

    images: Images
    part: Part
    before: Rows | None = None
    kept: NDArray[np.int64] | None = None


class Kept(NamedTuple):
    """Of a batch's rows, those that an earlier store holds already.

    Attributes:
        new: where in the batch the others are.
        old: where these are.
        rows: what they hold, by name.
    """

    new: list[int]
    old: list[int]
    rows: dict[str, Any]

    def join(self, made: dict[str, Any]) -> dict[str, Any]:
        """Put rows that were made between those that were kept; of each field by its name."""
        return {name: self._joined(self.rows[name], made.get(name, [])) for name in made or self.rows}

    def _joined(self, old: Any, new: Any) -> Any:
        both = [*zip(self.old, old, strict=True), *zip(self.new, new, strict=True)]
        values = [value for _, value in sorted(both, key=lambda pair: pair[0])]
        if isinstance(values[0], str):
            return values
        dtype = (new[0] if len(new) else old[0]).dtype  # of latents, that of before they are rounded
        return torch.stack([value.cpu().to(dtype) for value in values])


class _Rows(Dataset[Any]):
    """The rows of all sources, asked for by (source, shard, rows), joined."""

    def __init__(self, sources: list[Source]) -> None:
        self.sources = sources

    def __len__(self) -> int:
        return sum(source.part.rows for source in self.sources)

    def __getitem__(self, where: tuple[int, int, range]) -> tuple[int, int, int, Batch | None, Kept | None]:
        number, shard, rows = where
        images, part, before, kept = self.sources[number]
        samples, known, places = [], [], ([], [])
        for position, row in enumerate(rows):
            item, variant = divmod(row, len(part.variants))
            old = -1 if kept is None else int(kept[item])
            places[old >= 0].append(position)
            if old >= 0:
                known.append(old * len(part.variants) + variant)
                continue
            samples.append(vary(images, read_still(images, item), part.variants[variant]))
        held = None
        if known and before is not None:
            held = Kept(*places, {name: before.read(name, known) for name in part.fields})
        return number, shard, len(rows), collate(samples) if samples else None, held


def read_still(images: Images, row: int) -> Any:
    """Read one row, that must not depend on chance.

    Raises:
        ValueError: reading it draws random numbers.
    """
    sample, drew = detect_draws(lambda: images.read(Place(row, 0, 0, 0)))
    if drew:
        raise ValueError(
            f"Reading {images.name}[{row}] draws random numbers, in the dataset or in data.transform: a store would "
            "keep one draw of it for ever. Leave it out here, and set it with data=store, where it is drawn anew at "
            "every visit."
        )
    return sample


def vary(images: Images, sample: Any, variant: str) -> Any:
    """Return a sample as a variant has it: its image, and those that keep in step with it."""
    (image, place, extra), make = sample, VARIANTS[variant]
    return make(image), place, {**extra, **{name: make(extra[name]) for name in images.aligned.beside if name in extra}}


class _Batches(Sampler[Any]):
    """The batches of some shards, none of them across two shards."""

    def __init__(self, sources: list[Source], shards: list[tuple[int, int]], batch_size: int) -> None:
        self.sources, self.shards, self.batch_size = sources, shards, batch_size

    def _rows(self, number: int, shard: int) -> range:
        part = self.sources[number].part
        first = shard * part.shard_rows
        return range(first, first + part.rows_of(shard))

    def __iter__(self) -> Iterator[tuple[int, int, range]]:
        for number, shard in self.shards:
            rows = self._rows(number, shard)
            for start in range(0, len(rows), self.batch_size):
                yield number, shard, rows[start : start + self.batch_size]

    def __len__(self) -> int:
        return sum(-(-len(self._rows(*shard)) // self.batch_size) for shard in self.shards)


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
        return [(number, shard) for number, one in enumerate(self.sources) for shard in range(one.part.shards)]

    def missing(self) -> list[tuple[int, int]]:
        """List those that are not there in full."""
        return [(number, shard) for number, shard in self.shards() if self.sources[number].part.fault(self.root, shard)]

    def predict_dataloader(self: Any) -> _Plain:
        missing = self.trainer.strategy.broadcast(self.missing())
        ours = missing[self.trainer.global_rank :: self.trainer.world_size]
        batches = _Batches(self.sources, ours, self.batch_size)
        options = {**self.options, "generator": torch.Generator(), "batch_size": None}
        return _Plain(Loader(_Rows(self.sources), sampler=batches, **options))

    def predict_step(self, batch: tuple[int, int, int, Batch | None, Kept | None], batch_idx: int) -> tuple[()]:
        number, shard, count, images, kept = batch
        made: dict[str, Any] = {}
        if images is not None:
            with torch.autocast(images.image.device.type, enabled=False):  # as where a live encoder is called
                encoded = {"image": images.image} if self.latents is None else self.latents.encode(images.image)
            made = {**images.extra, **encoded}
        if kept is not None:
            made = kept.join(made)
        if self.latents is not None:
            made = {**made, **self.latents.rows(made)}
        rows = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in made.items()}
        writer = self._writer = self._writer or ShardWriter(self.root, self.sources[number].part, shard)
        writer.write(rows, count)
        if writer.rows == writer.part.rows_of(shard):
            writer.finish(self.latents and self.latents.take_sums())
            self._writer = None
        return ()  # not None, of which Lightning would warn

    def abandon(self) -> None:
        """Remove what was begun of a shard, where something went wrong."""
        if self._writer is not None:
            self._writer.abandon()

    def on_predict_end(self: Any) -> None:
        self.trainer.strategy.barrier()
