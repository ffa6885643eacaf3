"""The writing of a store's shards: each by one process, row after row, under its final name only when it is whole."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from diffaug.store.layout import ENDS, TEXT, Field, Split, file_of, header

_SHARD_BYTES = 2**29  # at most, so that a billion rows of 16 KiB are no more maps than a process may have
_SHARDS = 64  # so many where they are smaller than that, so that ranks can share out a small set
_LEAST_BYTES = 2**20


def choose_shard_rows(rows: int, row_bytes: int) -> int:
    """Choose the rows of a shard: of nothing but the set's size, so that any ranks write the same files."""
    least, most = -(-_LEAST_BYTES // row_bytes), max(1, _SHARD_BYTES // row_bytes)
    return max(1, min(rows, most, max(least, -(-rows // _SHARDS))))


class ShardWriter:
    """Writes one shard, rows in order, beside its place; `finish` flushes it to the disk and renames it.

    Plainly written, not mapped: where the disk is full that is an error, and not the end of the process.

    Arguments:
        root, split, shard: which one.
    """

    def __init__(self, root: Path, split: Split, shard: int) -> None:
        self.split, self.rows, self._root, self._shard = split, 0, root, shard
        (root / split.folder).mkdir(parents=True, exist_ok=True)
        self._files: dict[Path, BinaryIO] = {}
        self._shapes: dict[str, list[list[int]]] = {name: [] for name, field in split.fields.items() if field.varies}
        self._ends: dict[str, list[int]] = {name: [0] for name, field in split.fields.items() if field.dtype == TEXT}
        try:
            for name, field in split.fields.items():
                if field.dtype == TEXT:
                    self._open(name, "jsonl")
                else:  # where shapes differ, for now: it is as long as what is put in its place
                    plain = Field(field.dtype) if field.varies else field
                    self._open(name, "npy").write(header(plain, len(split.rows_of(shard))))
        except OSError as error:
            raise self._refuse(error) from error

    def _open(self, name: str, ending: str) -> BinaryIO:
        path = file_of(self._root, self.split.folder, name, self._shard, ending)
        file = self._files[path] = beside(path).open("wb")
        return file

    def _file(self, name: str, ending: str) -> BinaryIO:
        return self._files[file_of(self._root, self.split.folder, name, self._shard, ending)]

    def write(self, rows: dict[str, Any], count: int) -> None:
        """Append so many rows: tensors of shape (count, *) on the CPU and lists of texts, by name.

        Raises:
            ValueError: a field's rows are not what the first of the dataset were.
            OSError: the disk is full.
        """
        try:
            for name, field in self.split.fields.items():
                if field.dtype == TEXT:
                    self._write_texts(name, rows[name])
                    continue
                alone = isinstance(rows[name], list)
                for values in rows[name] if alone else [rows[name]]:
                    sides = tuple(values.shape) if alone else tuple(values.shape[1:])
                    _check(name, field, values.dtype, sides, f"{self.split.folder}, from row {self._first} on")
                    if field.varies:
                        self._shapes[name].append(list(sides))
                    plain = values.contiguous().reshape(-1)
                    self._file(name, "npy").write(plain.view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._refuse(error) from error
        self.rows += count

    @property
    def _first(self) -> int:
        return self.split.rows_of(self._shard).start + self.rows

    def _write_texts(self, name: str, texts: Any) -> None:
        ends = self._ends[name]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"{name} of {self.split.folder} must be a text in every row, but got {text!r}.")
            line = json.dumps(text, ensure_ascii=False).encode(errors="surrogatepass") + b"\n"
            self._file(name, "jsonl").write(line)
            ends.append(ends[-1] + len(line))

    def finish(self, sums: dict[str, Any] | None = None) -> None:
        """Flush every file to the disk and give it its name.

        Arguments:
            sums: of latents, what they come to.
        """
        try:
            if sums is not None:
                self._open("sums", "json").write(json.dumps(sums).encode())
            for name, ends in self._ends.items():
                file = self._open(name, "ends.npy")
                file.write(header(ENDS, self.rows) + np.array(ends[1:], "<i8").tobytes())
            for name, shapes in self._shapes.items():
                field, sides = self.split.fields[name], np.array(shapes, "<i8")
                kind = Field("int64", (len(field.shape),))
                self._open(name, "shapes.npy").write(header(kind, self.rows) + sides.tobytes())
                file = self._file(name, "npy")
                file.seek(0)
                file.write(header(Field(field.dtype), int(sides.prod(1).sum())))
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for path in self._files:
                os.replace(beside(path), path)
        except OSError as error:
            raise self._refuse(error) from error

    def abandon(self) -> None:
        """Remove what was begun."""
        for path, file in self._files.items():
            with suppress(OSError):  # what was not written yet, to a full disk
                file.close()
            beside(path).unlink(missing_ok=True)

    def _refuse(self, error: OSError) -> OSError:
        self.abandon()
        free = shutil.disk_usage(self._root).free / 2**20
        return OSError(
            error.errno,
            f"Shard {self._shard} of {self._root / self.split.folder} cannot be written ({free:.0f} MiB free): "
            f"{error.strerror}. What was finished stays, and the same command goes on",
        )


def beside(path: Path) -> Path:
    """Return the name under which a file is written: hidden, in the same folder."""
    return path.with_name(f".{path.name}.part")


def _check(name: str, field: Field, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> None:
    alike = len(shape) == len(field.shape) and all(
        side in (-1, own) for side, own in zip(field.shape, shape, strict=True)
    )
    if str(dtype).removeprefix("torch.") != field.dtype or not alike:
        raise ValueError(
            f"Every row of a store is alike, but {name} of {where} is {str(dtype).removeprefix('torch.')} of shape "
            f"{list(shape)} and was {field.dtype} of shape {list(field.shape)} before. Resize and crop images in the "
            "dataset or in data.transform; of anything else, say that its shape differs: differ=NAME."
        )
