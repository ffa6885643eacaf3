"""Wrappers that keep only some of another schedule's times: some of its steps, or a range."""

import itertools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from diffaug.checks import integer, number, one_of, refuse
from diffaug.schedules.base import table
from diffaug.schedules.numbers import in_float64
from diffaug.schedules.wrappers import MAKE_DISCRETE, Wrapper

SPACINGS = ("linspace", "leading", "trailing")


@dataclass(frozen=True)
class Respaced(Wrapper):
    """K of the base's T steps: the signal at the steps that are kept is the base's, the betas between them larger.

    Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", section 4. Which steps, for 10 of
    1000:

    - linspace: 0, 111, ..., 999: from the first to the last, rounded (guided-diffusion's "10"; diffusers' linspace);
    - leading: 0, 100, ..., 900: multiples of T // K (guided-diffusion's "ddim10"; diffusers' leading, offset 0);
    - trailing: 99, 199, ..., 999: multiples of T / K from the last down, rounded (diffusers' trailing).

    The new t counts the kept steps, from 0 to K - 1; ``kept`` says which t of the base each is. Places are exact, and a
    half is rounded to even. guided-diffusion adds up a stride in floating point, so for some K one step is the
    neighbour of that kept here (499 in place of 500 for 999 of 1000).

    Arguments:
        base: discrete.
        steps: K, from 1 to T; or several numbers, [K_1, K_2, ...]: the base is cut into as many sections, as equal as
            can be with the longer ones first, and each keeps its number (guided-diffusion's "10,15,20").
        spacing: linspace, leading or trailing.
    """

    steps: int | tuple[int, ...] = 50
    spacing: str = one_of("trailing", SPACINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base.discrete:
            raise self._refuse_base(f"a discrete schedule{MAKE_DISCRETE},")
        if not isinstance(self.steps, int) and not isinstance(self.steps, str) and hasattr(self.steps, "__iter__"):
            object.__setattr__(self, "steps", tuple(self.steps))
        for (low, high), steps in zip(self._sections(), self._counts(), strict=True):
            integer("schedule.steps", steps, 1, high - low)

    @property
    def timesteps(self) -> int:
        return sum(self._counts())

    def _counts(self) -> tuple[int, ...]:
        return self.steps if isinstance(self.steps, tuple) else (self.steps,)

    def _sections(self) -> list[tuple[int, int]]:
        count = len(self._counts())
        if not 1 <= count <= self.base.timesteps:
            raise refuse(
                "schedule.steps",
                self.steps,
                f"a whole number, or a list of them with a length in [1, {self.base.timesteps}]",
            )
        length, longer = divmod(self.base.timesteps, count)
        ends = [k * length + min(k, longer) for k in range(count + 1)]
        return list(itertools.pairwise(ends))

    @property
    def kept(self) -> Tensor:
        """Which t of the base each new t is, int64 on the CPU, shape (K,)."""
        sections = zip(self._sections(), self._counts(), strict=True)
        return torch.cat([low + _choose_steps(high - low, steps, self.spacing) for (low, high), steps in sections])

    def compute_log_snr_table(self) -> Tensor:
        return table(self.base, "log_snr")[self.kept]


def _choose_steps(total: int, steps: int, spacing: str) -> Tensor:
    k = torch.arange(steps, device="cpu")
    if spacing == "leading":
        return k * (total // steps)
    if spacing == "trailing":
        return _divide_rounding((k + 1) * total, steps) - 1
    return _divide_rounding(k * (total - 1), max(steps - 1, 1))


def _divide_rounding(numerator: Tensor, denominator: int) -> Tensor:
    """Return the quotient, rounded to the nearest whole number, halves to even as numpy does."""
    whole = numerator // denominator
    twice = 2 * (numerator - whole * denominator)
    return whole + ((twice > denominator) | ((twice == denominator) & (whole % 2 == 1))).long()


@dataclass(frozen=True)
class Truncated(Wrapper):
    """The base from t = ``low`` to t = ``high``, both included: to train on a part of the noise levels only.

    As the experts of eDiff-I (Balaji et al. 2022), or the refiner of SDXL, trained on the first 200 steps (Podell et
    al. 2023, section 2.5). If discrete, the new t counts from 0 at ``low``, and ``kept`` says which t of the base each
    is; if continuous, t stays the base's, and unit time runs over the range.

    Arguments:
        base: any schedule.
        low: a time of the base, a whole number if that is discrete, at most ``high`` (below it if continuous). None is
            the base's own beginning, at unit time 0.
        high: likewise. None is the base's own end, at unit time 1.
    """

    low: int | float | None = None
    high: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, end in zip(("low", "high"), self.base.ends, strict=True):
            value, (low, high) = getattr(self, name), self.base.range
            if value is None:
                value = end.item()
            elif self.base.discrete:
                value = integer(f"schedule.{name}", value, int(low), int(high))
            else:
                value = number(f"schedule.{name}", value, at_least=low, at_most=high)
            object.__setattr__(self, name, value)
        low, high = self._ends
        if low > high or (low == high and not self.base.discrete):
            raise refuse("schedule.low", low, f"less than schedule.high, {high}")

    @property
    def timesteps(self) -> int:
        low, high = self._ends
        return int(high - low) + 1 if self.base.discrete else 0

    @property
    def _ends(self) -> tuple[float, float]:
        return cast("tuple[float, float]", (self.low, self.high))

    @property
    def range(self) -> tuple[float, float]:
        return super().range if self.discrete else self._ends

    @property
    def kept(self) -> Tensor:
        """Which t of a discrete base each new t is, int64 on the CPU, shape (T,)."""
        if not self.discrete:
            raise self._only("discrete", "a list of kept steps")
        low, high = self._ends
        return torch.arange(int(low), int(high) + 1, device="cpu")

    @property
    def _units(self) -> tuple[float, float]:
        low, high = self.base.to_unit(torch.tensor(self._ends, dtype=torch.float64, device="cpu"), torch.float64)
        return low.item(), high.item()

    def from_unit(self, u: Tensor) -> Tensor:
        if self.discrete:
            return super().from_unit(u)
        low, high = self._units
        return in_float64(lambda u: self.base.from_unit(low + u * (high - low)).clamp(*self._ends), u, torch.float64)

    def to_unit(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.discrete:
            return super().to_unit(t, dtype)
        low, high = self._units
        return in_float64(
            lambda t: ((self.base.to_unit(t, torch.float64) - low) / (high - low)).clamp(0.0, 1.0), t, dtype
        )

    def compute_log_snr_table(self) -> Tensor:
        return table(self.base, "log_snr")[self.kept]

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.compute_t_of_log_snr(log_snr).clamp(*self._ends)
