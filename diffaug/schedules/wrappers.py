"""Wrappers: schedules that vary another one, their field ``base``.

A wrapper keeps its base's scaling, and its time where it can. In YAML the base is chosen by a group of its own, nested
as deep as one likes: ``schedule=zero_terminal_snr schedule@schedule.base=cosine``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import bounded, instance, refuse
from diffaug.schedules.base import VARIANCE_PRESERVING, Scaling, Schedule, table
from diffaug.schedules.numbers import keep

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
class ShiftedByOne(Wrapper):
    """The base with its log-SNR shifted by one number, the same at every t."""

    @property
    def shift(self) -> float:
        """What is added to the log-SNR."""
        raise NotImplementedError

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return self.base.compute_log_snr(t) + self.shift

    def compute_log_snr_table(self) -> Tensor:
        return table(self.base, "log_snr") + self.shift

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.compute_t_of_log_snr(log_snr - self.shift)


AUTO = "auto"


def find_auto(schedule: Schedule, where: str = "schedule") -> str | None:
    """Return the key of what a schedule takes from each batch, such as schedule.image; None where it takes nothing.

    Arguments:
        where: the YAML key of the schedule.
    """
    if not isinstance(schedule, Wrapper):
        return None
    own = (f"{where}.{name}" for name in ("image", "tokens") if getattr(schedule, name, None) == AUTO)
    return next(own, None) or find_auto(schedule.base, f"{where}.base")


@dataclass(frozen=True)
class _Sized(Wrapper):
    """A schedule for images of a size: a number of pixels, or that of each batch."""

    def _check_image(self, image: Any) -> None:
        a_number = isinstance(image, (int, float)) and not isinstance(image, bool) and 1 <= image < math.inf
        if image != AUTO and not a_number:
            raise refuse("schedule.image", image, f"a finite number >= 1, or {AUTO}, the size of each batch")

    def at_shape(self, shape: Sequence[int]) -> Schedule:
        schedule: Any = super().at_shape(shape)
        if schedule.image != AUTO:
            return schedule
        if len(shape) < 4:
            raise ValueError(
                f"schedule.image={AUTO} takes the height and width of a batch, (B, C, H, W), but got one of shape "
                f"{tuple(shape)}: set schedule.image to a number."
            )
        side = math.sqrt(shape[-2] * shape[-1])
        return _at_side(schedule, int(side) if side.is_integer() else side)


@keep
def _at_side(schedule: Any, side: float) -> Any:
    return replace(schedule, image=side)


@dataclass(frozen=True)
class Shifted(ShiftedByOne, _Sized):
    """The base with its log-SNR shifted by -2 ln ``factor``: sigma / alpha is ``factor`` times as large at every t.

    A larger image needs more noise, because its neighbouring pixels say the same thing. Give ``factor``, or ``image``
    and ``base_image``, and the factor is image / base_image:

    - Variance preserving: SNR' = SNR (base_image / image)^2. Hoogeboom, Heek and Salimans 2023, "simple diffusion",
      equation 5. The same as scaling the images by 1 / factor (Chen 2023, "On the Importance of Noise Scheduling").
    - Straight: the noise level u becomes factor u / (1 + (factor - 1) u). Esser et al. 2024, "Scaling Rectified Flow
      Transformers", equation 23, with factor sqrt(m / n) for m pixels in place of n; they choose 3.0 at 1024 x 1024.

    t stays the base's. A network that was trained on the shifted time, as SD3, is given the field ``sigma``.

    Arguments:
        base: any schedule.
        factor: in [1e-6, 1e6], or None to take it from the sizes.
        image: the images' size in pixels, at least 1: the side of a square, or sqrt(height width). "auto" takes it from
            each batch that is noised (of latents, theirs); where there is none, as in a plot of the schedule or a
            report, the base is shown as it is, as for images of ``base_image``.
        base_image: the size for which the base is right, at least 1.
    """

    factor: float | None = bounded(None, at_least=1e-6, at_most=1e6)
    image: int | float | str | None = None
    base_image: int = bounded(64, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is None and self.image is None:
            wanted = f"a number in [1e-06, 1e+06] where schedule.image is not given either ({AUTO}: each batch's own)"
            raise refuse("schedule.factor", None, wanted)
        if self.image is not None:
            self._check_image(self.image)

    @property
    def shift(self) -> float:
        if self.factor is not None:
            return -2 * math.log(self.factor)
        return 0.0 if isinstance(self.image, str) else 2 * math.log(self.base_image / (self.image or self.base_image))


@dataclass(frozen=True)
class InterpolatedShift(_Sized):
    """The base with its log-SNR shifted by an amount interpolated in unit time between those for two sizes of image.

    log_snr'(u) = log_snr(u) + (1 - u) 2 ln(base_image_least_noise / image) + u 2 ln(base_image_most_noise / image), u
    the unit time ((t + 1) / T if discrete). Hoogeboom, Heek and Salimans 2023, "simple diffusion", equation 6.

    A constant shift to larger images leaves little time to fine details, which are learned where there is little noise.
    With 256 at least and 32 at most noise, the default, it is given back: of 512 pixels and the cosine schedule, SNR
    exceeds 1 in 20.2 % of unit time, in place of 7.9 % under the constant shift from 64. This is the direction of
    k-diffusion and of lucidrains' denoising-diffusion-pytorch, with which models were trained. The paper's equation, as
    printed, has the two sizes exchanged (32 at u = 0, 256 at u = 1), which takes more of that time: 4.3 % is left. For
    that, exchange them here. (k-diffusion holds the ends of the log-SNR where they were; here, as in lucidrains' code,
    they are shifted too.)

    Arguments:
        base: any schedule whose log-SNR falls fast enough that it still falls, or stays, after the interpolation.
        image: the images' size in pixels, at least 1, or "auto", as in `Shifted`; without a batch it is then
            base_image_least_noise.
        base_image_least_noise: the size for which the base is right at u = 0, at least 1.
        base_image_most_noise: likewise at u = 1.
    """

    image: int | float | str = 512
    base_image_least_noise: int = bounded(256, at_least=1)
    base_image_most_noise: int = bounded(32, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_image(self.image)
        u = torch.linspace(0, 1, 4097, dtype=torch.float64, device="cpu")
        log_snr = table(self, "log_snr") if self.discrete else self.compute_log_snr(self.base.from_unit(u))
        if bool((log_snr[1:] > log_snr[:-1]).any()):
            raise refuse(
                "schedule.base_image_most_noise",
                self.base_image_most_noise,
                f"nearer to schedule.base_image_least_noise, {self.base_image_least_noise}, or less, in [1, ...]: with "
                f"{self.base!r} the log-SNR would rise somewhere, and noise must grow with t",
            )

    def _shift(self, u: Tensor) -> Tensor:
        image = self.base_image_least_noise if isinstance(self.image, str) else self.image
        least, most = (2 * math.log(base / image) for base in (self.base_image_least_noise, self.base_image_most_noise))
        return (1 - u) * least + u * most

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return self.base.compute_log_snr(t) + self._shift(self.base.to_unit(t, torch.float64))

    def compute_log_snr_table(self) -> Tensor:
        u = torch.arange(1, self.timesteps + 1, dtype=torch.float64) / self.timesteps
        return table(self.base, "log_snr") + self._shift(u)


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
