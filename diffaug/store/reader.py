"""A store: a dataset that was prepared once, read from large files that are mapped into memory.

Every worker maps the same pages of the system's cache, and holds no file open.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from diffaug.datasets.buckets import without_empty
from diffaug.store.layout import TEXT, Split, buckets_of, file_of, read_info


class Rows:
    """The rows of a split of a store, by number.

    Arguments:
        root: the store's folder.
        split: of the store.
    """

    def __init__(self, root: Path, split: Split) -> None:
        self.root, self.split = root, split
        self._mapped: dict[tuple[str, int, str], NDArray[np.uint8]] = {}
        self._lying: dict[tuple[str, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = {}  # where rows begin

    def read(self, name: str, rows: Sequence[int]) -> Any:
        """Copy rows of a field, one after the other: tensors, or texts."""
        if self.split.fields[name].dtype == TEXT:
            return [self._text(name, *self._place(row)) for row in rows]
        if self.split.fields[name].varies:
            return [self._own(name, *self._place(row)) for row in rows]
        return self.gather([name], rows).unbind(0)

    def gather(self, names: list[str], rows: Sequence[int]) -> Tensor:
        """Copy rows of one field, or of several alike side by side, into a tensor: (N, *) or (N, 2, *)."""
        field = self.split.fields[names[0]]
        shape = (len(rows), *([len(names)] if len(names) > 1 else []), *field.shape)
        out = torch.empty(shape, dtype=getattr(torch, field.dtype), device="cpu")
        # As bytes: numpy has not every dtype, and copies a row in a third of the time that torch does.
        copies = out.view(len(rows), len(names), -1).view(torch.uint8).numpy()
        for row, (shard, start) in zip(copies, map(self._place, rows), strict=True):
            for number, name in enumerate(names):
                row[number] = self._map(name, shard)[start]
        return out

    def bare(self, name: str, rows: Sequence[int]) -> list[Tensor]:
        """Return rows of a field as they lie in the mapped files."""
        field = self.split.fields[name]
        bare = [torch.from_numpy(self._map(name, shard)[start]) for shard, start in map(self._place, rows)]
        return [row.view(getattr(torch, field.dtype)).view(field.shape) for row in bare]

    def _place(self, row: int) -> tuple[int, int]:
        return divmod(row, self.split.shard_rows)

    def _map(self, name: str, shard: int, ending: str = "npy") -> NDArray[np.uint8]:
        """Return a shard's file as bytes, (rows, bytes of one) where these are alike: mapped when first asked for."""
        known = self._mapped.get((name, shard, ending))
        if known is None:
            known = _map_bytes(file_of(self.root, self.split.folder, name, shard, ending))
            if ending.endswith("npy"):
                known = known[10 + int(known[8:10].view("<u2")[0]) :]  # numpy's header says how long it is
                if ending != "npy" or not self.split.fields[name].varies:
                    known = known.reshape(len(self.split.rows_of(shard)), -1)
            self._mapped[name, shard, ending] = known
        return known

    def _own(self, name: str, shard: int, row: int) -> Tensor:
        """Copy a row that has a shape of its own."""
        dtype = getattr(torch, self.split.fields[name].dtype)
        known = self._lying.get((name, shard))
        if known is None:
            shapes = self._map(name, shard, "shapes.npy").view("<i8")
            known = self._lying[name, shard] = shapes, np.r_[0, shapes.prod(1).cumsum()] * dtype.itemsize
        shapes, ends = known
        out = torch.empty(shapes[row].tolist(), dtype=dtype, device="cpu")
        if out.numel():
            out.view(-1).view(torch.uint8).numpy()[:] = self._map(name, shard)[int(ends[row]) : int(ends[row + 1])]
        return out

    def _text(self, name: str, shard: int, row: int) -> str:
        ends = self._map(name, shard, "ends.npy")
        start = int(ends[row - 1].view("<i8")[0]) if row else 0
        return json.loads(self._map(name, shard, "jsonl")[start : int(ends[row].view("<i8")[0])].tobytes())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}, "_lying": {}}  # each process maps the files itself


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    # Not numpy.memmap, which keeps a file descriptor for every shard. What is written to it stays in this process.
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()


