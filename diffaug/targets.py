"""Targets and fields: everything a batch can hold, from x_0, epsilon and t.

A noised image is x_t = alpha x_0 + sigma epsilon. Everything image-shaped that a network is given or asked for is
such a mix too: ``p(t) x_0 + q(t) epsilon``. The table `IMAGE_FIELDS` holds (p, q) for each; one kernel makes them all.

=========  ==========================  ======================================================================
field      what                        source
=========  ==========================  ======================================================================
x_t        alpha x_0 + sigma epsilon   Ho, Jain and Abbeel 2020, equation 4
epsilon    the noise                   Ho, Jain and Abbeel 2020, equation 14
x_0        the clean image             Ho, Jain and Abbeel 2020, section 3.2
v          alpha epsilon - sigma x_0   Salimans and Ho 2022, section 4
flow       epsilon - x_0               Liu, Gong and Liu 2023, equation 1; Lipman et al. 2023
score      -epsilon / sigma            Song et al. 2021, the gradient of ln q(x_t | x_0)
=========  ==========================  ======================================================================

(p, q) are computed in float64 and rounded once. For a discrete schedule they are a table over t, kept for each
schedule and device, so a batch costs one look-up.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffaug.schedules import Schedule


class Level(NamedTuple):
    """The noise level at some times, float64."""

    alpha: Tensor
    sigma: Tensor


Mix = tuple[Tensor, Tensor]


def _constant(p: float, q: float) -> Callable[[Level], Mix]:
    return lambda level: (torch.full_like(level.alpha, p), torch.full_like(level.alpha, q))


IMAGE_FIELDS: dict[str, Callable[[Level], Mix]] = {
    "x_t": lambda level: (level.alpha, level.sigma),
    "epsilon": _constant(0.0, 1.0),
    "x_0": _constant(1.0, 0.0),
    "v": lambda level: (-level.sigma, level.alpha),
    "flow": _constant(-1.0, 1.0),
    "score": lambda level: (torch.zeros_like(level.sigma), -1.0 / level.sigma),
}
"""Image-shaped fields: name -> (p, q) at a noise level, where the field is p x_0 + q epsilon."""

NUMBER_FIELDS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "t": lambda schedule, t: t,
    "t_embed": lambda schedule, t: (
        t * (1000.0 / schedule.timesteps) if schedule.discrete else 1000.0 * schedule.to_unit(t)
    ),
    "unit": lambda schedule, t: schedule.to_unit(t),
    "log_snr": lambda schedule, t: schedule.log_snr(t),
    "alpha": lambda schedule, t: schedule.alpha_sigma(t)[0],
    "sigma": lambda schedule, t: schedule.alpha_sigma(t)[1],
}
"""Fields of one number a sample: name -> its value at t, shape (B,).

``t_embed`` is the time in the range that embeddings of time expect, whatever T: t 1000 / T if discrete (so t itself
at T = 1000, as diffusers passes it), 1000 times unit time if continuous.
"""

DRAW_FIELDS = ("index", "view")
"""What identifies a draw, int64, shape (B,)."""

FIELDS = (*IMAGE_FIELDS, *NUMBER_FIELDS, *DRAW_FIELDS)


def mixes(schedule: Schedule, fields: tuple[str, ...], t: Tensor, scale: float = 1.0) -> Tensor:
    """(p, q) of each image field at each t, float32, shape (*t.shape, len(fields), 2).

    Arguments:
        scale: what p is multiplied by before it is rounded, where x_0 is handed over in a multiple of its own unit.
    """
    if schedule.discrete:
        return mix_table(schedule, fields, scale, t.device)[t]
    return _mixes(schedule, fields, t, scale)


def _mixes(schedule: Schedule, fields: tuple[str, ...], t: Tensor, scale: float) -> Tensor:
    level = Level(*schedule.alpha_sigma(t, dtype=torch.float64 if t.device.type != "mps" else torch.float32))
    pairs = [IMAGE_FIELDS[name](level) for name in fields]
    return torch.stack([torch.stack((p * scale, q), -1) for p, q in pairs], -2).float()


@functools.lru_cache(maxsize=64)
def mix_table(schedule: Schedule, fields: tuple[str, ...], scale: float, device: torch.device) -> Tensor:
    """(p, q) of each image field at each timestep of a discrete schedule, float32, shape (T, len(fields), 2)."""
    # Made outside inference mode even when first asked for inside: a table made there would break a later training.
    with torch.inference_mode(False), torch.no_grad():
        return _mixes(schedule, fields, torch.arange(schedule.timesteps), scale).to(device)


def recovered(schedule: Schedule, target: str, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 and epsilon from x_t and any target, as a network predicts it.

    x_t = alpha x_0 + sigma epsilon and target = p x_0 + q epsilon are two equations in x_0 and epsilon; they are
    solved by their determinant alpha q - sigma p.

    Arguments:
        target: a name of `IMAGE_FIELDS` other than x_t.
        prediction, x_t: float, shape (B, *).
        t: native times, shape (B,).
    """
    level = Level(*schedule.alpha_sigma(t, torch.float64))
    p, q = IMAGE_FIELDS[target](level)
    determinant = level.alpha * q - level.sigma * p
    rows = (q, -level.sigma), (-p, level.alpha)
    shape = (-1, *(1,) * (x_t.ndim - 1))
    x_0, epsilon = (
        (a / determinant).float().view(shape) * x_t + (b / determinant).float().view(shape) * prediction
        for a, b in rows
    )
    return x_0, epsilon
