"""The keys of samples: what identifies a draw, as the words of Philox's key and counter.

The layout of key and counter is part of diffaug's contract (a test holds it; changing it changes every user's run):

=========  ====================================================================================
word       bits
=========  ====================================================================================
key 0      seed, low 32
key 1      seed, high 32, xor sample index, bits 40 to 62
counter 0  block: which four numbers of the sample, 30 bits | purpose, high 2 bits, << 30
counter 1  sample index, low 32
counter 2  sample index, bits 32 to 39 | view, 20 bits, << 8 | purpose, low 4 bits, << 28
counter 3  epoch, 20 bits | stage, 2 bits, << 20 | dataset number, 10 bits, << 22
=========  ====================================================================================

Two draws of one seed share key and counter only if they agree in all of these, and Philox is a bijection: under one
seed nothing is ever drawn twice. An index below 2^40 leaves the key to the seed, as every dataset's does; beyond are
the hashes that stand for an index in a stream.
"""

from enum import IntEnum
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from diffaug.checks import choice, integer, refuse
from diffaug.randomness.host_to_device import move

_LOW_32 = 0xFFFFFFFF
_T = TypeVar("_T")

STAGES = {"train": 0, "val": 1, "test": 2, "predict": 3}
INDEX_BITS, VIEW_BITS, EPOCH_BITS, DATASET_BITS, PURPOSE_BITS = 63, 20, 20, 10, 6
COUNTED_BITS = 40  # of the index, those in the counter: all that a dataset's has
ELEMENTS_MAX = 2**32


class Purpose(IntEnum):
    """What a draw is for: one sample's time and noise never share a counter."""

    TIME = 0
    EPSILON = 1
    ORDER = 2
    LABEL_DROPOUT = 3
    DEVICE_TRANSFORM = 4
    TRAJECTORY = 5
    SECOND_TIME = 6
    OFFSET = 7
    PYRAMID = 8
    PERTURBATION = 9
    CHI_SQUARE = 10
    CANDIDATES = 11
    COVERAGE = 12
    PAIR = 13
    POSTERIOR = 14
    CONDITION = 15  # hashed into a seed: a condition's time and noise are those of another seed, TIME and EPSILON
    HOLE = 16
    SAME_TIME = 17
    PARTS = 18  # of a sample's parts together; one part's own time is TIME, at the block of its place
    CHOICE_OF_PARTS = 19


