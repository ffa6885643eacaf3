"""Items of a dataset: which part is the image, and that image as a tensor.

An image is uint8 in [0, 255], uint16 in [0, 65535] or float in the process's ``value_range``; where that is None,
floats are latents, of any finite values. Nothing is guessed: a layout or dtype that could mean two things is refused,
with the line that says which it is.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.targets import FIELDS

_FIELDS = frozenset(FIELDS)
_CHANNELS = 4  # up to here a last axis is taken for channels at once

_ONE_IMAGE = "An item must hold one PIL image, or one tensor or array with two"


def is_image(value: Any, dimensions: int = 2) -> bool:
    """Return whether a part of an item is an image: of PIL, or a tensor or array of so many dimensions or more."""
    return value.ndim >= dimensions if isinstance(value, (Tensor, np.ndarray)) else hasattr(value, "getbands")


def name_parts(item: Any) -> dict[Any, Any]:
    """Return the parts of an item, or of a batch, by their names."""
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, tuple) and (named := getattr(item, "_asdict", None)) is not None:
        return named()
    if isinstance(item, (tuple, list)):
        return {("label" if i == 1 else f"item_{i}"): value for i, value in enumerate(item)}
    return {"item_0": item}


def take_apart(
    item: Any, image_key: str | int | None, where: str, *, batch: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Take an item apart: its image, and everything else by name.

    The second of a tuple is called label, later ones item_2, item_3, ...; dicts and named tuples have their own names.

    Arguments:
        image_key: a name, or a place in a tuple, list or named tuple; None where there is one image only.
        where: how errors call the item.
        batch: whether it is a whole batch, whose parts have one dimension more.

    Raises:
        ValueError: there is no image, or more than one and no ``image_key`` to say which; or another part has the name
            of a field that diffaug makes.
    """
    pair = type(item) is tuple and len(item) == 2 and type(item[1]) is int
    if pair and image_key is None and not batch and is_image(item[0]):
        return item[0], {"label": item[1]}  # an image and its class, by far the commonest item: spared the search
    parts = name_parts(item)
    if image_key is None:
        images = [name for name, value in parts.items() if is_image(value, 3 if batch else 2)]
        if len(images) != 1:
            found = "no image" if not images else f"{len(images)} images"
            raise ValueError(
                f"{where} holds {found}: {_listed(parts)}. "
                + ("It must hold one tensor of shape (B, ...) with three" if batch else _ONE_IMAGE)
                + " dimensions or more; data.image_key says which part to noise where there are several, or where it "
                "has fewer; data.images says so too, and which others keep in step with it."
            )
        key = images[0]
    else:
        key = find_part(item, parts, image_key, "data.image_key", where)
    image = parts.pop(key)
    if not _FIELDS.isdisjoint(parts):
        clash = sorted(_FIELDS.intersection(parts))
        raise ValueError(
            f"{where} has parts named {clash}, but diffaug makes fields of these names. Rename them in the dataset, "
            "or leave them out of its items."
        )
    return image, parts if isinstance(item, tuple) else {str(name): value for name, value in parts.items()}


def find_part(item: Any, parts: Mapping[Any, Any], key: str | int, option: str, where: str) -> Any:
    """Return the name of the part that an option says: by its name, or its place in a tuple, list or named tuple.

    Raises:
        ValueError: there is no such part.
    """
    if isinstance(key, int) and not isinstance(item, Mapping) and 0 <= key < len(parts):
        return list(parts)[key]
    if key not in parts:
        raise ValueError(
            f"{option}={key!r} is not in {where}, which holds {_listed(parts)}: data.images names parts so too."
        )
    return key


def _listed(parts: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} ({describe_value(value)})" for name, value in parts.items()) or "nothing"


