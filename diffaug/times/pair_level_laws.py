"""Laws of the times of a pair that are stated in the noise level, sigma / alpha, and curricula of them.

A curriculum goes by how many samples the run has handed out: those of the epochs before, plus the place in this one. So
it is the same for any batch size, on any ranks and after a resume, and there is nothing to keep for it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import bounded, one_of, refuse
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import points, uniforms
from diffaug.schedules import Schedule
from diffaug.schedules.level import LOG_SNR_TOLD, Level
from diffaug.schedules.numbers import sigmoid
from diffaug.times.densities import Times
from diffaug.times.pair_laws import NOWHERE, PairPlaces, PairTimes, TwoTimes, grid_cell, require, round_below

GROWTHS = ("doubling", "square_root")


@dataclass(frozen=True)
class SigmaRatio(PairTimes):
    """s has the noise level r = sigma (1 - (1 + k sigmoid(-b sigma)) / q^stage), at least 0, where t has sigma.

    Geng et al. 2024, "Consistency Models Made Easy", the mapping function of their section 3, with the defaults of
    their code for CIFAR-10 (q = 4 for ImageNet). Checked against that code (locuslab/ect, training/loss.py,
    training/ct_training_loop.py, run_ecm.sh), whose stage counts from 0, not against the paper's text. sigma is
    sigma(t) / alpha(t), EDM's t, and r is as low as the schedule goes. There each of eight stages lasts 3.2 million
    images: ``last_stage=8, samples=25_600_000``. ``pair_weight`` is that code's, EDM's on x_0 at t.

    Arguments:
        q: the base by which the step shrinks, > 1.
        k: how much longer a step is where sigma is small, >= 0.
        b: how soon that ends as sigma grows, >= 0.
        stage: the exponent, >= 1; the first is mostly plain denoising, r = 0.
        last_stage: the exponent at the end of a curriculum; None keeps ``stage``.
        samples: over how many samples handed out the stages go from the first to the last, each as long.
    """

    continuous = True
    q: float = bounded(2.0, above=1)
    k: float = bounded(8.0, at_least=0)
    b: float = bounded(1.0, at_least=0)
    stage: int = bounded(1, at_least=1, at_most=64)
    last_stage: int | None = bounded(None, at_least=1, at_most=64)
    samples: int | None = bounded(None, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_curriculum(self, "stage", "last_stage")

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        log_snr = schedule.log_snr(t, torch.float64)
        longer = 1 + self.k * sigmoid(-self.b * (-log_snr / 2).exp())
        ratio = (1 - longer / self.q ** self._stages(places)).clamp_min(0.0)
        return t, round_below(schedule.t_of_log_snr(log_snr - 2 * ratio.log()), t, schedule)

    def _stages(self, places: PairPlaces) -> Any:
        if self.last_stage is None or self.samples is None:
            return self.stage
        handed = require(self, places, "handed").clamp_max(self.samples)
        count = self.last_stage - self.stage + 1
        return (self.stage + handed * count // self.samples).clamp_max(self.last_stage).double()

    def weight(self, schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
        log_snr = schedule.log_snr(t, torch.float64).clamp(-LOG_SNR_TOLD, LOG_SNR_TOLD)
        return (log_snr.exp() + sigma_data**-2).float()


@dataclass(frozen=True)
class Neighbours(PairTimes):
    """t and s are the two neighbours, of a grid even in unit time, between which the process's own t lies.

    On `EDM` this is the Karras grid. Song et al. 2023, "Consistency Models", algorithm 3 (consistency training): with
    uniform times, each pair alike. Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models",
    section 3.5, p(sigma_i) as erf((ln sigma_{i+1} - P_mean) / (sqrt(2) P_std)) - erf((ln sigma_i - P_mean) / ...): with
    `LogNormal(-1.1, 2.0, sigma_min=0.002, sigma_max=80)`, whose share of a cell this is; ``pair_weight`` is theirs,
    1 / (sigma(t) - sigma(s)). Their grids grow, over K samples here, training steps there:

    - doubling (2023, improved): N(k) = min(s_0 2^floor(k / K'), s_1) + 1, K' = floor(K / (log2(floor(s_1 / s_0)) + 1)),
      so N - 1 from s_0 to s_1: ``points=11, last_points=1281``.
    - square_root (2023): N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1, so N from s_0 to s_1 + 1:
      ``points=2, last_points=151``.

    (The square root's growth is checked against openai/consistency_models, cm/script_util.py, the doubling against
    public implementations of the paper; the density and the weight are from memory, not checked against the texts.)

    Arguments:
        points: N, the points of the grid, ends included, in [2, 65536].
        last_points: N at the end of a curriculum; None keeps ``points``.
        samples: K, over how many samples handed out the grid grows.
        growth: doubling or square_root.
    """

    moves_t, continuous = True, True
    points: int = bounded(18, at_least=2, at_most=2**16)
    last_points: int | None = bounded(None, at_least=2, at_most=2**16)
    samples: int | None = bounded(None, at_least=1)
    growth: str = one_of("doubling", GROWTHS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_curriculum(self, "points", "last_points")

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        return grid_cell(schedule, t, self.cells(t, places))

    def cells(self, t: Tensor, places: PairPlaces) -> Tensor:
        """Return N - 1 of each sample, int64, of t's shape."""
        if self.last_points is None or self.samples is None:
            return torch.full_like(t, self.points - 1, dtype=torch.int64)
        handed, last = require(self, places, "handed").clamp_max(self.samples), self.last_points - 1
        if self.growth == "doubling":
            first = self.points - 1
            length = max(1, math.floor(self.samples / (math.log2(last // first) + 1)))
            return (first << (handed // length).clamp_max(16)).clamp_max(last)
        low, high = self.points**2, (last + 1) ** 2
        root = (handed.double() / self.samples * (high - low) + low).sqrt()
        return (root - 1).ceil().long().clamp(1, last)

    def weight(self, schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
        sigmas = [(Level(schedule, time).log_snr.clamp_min(-LOG_SNR_TOLD) / -2).exp() for time in (t, s)]
        least = torch.finfo(torch.float32).tiny  # beyond the level a batch tells both are one
        return (1 / (sigmas[0] - sigmas[1]).clamp_min(least)).float()


@dataclass(frozen=True)
class ConstantDecrement(PairTimes):
    """s is uniform over the earlier times, and r between them: t less eta_max / 2^halvings in eta = sigma / alpha.

    Zhou, Ermon and Song 2025, "Inductive Moment Matching": t uniform over [0, T], s over [0, t], r(s, t) = max(s,
    eta^-1(eta(t) - (eta_max - eta_min) / 2^k)) with eta_min = 0. Groups of M samples share s, r and t, and each group
    is matched as one. Their T = 0.994 of the straight path is ``schedule=truncated`` with ``high=0.994``.
    ``pair_weight`` is 1/2 sigmoid(b - log_snr) (-d log_snr / dt) alpha^a / (alpha^2 + sigma^2). Checked against two
    public implementations of the loss (the authors' repository has no training code), not against the paper's text; the
    defaults are those for CIFAR-10, for ImageNet k is 12, a is 2 and b 4.

    The groups are runs of M places of the epoch's order, and `diffaug.DiffusionDataModule` hands each out whole, to one
    process: ``data.batch_size`` must be a multiple of M.

    Arguments:
        halvings: k, in [1, 40].
        eta_max: > 0.
        group: M, >= 1.
        a: the exponent of alpha in the weight.
        b: the shift of log-SNR in the weight.
    """

    moves_t, continuous, third = True, True, True
    halvings: int = bounded(15, at_least=1, at_most=40)
    eta_max: float = bounded(160.0, above=0)
    group: int = bounded(4, at_least=1, at_most=2**20)
    a: float = bounded(1.0, at_least=0)
    b: float = bounded(5.0, at_least=-100, at_most=100)

    def draw(self, keys: Keys, schedule: Schedule, times: Times, t: Tensor, places: PairPlaces = NOWHERE) -> TwoTimes:
        number = require(self, places, "position") // self.group
        # The keys that its samples' own times and second times would be of, had they any.
        rows = keys.shared(keys.order).rows.clone()
        rows[2], rows[3] = number & 0xFFFFFFFF, number >> 32 & 255
        shared = Keys(rows)
        t = times.draw(shared, schedule, number)
        unit = schedule.to_unit(t, torch.float64) * uniforms(points(shared, Purpose.SECOND_TIME))
        return t, round_below(schedule.from_unit(unit), t, schedule)

    @property
    def together(self) -> int:
        return self.group

    def between(self, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
        eta = (schedule.log_snr(t, torch.float64) / -2).exp() - self.eta_max / 2**self.halvings
        return torch.maximum(s, round_below(schedule.t_of_log_snr(-2 * eta.clamp_min(0.0).log()), t, schedule))

    def weight(self, schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float) -> Tensor:
        level = Level(schedule, t, limit=True)
        share = level.alpha**self.a / (level.alpha.square() + level.sigma.square())
        return (sigmoid(self.b - level.log_snr) * -level.slope / 2 * share).float()


def _check_curriculum(law: Any, first: str, last: str) -> None:
    """Refuse half a curriculum, and one that goes back."""
    end = getattr(law, last)
    if (end is None) != (law.samples is None):
        raise ValueError(
            f"pair.times.{last} and pair.times.samples make a curriculum together, but got {end} and {law.samples}: "
            "set both, or neither."
        )
    if end is not None and end <= getattr(law, first):
        raise refuse(f"pair.times.{last}", end, f"greater than pair.times.{first}, {getattr(law, first)}")
