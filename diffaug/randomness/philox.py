"""Keyed random numbers: every draw is a pure function of a key, and of nothing else.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a bijection of a 128-bit counter under a 64-bit key. There is no state to seed, save, split over ranks or advance:
whoever knows the key of a sample can make its noise, on any device, in any order.

The layout of key and counter is part of diffaug's contract (a test holds it; changing it changes every user's run):

=========  ====================================================================================
word       bits
=========  ====================================================================================
key 0      seed, low 32
key 1      seed, high 32
counter 0  block: which four numbers of the sample, 30 bits | purpose, high 2 bits, << 30
counter 1  sample index, low 32
counter 2  sample index, high 8 | view, 20 bits, << 8 | purpose, low 4 bits, << 28
counter 3  epoch, 20 bits | stage, 2 bits, << 20 | dataset number, 10 bits, << 22
=========  ====================================================================================

Two draws share a counter only if they agree in all of these, and Philox is a bijection: nothing is ever drawn twice.

Words are held in int64 tensors (torch has no complete unsigned 32-bit arithmetic); products wrap modulo 2^64, which
is exact for what is read of them. All of it is plain integer and float tensor code, so that eager execution and
`torch.compile` run the same definition; but for `_points_here`, which draws a batch's few numbers on the host by numpy.
"""

from enum import IntEnum
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.checks import choice, integer, refuse
from diffaug.randomness.transfer import move

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = np.array([[_MULTIPLIER_0], [_MULTIPLIER_1]], np.uint64)
_WEYLS = np.array([[_WEYL_0], [_WEYL_1]], np.uint32)

_T = TypeVar("_T")

STAGES = {"train": 0, "val": 1, "test": 2, "predict": 3}
INDEX_BITS, VIEW_BITS, EPOCH_BITS, DATASET_BITS, PURPOSE_BITS = 40, 20, 20, 10, 6
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


class Keys(NamedTuple):
    """The keys of B samples: what identifies each draw, packed as in the table above.

    Attributes:
        rows: int64, shape (5, B): the seed's low and high 32 bits; the sample index's low 32 bits; its high bits and
            the view; and epoch, stage and dataset number.
    """

    rows: Tensor

    @property
    def key_0(self) -> Tensor:
        """The seed's low 32 bits, int64, shape (B,), as the four others."""
        return self.rows[0]

    @property
    def key_1(self) -> Tensor:
        """The seed's high 32 bits."""
        return self.rows[1]

    @property
    def low(self) -> Tensor:
        """The sample index's low 32 bits."""
        return self.rows[2]

    @property
    def high(self) -> Tensor:
        """The sample index's high 8 bits and the view."""
        return self.rows[3]

    @property
    def domain(self) -> Tensor:
        """Epoch, stage and dataset number."""
        return self.rows[4]

    @property
    def sample(self) -> Tensor:
        """The sample index."""
        return self.low + ((self.high & 255) << 32)

    @property
    def view(self) -> Tensor:
        """The view."""
        return self.high >> 8

    def part(self, which: slice | Tensor) -> "Keys":
        """Return the keys of some samples."""
        return Keys(self.rows[:, which])

    def replace(self, low: Tensor, high: Tensor, domain: Tensor) -> "Keys":
        """Return the keys with other words under the same seed, each int64, shape (B,)."""
        return Keys(torch.stack((self.key_0, self.key_1, low, high, domain)))

    def to(self, device: torch.device) -> "Keys":
        """Move the keys to a device, by one copy."""
        return Keys(*move([self.rows], device))


