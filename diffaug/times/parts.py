"""Times of parts: a t of its own for each frame, token or patch of a sample, where one for all of it is not enough.

A part is a block of elements along one axis of the images, or of several: frames of a clip, tokens, patches. t then has
the shape (B, *counts), counts being how many parts there are along each axis, and so has every number of a batch. The
density is that of the process's times; what the parts have to do with one another is a law:

| law                | what                                                            | source                        |
|--------------------|-----------------------------------------------------------------|-------------------------------|
| `IndependentParts` | each part its own draw                                          | Chen et al. 2024              |
| `SharedParts`      | one draw for all, for a share of samples; else each its own     |                               |
| `MonotoneParts`    | each its own, then sorted: noise rises along the first axis     |                               |
| `TwoLevelParts`    | a share of the parts at s, the rest at t, unsorted              | Self-Flow (2026)              |
| `ContextParts`     | the first parts clean, or lightly noised; the rest by another law |                             |

(Chen et al. 2024, "Diffusion Forcing: Next-token Prediction Meets Full-Sequence Diffusion", algorithm 1. Self-Flow's
dual-timestep scheduling is from memory, not checked against the text.)

Under the first, second and fourth each part's t has exactly the chosen density. A part is keyed by its sample and its
place, so a clip that is cut to its first frames keeps their draws; sorting, of course, is of what there is. What all
parts share, and the very first part's own draw, is the sample's draw of one time: what the coverage spreads. The other
parts draw for themselves, whatever the coverage.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, integer, refuse
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import points, uniforms
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep
from diffaug.times.coverage import Independent
from diffaug.times.densities import Times

_PLACE_BITS = 30
"""Of a part's place, shared out evenly among the axes: a block of the generator for each part."""
_ON_HOST = 256
"""Samples of as many parts or more have their times drawn where the images are: on the host it would take too long."""


@dataclass(frozen=True)
class PartLaw(ABC):
    """What the times of a sample's parts have to do with one another."""

    def __post_init__(self) -> None:
        check_fields(self, "process.parts.law")

    @abstractmethod
    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        """Return each part's point in [0, 2^53), int64, shape (B, *counts).

        Arguments:
            keys: of the B samples.
            own: the point that each sample has where it has one time, int64, shape (B,); None where that is of block 0
                by its own key, as the first part's is.
            counts: how many parts there are along each axis.
        """

    @property
    def context(self) -> int:
        """How many parts, from the first along the first axis, are given, and not to be learned."""
        return 0

    @property
    def sorts(self) -> bool:
        """Whether the parts of a sample are put in an order of their times, padding among them."""
        return False

    def finish(self, t: Tensor, schedule: Schedule) -> Tensor:
        """Return the times, given those of the points, int64 or float32, shape (B, *counts)."""
        return t


@dataclass(frozen=True)
class IndependentParts(PartLaw):
    """Each part draws its own t."""

    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        each = _draw_each(keys, Purpose.TIME, counts)
        if own is not None:
            each.flatten(1)[:, 0] = own
        return each


@dataclass(frozen=True)
class SharedParts(PartLaw):
    """One t for all parts, the one that the sample would have without parts, or else each its own.

    Arguments:
        probability: that a sample's parts share one, in [0, 1].
    """

    probability: float = bounded(0.5, at_least=0, at_most=1)

    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        together = _over_parts(points(keys, Purpose.TIME) if own is None else own, counts)
        if self.probability == 1:
            return together
        shares = uniforms(points(keys, Purpose.PARTS)) < self.probability
        return torch.where(_over_parts(shares, counts), together, IndependentParts().points(keys, own, counts))


@dataclass(frozen=True)
class MonotoneParts(PartLaw):
    """Each part draws its own t, and they are sorted along the first axis: later frames are never less noised."""

    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        return IndependentParts().points(keys, own, counts)

    @property
    def sorts(self) -> bool:
        return True

    def finish(self, t: Tensor, schedule: Schedule) -> Tensor:
        return t.sort(1).values


@dataclass(frozen=True)
class TwoLevelParts(PartLaw):
    """Two draws of a sample, s and t: each part is at s with a chance of ``share``, else at t, by its own key.

    Which of the two is less noise is left to chance. Where a code takes an exact share of a sample's tokens, here each
    token's key says it, whatever their number.

    Arguments:
        share: of the parts at s, in [0, 1].
    """

    share: float = bounded(0.5, at_least=0, at_most=1)

    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        first = points(keys, Purpose.TIME) if own is None else own
        chosen = uniforms(_draw_each(keys, Purpose.CHOICE_OF_PARTS, counts)) < self.share
        return torch.where(chosen, _over_parts(points(keys, Purpose.PARTS), counts), _over_parts(first, counts))


