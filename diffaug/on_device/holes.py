"""Holes: masks of what is to be painted in, drawn for each sample by its key, for inpainting.

A batch then has the fields ``hole``, bool of shape (B, 1, H, W), True where something is to be painted (of a video in
all frames, (B, 1, 1, H, W)), and ``known``, the clean image in [-1, 1] with 0 in the hole. A network that is to see the
known pixels without noise is given ``torch.where(hole, x_t, known)``.

All arithmetic is in whole numbers: a hole is the same on every device.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import words


@dataclass(frozen=True)
class Hole(ABC):
    """How a hole is drawn."""

    def __post_init__(self) -> None:
        check_fields(self, "data.hole")

    @abstractmethod
    def draw(self, keys: Keys, height: int, width: int) -> Tensor:
        """Draw a hole for each of B samples, bool, shape (B, 1, height, width), where the keys are."""


@dataclass(frozen=True)
class Half(Hole):
    """The upper, lower, left or right half, each as often; of an odd side the first pixels are one fewer."""

    def draw(self, keys: Keys, height: int, width: int) -> Tensor:
        row, column = _places(keys, height, width)
        which = _whole_numbers(keys, 0, 4)[0]
        beyond = torch.where(which < 2, row >= height // 2, column >= width // 2)
        return (beyond == (which % 2 == 0))[:, None]


@dataclass(frozen=True)
class Box(Hole):
    """A box, each of whose sides is uniform between two shares of the image's, anywhere that it fits.

    Arguments:
        least: the smallest share, in (0, 1]; a side has one pixel at least.
        most: the largest share, in (0, 1].
    """

    least: float = bounded(0.25, above=0, at_most="most")
    most: float = bounded(0.75, above=0, at_most=1)

    def draw(self, keys: Keys, height: int, width: int) -> Tensor:
        inside = None
        for block, (place, side) in enumerate(zip(_places(keys, height, width), (height, width), strict=True)):
            least, most = (max(1, int(share * side)) for share in (self.least, self.most))
            length = least + _whole_numbers(keys, block, most - least + 1)[0]
            start = _whole_numbers(keys, block, side - length + 1)[1]
            within = (place >= start) & (place < start + length)
            inside = within if inside is None else inside & within
        assert inside is not None
        return inside[:, None]


@dataclass(frozen=True)
class Brush(Hole):
    """Strokes of a round brush, each from a uniform place on by straight lines, held within the image.

    Free-form masks in the manner of Yu et al. 2019, "Free-form image inpainting with gated convolution"; the numbers
    are diffaug's own. It takes time in proportion to strokes times lines, each some passes over the images: on a CPU
    ten times that of the noise.

    Arguments:
        strokes: how many.
        lines: of each stroke.
        reach: how far a line goes at most in either direction, as a share of the shorter side.
        width: of the brush, likewise.
    """

    strokes: int = bounded(3, at_least=1, at_most=100)
    lines: int = bounded(4, at_least=1, at_most=100)
    reach: float = bounded(0.4, above=0, at_most=1)
    width: float = bounded(0.12, above=0, at_most=1)

    def draw(self, keys: Keys, height: int, width: int) -> Tensor:
        row, column = _places(keys, height, width)
        side = min(height, width)
        reach, square = max(1, int(self.reach * side)), max(1, int(self.width * side)) ** 2
        hole = torch.zeros(keys.rows.shape[1], height, width, dtype=torch.bool, device=keys.rows.device)
        for stroke in range(self.strokes):
            block = stroke * (self.lines + 1)
            y, x = _whole_numbers(keys, block, height)[0], _whole_numbers(keys, block, width)[1]
            for line in range(1, self.lines + 1):
                step_y, step_x, _, _ = _whole_numbers(keys, block + line, 2 * reach + 1)
                there = (y + step_y - reach).clamp(0, height - 1), (x + step_x - reach).clamp(0, width - 1)
                hole |= _near_line(row, column, (y, x), there, square)
                y, x = there
        return hole[:, None]


def _near_line(
    row: Tensor, column: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor], square: int
) -> Tensor:
    """Return which pixels lie within half a width of a line, of whose width ``square`` is the square."""
    down, right = end[0] - start[0], end[1] - start[1]
    length = down * down + right * right  # squared
    y, x = row - start[0], column - start[1]
    along, across = y * down + x * right, y * right - x * down  # both times the length
    near_start, near_end = y * y + x * x, (row - end[0]) ** 2 + (column - end[1]) ** 2
    beside = (along > 0) & (along < length) & (4 * across * across <= square * length)
    return beside | (4 * torch.minimum(near_start, near_end) <= square)


def _places(keys: Keys, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows, shape (1, height, 1), and columns, shape (1, 1, width), of an image."""
    device = keys.rows.device
    return torch.arange(height, device=device)[None, :, None], torch.arange(width, device=device)[None, None]


def _whole_numbers(keys: Keys, block: int, count: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw four whole numbers in [0, count) of each sample, count < 2^31, each of shape (B, 1, 1)."""
    block_ = torch.tensor([block], device=keys.rows.device)
    w_0, w_1, w_2, w_3 = (word[:, :, None] for word in words(keys, Purpose.HOLE, block_))
    return w_0 * count >> 32, w_1 * count >> 32, w_2 * count >> 32, w_3 * count >> 32
