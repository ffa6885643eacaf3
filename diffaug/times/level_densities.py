"""Densities over the noise level, by the names of their papers: in sigma (sigma / alpha on any schedule) or log-SNR.

All but `LaplaceLogSNR` are stated in sigma, whose log-SNR is -2 ln sigma.
"""

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded
from diffaug.times.densities import LevelTimes, ndtri


@dataclass(frozen=True)
class SplitLogNormal(LevelTimes):
    """ln sigma from two half normals that meet at ``mode``, with a standard deviation of their own each.

    The density is continuous, so the side below holds a share std_low / (std_low + std_high) (Crowson, k-diffusion).

    Arguments:
        mode: of ln sigma.
        std_low: below the mode, > 0.
        std_high: above the mode, > 0.
    """

    mode: float = -1.2
    std_low: float = bounded(1.2, above=0)
    std_high: float = bounded(1.2, above=0)

    def log_snr(self, q: Tensor) -> Tensor:
        total = self.std_low + self.std_high
        # Each half is half of a whole normal: the share below the mode, or above it, is at most 1/2 of that.
        below = (q * (total / self.std_low / 2)).clamp_max(0.5)
        above = ((1 - q) * (total / self.std_high / 2)).clamp_max(0.5)
        return -2 * (self.mode + self.std_low * ndtri(below) - self.std_high * ndtri(above))


@dataclass(frozen=True)
class LogUniform(LevelTimes):
    """ln sigma uniform between its bounds, by default those of EDM's sampling grid (Karras et al. 2022, table 1).

    Arguments:
        sigma_min: in (0, sigma_max).
        sigma_max: above sigma_min, finite.
    """

    sigma_min: float = bounded(0.002, above=0, below="sigma_max")
    sigma_max: float = bounded(80.0, above=0)

    def log_snr(self, q: Tensor) -> Tensor:
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return -2 * (low + q * (high - low))


@dataclass(frozen=True)
class Truncatable(LevelTimes):
    """A density over sigma > 0 that can be cut off at both sides: a subclass defines `cdf` and `log_sigma`.

    Arguments:
        sigma_min: where it begins, >= 0.
        sigma_max: where it ends, > sigma_min; None does not end it.
    """

    _: KW_ONLY
    sigma_min: float = bounded(0.0, at_least=0, below="sigma_max")
    sigma_max: float | None = bounded(None, above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._bounds()

    def _bounds(self) -> tuple[float, float]:
        """Return the share of the whole density below sigma_min, and below sigma_max."""
        low = self.cdf(self.sigma_min) if self.sigma_min > 0 else 0.0
        high = 1.0 if self.sigma_max is None else self.cdf(self.sigma_max)
        if high - low < 1e-6:
            raise ValueError(
                f"times.sigma_min and times.sigma_max must leave some of the density, but between {self.sigma_min} "
                f"and {self.sigma_max} lies a share of {high - low:.1g} of it. Widen them, or use times=log_uniform."
            )
        return low, high

    def log_snr(self, q: Tensor) -> Tensor:
        low, high = self._bounds()
        whole = low + q * (high - low)
        return -2 * self.log_sigma(whole.clamp(2.0**-60, 1 - 2.0**-53))

    @abstractmethod
    def cdf(self, sigma: float) -> float:
        """Return the share of the whole density below sigma."""

    @abstractmethod
    def log_sigma(self, q: Tensor) -> Tensor:
        """Return ln sigma at a quantile of the whole density, float64."""


@dataclass(frozen=True)
class LogNormal(Truncatable):
    """ln sigma ~ N(mean, std^2), cut off at sigma_min and sigma_max if wanted.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1 (P_mean, P_std);
    Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models": mean -0.4, std 1.

    Arguments:
        mean: of ln sigma.
        std: of ln sigma, > 0.
    """

    mean: float = -1.2
    std: float = bounded(1.2, above=0)

    def cdf(self, sigma: float) -> float:
        return math.erfc((self.mean - math.log(sigma)) / (self.std * math.sqrt(2))) / 2

    def log_sigma(self, q: Tensor) -> Tensor:
        return self.mean + self.std * ndtri(q)


@dataclass(frozen=True)
class LogLogistic(Truncatable):
    """ln sigma is logistic about ln sigma_data, cut off at sigma_min and sigma_max (Crowson, k-diffusion).

    Arguments:
        sigma_data: the median, where the noise is as strong as the data, > 0.
        scale: of ln sigma, > 0.
    """

    sigma_data: float = bounded(0.5, above=0)
    scale: float = bounded(0.5, above=0)

    def cdf(self, sigma: float) -> float:
        return 1 / (1 + (sigma / self.sigma_data) ** (-1 / self.scale))

    def log_sigma(self, q: Tensor) -> Tensor:
        return math.log(self.sigma_data) + self.scale * torch.logit(q)


@dataclass(frozen=True)
class VDiffusion(Truncatable):
    """sigma = sigma_data tan(pi q / 2): the angle of v-diffusion, atan(sigma / sigma_data), is uniform.

    Salimans and Ho 2022, "Progressive Distillation", section 4 (the cosine schedule in angle); as a density over
    sigma, cut off at both sides, Crowson, k-diffusion, whose bounds are the default. Untruncated (sigma_min=0,
    sigma_max=None), it draws a sigma above float16's 65,504 once in 200,000 times.

    Arguments:
        sigma_min: where it begins, as above.
        sigma_max: where it ends, as above.
        sigma_data: the median, > 0.
    """

    sigma_min: float = bounded(1e-3, at_least=0, below="sigma_max")
    sigma_max: float | None = bounded(1e3, above=0)
    sigma_data: float = bounded(0.5, above=0)

    def cdf(self, sigma: float) -> float:
        return 2 / math.pi * math.atan(sigma / self.sigma_data)

    def log_sigma(self, q: Tensor) -> Tensor:
        # ln tan is odd about 1/2: from the nearer end, so that neither tail loses digits.
        tail = torch.log(torch.tan(math.pi / 2 * torch.minimum(q, 1 - q)))
        return math.log(self.sigma_data) + torch.where(q < 0.5, tail, -tail)


@dataclass(frozen=True)
class LaplaceLogSNR(LevelTimes):
    """log-SNR ~ Laplace(mean, scale): most draws where signal and noise are alike.

    Hang and Gu 2024, "Improved Noise Schedule for Diffusion Training", as the schedule `diffaug.schedules.Laplace`.

    Arguments:
        mean: of log-SNR (their mu).
        scale: of log-SNR (their b; 0.5 to 0.75 do well), > 0.
    """

    mean: float = 0.0
    scale: float = bounded(0.5, above=0)

    def log_snr(self, q: Tensor) -> Tensor:
        tail = torch.log(2 * torch.minimum(q, 1 - q))  # <= 0
        return self.mean - self.scale * torch.where(q < 0.5, tail, -tail)
