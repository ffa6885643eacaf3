"""A batch as the user's own code made it, with the places of its samples beside it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffaug.data.batch import Place, overlaps_copies
from diffaug.randomness.user_code import KeyedCalls, mixed

_ROWS = 256
_COLLATE = 2**63  # beside the numbers of epochs: what a collate function draws is no sample's


class Places(NamedTuple):
    """The places of a batch's samples: int64, shape (B, 4), the columns of `Place`; the first on the host too."""

    rows: Tensor
    first: Place

    def __reduce__(self) -> tuple[Any, ...]:
        return _sent, (self.rows.numpy(force=True), self.first)  # as bytes: see `ImageBatch`


def _sent(rows: NDArray[np.int64], first: Place) -> Places:
    return Places(torch.from_numpy(rows), first)


class Placed:
    """A batch of the user's, and the `Places` of its samples: one entry for each of the batch's sub-batches, None
    where these are not known. Not a tuple, so that no precision plugin and no transfer looks inside."""

    def __init__(self, batch: Any, places: list[Places | None]) -> None:
        self.batch, self.places = batch, places

    def to_device(self, device: torch.device) -> list[Places | None]:
        """The places, on a device."""
        without_waiting = overlaps_copies(device)
        return [p and Places(p.rows.to(device, non_blocking=without_waiting), p.first) for p in self.places]

    def pin_memory(self, *_: Any) -> "Placed":
        batch = self.batch
        pinned = batch.pin_memory() if hasattr(batch, "pin_memory") else tree_map_only(Tensor, Tensor.pin_memory, batch)
        return Placed(pinned, [p and Places(p.rows.pin_memory(), p.first) for p in self.places])


class PlacedCollate:
    """The user's collate function for items with places: what it draws is a function of the first sample's place.

    Arguments:
        collate: the user's.
        domain: what its draws are keyed by, beside the place.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], domain: tuple[int, ...]) -> None:
        self.collate, self.domain = collate, domain
        self._keyed = KeyedCalls()
        self._keyed.drawn = (True, True, True)  # never call it twice: it may change the items

    def __call__(self, samples: list[tuple[Any, Place]]) -> Placed:
        items, places = [item for item, _ in samples], [place for _, place in samples]
        seed = mixed(*self.domain, _COLLATE, *places[0])
        (batch,) = self._keyed(self.collate, [items], lambda: [seed])
        rows = torch.from_numpy(np.array(places, np.int64).reshape(-1, 4))
        return Placed(batch, [Places(rows, places[0])])


def batch_place(count: int, *, epoch: int, rank: int, ranks: int) -> Place:
    """The place of a batch's first sample where only the batch's number is known: unlike any other's of the epoch."""
    start = (count * ranks + rank) * _ROWS
    return Place(start, 0, start, epoch)


def rows_from(first: Place, length: int, device: torch.device) -> Places:
    """The places of a batch's rows, from the first one on; rows past 256 count as further views."""
    row = torch.arange(length, device=device)
    index, view = first.index + row % _ROWS, row // _ROWS
    return Places(torch.stack([index, view, first.position + row, torch.full_like(row, first.epoch)], 1), first)


def leaves(tree: Any) -> list[Any]:
    """The loaders, or the sub-batches, of a nest of dicts, lists and tuples, in order."""
    if isinstance(tree, Mapping):
        return [leaf for part in tree.values() for leaf in leaves(part)]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
    return [tree]


def mapped(function: Callable[[Any], Any], tree: Any, values: Any, where: str) -> Any:
    """``function`` of the parts of ``values`` that stand where ``tree`` has its leaves.

    Raises:
        ValueError: they are not nested alike.
    """
    if isinstance(tree, Mapping):
        if not isinstance(values, Mapping) or set(tree) != set(values):
            raise _unlike(tree, values, where)
        return {name: mapped(function, part, values[name], f"{where}[{name!r}]") for name, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        if not isinstance(values, (list, tuple)) or len(tree) != len(values):
            raise _unlike(tree, values, where)
        return [
            mapped(function, part, value, f"{where}[{i}]")
            for i, (part, value) in enumerate(zip(tree, values, strict=True))
        ]
    return function(values)


def _unlike(tree: Any, values: Any, where: str) -> ValueError:
    def parts(value: Any) -> Any:
        if isinstance(value, Mapping):
            return list(value)
        return f"{len(value)} parts" if isinstance(value, (list, tuple)) else type(value).__name__

    return ValueError(
        f"{where} must be nested as its loaders are, {parts(tree)}, but it is {parts(values)}: the wrapped "
        "DataModule's hooks must keep the sub-batches of several loaders apart, so that each gets its own noise."
    )


def device_of(batch: Any) -> torch.device:
    """The device of the first tensor in a batch."""
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")