def keys(
    index: Tensor,
    *,
    seed: int = 0,
    stage: str = "train",
    epoch: int | Tensor = 0,
    view: int | Tensor = 0,
    dataset: int = 0,
) -> Keys:
    """Pack what identifies B samples into keys.

    Arguments:
        index: the sample index, int64, shape (B,), in [0, 2^40).
        seed: in [0, 2^64).
        stage: train, val, test or predict. Only train sees the epoch.
        epoch: in [0, 2^20), one number or int64 of shape (B,).
        view: which noised copy of the image within the epoch, in [0, 2^20), one number or int64 of shape (B,).
        dataset: the number of the dataset (dataloader_idx) within its stage, in [0, 2^10).

    Raises:
        ValueError: a value beyond its width. Tensors on an accelerator are not looked at (that would halt it).
    """
    integer("seed", seed, 0, 2**64 - 1)
    choice("stage", stage, STAGES)
    integer("dataset", dataset, 0, 2**DATASET_BITS - 1)
    if index.dtype != torch.int64 or index.ndim != 1:
        raise refuse("index", f"{index.dtype} of shape {tuple(index.shape)}", "an int64 tensor of shape (B,)")
    _within("index", index, INDEX_BITS)
    _within("view", view, VIEW_BITS)
    _within("epoch", epoch, EPOCH_BITS)
    device, index, view, epoch = index.device, _light(index), _light(view), _light(epoch)
    rows: Any = np.empty((5, len(index)), np.int64) if device.type == "cpu" else index.new_empty(5, len(index))
    rows[0], rows[1] = seed & _LOW_32, seed >> 32
    rows[2] = index & _LOW_32
    rows[3] = (index >> 32) + (view << 8)
    rows[4] = (STAGES[stage] << EPOCH_BITS) + (dataset << (EPOCH_BITS + 2)) + (epoch if stage == "train" else 0)
    return Keys(_heavy(rows))


def _light(numbers: _T) -> _T:
    """Return a tensor on the host as numpy's array, in the same memory: for few numbers a quarter of torch's time."""
    return cast("_T", numbers.numpy()) if isinstance(numbers, Tensor) and numbers.device.type == "cpu" else numbers


def _heavy(numbers: Any) -> Tensor:
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType]


def _within(name: str, value: int | Tensor, bits: int) -> None:
    if isinstance(value, int):
        integer(name, value, 0, 2**bits - 1)
    elif value.device.type == "cpu" and (_light(value) >> bits).any():  # a negative one's sign bits stay set
        raise ValueError(f"{name} must lie in [0, 2^{bits}), but its values span [{value.min()}, {value.max()}].")


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10: four random words from a counter of four words and a key of two.

    Arguments:
        counter, key: int64 tensors holding values in [0, 2^32), of shapes that broadcast together.

    Returns:
        Four int64 tensors with values in [0, 2^32).
    """
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for number in range(10):
        product_0, product_1 = c_0 * _MULTIPLIER_0, c_2 * _MULTIPLIER_1
        # Only what is multiplied next must be clean of high bits: the low halves stay whole products until then.
        c_0, c_1 = _crossed(product_1, c_1, k_0, number), product_1
        c_2, c_3 = _crossed(product_0, c_3, k_1, number), product_0
        k_0, k_1 = (k_0 + _WEYL_0) & _LOW_32, (k_1 + _WEYL_1) & _LOW_32
    return c_0, c_1 & _LOW_32, c_2, c_3 & _LOW_32


def _crossed(product: Tensor, word: Tensor, key: Tensor, number: int) -> Tensor:
    high = product >> 32
    if number < 2:  # until two rounds have mixed them, the words have only their own dimensions
        return (high ^ word ^ key) & _LOW_32
    return high.bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_LOW_32)


def words(keys: Keys, purpose: int, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the four random words of each block of each sample, for one purpose.

    Arguments:
        keys: of B samples.
        purpose: see `Purpose`.
        block: int64, shape (N,), values in [0, 2^30).

    Returns:
        Four int64 tensors of shape (B, N), values in [0, 2^32).
    """
    if purpose >> 4:
        block = block + (purpose >> 4 << 30)
    counter = (
        block[None, :],
        keys.low[:, None],
        keys.high[:, None] + ((purpose & 15) << 28),
        keys.domain[:, None],
    )
    # The key is kept per sample, not per call: with it every intermediate value of a compiled kernel has the shape
    # (B, N), which lets Inductor fuse all ten rounds and all outputs into one loop without a buffer between them.
    return philox(counter, (keys.key_0[:, None], keys.key_1[:, None]))


def points(keys: Keys, purpose: int) -> Tensor:
    """Draw one random point of each sample: int64, shape (B,), uniform over [0, 2^53)."""
    if keys.rows.device.type == "cpu" and not torch.compiler.is_compiling():
        return _heavy(_points_here(keys.rows.numpy(), purpose))
    w_0, w_1, _, _ = words(keys, purpose, torch.zeros(1, dtype=torch.int64, device=keys.rows.device))
    return ((w_0 << 21) | (w_1 >> 11))[:, 0]


