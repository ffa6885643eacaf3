"""The middle square of a Pillow image, resized: the same bits whatever the number of threads.

Images of 8 bits are resized by torch's integer kernel, which gives the same bits with a CPU's vector instructions and
without, and takes a quarter of the time of Pillow's. It is fast only where the channels of a pixel lie side by side.
Pillow keeps RGB in four bytes a pixel, and `_shared` lets torch read these where they lie: the copies that
``np.asarray`` makes would take half as long as the resizing.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


def middle_square(image: Any, size: int, channels: int) -> Tensor:
    """Return the largest square in an image's middle, of whole pixels, resized (bicubic, antialiased).

    Where the middle lies between two pixels, the square is the left or upper one of two.

    Arguments:
        image: of mode L or RGB, or F in [0, 255], which is resized in full depth and rounded.
        size: the side of the result.
        channels: 3 for RGB, 1 for grey (ITU-R 601's luma).

    Returns:
        uint8, shape (channels, size, size), contiguous.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if image.mode == "F":  # by Pillow: torch rounds floats as the CPU does. Bicubic overshoots beside edges, so: clip
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
        planes = np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8)[None]
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # torch is slower at one channel than at four
        square = np.ascontiguousarray(_shared(rgb)[top : top + side, left : left + side])
        square = square.reshape(1, side, side, -1).transpose(0, 3, 1, 2)  # by [None] torch takes it for planes: slower
        resized = interpolate(torch.from_numpy(square), (size, size), mode="bicubic", antialias=True)
        planes = resized.numpy()[0, :3]
    if len(planes) > channels:
        rgb = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
        planes = np.asarray(rgb.convert("L"))[None]
    elif len(planes) < channels:
        planes = np.broadcast_to(planes, (channels, size, size))
    return torch.from_numpy(np.array(planes, order="C"))  # numpy orders bytes three times as fast as torch


class _ArrowArray(ctypes.Structure):
    """The head of Arrow's struct of this name (arrow.apache.org/docs/format/CDataInterface.html)."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Memory:
    """What numpy asks for a pointer and its shape; an array made of it keeps it, and so the image, alive."""

    def __init__(self, address: int, shape: tuple[int, ...], image: Any) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": "|u1", "version": 3}
        self.image = image


def _shared(image: Any) -> np.ndarray[Any, Any]:
    """Return an RGB image's pixels: in its own memory, shape (H, W, 4), the fourth of no meaning, where it lies in one
    piece; else (above 16 MB, or Pillow before 11.2) copied, shape (H, W, 3)."""
    try:
        _, capsule = image.__arrow_c_array__()
    except (AttributeError, ValueError):
        return np.array(image)
    array = _ArrowArray.from_address(_pointer(capsule, b"arrow_array"))  # of lists of four bytes
    address = array.children[0].contents.buffers[1]  # the first buffer says which bytes are missing: none
    return np.asarray(_Memory(address, (image.height, image.width, 4), (image, capsule)))
