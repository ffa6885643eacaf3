"""Wrappers that shift the log-SNR, by how large an image is or by how many tokens it has."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaug.checks import bounded, refuse
from diffaug.schedules.base import Schedule, table
from diffaug.schedules.numbers import keep
from diffaug.schedules.wrappers import Wrapper

AUTO = "auto"


def find_auto(schedule: Schedule, where: str = "schedule") -> str | None:
    """Return the key of what a schedule takes from each batch, such as schedule.image; None where it takes nothing.

    Arguments:
        where: the YAML key of the schedule.
    """
    if not isinstance(schedule, Wrapper):
        return None
    if isinstance(schedule, Sized) and getattr(schedule, schedule.measured) == AUTO:
        return f"{where}.{schedule.measured}"
    return find_auto(schedule.base, f"{where}.base")


@dataclass(frozen=True)
class Sized(Wrapper):
    """A wrapper that goes by a size: a number, or that of each batch.

    Attributes:
        measured: the field that holds it: a number, or "auto".
    """

    measured: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        super().__post_init__()
        size = getattr(self, self.measured)
        a_number = isinstance(size, (int, float)) and not isinstance(size, bool) and 1 <= size < math.inf
        if not a_number and size not in (AUTO, getattr(type(self), self.measured)):  # the default: for `Shifted` None
            raise refuse(f"schedule.{self.measured}", size, f"a finite number >= 1, or {AUTO}, that of each batch")

    def measure(self, shape: Sequence[int]) -> float:
        """Return the size of images of this shape, (B, C, H, W): the side of a square with as many pixels."""
        if len(shape) < 4:
            raise ValueError(
                f"schedule.image={AUTO} takes the height and width of a batch, (B, C, H, W), but got one of shape "
                f"{tuple(shape)}: set schedule.image to a number."
            )
        side = math.sqrt(shape[-2] * shape[-1])
        return int(side) if side.is_integer() else side

    def at_shape(self, shape: Sequence[int]) -> Schedule:
        schedule = super().at_shape(shape)
        return _settle(schedule, self.measure(shape)) if getattr(self, self.measured) == AUTO else schedule


@keep
def _settle(schedule: Any, size: float) -> Schedule:
    return replace(schedule, **{schedule.measured: size})


@dataclass(frozen=True)
class ShiftedByOne(Sized):
    """The base with its log-SNR shifted by one number, the same at every t."""

    @property
    @abstractmethod
    def shift(self) -> float:
        """What is added to the log-SNR."""

    def compute_log_snr(self, t: Tensor) -> Tensor:
        return self.base.compute_log_snr(t) + self.shift

    def compute_log_snr_table(self) -> Tensor:
        return table(self.base, "log_snr") + self.shift

    def compute_t_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.base.compute_t_of_log_snr(log_snr - self.shift)


@dataclass(frozen=True)
class Shifted(ShiftedByOne):
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

    @property
    def shift(self) -> float:
        if self.factor is not None:
            return -2 * math.log(self.factor)
        return 0.0 if isinstance(self.image, str) else 2 * math.log(self.base_image / (self.image or self.base_image))


@dataclass(frozen=True)
class ShiftedByTokens(ShiftedByOne):
    """The base with sigma / alpha e^mu times as large at every t, mu linear in how many tokens an image has.

    Dynamic shifting as in FLUX.1 (Black Forest Labs 2024; ``calculate_shift`` of diffusers' FluxPipeline, whose numbers
    are the defaults), there over `Rectified`: mu goes from 0.5 at 256 tokens to 1.15 at 4096, and on beyond either.

    Arguments:
        base: any schedule.
        tokens: how many, at least 1, or "auto": of each batch that is noised, (B, C, H, W), but not of clips: it does
            not know which axis holds frames; where there is no batch, as in a plot, the base is shown as it is.
        patch: the side of the square of pixels, or of latents, that makes a token.
        few: where mu is mu_few, at most many.
        many: where mu is mu_many.
        mu_few: in [-10, 10].
        mu_many: in [-10, 10].
    """

    measured: ClassVar[str] = "tokens"
    tokens: int | float | str = AUTO
    patch: int = bounded(2, at_least=1)
    few: int = bounded(256, at_least=1, at_most="many")
    many: int = bounded(4096, at_least=1)
    mu_few: float = bounded(0.5, at_least=-10, at_most=10)
    mu_many: float = bounded(1.15, at_least=-10, at_most=10)

    def measure(self, shape: Sequence[int]) -> float:
        if len(shape) != 4:
            raise ValueError(
                f"schedule.tokens={AUTO} counts the patches of a batch, (B, C, H, W), but got one of shape "
                f"{tuple(shape)}: set schedule.tokens=N, a number."
            )
        return max(1.0, shape[2] * shape[3] / self.patch**2)

    @property
    def shift(self) -> float:
        if isinstance(self.tokens, str):
            return 0.0
        share = (self.tokens - self.few) / max(self.many - self.few, 1)
        return -2 * (self.mu_few + share * (self.mu_many - self.mu_few))


@dataclass(frozen=True)
class InterpolatedShift(Sized):
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
