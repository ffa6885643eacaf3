"""Any dataset item -> an image tensor, with the sample's place.

A dataset yields what it likes: a PIL image, a tensor or a numpy array, alone, in a tuple, a dict or a named tuple.
`Images` finds the image, applies the user's transform, checks it and hands it on with its `Place`; uint8 stays uint8,
so that a quarter of the bytes cross to the accelerator.

The user's random transforms run under a random state that is seeded for each sample and put back afterwards: flips
and crops too are the same for any number of workers, after any resume.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from diffaug.noise.guard import sample_seed, untouched_random_state


class Place(NamedTuple):
    """Where a sample stands: what a sampler yields and a batch carries, so that its draws need nothing else.

    Attributes:
        index: the item of the dataset.
        view: how often that item has come before in this epoch, counted over all ranks.
        position: the place in the epoch's global order.
        epoch: the epoch; 0 in evaluation.
    """

    index: int
    view: int
    position: int
    epoch: int


class ImageBatch:
    """A batch on its way to the accelerator. Not a tuple, so that no precision plugin rounds its images on the way.

    Attributes:
        image: uint8 or float, shape (B, *).
        place: int64, shape (B, 4): the columns of `Place`.
        extra: what else the dataset yields and the process's fields ask for, by name.
    """

    __slots__ = ("extra", "image", "place")

    def __init__(self, image: Tensor, place: Tensor, extra: dict[str, Any]) -> None:
        self.image, self.place, self.extra = image, place, extra

    def __len__(self) -> int:
        return len(self.image)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ImageBatch":
        extra = {name: function(v) if isinstance(v, Tensor) else v for name, v in self.extra.items()}
        return ImageBatch(function(self.image), function(self.place), extra)

    def to(self, *args: Any, **kwargs: Any) -> "ImageBatch":
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self, *_: Any) -> "ImageBatch":
        return self._map(lambda tensor: tensor.pin_memory())


class Images(Dataset[Any]):
    """A dataset whose items are (image, place, extra), ready for `collate`.

    Arguments:
        dataset: the user's, map-style.
        transform: applied to the image as the dataset yields it.
        image_key: which part of an item is the image; None where there is only one.
        wanted: the names of the extra parts to keep.
        value_range: what float images must lie in.
        name: how error messages call the dataset, for example ``data.train``.
        check_range: whether float images are checked here (not where a device transform comes later).
        domain: what the random state of the transforms is keyed by, beside the sample's place.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        transform: Callable[[Any], Any] | None = None,
        image_key: str | int | None = None,
        wanted: Sequence[str] = (),
        value_range: tuple[float, float] = (-1.0, 1.0),
        name: str = "data.train",
        check_range: bool = True,
        domain: tuple[int, ...] = (0,),
    ) -> None:
        self.dataset, self.transform, self.image_key = dataset, transform, image_key
        self.wanted, self.value_range, self.name = tuple(wanted), value_range, name
        self.check_range, self.domain = check_range, domain

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, places: Sequence[Place]) -> list[tuple[Tensor, Place, dict[str, Any]]]:
        with untouched_random_state():
            return [self._item(place) for place in places]

    def __getitem__(self, place: Place) -> tuple[Tensor, Place, dict[str, Any]]:
        return self.__getitems__([place])[0]

    def _item(self, place: Place) -> tuple[Tensor, Place, dict[str, Any]]:
        sample_seed(*self.domain, place.epoch, place.index, place.view)
        where = f"{self.name}[{place.index}]"
        image, extra = split(self.dataset[place.index], self.image_key, where)
        if self.transform is not None:
            image = self.transform(image)
        tensor = as_tensor(image, where)
        if self.check_range and tensor.is_floating_point():
            check_range(tensor, self.value_range, where)
        missing = [name for name in self.wanted if name not in extra]
        if missing:
            has = f"beside the image {', '.join(extra)}" if extra else "nothing beside the image"
            raise ValueError(f"process.fields asks for {missing}, but {where} holds {has}.")
        return tensor, place, {name: extra[name] for name in self.wanted}


def is_image(value: Any) -> bool:
    """Whether a part of an item is an image: a PIL image, or a tensor or array with two dimensions or more."""
    return hasattr(value, "getbands") or (isinstance(value, (Tensor, np.ndarray)) and value.ndim >= 2)


