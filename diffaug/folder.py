"""A folder of image files, of any sizes and modes, as uint8 squares.

What becomes of each kind of file:

==============================  ==========================================================================
transparent pixels              laid over white
palette, CMYK, YCbCr, 1-bit     converted to RGB or grey by Pillow; colour profiles are not applied
16-bit and 12-bit grey          divided by the depth, 65535 or 4095; 16-bit colour loses its low byte
float (F)                       must lie in [0, 1]
more than one frame             the first
EXIF orientation                applied
==============================  ==========================================================================

Nothing is clipped: a value outside these ranges is an error, as is a file that cannot be read in full.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from diffaug.checks import choice, integer
from diffaug.items import as_tensor, over_white

_log = logging.getLogger("diffaug")
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".tga"),
    *(".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
_BITS_PER_SAMPLE = 258  # TIFF's tag
_MODES = {1: "L", 3: "RGB"}
# A JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that keeps it this many times larger than the square. Against
# decoding in full, 100 photos at 64 pixels: 0.03 of 255 off on average, 1.4 for the worst photo. (At 2: 1.2 and 4.)
_LARGER = 4


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images under a folder, sorted by path, each with the number of its top subfolder as label.

    Items are (image, label): uint8, shape (channels, image_size, image_size), in [0, 255], and an int; files that lie
    in the folder itself have a class of their own, the last, so that they move no other label. The largest square in
    the middle is cut out and resized (bicubic, antialiased), up as well as down. Hidden files and folders are left out;
    links are followed.

    Arguments:
        root: the folder.
        image_size: the side of the squares, in pixels.
        channels: 3 for RGB, 1 for grey.

    Attributes:
        paths: the files, str.
        names: their paths within the folder, with slashes.
        labels: the class of each.
        classes: the names of the top subfolders, sorted; last, "" for the folder itself where files lie in it.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
        ValueError: a size or channels that cannot be; on reading, a file that cannot be read, named with its index.
    """

    def __init__(self, root: str, image_size: int, *, channels: int = 3) -> None:
        self.image_size = integer("data.image_size", image_size, 1)
        self.channels = choice("data.channels", channels, _MODES)
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(f"data.root={root!r} is not a folder (looked for {folder.resolve()}).")
        files = sorted(_files(folder, ()))
        found = [parts for parts in files if parts[-1].lower().endswith(_ENDINGS)]
        others = Counter(os.path.splitext(parts[-1])[1].lower() or "no ending" for parts in files)
        others = {ending: n for ending, n in sorted(others.items()) if ending not in _ENDINGS}
        if not found:
            seen = f"it holds {', '.join(others)}" if others else "it is empty"
            raise FileNotFoundError(
                f"data.root={root!r} holds no images: no file under {folder.resolve()} ends in one of "
                f"{', '.join(_ENDINGS)} ({seen})."
            )
        if others:
            left_out = ", ".join(f"{n} {ending}" for ending, n in others.items())
            _say_once(f"{root}: {len(found)} images; files of other kinds are left out: {left_out}")
        self.paths = [str(folder.joinpath(*parts)) for parts in found]
        self.names = ["/".join(parts) for parts in found]
        tops = [parts[0] if len(parts) > 1 else "" for parts in found]
        self.classes = sorted(set(tops), key=lambda top: (not top, top))
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[top] for top in tops]

    def only(self, indices: Sequence[int]) -> "ImageFolder":
        """The same with these images only, numbered anew; the classes stay."""
        part = copy(self)
        part.paths = [self.paths[index] for index in indices]
        part.names = [self.names[index] for index in indices]
        part.labels = [self.labels[index] for index in indices]
        return part

    def recipe(self) -> dict[str, Any]:
        """What a resume compares: the names of the files, as a digest, and the classes."""
        names = "\n".join(self.names).encode(errors="surrogateescape")
        return {"files": hashlib.blake2b(names, digest_size=16).hexdigest(), "classes": self.classes}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                square = self._square(image)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"Sample {index}, {path}, is suspiciously large: {error} Remove it or make it smaller; if it is right, "
                "raise PIL.Image.MAX_IMAGE_PIXELS."
            ) from error
        except Exception as error:  # what a broken file makes Pillow raise is of many kinds
            raise ValueError(
                f"Sample {index}, {path}, cannot be read: {error} ({type(error).__name__}). Remove or replace the file."
            ) from error
        return as_tensor(square, path), self.labels[index]

    def _square(self, image: Any) -> Any:
        size = self.image_size
        image.draft(None, (_LARGER * size, _LARGER * size))  # does nothing to other files than JPEG
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
        ImageOps.exif_transpose(image, in_place=True)
        image = _plain(image, depth=2 ** min(bits, 16) - 1)
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        if image.mode == "F":  # rounded; bicubic overshoots beside edges, in 8 bits too, where Pillow cuts it off
            image = Image.fromarray(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8))
        return image.convert(_MODES[self.channels])


@cache
def _say_once(message: str) -> None:  # each split lists the folder anew
    _log.info(message)


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, ...]]:
    """The files under a folder, as the parts of their path. A link back to a folder above is not followed."""
    status = folder.stat()
    here = status.st_dev, status.st_ino
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                for parts in _files(folder / entry.name, (*above, here)):
                    yield (entry.name, *parts)
            else:
                yield (entry.name,)


def _plain(image: Any, depth: int) -> Any:
    """Any image as L, RGB or, where it has more than 8 bits, F in [0, 255]. ``depth`` is whole numbers' largest."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image, 1 if image.mode == "F" else depth)
    if image.has_transparency_data:
        return over_white(image)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _from_deep(image: Any, depth: int) -> Any:
    pixels = np.asarray(image).astype(np.float32)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= depth):  # so written, NaN is refused too
        raise ValueError(
            f"its pixels are of mode {image.mode} and span [{low:g}, {high:g}], but must lie in [0, {depth}], which "
            "becomes [0, 255]"
        )
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels[pixels == transparent] = depth
    return Image.fromarray(pixels * np.float32(255 / depth))