@dataclass(frozen=True)
class ContextParts(PartLaw):
    """The first parts along the first axis are given: clean, or lightly noised; the rest go by another law.

    A clean part is at t = -1 where time is discrete, at 0 where it is continuous: its x_t is its x_0, alpha is 1 and
    sigma 0, and no draw ever falls there. The field ``part_mask`` is 0 on the context, and so is ``weight``.

    Arguments:
        count: how many are given, at least 1.
        level: the unit time at which they are noised, in [0, 1); None leaves them clean.
        others: the law of the rest.
    """

    count: int = bounded(1, at_least=1)
    level: float | None = bounded(None, at_least=0, below=1)
    others: PartLaw = field(default_factory=IndependentParts)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_law("process.parts.law.others", self.others)
        if self.others.context:
            raise refuse("process.parts.law.others", self.others, "a law without a context of its own")

    def points(self, keys: Keys, own: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        if self.count >= counts[0]:
            raise ValueError(
                f"process.parts.law.count={self.count} leaves nothing to learn of {counts[0]} parts along the first "
                "axis: set it lower."
            )
        return self.others.points(keys, own, counts)

    @property
    def context(self) -> int:
        return self.count

    @property
    def sorts(self) -> bool:
        return self.others.sorts

    def finish(self, t: Tensor, schedule: Schedule) -> Tensor:
        if self.level is None:
            given = -1 if schedule.discrete else 0
        else:
            given = schedule.from_unit(torch.tensor(self.level, dtype=torch.float64, device="cpu")).item()
        rest = self.others.finish(t[:, self.count :], schedule)
        return torch.cat([torch.full_like(t[:, : self.count], given), rest], 1)


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
    dims: int | None = None

    def __post_init__(self) -> None:
        axes = [integer("process.parts.axis", axis) for axis in _as_list(self.axis)]
        blocks = [integer("process.parts.block", block, 1) for block in _as_list(self.block)]
        blocks = blocks * len(axes) if len(blocks) == 1 else blocks
        if not axes or 0 in axes:
            raise refuse("process.parts.axis", self.axis, "an axis of the images, but not 0, or a list of them")
        if len(blocks) != len(axes):
            raise refuse("process.parts.block", self.block, f"one number, or one for each of the {len(axes)} axes")
        _check_law("process.parts.law", self.law)
        if self.padding is not None:
            instance("process.parts.padding", self.padding, str, "the name of a field of the dataset, or null")
            if self.law.sorts:
                raise ValueError(
                    f"process.parts.law={self.law!r} sorts padding too, which would take the most noise from what is "
                    "real: leave process.parts.padding out, or take another law, such as independent."
                )
        if self.dims is not None:
            integer("process.parts.dims", self.dims, 2)
        object.__setattr__(self, "axis", tuple(axes))
        object.__setattr__(self, "block", tuple(blocks))

    def planes(self, shape: Sequence[int]) -> tuple[int, ...]:
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
            if planes[axis] > 2 ** (_PLACE_BITS // len(axes)):
                wanted = f"such that there are at most {2 ** (_PLACE_BITS // len(axes))} parts along axis {axis}"
                raise refuse("process.parts.block", block, wanted)
        if math.prod(planes) == 1:
            raise ValueError(
                f"process.parts.axis={axes} with process.parts.block={_as_list(self.block)} makes one part of each "
                f"sample, of images of shape {tuple(shape)}: set another axis or a smaller block, or leave parts out."
            )
        return tuple(planes[1:])

    def counts(self, shape: Sequence[int]) -> tuple[int, ...]:
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
        shape: Sequence[int],
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


def _check_law(where: str, law: object) -> None:
    instance(where, law, PartLaw, f"a PartLaw, such as SharedParts(), on the command line law@{where}=shared")


def _as_list(numbers: int | Sequence[int]) -> list[int]:
    return list(numbers) if isinstance(numbers, Sequence) else [numbers]


def _draw_each(keys: Keys, purpose: int, counts: tuple[int, ...]) -> Tensor:
    """Draw one point for each part by its place: int64, shape (B, *counts), uniform over [0, 2^53)."""
    return points(keys, purpose, _number_places(counts, keys.rows.device)).view(-1, *counts)


@keep
def _number_places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    place = torch.zeros((), dtype=torch.int64)
    for count in counts:
        place = (place[..., None] << _PLACE_BITS // len(counts)) + torch.arange(count)
    return place.flatten().to(device)


def _over_parts(number: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return one number a sample, shape (B,), for each of its parts: shape (B, *counts)."""
    return number.view(-1, *(1,) * len(counts)).expand(-1, *counts)
