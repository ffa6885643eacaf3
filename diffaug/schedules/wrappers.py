"""Wrappers: schedules that vary another one, their field ``base``.

A wrapper keeps its base's scaling, and its time where it can. In YAML the base is chosen by a group of its own, nested
as deep as one likes: ``schedule=zero_terminal_snr schedule@schedule.base=cosine``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffaug.checks import bounded, instance, refuse
from diffaug.schedules.base import VARIANCE_PRESERVING, Scaling, Schedule, table

MAKE_DISCRETE = (
    "; to put a continuous schedule on T points, wrap it: schedule@schedule.base=discretised "
    "schedule@schedule.base.base=NAME"
)


@dataclass(frozen=True)
class Wrapper(Schedule):
    """A schedule that varies another one. A subclass overrides what it changes: here, nothing.

    Arguments:
        base: the schedule that is varied.
    """

    base: Schedule

    def __post_init__(self) -> None:
        instance("schedule.base", self.base, Schedule, "a schedule")
        super().__post_init__()

    @property
    def timesteps(self) -> int:
        return self.base.timesteps

    @property
    def scaling(self) -> Scaling:
        return self.base.scaling

    @property
    def range(self) -> tuple[float, float]:
        return super().range if self.discrete else self.base.range

    def from_unit(self, u: Tensor) -> Tensor:
        return super().from_unit(u) if self.discrete else self.base.from_unit(u)

    def to_unit(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().to_unit(t, dtype) if self.discrete else self.base.to_unit(t, dtype)

    def at_shape(self, shape: Sequence[int]) -> Schedule:
        base = self.base.at_shape(shape)
        return self if base is self.base else replace(self, base=base)

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return self.base.compute_log_snr(t)

    def compute_log_snr_table(self) -> Tensor:
        return table(self.base, "log_snr")

    def _refuse_base(self, wanted: str) -> ValueError:
        return refuse("schedule.base", self.base, f"{wanted} for {type(self).__name__}")


@dataclass(frozen=True)
class ZeroTerminalSNR(Wrapper):
    """The base with sqrt(alpha_bar) shifted and scaled so that no signal is left at T - 1, the first value kept.

    With r = sqrt(alpha_bar): r_t -> (r_t - r_{T-1}) r_0 / (r_0 - r_{T-1}). Lin et al. 2024, "Common Diffusion Noise
    Schedules and Sample Steps Are Flawed", algorithm 1. The last alpha is 0, the last log-SNR -inf, the last beta 1:
    at T - 1 epsilon says nothing about x_0, so the network needs another target, v for example.

    Arguments:
        base: discrete and variance preserving, with at least two steps.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.discrete or self.scaling is not VARIANCE_PRESERVING:
            raise self._refuse_base(f"a discrete, variance preserving schedule{MAKE_DISCRETE},")
        log_snr = table(self.base, "log_snr")
        if not log_snr[0] > log_snr[-1]:
            raise self._refuse_base("a schedule with less signal at its last step than at its first")

    def compute_log_snr_table(self) -> Tensor:
        log_snr = table(self.base, "log_snr")
        r, noise = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid()
        first, last = r[0], r[-1]
        # With q = (r_0 - r) / (r_0 - r_{T-1}) the new r is r_0 (1 - q), and 1 - r^2 is the first step's noise plus
        # r_0^2 q (2 - q). r_0 - r is taken from the noise, 1 - r^2, which keeps its digits where r is nearly 1.
        q = (noise - noise[0]) / ((first + r) * (first - last))
        signal = first.square() * ((r - last) / (first - last)).square()
        return torch.log(signal) - torch.log(noise[0] + first.square() * q * (2 - q))


@dataclass(frozen=True)
class Discretised(Wrapper):
    """A continuous schedule on T points, u = (t + 1) / T (for EDM: of its grid).

    Arguments:
        base: continuous.
        timesteps: T, at least 1.
    """

    timesteps: int = bounded(1000, at_least=1, at_most=2**31 - 1)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base.discrete:
            raise self._refuse_base("a continuous schedule (to thin out a discrete one there is Respaced)")

    def compute_log_snr_table(self) -> Tensor:
        u = torch.arange(1, self.timesteps + 1, dtype=torch.float64) / self.timesteps
        return self.base.compute_log_snr(self.base.from_unit(u))
