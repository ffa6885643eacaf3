"""How a store lies on the disk, and what it says of itself.

A folder of `store.json`, which says what made it and what it holds, and one folder a split, train and val:

    train/image-00000.npy          rows of one shape, uint8 or float: numpy.load reads them, without diffaug
    train/label-00000.npy          whatever numbers the dataset yields beside the image, by name
    train/caption-00000.jsonl      texts, a line of JSON each, and
    train/caption-00000.ends.npy   where each line ends, in bytes

In the place of ``image``, a store of latents has ``mean`` and, of an encoder that returns a distribution, ``std``.
numpy has no bfloat16: such a file holds the same 16 bits as uint16, and store.json names the dtype.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaug.datasets.atomic_file import open_whole

INFO = "store.json"
FORMAT = 1
TEXT = "text"


@dataclass(frozen=True)
class Field:
    """What a row of a field is: a tensor of a dtype of torch's, by its name, and a shape; or a text.

    Where a side of the shape differs from row to row it is -1.
    """

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether rows have shapes of their own."""
        return -1 in self.shape

    @property
    def bytes(self) -> int:
        """Bytes of a row; 0 where none are known beforehand, of a text or where the shape differs."""
        if self.dtype == TEXT or self.varies:
            return 0
        return getattr(torch, self.dtype).itemsize * int(np.prod(self.shape, dtype=int))


@dataclass(frozen=True)
class Split:
    """One dataset of a stage.

    Attributes:
        folder: its name within the store.
        rows: of all variants, those of an item side by side.
        shard_rows: the rows of a shard; the last may have fewer.
        fields: by name.
        variants: what each item was stored as, by name, or the numbers of its draws.
        bucket_shapes: (height, width) of each bucket of the dataset, where it has any.
    """

    folder: str
    rows: int
    shard_rows: int
    fields: dict[str, Field]
    variants: tuple[str, ...] = ("identity",)
    bucket_shapes: tuple[tuple[int, int], ...] | None = None

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

    def rows_of(self, shard: int) -> range:
        """Return the rows of a shard, by number."""
        return range(self.rows)[shard * self.shard_rows :][: self.shard_rows]

    def fault(self, root: Path, shard: int) -> str | None:
        """Say what is wrong with a shard's files; None if it is whole."""
        rows = len(self.rows_of(shard))
        for name, field in self.fields.items():
            ending, kind = "npy", field
            if field.dtype == TEXT:
                ending, kind = "ends.npy", ENDS
            elif field.varies:
                ending, kind = "shapes.npy", Field("int64", (len(field.shape),))
            path = file_of(root, self.folder, name, shard, ending)
            wanted = len(header(kind, rows)) + rows * kind.bytes
            fault = _size_fault(path, wanted)
            if fault is None and field.varies:
                count = int(np.load(path).prod(1).sum())
                size = len(header(Field(field.dtype), count)) + count * Field(field.dtype).bytes
                fault = _size_fault(file_of(root, self.folder, name, shard, "npy"), size)
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
    """Read what a store says of itself; its splits as lists of `Split` by stage.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it is of another format.
    """
    path = Path(root).expanduser() / INFO
    try:
        info = json.loads(path.read_text())
        if info["format"] != FORMAT:
            raise ValueError(f"{path} is of format {info['format']}, but this version of diffaug reads {FORMAT}.")
        info["splits"] = {stage: [_split(split) for split in splits] for stage, splits in info["splits"].items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"data.root={str(root)!r} holds no store: there is no {path.resolve()}. This makes one: "
            f"python -m diffaug encode data=... out={root}"
        ) from error
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no store's: {error!r}.") from error
    return info


def splits_of(info: Mapping[str, Any]) -> list[Split]:
    """List the splits of what a store says of itself."""
    return [split for of_stage in info["splits"].values() for split in of_stage]


def _split(split: dict[str, Any]) -> Split:
    fields = {name: Field(field["dtype"], tuple(field["shape"])) for name, field in split.pop("fields").items()}
    shapes = split.get("bucket_shapes") and tuple((height, width) for height, width in split["bucket_shapes"])
    return Split(**{**split, "fields": fields, "variants": tuple(split["variants"]), "bucket_shapes": shapes})


def write_info(root: Path, info: dict[str, Any]) -> None:
    """Write store.json, whole or not at all."""
    with open_whole(root / INFO) as file:
        file.write((json.dumps(info, indent=1, default=asdict) + "\n").encode())


def shape_of(root: str) -> list[int | None]:
    """Return the shape of a store's images or latents, as ``data.image_shape`` is written: None for what differs."""
    splits: dict[str, list[Split]] = read_info(root)["splits"]
    fields = next(iter(splits.values()))[0].fields
    return [None if side < 0 else side for side in fields["mean" if "mean" in fields else "image"].shape]


def buckets_of(root: Path, split: Split) -> Path:
    """Return the file that numbers the bucket of each item."""
    return root / split.folder / "buckets.npy"
