"""Schedules of T steps, by the names of their papers. At t = 0 one step of noise has been added (the papers' t = 1)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.schedules.base import BetaSchedule


@dataclass(frozen=True)
class LinearBeta(BetaSchedule):
    """beta_t rises linearly from ``beta_start`` to ``beta_end``.

    Ho, Jain and Abbeel 2020, "Denoising Diffusion Probabilistic Models", section 4.

    Arguments:
        timesteps: T, at least 1.
        beta_start, beta_end: in (0, 1), beta_start <= beta_end.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ends(self)

    def _betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.timesteps, dtype=torch.float64)


@dataclass(frozen=True)
class ScaledLinearBeta(BetaSchedule):
    """sqrt(beta_t) rises linearly: the schedule of latent diffusion and Stable Diffusion.

    Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models" (their code calls it linear).

    Arguments:
        timesteps: T, at least 1.
        beta_start, beta_end: in (0, 1), beta_start <= beta_end.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ends(self)

    def _betas(self) -> Tensor:
        root = torch.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), self.timesteps, dtype=torch.float64)
        return root.square()


@dataclass(frozen=True)
class Cosine(BetaSchedule):
    """alpha_bar falls as a squared cosine; beta_t is clipped at ``max_beta``.

    Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", equation 17.

    Arguments:
        timesteps: T, at least 1.
        s: the offset that keeps the first betas from being too small, >= 0.
        max_beta: in (0, 1).
    """

    s: float = 0.008
    max_beta: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_number("s", 0, math.inf)
        self._set_number("max_beta", 0, 1, open_low=True, open_high=True)

    def _betas(self) -> Tensor:
        # 1 - cos^2(b) / cos^2(a) = sin(b - a) sin(b + a) / cos^2(a): no cancellation, unlike the ratio itself.
        step = math.pi / 2 / (1 + self.s) / self.timesteps
        angle = torch.arange(self.timesteps, dtype=torch.float64) * step + math.pi / 2 * self.s / (1 + self.s)
        betas = math.sin(step) * torch.sin(2 * angle + step) / torch.cos(angle).square()
        return betas.clamp_max(self.max_beta)


def _check_ends(schedule: LinearBeta | ScaledLinearBeta) -> None:
    schedule._set_number("beta_start", 0, 1, open_low=True, open_high=True)
    schedule._set_number("beta_end", 0, 1, open_low=True, open_high=True)
    if schedule.beta_start > schedule.beta_end:
        raise ValueError(
            f"schedule.beta_start must not be greater than schedule.beta_end, but got {schedule.beta_start} and "
            f"{schedule.beta_end}: noise grows with t."
        )
