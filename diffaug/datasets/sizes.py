"""The sizes of a folder's images, read from the files' headers, and kept in one file beside them.

A file is read again where its length or its time of change is another than when it was last read; everything else
comes from the kept file, by arrays: a folder of a million images is then known in a few seconds.
"""

import logging
import os
import time
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from diffaug.datasets.atomic_file import open_whole
from diffaug.datasets.broken import reason

NAME = ".diffaug-sizes.npz"
"""In the folder that the files lie in; hidden, so that it is no file of the dataset."""

_log = logging.getLogger("diffaug")
_ORIENTATION = 0x0112  # EXIF's tag
_SWAPPED = (5, 6, 7, 8)  # its values that exchange height and width
_TIFF_SIZE = (256, 257)  # the tags of width and height
_LONG = 2.0  # seconds after which progress is shown
_FORMAT = 1
_unkept: dict[str, tuple[bytes, NDArray[np.int64]]] = {}
"""What could not be written, by the file that it was for: each split lists the folder anew."""


def read_size(path: str) -> tuple[int, int]:
    """Read the height and width of an image, turned as its EXIF orientation says, from its file's header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of files that it reads all the same
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", None)
            # A TIFF's size has been turned already, or not, by Pillow's release: its tags say how it is stored.
            width, height = image.size if tags is None else (tags[tag] for tag in _TIFF_SIZE)
            if image.format == "PNG" and _says_more_after_its_pixels(image.fp):
                exif = image.getexif()  # reads it all
            else:
                exif = Image.Image.getexif(image)  # not PNG's own, which reads all the pixels to look behind them
            return (width, height) if exif.get(_ORIENTATION) in _SWAPPED else (height, width)


def _try(path: str, problems: list[str]) -> tuple[int, int]:
    try:
        return read_size(path)
    except Exception as error:  # what a broken file makes Pillow raise is of many kinds
        problems.append(f"{path} {reason(error)}")
        return 0, 0


def _says_more_after_its_pixels(file: Any) -> bool:
    """Return whether a PNG has a chunk behind its pixels that could tell an orientation; the chunks are skipped over.

    The file stands at the first of the pixels' chunks, behind its length and name, and is put back there.
    """
    here = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            if head[4:] in (b"eXIf", b"iTXt", b"zTXt") and file.tell() > here:
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(here)


def read_sizes(folder: Path, names: Sequence[str], remedy: str) -> NDArray[np.int64]:
    """Return the height and width of each file, shape (N, 2): as they are kept, or else from the files' headers.

    What is read is kept in the folder, in the file `NAME`, written whole or not at all; where the folder may not be
    written to, that is said in the log, and every run reads the headers anew.

    Arguments:
        folder: what the names are within.
        names: the files' paths within it, with slashes.
        remedy: what an error says at its end.

    Raises:
        ValueError: files whose headers cannot be read.
    """
    paths = [f"{folder}/{name}" for name in names]
    status = np.fromiter((n for path in paths for n in _status(path)), np.int64, 2 * len(paths)).reshape(-1, 2)
    path, listed = folder / NAME, "\0".join(names).encode(errors="surrogateescape")
    known = _load(path) or _unkept.get(str(path))
    rows = _rows_of(known, listed, names)
    stale = np.flatnonzero((rows[:, :2] != status).any(1))
    if not len(stale):
        return rows[:, 2:]
    began = time.perf_counter()
    problems: list[str] = []
    for index in tqdm(stale.tolist(), desc="Reading sizes", unit=" images", delay=_LONG, disable=None):
        rows[index, 2:] = _try(paths[index], problems)
    if problems:
        raise ValueError(
            f"The size of {len(problems)} of {len(paths)} images cannot be read. The first: {problems[0]} {remedy}"
        )
    rows[stale, :2] = status[stale]
    seconds = time.perf_counter() - began
    try:
        _save(path, listed, rows)
        where = f"kept in {path}"
    except OSError as error:
        _unkept[str(path)] = listed, rows
        where = f"not kept for the next run, as {path} cannot be written: {error.strerror}"
    _log.info("the sizes of %d images read from their headers in %.1f s; %s", len(stale), seconds, where)
    return rows[:, 2:]


def _status(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere, say: said when it is read
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _rows_of(known: tuple[bytes, NDArray[np.int64]] | None, listed: bytes, names: Sequence[str]) -> NDArray[np.int64]:
    """Return (length, time, height, width) of each file, shape (N, 4), as known; -2 where it is not."""
    if known is not None and known[0] == listed:
        return known[1].copy()
    rows = np.full((len(names), 4), -2, np.int64)
    if known is not None:
        place = {name: index for index, name in enumerate(known[0].decode(errors="surrogateescape").split("\0"))}
        pairs = np.array([(i, place[name]) for i, name in enumerate(names) if name in place], np.int64).reshape(-1, 2)
        rows[pairs[:, 0]] = known[1][pairs[:, 1]]
    return rows


def _load(path: Path) -> tuple[bytes, NDArray[np.int64]] | None:
    """Read what is kept: the names, joined by zeros, and their rows; None where there is nothing, or something else."""
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as kept:
            names, rows = kept["names"].tobytes(), kept["rows"]
            fits = kept["format"] == _FORMAT and rows.dtype == np.int64 and rows.shape == (names.count(b"\0") + 1, 4)
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy raises five kinds for a damaged file
        _log.warning("%s is left aside, and written anew: %s", path, error)
        return None
    return (names, rows) if fits else None


def _save(path: Path, names: bytes, rows: NDArray[np.int64]) -> None:
    with open_whole(path) as file:  # other ranks may be at it too
        np.savez(file, format=np.int64(_FORMAT), names=np.frombuffer(names, np.uint8), rows=rows)