def split(item: Any, image_key: str | int | None, where: str) -> tuple[Any, dict[str, Any]]:
    """Take an item apart: its image, and everything else by name.

    The second of a tuple is called label, later ones item_2, item_3, ...; dicts and named tuples have their own names.

    Raises:
        ValueError: there is no image, or more than one and no ``image_key`` to say which.
    """
    if isinstance(item, Mapping):
        parts = dict(item)
    elif isinstance(item, tuple) and hasattr(item, "_asdict"):
        parts = item._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(item, (tuple, list)):
        parts = {("label" if i == 1 else f"item_{i}"): value for i, value in enumerate(item)}
        if isinstance(image_key, int) and 0 <= image_key < len(parts):
            image_key = list(parts)[image_key]
    else:
        parts = {"item_0": item}
    described = ", ".join(f"{name} ({_describe(value)})" for name, value in parts.items())
    if image_key is not None:
        if image_key not in parts:
            raise ValueError(f"data.image_key={image_key!r} is not in {where}, which holds {described}.")
        key = image_key
    else:
        images = [name for name, value in parts.items() if is_image(value)]
        if len(images) != 1:
            found = "no image" if not images else f"{len(images)} images"
            raise ValueError(
                f"{where} holds {found}: {described}. An item must hold one PIL image, or one tensor or array with two "
                "dimensions or more; where there are several, data.image_key says which one to noise."
            )
        key = images[0]
    return parts.pop(key), {str(name): value for name, value in parts.items()}


def _describe(value: Any) -> str:
    if hasattr(value, "getbands"):
        return f"{value.mode} image {value.size[0]}x{value.size[1]}"
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, (Tensor, np.ndarray)) else ""
    return f"{type(value).__name__}{shape}"


def as_tensor(image: Any, where: str) -> Tensor:
    """A PIL image or an array (H, W) or (H, W, C) as a tensor (C, H, W); a tensor as it is.

    Raises:
        ValueError: it is none of these, its layout is in doubt, or its dtype is neither uint8 nor float.
    """
    if hasattr(image, "getbands"):
        if image.mode in ("1", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        if image.ndim == 2:
            image = image[:, :, None]
        if image.ndim != 3 or (image.shape[2] > 4 and image.shape[0] <= 4):
            raise ValueError(
                f"{where} is a numpy array of shape {image.shape}; an array must be (H, W) or (H, W, C). "
                "For another layout yield a tensor: torch.from_numpy(array) if it is (C, H, W) already."
            )
        image = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
    if not isinstance(image, Tensor):
        raise ValueError(f"{where} must be a PIL image, a tensor or a numpy array, but is {_describe(image)}.")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(
            f"{where} has dtype {image.dtype}; an image must be uint8 in [0, 255] or float in process.value_range."
        )
    return image


def check_range(image: Tensor, value_range: tuple[float, float], where: str) -> None:
    """Refuse a float image outside its stated range, by more than rounding."""
    if not image.numel():
        raise ValueError(f"{where} is empty: its shape is {tuple(image.shape)}.")
    low, high = value_range
    slack = 1e-3 * (high - low)
    seen_low, seen_high = torch.aminmax(image.detach())
    # Written so that NaN, which compares as false, is refused too.
    if not (seen_low >= low - slack and seen_high <= high + slack):
        raise ValueError(
            f"{where} spans [{seen_low:.4g}, {seen_high:.4g}], outside process.value_range=[{low:g}, {high:g}]. "
            "Set process.value_range to the range of your float images (torchvision's ToTensor gives [0, 1]), "
            "or yield uint8 images."
        )


def collate(items: list[tuple[Tensor, Place, dict[str, Any]]]) -> ImageBatch:
    """Join items into an `ImageBatch`.

    Raises:
        ValueError: the images differ in shape.
    """
    first, place, _ = items[0]
    for image, other, _ in items:
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ValueError(
                f"The images of a batch must be alike, but sample {place.index} is {first.dtype} of shape "
                f"{tuple(first.shape)} and sample {other.index} is {image.dtype} of shape {tuple(image.shape)}. Resize "
                "and crop them: data.image_size for data=image_folder, else transform=, for example torchvision's "
                "Resize and CenterCrop."
            )
    extra = default_collate([extra for _, _, extra in items]) if items[0][2] else {}
    return ImageBatch(torch.stack([image for image, _, _ in items]), torch.tensor([p for _, p, _ in items]), extra)
