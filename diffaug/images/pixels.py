"""The pixels of a Pillow image of any mode: grey or RGB of 8 bits, or grey of more, laid over white."""

import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from diffaug.images.items import over_white

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_WHOLE = 2**20  # bytes; a larger file may hold much behind its picture, as a phone's short film


def open_image(path: str) -> Any:
    """Open an image file; a JPEG of up to 1 MiB is read in one go, not by parts: 2 to 3 % of what a photo takes."""
    if path.lower().endswith(_JPEG) and os.path.getsize(path) <= _WHOLE:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
        try:
            image = Image.open(BytesIO(content))
        except UnidentifiedImageError:
            return Image.open(path)  # whose error names the file
        image.decodermaxblock = len(content)
        return image
    return Image.open(path)


def plain(image: Any, depth: int, inverted: bool) -> Any:
    """Convert any image to L, RGB or, of more than 8 bits, F in [0, 255]; ``depth`` is its largest whole number."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep(image, 1 if image.mode == "F" else depth, inverted)
    if image.has_transparency_data:
        return over_white(image)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _from_deep(image: Any, depth: int, inverted: bool) -> Any:
    pixels = np.asarray(image).astype(np.float32)
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= depth):  # so written, NaN is refused too
        raise ValueError(
            f"its pixels are of mode {image.mode} and span [{low:g}, {high:g}], but must lie in [0, {depth}], which "
            f"becomes [0, 255]{'' if image.mode == 'F' else '; data.bits says how many bits are used'}"
        )
    if inverted:
        pixels = depth - pixels
    transparent = image.info.get("transparency")
    if transparent is not None:
        pixels[pixels == transparent] = depth
    return Image.fromarray(pixels * np.float32(255 / depth))