def _points_here(rows: NDArray[np.int64], purpose: int) -> NDArray[np.int64]:
    """Draw the same points on the host.

    This is Philox once more, for the few numbers of a batch, which are drawn at every step: torch takes as long for an
    operation on a hundred numbers as on one, and ten rounds are 140. In numpy's unsigned words, both halves of the
    counter at once, they are 40 short ones.
    """
    even = np.empty((2, rows.shape[1]), np.uint32)
    even[0], even[1] = purpose >> 4 << 30, rows[3] + ((purpose & 15) << 28)  # block 0
    odd, key = rows[2::2].astype(np.uint32), rows[:2].astype(np.uint32)
    for _ in range(10):
        halves = (even * _MULTIPLIERS)[::-1].astype("<u8", copy=False).view("<u4")
        even, odd = halves[:, 1::2] ^ odd, halves[:, ::2]
        even ^= key
        key += _WEYLS
    return (even[0].astype(np.int64) << 21) | (odd[0] >> 11)


def indices(points: Tensor, count: int | Tensor) -> Tensor:
    """Map points in [0, 2^53) to whole numbers in [0, count): floor(point count / 2^53), for count < 2^31.

    In integers, in two halves so that nothing overflows: identical on every device.
    """
    high, low = points >> 21, points & (2**21 - 1)
    return (high * count + (low * count >> 21)) >> 32


def uniforms(points: Tensor) -> Tensor:
    """Map points in [0, 2^53) to float64 strictly between 0 and 1: the middle of each of 2^53 equal cells.

    The last cell's middle, 1 - 2^-54, would round to 1; it is held at 1 - 2^-53.
    """
    return ((points.double() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)


def box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """Compute two independent standard normals, float32, from two words (Box and Muller 1958).

    The radius uses (w + 1) / 2^32 in (0, 1], so the largest is sqrt(64 ln 2) = 6.66; the angle is centred on 0, where
    float32 is finest. Cosine and sine share one reduction to the half circle around 0, which is exact, and no branch:
    beyond it both change their sign, and the radius carries it. Their errors are 1.6e-7 and 2.2e-7 at most.
    """
    radius = (radius_word + 1).float().mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    turns = (angle_word - 2**31).float().mul_(2.0**-31)  # half turns, in [-1, 1]
    beyond = turns.round()
    turns = turns.sub_(beyond)
    radius = radius.mul_(1.0 - 2.0 * beyond.mul_(beyond))
    square = turns * turns
    return _cosine(square).mul_(radius), _sine_over(square).mul_(turns).mul_(radius)


# The coefficients are those whose largest error is least, by linear programming, rounded to float32. They are written
# where they are used: what a compiled function reads from a global is an argument of each of its calls, 4 microseconds.


def _cosine(square: Tensor) -> Tensor:
    """Compute cos(pi a) for |a| <= 1/2 from a^2, by Horner's scheme."""
    value = (-0.024416031315922737 * square).add_(0.23495057225227356)
    value = value.mul_(square).add_(-1.3352152109146118)
    value = value.mul_(square).add_(4.058709621429443)
    value = value.mul_(square).add_(-4.934802055358887)
    return value.mul_(square).add_(1.0)


def _sine_over(square: Tensor) -> Tensor:
    """Compute sin(pi a) / a for |a| <= 1/2 from a^2, likewise."""
    value = (0.07722116261720657 * square).add_(-0.5980457663536072)
    value = value.mul_(square).add_(2.5500314235687256)
    value = value.mul_(square).add_(-5.1677069664001465)
    return value.mul_(square).add_(3.141592502593994)


def lanes(elements: int) -> int:
    """Return how many blocks serve a sample of so many elements: block i makes elements i, i + n, i + 2n and i + 3n.

    One call of Philox makes four numbers. Spread so, and not side by side, each of the four is a contiguous run.
    """
    return (elements + 3) // 4


def normals(keys: Keys, purpose: int, block: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw four standard normals of each block of each sample, float32, each of shape (B, len(block)).

    With ``block = arange(lanes(elements))``, joined along dimension 1 and cut to ``elements``, they are a sample's
    noise in C order.
    """
    w_0, w_1, w_2, w_3 = words(keys, purpose, block)
    return (*box_muller(w_0, w_1), *box_muller(w_2, w_3))
