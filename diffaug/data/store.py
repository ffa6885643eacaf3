"""A store: a dataset that was prepared once, read from large files that are mapped into memory.

A folder of `store.json`, which says what made it and what it holds, and one folder a part, train and val:

    train/image-00000.npy          rows of one shape, uint8 or float: numpy.load reads them, without diffaug
    train/label-00000.npy          whatever numbers the dataset yields beside the image, by name
    train/caption-00000.jsonl      texts, a line of JSON each, and
    train/caption-00000.ends.npy   where each line ends, in bytes

In the place of ``image``, a store of latents has ``mean`` and, of an encoder that returns a distribution, ``std``.
numpy has no bfloat16: such a file holds the same 16 bits as uint16, and store.json names the dtype.

Every worker maps the same pages of the system's cache, and holds no file open.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

INFO = "store.json"
FORMAT = 1
TEXT = "text"


@dataclass(frozen=True)
class Field:
    """What a row of a field is: a tensor of a dtype of torch's, by its name, and a shape; or a text."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of a row; 0 of a text, which has none beforehand."""
        return 0 if self.dtype == TEXT else getattr(torch, self.dtype).itemsize * int(np.prod(self.shape, dtype=int))


@dataclass(frozen=True)
class Part:
    """One dataset of a stage.

    Attributes:
        folder: its name within the store.
        rows: of all variants, those of an item side by side.
        shard_rows: the rows of a shard; the last may have fewer.
        fields: by name.
        variants: what each item was stored as, by name.
    """

    folder: str
    rows: int
    shard_rows: int
    fields: dict[str, Field]
    variants: tuple[str, ...] = ("identity",)

    @property
    def items(self) -> int:
        return self.rows // len(self.variants)

    @property
    def floats(self) -> bool:
        """Whether its images are floats, whose range must be known."""
        return "image" in self.fields and self.fields["image"].dtype != "uint8"

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """Return how many rows a shard has."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def fault(self, root: Path, shard: int) -> str | None:
        """Say what is wrong with a shard's files; None if it is whole."""
        rows = self.rows_of(shard)
        for name, field in self.fields.items():
            path = file_of(root, self.folder, name, shard, "npy" if field.dtype != TEXT else "ends.npy")
            kind = field if field.dtype != TEXT else ENDS
            wanted = len(header(kind, rows)) + rows * kind.bytes
            fault = _size_fault(path, wanted)
            if fault is None and field.dtype == TEXT:
                end = int(np.frombuffer(path.read_bytes()[-8:], "<i8")[0])
                fault = _size_fault(file_of(root, self.folder, name, shard, "jsonl"), end)
            if fault:
                return fault
        sums = self.sums(root, shard)
        return f"{sums} is missing" if "mean" in self.fields and not sums.exists() else None

    def sums(self, root: Path, shard: int) -> Path:
        """Return the file of what the latents of a shard come to."""
        return file_of(root, self.folder, "sums", shard, "json")


ENDS = Field("int64")


def file_of(root: Path, folder: str, name: str, shard: int, ending: str) -> Path:
    """Return the path of a shard's file."""
    return root / folder / f"{name}-{shard:05}.{ending}"


