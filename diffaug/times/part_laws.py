"""Laws of the times of a sample's parts: what the t of one has to do with those of the others.

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

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, refuse
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import points, uniforms
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep

PLACE_BITS = 30
"""Of a part's place, shared out evenly among the axes: a block of the generator for each part."""


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
        check_law("process.parts.law.others", self.others)
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


def check_law(where: str, law: object) -> None:
    """Refuse what is no law, naming its key."""
    instance(where, law, PartLaw, f"a PartLaw, such as SharedParts(), on the command line part_law@{where}=shared")


def _draw_each(keys: Keys, purpose: int, counts: tuple[int, ...]) -> Tensor:
    """Draw one point for each part by its place: int64, shape (B, *counts), uniform over [0, 2^53)."""
    return points(keys, purpose, _number_places(counts, keys.rows.device)).view(-1, *counts)


@keep
def _number_places(counts: tuple[int, ...], device: torch.device) -> Tensor:
    place = torch.zeros((), dtype=torch.int64)
    for count in counts:
        place = (place[..., None] << PLACE_BITS // len(counts)) + torch.arange(count)
    return place.flatten().to(device)


def _over_parts(number: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return one number a sample, shape (B,), for each of its parts: shape (B, *counts)."""
    return number.view(-1, *(1,) * len(counts)).expand(-1, *counts)