class Keys(NamedTuple):
    """The keys of B samples: what identifies each draw, packed as in the table above.

    Attributes:
        rows: int64, shape (6, B): the seed's low 32 bits; its high ones, as in the table, with the sample index's bits
            40 to 62 above them once more, where Philox does not look; the index's low 32 bits; its next 8 and the view;
            epoch, stage and dataset number; and these three of the order that the sample stands in, by which a coverage
            goes that spreads the samples of an order. They differ where samples come in laps.
    """

    rows: Tensor

    @classmethod
    def pack(
        cls,
        index: Tensor,
        *,
        seed: int = 0,
        stage: str = "train",
        epoch: int | Tensor = 0,
        view: int | Tensor = 0,
        dataset: int | Tensor = 0,
        order: int | Tensor | None = None,
    ) -> "Keys":
        """Pack what identifies B samples.

        Arguments:
            index: the sample index, int64, shape (B,), in [0, 2^63).
            seed: in [0, 2^64).
            stage: train, val, test or predict. Only train sees the epoch.
            epoch: in [0, 2^20), one number or int64 of shape (B,).
            view: which noised copy of the image within the epoch, in [0, 2^20), one number or int64 of shape (B,).
            dataset: the number of the dataset (dataloader_idx) within its stage, in [0, 2^10), likewise.
            order: the epoch of an order that several laps, or sets, share; None where the order is the epoch's own.

        Raises:
            ValueError: a value beyond its width. Tensors on an accelerator are not looked at (that would halt it).
        """
        integer("seed", seed, 0, 2**64 - 1)
        choice("stage", stage, STAGES)
        if index.dtype != torch.int64 or index.ndim != 1:
            raise refuse("index", f"{index.dtype} of shape {tuple(index.shape)}", "an int64 tensor of shape (B,)")
        _within("index", index, INDEX_BITS)
        _within("view", view, VIEW_BITS)
        _within("epoch", epoch, EPOCH_BITS)
        _within("dataset", dataset, DATASET_BITS)
        device, index, view, epoch = index.device, _to_numpy(index), _to_numpy(view), _to_numpy(epoch)
        dataset, order = _to_numpy(dataset), _to_numpy(order)
        rows: Any = np.empty((6, len(index)), np.int64) if device.type == "cpu" else index.new_empty(6, len(index))
        rows[0] = seed & _LOW_32
        rows[1] = (index >> COUNTED_BITS) * (2**32 + 1) ^ (seed >> 32)
        rows[2] = index & _LOW_32
        rows[3] = (index >> 32 & 255) + (view << 8)
        rows[4] = (STAGES[stage] << EPOCH_BITS) + (dataset << (EPOCH_BITS + 2)) + (epoch if stage == "train" else 0)
        rows[5] = rows[4] if order is None else (STAGES[stage] << EPOCH_BITS) + order
        return cls(to_tensor(rows))

    @property
    def key_0(self) -> Tensor:
        """The seed's low 32 bits, int64, shape (B,), as the five others."""
        return self.rows[0]

    @property
    def key_1(self) -> Tensor:
        """The seed's high 32 bits and the sample index's highest: of its 64 bits Philox reads the low 32."""
        return self.rows[1]

    @property
    def low(self) -> Tensor:
        """The sample index's low 32 bits."""
        return self.rows[2]

    @property
    def high(self) -> Tensor:
        """The sample index's bits 32 to 39 and the view."""
        return self.rows[3]

    @property
    def domain(self) -> Tensor:
        """Epoch, stage and dataset number."""
        return self.rows[4]

    @property
    def order(self) -> Tensor:
        """Epoch, stage and dataset number of the order."""
        return self.rows[5]

    @property
    def number(self) -> Tensor:
        """The dataset number."""
        return self.domain >> (EPOCH_BITS + 2)

    @property
    def sample(self) -> Tensor:
        """The sample index."""
        return self.low + ((self.high & 255) << 32) + (self.key_1 >> 32 << COUNTED_BITS)

    @property
    def view(self) -> Tensor:
        """The view."""
        return self.high >> 8

    def part(self, which: slice | Tensor) -> "Keys":
        """Return the keys of some samples."""
        return Keys(self.rows[:, which])

    def of_image(self) -> "Keys":
        """Return the keys of the samples' images: without view and epoch."""
        no_epoch = self.domain - (self.domain & (2**EPOCH_BITS - 1))
        return Keys(torch.stack((self.key_0, self.key_1, self.low, self.high & 255, no_epoch, self.order)))

    def shared(self, domain: Tensor) -> "Keys":
        """Return the keys that all samples of a domain share: without sample index and view.

        Arguments:
            domain: ``keys.order`` or ``keys.domain``.
        """
        nothing, seed = torch.zeros_like(self.low), (self.key_1 ^ self.key_1 >> 32) & _LOW_32
        return Keys(torch.stack((self.key_0, seed, nothing, nothing, domain, self.order)))

    def to(self, device: torch.device) -> "Keys":
        """Move the keys to a device, by one copy."""
        return Keys(*move([self.rows], device))


def _to_numpy(numbers: _T) -> _T:
    """Return a tensor on the host as numpy's array, in the same memory: with few numbers four times as fast."""
    return cast("_T", numbers.numpy()) if isinstance(numbers, Tensor) and numbers.device.type == "cpu" else numbers


def to_tensor(numbers: Any) -> Tensor:
    """Return numpy's array as a tensor, in the same memory; a tensor as it is."""
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType]


def _within(name: str, value: int | Tensor, bits: int) -> None:
    if isinstance(value, int):
        integer(name, value, 0, 2**bits - 1)
    elif value.device.type == "cpu" and (_to_numpy(value) >> bits).any():  # a negative one's sign bits stay set
        raise ValueError(f"{name} must lie in [0, 2^{bits}), but its values span [{value.min()}, {value.max()}].")
