"""Times of parts: a t of its own for each frame, token or patch of a sample, where one for all of it is not enough.

A part is a block of elements along one axis of the images, or of several: frames of a clip, tokens, patches. t then has
the shape (B, *counts), counts being how many parts there are along each axis, and so has every number of a batch. The
density is that of the process's times; what the parts have to do with one another is a law, of
`diffaug.times.part_laws`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, integer, refuse
from diffaug.randomness.keys import Keys
from diffaug.schedules import Schedule
from diffaug.times.coverage import Independent
from diffaug.times.densities import Times
from diffaug.times.part_laws import PLACE_BITS, IndependentParts, PartLaw, check_law

_ON_HOST = 256
"""Samples of as many parts or more have their times drawn where the images are: on the host it would take too long."""


@dataclass(frozen=True)
class Parts:
    """The parts of a sample that have times of their own, and the law of these.

    Arguments:
        axis: along which axis of the images, shape (B, *), the parts lie, or several, rising: 1 for the frames of
            (B, F, C, H, W), 2 for those of (B, C, F, H, W), 1 for the tokens of (B, N, D), [-2, -1] for the patches of
            (B, C, H, W). 0 is the batch.
        block: how many elements along the axis are one part, one number for all axes or one for each; it divides them.
        law: what the times of the parts have to do with one another.
        padding: the field of the dataset that says which parts are real, shape (B, *counts), 1 or True where they are;
            None where all are. The field ``part_mask`` is 0 on the others, and so is ``weight``.
        dims: how many dimensions the images have, the batch's among them, so that no channels are taken for frames or
            tokens; None: any that the axes allow.
    """

    axis: int | Sequence[int] = 1
    block: int | Sequence[int] = 1
    law: PartLaw = field(default_factory=IndependentParts)
    padding: str | None = None
    dims: int | None = bounded(None, at_least=2)

    def __post_init__(self) -> None:
        check_fields(self, "process.parts")
        axes = [integer("process.parts.axis", axis) for axis in _as_list(self.axis)]
        blocks = [integer("process.parts.block", block, 1) for block in _as_list(self.block)]
        blocks = blocks * len(axes) if len(blocks) == 1 else blocks
        if not axes or 0 in axes:
            raise refuse("process.parts.axis", self.axis, "an axis of the images, but not 0, or a list of them")
        if len(blocks) != len(axes):
            raise refuse("process.parts.block", self.block, f"one number, or one for each of the {len(axes)} axes")
        check_law("process.parts.law", self.law)
        if self.padding is not None:
            instance("process.parts.padding", self.padding, str, "the name of a field of the dataset, or null")
            if self.law.sorts:
                raise ValueError(
                    f"process.parts.law={self.law!r} sorts padding too, which would take the most noise from what is "
                    "real: leave process.parts.padding out, or take another law, such as independent."
                )
        object.__setattr__(self, "axis", tuple(axes))
        object.__setattr__(self, "block", tuple(blocks))

    @functools.lru_cache(maxsize=256)  # noqa: B019 - asked twice a batch, of frozen values of which there are few
    def planes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many parts there are along each axis but the batch's, for images of this shape, (B, *)."""
        if len(shape) != (self.dims or len(shape)):
            raise ValueError(
                f"process.parts.dims={self.dims} wants images of so many dimensions, the batch's among them, but got "
                f"shape {tuple(shape)}: set parts=frames for clips (B, F, C, H, W), tokens for (B, N, D), patches for "
                "images (B, C, H, W), or process.parts.dims=null where process.parts.axis says what is meant."
            )
        axes = [axis % len(shape) if -len(shape) <= axis < len(shape) else 0 for axis in _as_list(self.axis)]
        if 0 in axes or axes != sorted(set(axes)):
            wanted = f"an axis from 1 to {len(shape) - 1} of images of shape {tuple(shape)}, or a list of them, rising"
            raise refuse("process.parts.axis", self.axis, wanted)
        planes = [1] * len(shape)
        for axis, block in zip(axes, _as_list(self.block), strict=True):
            planes[axis], rest = divmod(shape[axis], block)
            if rest or not planes[axis]:
                wanted = f"a divisor of {shape[axis]}, the size of axis {axis} of images of shape {tuple(shape)}"
                raise refuse("process.parts.block", block, wanted)
            if planes[axis] > 2 ** (PLACE_BITS // len(axes)):
                wanted = f"such that there are at most {2 ** (PLACE_BITS // len(axes))} parts along axis {axis}"
                raise refuse("process.parts.block", block, wanted)
        if math.prod(planes) == 1 and self.dims is None:  # else it may be a clip of one frame
            raise ValueError(
                f"process.parts.axis={axes} with process.parts.block={_as_list(self.block)} makes one part of each "
                f"sample, of images of shape {tuple(shape)}: set another axis or a smaller block, or leave parts out."
            )
        return tuple(planes[1:])

    @functools.lru_cache(maxsize=256)  # noqa: B019 - likewise
    def counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return how many parts there are along each of the parts' own axes, for images of this shape, (B, *)."""
        planes = self.planes(shape)
        return tuple(planes[axis % len(shape) - 1] for axis in _as_list(self.axis))

    def example(self) -> tuple[int, ...]:
        """Return the shape of an image that has such parts, (1, *)."""
        axes = _as_list(self.axis)
        most = 1 + max(0, *axes) + max(0, *(-axis for axis in axes))
        shape = [1, *[32] * ((self.dims or max(most, 3)) - 1)]
        for axis, block in zip(axes, _as_list(self.block), strict=True):
            shape[axis] = block * max(32, self.law.context + 1)
        return tuple(shape)

    @property
    def masks(self) -> bool:
        """Whether some parts may be not to be learned."""
        return self.law.context > 0 or self.padding is not None

    def draw(
        self,
        keys: Keys,
        schedule: Schedule,
        times: Times,
        position: Tensor | None,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        """Draw the times of the parts: int64 or float32, shape (B, *counts), where the keys are, or on the device.

        Arguments:
            keys: of the B samples.
            times: their density.
            position: each sample's place in the epoch's global order, int64, shape (B,), where the coverage needs it.
            shape: of the images, (B, *).
            device: the images'.
        """
        counts = self.counts(shape)
        own = None if isinstance(times.coverage, Independent) else times.coverage.points(keys, position)
        if math.prod(counts) >= _ON_HOST:
            keys, own = keys.to(device), None if own is None else own.to(device)
        drawn = self.law.points(keys, own, counts)
        return self.law.finish(times.of_points(drawn, schedule), schedule)

    def mask(self, t: Tensor, extra: Mapping[str, Any]) -> Tensor:
        """Return which parts are to be learned: float32, 1 or 0, of t's shape, (B, *counts).

        Arguments:
            t: the times of the parts.
            extra: the fields of the dataset, among them the one that `padding` names.
        """
        mask = torch.ones(t.shape, dtype=torch.float32, device=t.device)
        mask[:, : self.law.context] = 0
        if self.padding is None:
            return mask
        real = extra[self.padding]
        if not isinstance(real, Tensor) or real.shape != t.shape:
            raise refuse(
                f"the dataset's {self.padding}, process.parts.padding,", real, f"of shape {tuple(t.shape)}, t's"
            )
        return mask.to(real.device) * (real != 0)

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean over each part, of x's dtype, shape (B, *counts), of what has the images' shape, (B, *)."""
        planes = self.planes(x.shape)
        split = [length for size, plane in zip(x.shape[1:], planes, strict=True) for length in (plane, size // plane)]
        blocks = x.reshape(len(x), *split)
        return blocks.mean([*range(2, blocks.ndim, 2)]).view(len(x), *self.counts(x.shape))


def _as_list(numbers: int | Sequence[int]) -> list[int]:
    return list(numbers) if isinstance(numbers, Sequence) else [numbers]
