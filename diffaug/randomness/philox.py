"""Keyed random numbers: every draw is a pure function of a key, and of nothing else.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
a bijection of a 128-bit counter under a 64-bit key. There is no state to seed, save, split over ranks or advance:
whoever knows the key of a sample can make its noise, on any device, in any order.

Words are held in int64 tensors (torch has no complete unsigned 32-bit arithmetic); products wrap modulo 2^64, which
is exact for what is read of them. All of it is plain integer and float tensor code, so that eager execution and
`torch.compile` run the same definition; but for `_points_here`, which draws a batch's few numbers on the host by numpy.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.randomness.keys import Keys, to_tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
_MULTIPLIERS = np.array([[_MULTIPLIER_0], [_MULTIPLIER_1]], np.uint64)
_WEYLS = np.array([[_WEYL_0], [_WEYL_1]], np.uint32)


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
        block: int64, shape (N,) or (N, M), values in [0, 2^30).

    Returns:
        Four int64 tensors of shape (B, N) or (B, N, M), values in [0, 2^32).
    """
    if purpose >> 4:
        block = block + (purpose >> 4 << 30)
    ones = (1,) * (block.ndim + 2 - keys.rows.ndim)
    key_0, key_1, low, high, domain = (row.view(*row.shape, *ones) for row in keys.rows[:5])
    counter = (block[None], low, high + ((purpose & 15) << 28), domain)
    # The key is kept per sample, not per call: with it every intermediate value of a compiled kernel has the shape
    # (B, N), which lets Inductor fuse all ten rounds and all outputs into one loop without a buffer between them.
    return philox(counter, (key_0, key_1))


def points(keys: Keys, purpose: int, block: Tensor | None = None) -> Tensor:
    """Draw one random point of each sample: int64, shape (B,), uniform over [0, 2^53).

    Arguments:
        block: int64, shape (N,), values in [0, 2^30): a point of each of these blocks, shape (B, N), not of block 0.
    """
    if keys.rows.device.type == "cpu" and not torch.compiler.is_compiling():
        if block is None:
            return _points_here(keys.rows.numpy(), purpose)
        return _points_here(keys.rows.numpy().repeat(len(block), 1), purpose, block.numpy()).view(-1, len(block))
    which = torch.zeros(1, dtype=torch.int64, device=keys.rows.device) if block is None else block
    w_0, w_1, _, _ = words(keys, purpose, which)
    drawn = (w_0 << 21) | (w_1 >> 11)
    return drawn[:, 0] if block is None else drawn


def _points_here(rows: NDArray[np.int64], purpose: int, blocks: NDArray[np.int64] | int = 0) -> Tensor:
    """Draw the same points on the host, one for each column of the rows, which go by each of the blocks in turn.

    This is Philox once more, for the few numbers of a batch, which are drawn at every step: torch takes as long for an
    operation on a hundred numbers as on one, and ten rounds are 140. In numpy's unsigned words, both halves of the
    counter at once, they are 40 short ones.
    """
    even = np.empty((2, rows.shape[1]), np.uint32)
    even[0].reshape(-1, np.size(blocks))[:] = blocks + (purpose >> 4 << 30)
    even[1] = rows[3] + ((purpose & 15) << 28)
    odd, key = rows[2:5:2].astype(np.uint32), rows[:2].astype(np.uint32)
    for _ in range(10):
        halves = (even * _MULTIPLIERS)[::-1].astype("<u8", copy=False).view("<u4")
        even, odd = halves[:, 1::2] ^ odd, halves[:, ::2]
        even ^= key
        key += _WEYLS
    return to_tensor((even[0].astype(np.int64) << 21) | (odd[0] >> 11))


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
    """Draw four standard normals of each block of each sample, float32, each of shape (B, *block.shape).

    With ``block = arange(lanes(elements))``, joined along dimension 1 and cut to ``elements``, they are a sample's
    noise in C order.
    """
    w_0, w_1, w_2, w_3 = words(keys, purpose, block)
    return (*box_muller(w_0, w_1), *box_muller(w_2, w_3))
