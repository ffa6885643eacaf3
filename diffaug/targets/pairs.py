"""Pairs of states: an earlier x_s of each image beside x_t, for consistency training and distillation.

How the times are drawn is a law of `diffaug.times.pair_laws`. How the two states share their noise is another
matter. Two joint laws have the marginals x_s = alpha_s x_0 + sigma_s epsilon_s and x_t = alpha_t x_0 + sigma_t epsilon:

same    epsilon_s = epsilon: both lie on the straight line of one noise (Song et al. 2023, "Consistency Models",
        algorithm 3, consistency training).
chain   epsilon_s = r epsilon + sqrt(1 - r^2) xi with r = e^{(log_snr_t - log_snr_s) / 2} and xi new: the diffusion's
        own joint law, x_t being a `step` on from x_s (its covariance with x_s is alpha_t / alpha_s sigma_s^2).

epsilon is what it would be without the pair; so are t and x_t, unless the law of the times makes a t of its own.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaug.checks import check_fields, instance, one_of
from diffaug.schedules import Schedule
from diffaug.schedules.level import Level
from diffaug.times.pair_laws import PairTimes, UniformEarlier, interval

NOISES = ("same", "chain")


@dataclass(frozen=True)
class Pair:
    """The law by which an earlier time s and state x_s are drawn beside t and x_t.

    Arguments:
        times: how the times are drawn; see `diffaug.times.pair_laws`.
        noise: how the two states share their noise, "same" or "chain"; see the top.

    A discrete s of -1 is the clean image, x_s = x_0, as in `ForwardProcess.step`. A continuous s goes down to unit
    time 0. t is never earlier than s.
    """

    times: PairTimes = field(default_factory=UniformEarlier)
    noise: str = one_of("same", NOISES)

    def __post_init__(self) -> None:
        instance("pair.times", self.times, PairTimes, "a law of diffaug.times, such as TwoDraws()")
        check_fields(self, "pair")

    def numbers(
        self, fields: Collection[str], schedule: Schedule, t: Tensor, s: Tensor, sigma_data: float
    ) -> dict[str, Tensor]:
        """Return the times and numbers of pairs by their fields' names, each of t's shape; see `PAIR_FIELDS`.

        Arguments:
            fields: what a batch holds.
            schedule: of which t and s are native times.
            t: the later times, of any shape.
            s: the earlier ones, likewise.
            sigma_data: the standard deviation of the images, for the weight.
        """
        made = {"s": s, "same": s == t}
        if "interval" in fields:
            made["interval"] = interval(schedule, t, s)
        if "pair_weight" in fields:
            made["pair_weight"] = self.times.weight(schedule, t, s, sigma_data)
        if self.times.third:
            made["r"] = self.times.between(schedule, t, s)
        return made

    def mix(self, schedule: Schedule, t: Tensor, s: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return x_s as p x_0 + q epsilon + r xi: (p, q) float32 of shape (*, 1, 2), and r float32 of t's shape.

        Arguments:
            schedule: of which t and s are native times.
            t: the later times, of any shape.
            s: the earlier ones, likewise.
            scale: as in `mixes`.
        """
        clean = s < 0
        level_s = Level(schedule, torch.where(clean, 0, s) if schedule.discrete else s)
        alpha = torch.where(clean, 1.0, level_s.alpha)
        sigma = torch.where(clean, 0.0, level_s.sigma)
        share, fresh = torch.ones_like(sigma), torch.zeros_like(sigma)
        if self.noise == "chain":
            # Between two times of no signal at all nothing is shared, as in `ForwardProcess.step`.
            fall = (Level(schedule, t).log_snr - level_s.log_snr).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            fall = torch.where(s == t, 0.0, fall)  # one and the same state
            share, fresh = (fall / 2).exp(), (-torch.expm1(fall)).sqrt()
        mix = torch.stack((alpha * scale, sigma * share), -1).float()
        return mix.unsqueeze(-2), (sigma * fresh).float()
