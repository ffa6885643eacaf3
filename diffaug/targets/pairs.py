"""Pairs of states: an earlier x_s of each image beside x_t, for consistency training and distillation.

Two joint laws share the marginals x_s = alpha_s x_0 + sigma_s epsilon_s and x_t = alpha_t x_0 + sigma_t epsilon:

same    epsilon_s = epsilon: both lie on the straight line of one noise (Song et al. 2023, "Consistency Models",
        algorithm 3, consistency training).
chain   epsilon_s = r epsilon + sqrt(1 - r^2) xi with r = e^{(log_snr_t - log_snr_s) / 2} and xi new: the diffusion's
        own joint law, x_t being a `step` on from x_s (its covariance with x_s is alpha_t / alpha_s sigma_s^2).

x_t, epsilon and t are what they would be without the pair.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, one_of
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import indices, points, uniforms
from diffaug.schedules import Schedule
from diffaug.targets.level import Level

LAWS = ("same", "chain")


@dataclass(frozen=True)
class Pair:
    """The law by which an earlier time s and state x_s are drawn, given t and x_t.

    Arguments:
        law: "same" or "chain"; see the top.
        steps: s is one of so many equal steps of unit time before t (Song et al. 2023: adjacent times of N). None:
            s is uniform over all earlier times.

    A discrete s of -1 is the clean image, x_s = x_0, as in `ForwardProcess.step`. A continuous s goes down to unit
    time 0. t is always later, but where a continuous t is itself the lowest time: there s is t.
    """

    law: str = one_of("same", LAWS)
    steps: int | None = bounded(None, at_least=1)

    def __post_init__(self) -> None:
        check_fields(self, "process.pair")

    def second_times(self, keys: Keys, schedule: Schedule, t: Tensor) -> Tensor:
        """Draw s of each sample, int64 or float32, shape (B,): of the sample's own key and t alone."""
        if schedule.discrete:
            if self.steps is not None:
                return (t - max(1, round(schedule.timesteps / self.steps))).clamp_min(-1)
            return indices(points(keys, Purpose.SECOND_TIME), t + 1) - 1
        unit = schedule.to_unit(t, torch.float64)
        if self.steps is not None:
            earlier = (unit - 1 / self.steps).clamp_min(0.0)
        else:
            earlier = unit * uniforms(points(keys, Purpose.SECOND_TIME))
        s = schedule.from_unit(earlier).float()
        return torch.minimum(s, torch.nextafter(t, torch.zeros_like(t)))

    def mix(self, schedule: Schedule, t: Tensor, s: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return x_s as p x_0 + q epsilon + r xi: (p, q) float32 of shape (B, 1, 2), and r float32 of shape (B,).

        Arguments:
            scale: as in `mixes`.
        """
        clean = s < 0
        level_s = Level(schedule, torch.where(clean, 0, s) if schedule.discrete else s)
        alpha = torch.where(clean, 1.0, level_s.alpha)
        sigma = torch.where(clean, 0.0, level_s.sigma)
        share, fresh = torch.ones_like(sigma), torch.zeros_like(sigma)
        if self.law == "chain":
            # Between two times of no signal at all nothing is shared, as in `ForwardProcess.step`.
            fall = (Level(schedule, t).log_snr - level_s.log_snr).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            share, fresh = (fall / 2).exp(), (-torch.expm1(fall)).sqrt()
        mix = torch.stack((alpha * scale, sigma * share), -1).float()
        return mix[:, None], (sigma * fresh).float()