def describe_value(value: Any) -> str:
    """Describe a value in a few words, for errors."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if hasattr(value, "getbands"):
        return f"PIL image {value.size[0]}x{value.size[1]} of mode {value.mode}"
    return type(value).__name__


def as_tensor(image: Any, where: str, value_range: tuple[float, float] | None = (-1.0, 1.0)) -> Tensor:
    """Convert an image to a tensor: uint8, or float in ``value_range``.

    - A tensor keeps its shape.
    - A numpy array (H, W) or (H, W, C) becomes (C, H, W).
    - A PIL image becomes (C, H, W): its own channels where it is L, LA, RGB, RGBA or F, one where it is 1-bit or
      16-bit, and RGB where it is a palette (over white where that has transparency), CMYK, YCbCr or HSV.
    - uint16 is mapped from [0, 65535] to ``value_range``, or to [-1, 1] where that is None, as float32.

    Raises:
        ValueError: it is none of these, its layout is in doubt, or its dtype does not say what its range is.
    """
    if type(image) is Tensor and image.dtype is torch.uint8 and image.ndim and image.numel():
        return image
    if isinstance(image, np.ndarray):
        _check_layout(image, where)
        image = _from_array(image, where)
    elif not isinstance(image, Tensor) and hasattr(image, "getbands"):
        image = _from_array(_array(image), where)
    if not isinstance(image, Tensor):
        raise ValueError(f"{where} must be a PIL image, a tensor or a numpy array, but is {describe_value(image)}.")
    if type(image) is not Tensor:
        image = image.as_subclass(Tensor)  # torchvision's tv_tensors: plain from here on
    if not image.numel() or not image.ndim:
        raise ValueError(f"{where} is empty or a single number: {describe_value(image)}.")
    if image.dtype == torch.uint16:
        low, high = value_range or (-1.0, 1.0)
        return image.to(torch.float32).mul_((high - low) / 65535).add_(low)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(
            f"{where} has dtype {image.dtype}, which does not say what its range is: {describe_value(image)}. An "
            "image must be uint8 in [0, 255], uint16 in [0, 65535] or float in process.value_range. Convert it in the "
            "dataset or in data.transform: .to(torch.uint8) if its values are in [0, 255], .float() if they are in "
            "process.value_range (a mask of True and False too)."
        )
    return image


def as_mask(mask: Any, where: str) -> Tensor:
    """Convert a mask to a tensor of its own dtype and values: of PIL (palettes: the indices) or numpy to (C, H, W)."""
    if isinstance(mask, np.ndarray) or (not isinstance(mask, Tensor) and hasattr(mask, "getbands")):
        mask = np.asarray(mask)
        _check_layout(mask, where)
        mask = _from_array(mask, where)
    if not isinstance(mask, Tensor) or mask.ndim < 2:
        raise ValueError(
            f"{where} must be a PIL image, a tensor or a numpy array of two dimensions or more, but is "
            f"{describe_value(mask)}."
        )
    return mask.as_subclass(Tensor)


def _array(image: Any) -> np.ndarray[Any, Any]:
    """Return a PIL image's pixels, (H, W) or (H, W, C)."""
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "LA", "RGB", "RGBA", "F", "I") and not image.mode.startswith("I;16"):
        image = (over_white(image) if image.has_transparency_data else image).convert("RGB")
    pixels = np.asarray(image)
    return pixels.astype(np.uint16) if image.mode.startswith("I;16") else pixels


def over_white(image: Any) -> Any:
    """Lay a PIL image that has transparent pixels over a white background, as RGB."""
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _check_layout(array: np.ndarray[Any, Any], where: str) -> None:
    if array.ndim == 2:
        return
    height, width, channels = array.shape if array.ndim == 3 else (0, 0, 0)
    # (C, H, W) would show as few rows, or as more channels than a picture has pixels a side.
    few_rows = height <= _CHANNELS < width
    if array.ndim != 3 or few_rows or (channels > _CHANNELS and channels >= min(height, width)):
        raise ValueError(
            f"{where} is a numpy array of shape {array.shape}; an array must be (H, W) or (H, W, C), and this one may "
            "be neither. Yield a tensor, whose layout is taken as it is: torch.from_numpy(array) if it is (C, H, W) "
            "or has no height and width, torch.from_numpy(array).permute(2, 0, 1) if it is (H, W, C)."
        )


def _from_array(array: np.ndarray[Any, Any], where: str) -> Tensor:
    array = (array[:, :, None] if array.ndim == 2 else array).transpose(2, 0, 1)
    try:
        return torch.from_numpy(np.array(array, order="C", dtype=array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise ValueError(
            f"{where} is a numpy array of dtype {array.dtype}; an image must be uint8 in [0, 255], uint16 in "
            "[0, 65535] or float in process.value_range."
        ) from error


def check_range(
    image: Tensor,
    value_range: tuple[float, float] | None,
    where: str,
    key: str = "process.value_range",
    remedy: str = "Set process.value_range to the range of your float images (torchvision's ToTensor gives [0, 1]), or "
    "yield uint8 images. For latents set process.value_range=null: they are noised as they are.",
) -> None:
    """Refuse a float image outside its stated range, by more than rounding; NaN, and what is infinite, always."""
    seen_low, seen_high = (float(seen) for seen in torch.aminmax(image.detach()))
    if not (math.isfinite(seen_low) and math.isfinite(seen_high)):
        raise ValueError(
            f"{where} holds values that are nan or infinite: {int((~torch.isfinite(image)).sum())} of "
            f"{image.numel()}. Mend the dataset (latents that were encoded in float16 may be beyond its range)."
        )
    low, high = value_range or (-math.inf, math.inf)
    slack = 1e-3 * (high - low)
    if not low - slack <= seen_low <= seen_high <= high + slack:
        raise ValueError(
            f"{where} spans [{seen_low:.4g}, {seen_high:.4g}], outside {key}=[{low:g}, {high:g}]. {remedy}"
        )