def header(field: Field, rows: int) -> bytes:
    """Make the header of a .npy file, format 1.0: alike under every version of numpy, so that its length is known."""
    stored = "uint16" if field.dtype == "bfloat16" else field.dtype
    kind = {"descr": np.dtype(stored).newbyteorder("<").str, "fortran_order": False, "shape": (rows, *field.shape)}
    text = repr(kind)
    length = -(-(len(text) + 11) // 64) * 64  # a multiple of 64, with the 10 bytes before and the line's end
    return b"\x93NUMPY\x01\x00" + (length - 10).to_bytes(2, "little") + text.ljust(length - 11).encode() + b"\n"


def _size_fault(path: Path, wanted: int) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    return None if size == wanted else f"{path} is cut short or not whole: {size} bytes of {wanted}"


def read_info(root: str | Path) -> dict[str, Any]:
    """Read what a store says of itself; its parts as lists of `Part` by stage.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is of another format.
    """
    path = Path(root).expanduser() / INFO
    try:
        info = json.loads(path.read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"{path} is of format {info['format']}, but this version of diffaug reads {FORMAT}.")
        info["parts"] = {stage: [_part(part) for part in parts] for stage, parts in info["parts"].items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"data.root={str(root)!r} holds no store: there is no {path.resolve()}. This makes one: "
            f"python -m diffaug encode data=... out={root}"
        ) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no store's: {error!r}.") from error
    return info


def _part(part: dict[str, Any]) -> Part:
    fields = {name: Field(field["dtype"], tuple(field["shape"])) for name, field in part.pop("fields").items()}
    return Part(**{**part, "fields": fields, "variants": tuple(part["variants"])})


def write_info(root: Path, info: dict[str, Any]) -> None:
    """Write store.json, whole or not at all."""
    parts = {stage: [asdict(part) for part in parts] for stage, parts in info["parts"].items()}
    beside = root / f".{INFO}.new"
    beside.write_text(json.dumps({**info, "parts": parts}, indent=1) + "\n")
    beside.replace(root / INFO)


def shape_of(root: str) -> list[int]:
    """Return the shape of a store's images or latents, as ``data.image_shape`` is written."""
    parts: dict[str, list[Part]] = read_info(root)["parts"]
    fields = next(iter(parts.values()))[0].fields
    return list(fields["mean" if "mean" in fields else "image"].shape)


class Store(Dataset[dict[str, Any]]):
    """A part of a store, as a dataset: items are dicts of ``image`` and whatever else was stored, by name.

    Batches are fetched at once (``__getitems__``). Of a distribution's moments ``image`` is (2, *): mean and std. Of an
    item with several variants one is drawn from torch's global state, which diffaug's loaders key by the visit.

    Arguments:
        root: the store's folder.
        stage: train, val or test.
        number: which of the stage's datasets, where it has several.

    Attributes:
        copies: whether images are copies, which may be written to. Where nothing but collate reads them, False spares a
            copy; then what is written to them stays, in this process.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is not finished, lacks such a part, or a file of it is missing or cut short.
    """

    copies = True

    def __init__(self, root: str, stage: str = "train", number: int = 0) -> None:
        self.root, info = Path(root).expanduser(), read_info(root)
        again = f"The command that made it goes on with it: python -m diffaug encode ... out={root}"
        if not info["finished"]:
            raise ValueError(f"The store data.root={root!r} is not finished. {again}")
        parts = info["parts"].get(stage, [])
        if number >= len(parts):
            raise ValueError(f"The store data.root={root!r} has no {stage} set number {number}: {dict(info['parts'])}.")
        self.part: Part = parts[number]
        for shard in range(self.part.shards):
            fault = self.part.fault(self.root, shard)
            if fault:
                raise ValueError(f"{fault}. {again}")
        self._made_from = info["made_from"]
        self._images = [name for name in ("image", "mean", "std") if name in self.part.fields]
        self.shape = self.part.fields[self._images[0]].shape
        self._mapped: dict[tuple[str, int], NDArray[np.uint8]] = {}

    def recipe(self) -> dict[str, Any]:
        """Return what a resume compares: what made the store."""
        return {"shape": list(self.shape), **self._made_from}

    def __len__(self) -> int:
        return self.part.items

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        places = [divmod(self._row(index), self.part.shard_rows) for index in indices]
        bare = not self.copies and len(self._images) == 1
        images = self._bare(self._images[0], places) if bare else self._gather(self._images, places).unbind(0)
        gathered: dict[str, Any] = {"image": images}
        for name, field in self.part.fields.items():
            if field.dtype == TEXT:
                gathered[name] = [self._text(name, *place) for place in places]
            elif name not in self._images:
                gathered[name] = self._gather([name], places).unbind(0)
        return [dict(zip(gathered, row, strict=True)) for row in zip(*gathered.values(), strict=True)]

    @property
    def draws(self) -> bool:
        """Whether reading draws, of several variants."""
        return len(self.part.variants) > 1

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.root} holds {len(self)} items, of which {index} is none")
        count = len(self.part.variants)
        return index % len(self) * count + (int(torch.randint(count, (), device="cpu")) if self.draws else 0)

    def _gather(self, names: list[str], places: list[tuple[int, int]]) -> Tensor:
        """Copy rows of one field, or of several alike side by side, into a tensor: (N, *) or (N, 2, *)."""
        field = self.part.fields[names[0]]
        shape = (len(places), *([len(names)] if len(names) > 1 else []), *field.shape)
        out = torch.empty(shape, dtype=getattr(torch, field.dtype), device="cpu")
        # As bytes: numpy has not every dtype, and copies a row in a third of the time that torch does.
        rows = out.view(len(places), len(names), -1).view(torch.uint8).numpy()
        for row, (shard, start) in zip(rows, places, strict=True):
            for number, name in enumerate(names):
                row[number] = self._map(name, shard)[start]
        return out

    def _bare(self, name: str, places: list[tuple[int, int]]) -> list[Tensor]:
        """Return rows of a field as they lie in the mapped files."""
        field = self.part.fields[name]
        rows = [torch.from_numpy(self._map(name, shard)[row]) for shard, row in places]
        return [row.view(getattr(torch, field.dtype)).view(field.shape) for row in rows]

    def _map(self, name: str, shard: int) -> NDArray[np.uint8]:
        """Return the rows of a shard as bytes, mapped when first asked for; the file is closed again."""
        known = self._mapped.get((name, shard))
        if known is None:
            field, rows = self.part.fields[name], self.part.rows_of(shard)
            field, ending = (field, "npy") if field.dtype != TEXT else (ENDS, "ends.npy")
            whole = _map_bytes(file_of(self.root, self.part.folder, name, shard, ending))
            known = self._mapped[name, shard] = whole[len(header(field, rows)) :].reshape(rows, field.bytes)
        return known

    def _text(self, name: str, shard: int, row: int) -> str:
        ends = self._map(name, shard)
        lines = self._mapped.get((f"{name}.jsonl", shard))
        if lines is None:
            lines = _map_bytes(file_of(self.root, self.part.folder, name, shard, "jsonl"))
            self._mapped[f"{name}.jsonl", shard] = lines
        start = int(ends[row - 1].view("<i8")[0]) if row else 0
        return json.loads(lines[start : int(ends[row].view("<i8")[0])].tobytes())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # each process maps the files itself


def _map_bytes(path: Path) -> NDArray[np.uint8]:
    # Not numpy.memmap, which keeps a file descriptor for every shard. What is written to it stays in this process.
    return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
