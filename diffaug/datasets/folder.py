"""A folder of image files, of any sizes and modes, as uint8 squares, or fitted to buckets.

What becomes of each kind of file:

==============================  ==========================================================================
transparent pixels              laid over white
palette, CMYK, YCbCr, 1-bit     converted to RGB or grey by Pillow; colour profiles are not applied
more than 8 bits, grey          divided by the depth: ``bits`` where it is given, or else as the file says: 65535 for
                                16 bits, 4095 for 12, 32767 for signed 16; 16-bit colour loses its low byte
float (F)                       must lie in [0, 1]
TIFF where 0 is white           inverted, whatever its bits
more than one frame             the first
EXIF orientation                applied
==============================  ==========================================================================

Nothing is clipped: a value outside these ranges is an error, as is a file that cannot be read in full. Which files are
left out is settled before training, so that an index means the same file in every epoch and on every rank:
``python -m diffaug check`` reads them all and writes a list of the broken ones, and ``on_error="skip"`` goes by it.
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

from diffaug.checks import choice, instance, integer
from diffaug.datasets import broken as broken_files
from diffaug.datasets.bucketed import describe_buckets
from diffaug.datasets.buckets import Buckets, fields, without_empty
from diffaug.datasets.sizes import read_sizes
from diffaug.images.fit import Size, fit
from diffaug.images.pixels import open_image, plain

_log = logging.getLogger("diffaug")
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".tga"),
    *(".jp2", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
_WHITE_IS_ZERO, _SIGNED = 0, 2
_SIGNED_BYTE, _TWELVE = 2**7 - 1, 2**12 - 1
_STORED = ("TIFF", "PNG")  # whose pixels come as they are stored
_MAY_TURN = ("exif", "xmp")  # where a JPEG says that it is to be turned
_LOOKED_AT = 16  # files that are looked at for their depth, or a few more
# A JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that keeps it this many times larger than the square. Against
# decoding in full, 100 photos at 64 pixels: 0.03 of 255 off on average, 1.4 for the worst photo. (At 2: 1.2 and 4.)
_LARGER = 4


class ImageFolder(Dataset[Any]):
    """The images under a folder, sorted by path, each with the number of its top subfolder as label.

    Items are (image, label): uint8, shape (channels, image_size, image_size), in [0, 255], and an int; files that lie
    in the folder itself have a class of their own, the last, so that they move no other label. The largest square in
    the middle is cut out, by whole pixels, and resized (bicubic, antialiased), up as well as down. Hidden files and
    folders are left out; links are followed.

    With ``buckets`` it is the largest part of the ratio of the image's bucket, shape (channels, height, width), and
    items are dicts, with ``original_size``, ``crop`` and ``target_size`` beside image and label
    (`diffaug.datasets.buckets.fields`). The sizes are read from the files' headers before, and kept in the folder
    (`diffaug.datasets.sizes`).

    Arguments:
        root: the folder.
        image_size: the side of the squares, in pixels; or None, and
        buckets: the shapes instead.
        channels: 3 for RGB, 1 for grey.
        bits: how many bits of a grey pixel are used, in files that have room for more than 8: 12 for a camera's 12 bits
            stored in 16. None takes all the file's.
        on_error: what becomes of broken files: "raise" refuses them when it is their turn; "skip" leaves out those on
            the list, and refuses others.
        broken_list: the file of that list; None is `diffaug.datasets.broken.NAME` in the folder.

    Attributes:
        paths: the files, str.
        names: their paths within the folder, with slashes.
        labels: the class of each.
        classes: the names of the top subfolders, sorted; last, "" for the folder itself where files lie in it. What is
            skipped counts, so that labels stay.
        sizes: with buckets, height and width of each, int64, shape (N, 2), turned as EXIF orientation says;
        bucket_of: the number of its bucket, int64, shape (N,);
        bucket_shapes: (height, width) of each bucket.

    Raises:
        FileNotFoundError: there is no such folder, no image in it, or no list to skip by.
        ValueError: an option that cannot be; an image that fits no bucket, or whose size cannot be read; on reading, a
            file that cannot be read, named with its index.
    """

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        *,
        buckets: Buckets | None = None,
        channels: int = 3,
        bits: int | None = None,
        on_error: str = "raise",
        broken_list: str | None = None,
    ) -> None:
        if (image_size is None) == (buckets is None):
            raise ValueError(f"ImageFolder wants image_size or buckets, and not both, but got {image_size}, {buckets}.")
        self.image_size = None if image_size is None else integer("data.image_size", image_size, 1)
        self.buckets = None if buckets is None else instance("data.buckets", buckets, Buckets, "a diffaug.Buckets")
        self.channels = choice("data.channels", channels, (1, 3))
        self.bits = None if bits is None else integer("data.bits", bits, 1, 16)
        self.on_error = choice("data.on_error", on_error, broken_files.ON_ERROR)
        self.root, folder = root, Path(root).expanduser()
        self.broken_list = folder / broken_files.NAME if broken_list is None else Path(broken_list).expanduser()
        self._check = broken_files.command(root=root, bits=bits, broken_list=broken_list)
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
        self.classes = sorted({_top(parts) for parts in found}, key=lambda top: (not top, top))
        numbers = {name: number for number, name in enumerate(self.classes)}
        if on_error == "skip":
            found = self._without_broken(found)
        self.paths = [os.path.join(folder, *parts) for parts in found]  # pathlib's way takes ten times as long
        self.names = ["/".join(parts) for parts in found]
        self.labels = [numbers[_top(parts)] for parts in found]
        if self.buckets is not None:
            self.sizes = read_sizes(folder, self.names, self._remedy())
            self.bucket_of, self.bucket_shapes = self.buckets.assign(self.sizes, self.paths.__getitem__)

    def only(self, indices: Sequence[int]) -> "ImageFolder":
        """Return the same folder with these images only, numbered anew; each keeps its label and bucket's shape."""
        part = copy(self)
        if self.buckets is not None:
            chosen = np.asarray(indices, np.int64)
            part.sizes = self.sizes[chosen]
            part.bucket_of, part.bucket_shapes = without_empty(self.bucket_of[chosen], self.bucket_shapes)
        part.paths = [self.paths[index] for index in indices]
        part.names = [self.names[index] for index in indices]
        part.labels = [self.labels[index] for index in indices]
        return part

    def recipe(self) -> dict[str, Any]:
        """Return what a resume compares: the names of the files, as a digest, and the classes."""
        names = "\n".join(self.names).encode(errors="surrogateescape")
        return {
            "files": hashlib.blake2b(names, digest_size=16).hexdigest(),
            "classes": self.classes,
            "image_size": self.image_size,
            "channels": self.channels,
            "bits": self.bits,
            **(describe_buckets(self.buckets, self.bucket_of) if self.buckets is not None else {}),
        }

    def _without_broken(self, found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        broken = broken_files.read(self.broken_list, self._check)
        kept = [parts for parts in found if "/".join(parts) not in broken]
        if not kept:
            raise ValueError(f"All {len(found)} images of data.root={self.root!r} are broken, says {self.broken_list}.")
        _say_once(f"{self.root}: {len(found) - len(kept)} broken files are left out, as {self.broken_list} says")
        return kept

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        path = self.paths[index]
        try:
            image, said = self._read(index)
        except Exception as error:  # what a broken file makes Pillow raise is of many kinds
            raise ValueError(f"Sample {index}, {path}, {broken_files.reason(error)} {self._remedy()}") from error
        return {"image": image, "label": self.labels[index], **said} if said else (image, self.labels[index])

    def _remedy(self) -> str:
        if self.on_error == "skip":
            return f"It is not on the list of broken files, {self.broken_list}; this makes the list anew: {self._check}"
        return (
            "Remove or replace the file. To leave out all that are broken: data.on_error=skip, once this has "
            f"listed them: {self._check}"
        )

    def problem(self, index: int) -> tuple[str, bool] | None:
        """Say what is wrong with a file, and whether that is lasting; None if nothing is."""
        try:
            self._read(index)
        except Exception as error:
            return broken_files.reason(error), broken_files.is_lasting(error)
        return None

    def _read(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Read one image, and what there is to say of it where it is fitted to a bucket."""
        with open_image(self.paths[index]) as image:
            if self.buckets is None:
                side = self.image_size or 1
                return fit(self._upright(image, (side, side)), (side, side), self.channels), {}
            shape, size = self.bucket_shapes[self.bucket_of[index]], tuple(self.sizes[index].tolist())
            turned, stored = image.size != size[::-1], sorted(image.size)
            upright = self._upright(image, shape[::-1] if turned else shape)
            if stored != sorted(size) or (upright.height - upright.width) * (size[0] - size[1]) < 0:
                raise ValueError(f"it was {size[0]} x {size[1]} (height x width) when the folder was looked through")
            placed = self.buckets.place((upright.height, upright.width), shape)
            pixels = fit(upright, shape, self.channels, placed.corner)
            return pixels.flip(-1) if placed.flipped else pixels, fields(size, placed.crop, shape)

    def _upright(self, image: Any, shape: Size) -> Any:
        """Read a file's pixels, at least several times as many as of this shape, which is not turned yet."""
        image.draft(None, (_LARGER * shape[1], _LARGER * shape[0]))  # does nothing to other files than JPEG
        depth, inverted = self._depth(image)
        if image.format != "JPEG" or not image.info.keys().isdisjoint(_MAY_TURN):  # to look takes 2 % of a JPEG's time
            ImageOps.exif_transpose(image, in_place=True)
        if depth == _SIGNED_BYTE and image.mode == "L":  # Pillow reads these bytes as if they had no sign
            image = Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32))
        return plain(image, depth, inverted)

    def _depth(self, image: Any) -> tuple[int, bool]:
        """Return the largest whole number that a file's pixels may be, and whether 0 is white."""
        tags = getattr(image, "tag_v2", {})  # a TIFF's; what other formats hold, Pillow scales to all 16 bits but PNG
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0] - (tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED)
        if self.bits is not None and image.format in _STORED and image.mode != "L":
            bits = min(bits, self.bits)
        return 2 ** min(bits, 16) - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO

    def warn_of_depth(self) -> None:
        """Say in the log where 16-bit files look as if they held 12 bits or fewer: they would be nearly black.

        Some files are looked at, spread over the folder, the pixels only of those that are deep.
        """
        highest = []
        for path in self.paths[:: max(1, len(self) // _LOOKED_AT)] if self.bits is None else ():
            try:
                with Image.open(path) as image:
                    if image.mode.startswith("I") and image.format in _STORED and self._depth(image)[0] > _TWELVE:
                        highest.append(int(np.asarray(image).max()))
            except Exception:  # said when it is its turn to be read
                continue
            if highest and highest[-1] > _TWELVE:
                return
        if highest and max(highest) > 0:
            seen = max(highest)
            _say_once(
                f"{self.root}: none of {len(highest)} 16-bit files looked at has a pixel above {seen}: they are nearly "
                f"black. If they hold fewer bits, as a camera's 12, set data.bits={seen.bit_length()} or what it is; "
                "if they are dark, data.bits=16 says so.",
                logging.WARNING,
            )


def _top(parts: tuple[str, ...]) -> str:
    return parts[0] if len(parts) > 1 else ""


@cache
def _say_once(message: str, level: int = logging.INFO) -> None:  # each split lists the folder anew
    _log.log(level, message)


def _files(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, ...]]:
    """List the files under a folder, as the parts of their path. A link back to a folder above is not followed."""
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
