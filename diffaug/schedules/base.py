"""The interface of schedules: how signal turns into noise with t.

A noised image is ``x_t = alpha(t) x_0 + sigma(t) epsilon`` with ``epsilon ~ N(0, I)``. A schedule is one function, the
log signal-to-noise ratio ``log_snr(t) = ln(alpha(t)^2 / sigma(t)^2)`` (Kingma et al. 2021, "Variational Diffusion
Models"), and a scaling that turns it into alpha and sigma; everything else is derived here.

| scaling             | alpha(log_snr)   | sigma(log_snr)    | identity              |
|---------------------|------------------|-------------------|-----------------------|
| variance preserving | sqrt(sigmoid(l)) | sqrt(sigmoid(-l)) | alpha^2 + sigma^2 = 1 |
| variance exploding  | 1                | exp(-l / 2)       | alpha = 1             |
| straight            | sigmoid(l / 2)   | sigmoid(-l / 2)   | alpha + sigma = 1     |

(Two more scalings, each of one schedule, are in `diffaug.schedules.paths`.)

The one constraint: log_snr never rises with t. Noise grows with t, always.

t is the schedule's native time: int64 in [0, T) if discrete, a float if continuous (the papers' u in [0, 1]; EDM's
is sigma itself). A discrete t is zero-based: it is the DDPM paper's t + 1, and at t = 0 one step of noise has been
added. ``unit`` maps every kind of time to [0, 1].

Schedules are frozen and hold plain numbers, no tensors: the device follows t. Coefficients are computed in float64
and rounded once; in float32 they are within 2e-7 relative of the exact value at that t.

To add a schedule, write one class, with the range of each number beside it, and one file in configs/schedule:

    @dataclass(frozen=True)
    class PowerLaw(Schedule):
        "SNR(u) = ((1 - u) / u)^power, variance preserving."

        power: float = bounded(2.0, above=0, at_most=100)

        def compute_log_snr(self, t: Tensor) -> Tensor:
            return self.power * (torch.log1p(-t) - torch.log(t))

What is defined, all in float64, is ``compute_log_snr(t)`` if the schedule is continuous, ``compute_betas()`` or
``compute_log_snr_table()``, shape (T,), if it is discrete: derive that from `BetaSchedule`, which has ``timesteps``.
Another scaling is the property ``scaling``. ``compute_t_of_log_snr(log_snr)``, where there is a closed form, and
``compute_alpha_bars()``, where the table loses digits, may be defined too. A schedule that varies another is a
`diffaug.schedules.wrappers.Wrapper`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields
from diffaug.schedules.numbers import in_float64, keep, log_odds, sigmoid


@dataclass(frozen=True)
class Scaling:
    """The formulas by which alpha and sigma follow from the log signal-to-noise ratio; see the table at the top."""

    name: str
    of_log_snr: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __repr__(self) -> str:
        return self.name


VARIANCE_PRESERVING = Scaling("variance preserving", lambda x: (sigmoid(x).sqrt(), sigmoid(-x).sqrt()))
VARIANCE_EXPLODING = Scaling("variance exploding", lambda x: (torch.ones_like(x), (-x / 2).exp()))
STRAIGHT = Scaling("straight", lambda x: (sigmoid(x / 2), sigmoid(-x / 2)))


@dataclass(frozen=True)
class Schedule(ABC):  # noqa: B024 - a subclass defines one of two primitives
    """A schedule: the log-SNR as a function of t, and what follows from it.

    A subclass is either abstract or final; vary a final one by wrapping it.

    Attributes:
        timesteps: T, the number of steps, of a discrete schedule; 0 if the schedule is continuous.
    """

    timesteps = 0  # a discrete schedule has a field or a property of this name

    def __post_init__(self) -> None:
        check_fields(self, "schedule")

    def compute_log_snr(self, t: Tensor) -> Tensor:
        """Return the log-SNR at float64 times, of t's shape: what a continuous schedule is."""
        raise self._only("continuous", "a log-SNR between its steps")

    def compute_log_snr_table(self) -> Tensor:
        """Return the log-SNR after each step, float64, shape (T,): what a discrete schedule is."""
        raise self._only("discrete", "a table of log-SNRs")

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at float64 log-SNRs: the inverse of `compute_log_snr`, here by bisection."""
        # Over unit time, where every schedule runs from 0 to 1; 80 halvings reach the last bit of a float64.
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(80):
            middle = (low + high) / 2
            above = self.compute_log_snr(self.from_unit(middle)) > log_snr
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return self.from_unit(high)

    def compute_betas(self) -> Tensor:
        """Return beta_t of a discrete, variance preserving schedule, float64, shape (T,)."""
        return betas_of(table(self, "log_snr"))

    def compute_alpha_bars(self) -> Tensor:
        """Return alpha(t)^2 of a discrete, variance preserving schedule, float64, shape (T,)."""
        return table(self, "log_snr").sigmoid()

    def at_shape(self, shape: Sequence[int]) -> "Schedule":
        """Return the schedule of images of this shape, (B, C, H, W): itself, but where it takes its size from them."""
        return self

    @property
    def discrete(self) -> bool:
        """Whether t counts steps (int64) or is a float."""
        return self.timesteps > 0

    @property
    def scaling(self) -> Scaling:
        """Which of the three scalings; variance preserving unless a schedule says otherwise."""
        return VARIANCE_PRESERVING

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest t at which the schedule is defined, both included."""
        return (0, self.timesteps - 1) if self.discrete else (0.0, 1.0)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The native times of least and of most noise, at unit 0 and 1, as scalar tensors."""
        low, high = self.from_unit(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
        return low, high

    def log_snr(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return ln(alpha(t)^2 / sigma(t)^2), of t's shape and device; +-inf where sigma or alpha is exactly 0."""
        self._check_time(t)
        if self.discrete:
            return table(self, "log_snr", dtype, t.device)[t]
        return in_float64(self.compute_log_snr, t, dtype)

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the coefficients (alpha(t), sigma(t)), each of t's shape and device, rounded once from float64."""
        self._check_time(t)
        if self.discrete:
            return table(self, "alpha", dtype, t.device)[t], table(self, "sigma", dtype, t.device)[t]
        alpha, sigma = in_float64(lambda t: torch.stack(self.scaling.of_log_snr(self.compute_log_snr(t))), t, dtype)
        return alpha, sigma

    def from_unit(self, u: Tensor) -> Tensor:
        """Return the native time at u in [0, 1], 0 the least noise and 1 the most: float64 or int64, of u's shape."""
        if self.discrete:
            return in_float64(lambda u: (u * self.timesteps).floor().clamp(0, self.timesteps - 1), u, torch.int64)
        return in_float64(lambda u: u, u, torch.float64)

    def to_unit(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return where t lies in [0, 1]: the inverse of `from_unit`, (t + 1/2) / T if discrete."""
        if self.discrete:
            return in_float64(lambda t: (t + 0.5) / self.timesteps, t, dtype)
        return t.to(dtype)

    def t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time, as float64, at which the log-SNR has this value: the inverse of `log_snr`.

        Linear in log-SNR between the indices of a discrete schedule; the lowest t where log_snr is flat; the nearest
        end beyond either end.
        """
        if self.discrete:
            values = table(self, "log_snr", device=log_snr.device)
            return in_float64(lambda x: _interpolate(values, x), log_snr, torch.float64)
        return in_float64(self.compute_t_of_log_snr, log_snr, torch.float64)

    @property
    def betas(self) -> Tensor:
        """beta_t, float64 on the CPU, shape (T,): x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) epsilon."""
        return self._variance_preserving_table("betas")

    @property
    def alphas(self) -> Tensor:
        """1 - betas, float64 on the CPU, shape (T,): the DDPM paper's alpha_t, not the coefficient alpha(t)."""
        return 1.0 - self.betas

    @property
    def alpha_bars(self) -> Tensor:
        """The cumulative product of alphas, float64 on the CPU, shape (T,): alpha(t)^2."""
        return self._variance_preserving_table("alpha_bars")

    def _variance_preserving_table(self, name: str) -> Tensor:
        if not self.discrete or self.scaling is not VARIANCE_PRESERVING:
            raise self._only("discrete, variance preserving", name)
        return table(self, name).clone()

    def _only(self, kind: str, what: str) -> TypeError:
        own = f"{'discrete' if self.discrete else 'continuous'}, {self.scaling}"
        return TypeError(
            f"Only a {kind} schedule has {what}, but {self!r} is {own}. Every schedule has alpha_sigma(t)."
        )

    def _check_time(self, t: Tensor) -> None:
        low, high = self.range
        kind = "int64" if self.discrete else "float"
        right = t.dtype == torch.int64 if self.discrete else t.is_floating_point()
        # Values on an accelerator are not looked at: that would halt it.
        if right and (t.device.type != "cpu" or not t.numel() or bool(((t >= low) & (t <= high)).all())):
            return
        span = f"from {t.min().item():g} to {t.max().item():g}" if t.numel() else "(none)"
        wanted = f"t as {kind} in [{low:g}, {high:g}]"
        raise ValueError(f"{type(self).__name__} wants {wanted}, but got {t.dtype} {span}.")


@dataclass(frozen=True)
class BetaSchedule(Schedule):
    """A discrete schedule that is given by its betas: a subclass defines `compute_betas`, float64, shape (T,)."""

    timesteps: int = bounded(1000, at_least=1, at_most=2**31 - 1)

    @abstractmethod
    def compute_betas(self) -> Tensor: ...

    def compute_alpha_bars(self) -> Tensor:
        return (1.0 - table(self, "betas")).cumprod(0)

    def compute_log_snr_table(self) -> Tensor:
        return log_odds(torch.log1p(-table(self, "betas")).cumsum(0))


@keep
def table(
    schedule: Schedule,
    name: str,
    dtype: torch.dtype = torch.float64,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - an immutable value
) -> Tensor:
    """Return a discrete schedule's table over t, shape (T,), kept for each schedule, dtype and device."""
    if dtype != torch.float64 or device.type != "cpu":
        return table(schedule, name).to(dtype).to(device)
    if name == "betas":
        return schedule.compute_betas()
    if name == "log_snr":
        return schedule.compute_log_snr_table()
    if name == "alpha_bars":
        return schedule.compute_alpha_bars()
    alpha, sigma = schedule.scaling.of_log_snr(table(schedule, "log_snr"))
    return {"alpha": alpha, "sigma": sigma}[name]


def betas_of(log_snr: Tensor) -> Tensor:
    """Return the betas of a variance preserving table of log-SNRs, both float64, shape (T,)."""
    log_alpha_bars = torch.nn.functional.logsigmoid(log_snr)
    previous = torch.cat([log_alpha_bars.new_zeros(1), log_alpha_bars[:-1]])
    # Where all signal is gone already (-inf - -inf) a further step adds only noise: beta is 1.
    return -torch.expm1((log_alpha_bars - previous).nan_to_num(nan=-math.inf))


def _interpolate(values: Tensor, log_snr: Tensor) -> Tensor:
    """Return the place in a table that never rises at which it takes each value; the lowest where it is flat."""
    last = len(values) - 1
    right = torch.searchsorted(-values, -log_snr.contiguous()).clamp(0, last)  # the first entry <= the value
    left = (right - 1).clamp_min(0)
    high, low = values[left], values[right]
    step = (high - log_snr) / (high - low)
    # An infinite end has no interior: every value before it is nearest to the finite index beside it.
    step = torch.where(torch.isinf(high) | (high == low) | (log_snr == low), 1.0, step).clamp(0.0, 1.0)
    return torch.where(right == left, right.double(), left + step)
