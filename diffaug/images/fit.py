"""An image fitted to a shape: covered by it, cropped and resized, with the same bits whatever the number of threads.

Images of 8 bits are resized by torch's integer kernel, which gives the same bits with a CPU's vector instructions and
without, and takes a quarter of the time of Pillow's. It is fast only where the channels of a pixel lie side by side.
Pillow keeps RGB in four bytes a pixel, and `_shared` lets torch read these where they lie: the copies that
``np.asarray`` makes would take half as long as the resizing.
"""

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

Size = tuple[int, int]
"""Height and width, or top and left."""


def part_of(size: Size, shape: Size) -> Size:
    """Return the height and width of the largest part of an image that has a shape's ratio, in whole pixels.

    So one of its sides is the image's own, and the other is off by up to half a pixel: that much, and no more, the
    image is stretched when this part becomes the shape. A square is exact.
    """
    (height, width), (high, wide) = size, shape
    if height * wide > width * high:
        return max((2 * width * high + wide) // (2 * wide), 1), width
    return height, max((2 * height * wide + high) // (2 * high), 1)


def middle(size: Size, part: Size) -> Size:
    """Return the top and left of a part in an image's middle; where that lies between two pixels, the lesser one."""
    return (size[0] - part[0]) // 2, (size[1] - part[1]) // 2


def fit(image: Any, shape: Size, channels: int, corner: Size | None = None) -> Tensor:
    """Return the largest part of a Pillow image that has a shape's ratio, resized to it (bicubic, antialiased).

    Arguments:
        image: of mode L or RGB, or F in [0, 255], which is resized in full depth and rounded.
        shape: the height and width of the result.
        channels: 3 for RGB, 1 for grey (ITU-R 601's luma).
        corner: the top and left of the part, whose size is `part_of`'s; None is the middle.

    Returns:
        uint8, shape (channels, *shape), contiguous.
    """
    size = (image.height, image.width)
    high, wide = part = part_of(size, shape)
    top, left = middle(size, part) if corner is None else corner
    if image.mode == "F":  # in full depth; bicubic overshoots beside edges, so: clip
        planes = _by_pillow(image, (top, left), part, shape)[None]
        planes = np.clip(np.rint(planes), 0, 255).astype(np.uint8)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")  # torch is slower at one channel than at four
        planes = _resize_bytes(_shared(rgb)[top : top + high, left : left + wide], shape)[:3]
    if len(planes) > channels:
        rgb = Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))
        planes = np.asarray(rgb.convert("L"))[None]
    elif len(planes) < channels:
        planes = np.broadcast_to(planes, (channels, *shape))
    return torch.from_numpy(np.array(planes, order="C"))  # numpy orders bytes three times as fast as torch


def fit_tensor(image: Tensor, shape: Size, corner: Size | None = None) -> Tensor:
    """Return the same of a tensor, uint8, uint16 or float, of shape (channels, height, width), of any channels.

    All but uint8 are resized as float32, come out in their own dtype, and are clipped to the part's own range, which
    bicubic interpolation oversteps beside edges.
    """
    size = (int(image.shape[1]), int(image.shape[2]))
    high, wide = part = part_of(size, shape)
    top, left = middle(size, part) if corner is None else corner
    cut = image[:, top : top + high, left : left + wide]
    if part == shape:
        return cut.contiguous()
    if image.dtype == torch.uint8:
        planes = _resize_bytes(cut.permute(1, 2, 0).numpy(), shape)
        return torch.from_numpy(np.array(planes, order="C"))
    cut = cut.to(torch.float32)
    sources = [Image.fromarray(np.ascontiguousarray(plane)) for plane in cut.numpy()]
    resized = torch.from_numpy(np.stack([_by_pillow(source, (0, 0), part, shape) for source in sources]))
    resized.clamp_(cut.min().item(), cut.max().item())
    return (resized if image.is_floating_point() else resized.round_()).to(image.dtype)


def fit_mask(mask: Tensor, shape: Size, corner: Size | None = None) -> Tensor:
    """Return the same of a mask of any dtype, shape (*, height, width): the nearest pixels, their values kept."""
    size = (int(mask.shape[-2]), int(mask.shape[-1]))
    part = part_of(size, shape)
    starts = middle(size, part) if corner is None else corner
    rows, columns = (
        start + (2 * torch.arange(new, device="cpu") + 1) * old // (2 * new)
        for start, old, new in zip(starts, part, shape, strict=True)
    )
    return mask[..., rows[:, None], columns]


def _by_pillow(image: Any, corner: Size, part: Size, shape: Size) -> NDArray[np.float32]:
    """Resize a part of an image of mode F: not by torch, which rounds floats as the CPU does."""
    (top, left), (high, wide) = corner, part
    cropped = image.crop((left, top, left + wide, top + high))
    return np.asarray(cropped.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _resize_bytes(pixels: NDArray[np.uint8], shape: Size) -> NDArray[np.uint8]:
    """Resize uint8 pixels, (H, W, C), to planes, (C, *shape)."""
    height, width, _ = pixels.shape
    pixels = np.ascontiguousarray(pixels)
    planes = pixels.reshape(1, height, width, -1).transpose(0, 3, 1, 2)  # by [None] torch takes it for planes: slower
    return interpolate(torch.from_numpy(planes), shape, mode="bicubic", antialias=True).numpy()[0]


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
