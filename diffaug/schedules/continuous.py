"""Schedules in continuous time, by the names of their papers; u in [0, 1], noise at 1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.schedules.base import STRAIGHT, Scaling, Schedule


@dataclass(frozen=True)
class Rectified(Schedule):
    """x_u = (1 - u) x_0 + u epsilon: the straight path of rectified flow and flow matching.

    Liu, Gong and Liu 2023, "Flow Straight and Fast", equation 1 (data and noise exchanged: theirs is noise at 0);
    Lipman et al. 2023, "Flow Matching for Generative Modeling", section 4.1.
    """

    @property
    def scaling(self) -> Scaling:
        return STRAIGHT

    def _log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))
