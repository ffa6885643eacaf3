"""A batch on its way from the loader to the accelerator, and how items are joined into one."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate


class Place(NamedTuple):
    """Where a sample stands: what a sampler yields and a batch carries, so that its draws need nothing else.

    Attributes:
        index: the item of the dataset.
        view: how often that item has come before in this epoch, counted over all ranks.
        position: the place in the epoch's global order.
        epoch: the epoch; 0 in evaluation.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - tuple.index is not needed
    view: int
    position: int
    epoch: int


Sample = tuple[Tensor, Place, dict[str, Any]]


class ImageBatch:
    """A batch on its way to the accelerator. Not a tuple, so that no precision plugin rounds its images on the way.

    Attributes:
        image: uint8 or float, shape (B, *).
        place: int64, shape (B, 4): the columns of `Place`.
        extra: what else the dataset yields and the process's fields ask for, by name.
        first: the first sample's place, on the host: what keys the draws of a whole batch.
    """

    __slots__ = ("extra", "first", "image", "place")

    def __init__(self, image: Tensor, place: Tensor, extra: dict[str, Any], first: Place | None = None) -> None:
        self.image, self.place, self.extra = image, place, extra
        self.first = first or Place(*place[0].tolist())

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: Any) -> Any:
        # Python asks for this when it unpacks or goes through a batch, too.
        raise TypeError(
            "This batch is as the loader gives it, images before the noise. A Trainer's training_step gets x_t, "
            "epsilon, t; without a Trainer: x_t, epsilon, t = data.noise(batch). (batch.image has the images.)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # From a worker every tensor comes over a connection of its own, at the cost of reading some thirty small
        # images. The few numbers of the places come as bytes.
        return _sent, (self.image, self.place.numpy(force=True), self.extra, self.first)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "ImageBatch":
        extra = {name: function(v) if isinstance(v, Tensor) else v for name, v in self.extra.items()}
        return ImageBatch(function(self.image), function(self.place), extra, self.first)

    def to(self, target: torch.device | str | torch.dtype) -> "ImageBatch":
        # Lightning passes non_blocking to tensors only: without it every batch waits for the work already queued.
        options: dict[str, Any] = {} if isinstance(target, torch.dtype) else {"non_blocking": overlaps_copies(target)}
        return self._map(lambda tensor: tensor.to(target, **options))

    def pin_memory(self, *_: Any) -> "ImageBatch":
        return self._map(lambda tensor: tensor.pin_memory())


def overlaps_copies(device: torch.device | str) -> bool:
    """Whether a copy to this device may go on while the host works; to the CPU and to MPS, values could be read too
    early (Lightning's own rule)."""
    return torch.device(device).type not in ("cpu", "mps")


def _sent(image: Tensor, places: NDArray[np.int64], extra: dict[str, Any], first: Place) -> ImageBatch:
    return ImageBatch(image, torch.from_numpy(places), extra, first)


def collate(items: list[Sample]) -> ImageBatch:
    """Join items into an `ImageBatch`.

    Raises:
        ValueError: the images differ in shape or dtype, or an extra part cannot be joined.
    """
    first, place, extra = items[0]
    for image, other, _ in items:
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ValueError(
                f"The images of a batch must be alike, but sample {place.index} is {first.dtype} of shape "
                f"{tuple(first.shape)} and sample {other.index} is {image.dtype} of shape {tuple(image.shape)}. "
                + _remedy(first, image)
            )
    joined = {name: _joined(name, [extra[name] for _, _, extra in items]) for name in extra}
    places = np.fromiter(chain.from_iterable(place for _, place, _ in items), np.int64, 4 * len(items))
    # default_collate, in a worker, stacks straight into memory that the main process sees.
    images = default_collate([image for image, _, _ in items])
    return ImageBatch(images, torch.from_numpy(places.reshape(len(items), 4)), joined, place)


def _remedy(one: Tensor, other: Tensor) -> str:
    if one.dtype != other.dtype:
        return "Convert them to one dtype in the dataset or in data.transform."
    if one.shape[1:] == other.shape[1:]:
        return (
            "Give them the same channels: data.channels for data=image_folder, else data.transform, for example "
            "torchvision's Grayscale(3) or lambda image: image.convert('RGB')."
        )
    return (
        "Resize and crop them: data.image_size for data=image_folder, else data.transform, for example torchvision's "
        "Resize and CenterCrop."
    )


def _joined(name: str, values: list[Any]) -> Any:
    try:
        return default_collate(values)
    except (TypeError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"process.fields asks for {name!r}, but these parts of a batch's items cannot be joined: {error}"
        ) from error
