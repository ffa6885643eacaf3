"""A batch on its way from the loader to the accelerator: its samples' places, and how items are joined into one."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from diffaug.randomness.host_to_device import overlaps_copies
from diffaug.randomness.user_code import call_keyed, mix_key

_COLLATE = 2**63  # beside the numbers of epochs: what a collate function draws is no sample's


class Place(NamedTuple):
    """Where a sample stands: what a sampler yields and a batch carries, so that its draws need nothing else.

    Attributes:
        index: the item of the dataset.
        view: how often that item has come before in this epoch, counted over all ranks.
        position: the place in the epoch's global order.
        epoch: the epoch; 0 in evaluation. Where samples come in laps (`diffaug.order.laps`), the lap.
        dataset: the number of the set within a mixture.
        order: the epoch of the order; -1 is ``epoch``.
        handed: how many samples the run has handed out before this one, an epoch counted as long as its order, also
            where the Trainer cuts it short; -1 where that is not known (a stream), and in evaluation.
    """

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - tuple.index is not needed
    view: int
    position: int
    epoch: int
    dataset: int = 0
    order: int = -1
    handed: int = -1


_COLUMNS = len(Place._fields)
Sample = tuple[Tensor, Place, dict[str, Any]]
_ROWS = 256


class Places(NamedTuple):
    """The places of a batch's samples: on the host, always.

    What a batch has few of, times, coefficients and coins, is drawn there, and crosses to the images at once: see
    `diffaug.process.ForwardProcess.forward`.

    Attributes:
        rows: int64, shape (B, 7): the columns of `Place`.
        first: the first of them: what keys the draws of a whole batch.
    """

    rows: Tensor
    first: Place

    @classmethod
    def of(cls, places: Sequence[Place]) -> "Places":
        """Gather the places of these samples."""
        rows = np.fromiter(chain.from_iterable(places), np.int64, _COLUMNS * len(places))
        return cls(torch.from_numpy(rows.reshape(len(places), _COLUMNS)), places[0])

    @classmethod
    def count_from(cls, first: Place, length: int) -> "Places":
        """Count places from a first one on, where rows have none of their own; past 256 they count as views."""
        row = torch.arange(length, device="cpu")
        rows = torch.tensor(first, device="cpu").repeat(length, 1)
        rows[:, 0] += row % _ROWS
        rows[:, 1] = row // _ROWS
        rows[:, 2] += row
        return cls(rows, first)

    def __reduce__(self) -> tuple[Any, ...]:
        # From a worker every tensor comes over a connection of its own, at the cost of reading some thirty small
        # images. These few numbers come as bytes.
        return _receive, (self.rows.numpy(), self.first)


def _receive(rows: NDArray[np.int64], first: Place) -> Places:
    return Places(torch.from_numpy(rows), first)


def first_place(count: int, *, epoch: int, rank: int, ranks: int) -> Place:
    """Return the place of a batch's first sample where only the batch's number is known; no other has it."""
    start = (count * ranks + rank) * _ROWS
    return Place(start, 0, start, epoch)


class Batch:
    """A batch on its way to the accelerator. Not a tuple, so that no precision plugin rounds its images on the way.

    Attributes:
        content: as the loader's collate function made it; of diffaug's own loaders (images, the rest by name).
        places: of its samples; one entry for each of the sub-batches that several loaders side by side make, None
            where a loader's samples have no places.
    """

    __slots__ = ("content", "places")

    def __init__(self, content: Any, places: list[Places | None]) -> None:
        self.content, self.places = content, places

    @property
    def image(self) -> Tensor:
        """The images of a batch of diffaug's own loaders: uint8 or float, shape (B, *)."""
        return self.content[0]

    @property
    def extra(self) -> dict[str, Any]:
        """What else such a batch holds, by name."""
        return self.content[1]

    def __getitem__(self, index: Any) -> Any:
        # Python asks for this when it unpacks or goes through a batch, too.
        raise TypeError(
            "This batch is as the loader gives it, images before the noise. A Trainer's training_step gets x_t, "
            "epsilon, t; without a Trainer: x_t, epsilon, t = data.noise(batch). (batch.image has the images.)"
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Move its content: without waiting for the work that is queued on the device, where that is safe."""
        # Lightning passes non_blocking to tensors only: without it every batch would wait.
        options = {"device": device, "non_blocking": overlaps_copies(device)}
        return Batch(tree_map_only(Tensor, lambda tensor: tensor.to(**options), self.content), self.places)

    def pin_memory(self, *_: Any) -> "Batch":
        content = self.content
        pinned = (
            content.pin_memory()
            if hasattr(content, "pin_memory")
            else tree_map_only(Tensor, Tensor.pin_memory, content)
        )
        return Batch(pinned, self.places)


def collate(items: list[Sample]) -> Batch:
    """Join items into a `Batch`.

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
    # default_collate, in a worker, stacks straight into memory that the main process sees.
    images = default_collate([image for image, _, _ in items])
    return Batch((images, joined), [Places.of([place for _, place, _ in items])])


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
    if all(isinstance(value, Tensor) and value.ndim for value in values):
        lengths, rest = {len(value) for value in values}, {(value.shape[1:], value.dtype) for value in values}
        if len(lengths) > 1 and len(rest) == 1:
            return values  # of lengths of their own, as embeddings of texts
    try:
        return default_collate(values)
    except (TypeError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"The parts {name!r} of a batch's items cannot be joined: {error}. A batch holds them as process.fields or "
            "data.images names them; a store as keep= does."
        ) from error


class PlacedCollate:
    """The user's collate function for items with places: what it draws is a function of the first sample's place.

    Arguments:
        collate: the user's.
        domain: what its draws are keyed by, beside the place.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], domain: tuple[int, ...]) -> None:
        self.collate, self.domain = collate, domain

    def __call__(self, samples: list[tuple[Any, Place]]) -> Batch:
        items, places = [item for item, _ in samples], [place for _, place in samples]
        (batch,) = call_keyed(self.collate, [items], [mix_key(*self.domain, _COLLATE, *places[0][:4])])
        return Batch(batch, [Places.of(places)])