class Store(Dataset[dict[str, Any]]):
    """A split of a store, as a dataset: items are dicts of ``image`` and whatever else was stored, by name.

    Batches are fetched at once (``__getitems__``). Of a distribution's moments ``image`` is (2, *): mean and std. Of an
    item with several variants one is drawn from torch's global state, which diffaug's loaders key by the visit.

    Arguments:
        root: the store's folder.
        stage: train, val or test.
        number: which of the stage's datasets, where it has several.

    Attributes:
        copies: whether images are copies, which may be written to. Where nothing but collate reads them, False spares a
            copy; then what is written to them stays, in this process.
        roles: what ``data.images`` said when the store was made; its target is called ``image`` here.
        bucket_of, bucket_shapes: as the dataset's, where it has buckets: the number of each item's, int64, shape (N,),
            and the height and width of each; else None.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is not finished, lacks such a split, or a file of it is missing or cut short.
    """

    copies = True

    def __init__(self, root: str, stage: str = "train", number: int = 0) -> None:
        self.root, info = Path(root).expanduser(), read_info(root)
        again = f"The command that made it goes on with it: python -m diffaug encode ... out={root}"
        if not info["finished"]:
            raise ValueError(f"The store data.root={root!r} is not finished. {again}")
        splits = info["splits"].get(stage, [])
        if number >= len(splits):
            held = ", ".join(f"{len(each)} of {name}" for name, each in info["splits"].items())
            raise ValueError(f"The store data.root={root!r} has no {stage} set number {number}, but {held}.")
        self.split: Split = splits[number]
        for shard in range(self.split.shards):
            fault = self.split.fault(self.root, shard)
            if fault:
                raise ValueError(f"{fault}. {again}")
        self._made_from = info["made_from"]
        self.roles: dict[str, Any] = {
            "image" if said == "target" else name: said for name, said in (self._made_from["images"] or {}).items()
        }
        self._items: Sequence[int] | NDArray[np.int64] = range(self.split.items)
        self.rows = Rows(self.root, self.split)
        self._images = [name for name in ("image", "mean", "std") if name in self.split.fields]
        self.shape = self.split.fields[self._images[0]].shape
        self.bucket_of: NDArray[np.int64] | None = None
        self.bucket_shapes: Sequence[tuple[int, int]] | None = self.split.bucket_shapes
        if self.bucket_shapes is not None:
            self.bucket_of = np.load(buckets_of(self.root, self.split))

    def only(self, indices: Sequence[int]) -> "Store":
        """Return the same store with these items only, numbered anew; each keeps its bucket's shape."""
        some, chosen = copy(self), np.asarray(indices, np.int64)
        some._items = np.asarray(self._items, np.int64)[chosen]
        if self.bucket_of is not None and self.bucket_shapes is not None:
            some.bucket_of, some.bucket_shapes = without_empty(self.bucket_of[chosen], self.bucket_shapes)
        return some

    @property
    def sizes(self) -> NDArray[np.int64] | None:
        """Height and width of each image before it was fitted to its bucket, shape (N, 2), where that was kept."""
        if self.bucket_of is None or "original_size" not in self.split.fields:
            return None
        rows = np.asarray(self._items) * len(self.split.variants)
        return self.rows.gather(["original_size"], rows.tolist()).numpy()

    def recipe(self) -> dict[str, Any]:
        """Return what a resume compares: what made the store, and which items are chosen of it."""
        made = {"shape": list(self.shape), **self._made_from}
        if not isinstance(self._items, np.ndarray):
            return made
        return {**made, "chosen": hashlib.blake2b(self._items.tobytes(), digest_size=8).hexdigest()}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = [self._row(index) for index in indices]
        if -1 in self.shape:
            several = [self.rows.read(name, rows) for name in self._images]
            images = several[0] if len(several) == 1 else [torch.stack(both) for both in zip(*several, strict=True)]
        elif not self.copies and len(self._images) == 1:
            images = self.rows.bare(self._images[0], rows)
        else:
            images = self.rows.gather(self._images, rows).unbind(0)
        gathered = {"image": images}
        gathered |= {name: self.rows.read(name, rows) for name in self.split.fields if name not in self._images}
        return [dict(zip(gathered, row, strict=True)) for row in zip(*gathered.values(), strict=True)]

    @property
    def draws(self) -> bool:
        """Whether reading draws, of several variants."""
        return len(self.split.variants) > 1

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.root} holds {len(self)} items, of which {index} is none")
        count = len(self.split.variants)
        return int(self._items[index]) * count + (int(torch.randint(count, (), device="cpu")) if self.draws else 0)
