"""The fields that a batch can hold, each from x_0, epsilon and t.

A noised image is x_t = alpha x_0 + sigma epsilon. Everything image-shaped that a network is given or asked for is
such a mix too: ``p(t) x_0 + q(t) epsilon``. The table `IMAGE_FIELDS` holds (p, q) for each; one kernel makes them all.

| field    | what                                        | source                                                 |
|----------|---------------------------------------------|--------------------------------------------------------|
| x_t      | alpha x_0 + sigma epsilon                   | Ho, Jain and Abbeel 2020, equation 4                   |
| epsilon  | the noise                                   | Ho, Jain and Abbeel 2020, equation 14                  |
| x_0      | the clean image                             | Ho, Jain and Abbeel 2020, section 3.2                  |
| v        | alpha epsilon - sigma x_0                   | Salimans and Ho 2022, section 4                        |
| flow     | epsilon - x_0                               | Liu, Gong and Liu 2023, equation 1; Lipman et al. 2023 |
| velocity | alpha' x_0 + sigma' epsilon                 | Albergo, Boffi and Vanden-Eijnden 2023; Ma et al. 2024 |
| score    | -epsilon / sigma                            | Song et al. 2021, the gradient of ln q(x_t given x_0)  |
| F        | (sigma / s x_0 - alpha s epsilon) / sqrt(D) | Karras et al. 2022, equation 8 and table 1             |
| x_in     | x_t / sqrt(D)                               | Karras et al. 2022, equation 7: c_in x_t               |

Here s is sigma_data, the standard deviation of the images (0.5 in [-1, 1], Karras et al. 2022), and
D = sigma^2 + alpha^2 s^2, the variance of x_t. F is EDM's target, (x_0 - c_skip x_t) / c_out at the noise level
sigma / alpha; multiplied out as above nothing is divided by alpha. velocity is x_t's derivative by unit time, equal to
flow where the schedule is straight; see `Level.rates`.

(p, q) are computed in float64 and rounded once. For a discrete schedule they are a table over t, kept for each
schedule and device, so a batch costs one look-up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffaug.schedules import Schedule
from diffaug.schedules.level import LOG_SNR_TOLD, SIGMA_DATA, Level, Mix, split_clean
from diffaug.schedules.numbers import hypot, keep


def _constant(p: float, q: float) -> Callable[[Level], Mix]:
    return lambda level: (torch.full_like(level.alpha, p), torch.full_like(level.alpha, q))


def _edm_target(level: Level) -> Mix:
    root = _edm_root(level)
    return level.sigma / (level.sigma_data * root), -level.alpha * level.sigma_data / root


def _edm_root(level: Level) -> Tensor:
    return hypot(level.sigma, level.alpha * level.sigma_data)


IMAGE_FIELDS: dict[str, Callable[[Level], Mix]] = {
    "x_t": lambda level: (level.alpha, level.sigma),
    "epsilon": _constant(0.0, 1.0),
    "x_0": _constant(1.0, 0.0),
    "v": lambda level: (-level.sigma, level.alpha),
    "flow": _constant(-1.0, 1.0),
    "velocity": lambda level: level.rates,
    "score": lambda level: (torch.zeros_like(level.sigma), -1.0 / level.sigma),
    "F": _edm_target,
    "x_in": lambda level: (level.alpha / _edm_root(level), level.sigma / _edm_root(level)),
}
"""Image-shaped fields: name -> (p, q) at a noise level, where the field is p x_0 + q epsilon."""

INPUTS = ("x_t", "x_in")
"""The image fields that are x_t but for a factor: what a network is given, and what noise is mixed into."""

TARGETS = tuple(name for name in IMAGE_FIELDS if name not in INPUTS)
"""The image fields that a network can be asked for."""


def _told_log_snr(schedule: Schedule, t: Tensor) -> Tensor:
    return schedule.log_snr(t).clamp(-LOG_SNR_TOLD, LOG_SNR_TOLD)


NUMBER_FIELDS: dict[str, Callable[[Schedule, Tensor], Tensor]] = {
    "t": lambda schedule, t: t,
    "t_embed": lambda schedule, t: (
        t.float() * (1000.0 / schedule.timesteps) if schedule.discrete else 1000.0 * schedule.to_unit(t)
    ),
    "unit": lambda schedule, t: schedule.to_unit(t),
    "log_snr": _told_log_snr,
    "c_noise": lambda schedule, t: _told_log_snr(schedule, t) * -0.125,
    "alpha": lambda schedule, t: schedule.alpha_sigma(t)[0],
    "sigma": lambda schedule, t: schedule.alpha_sigma(t)[1],
}
"""Fields of one number a sample, or a part of it: name -> its value at t, of t's shape, (B,) or (B, *counts).

``t_embed`` is the time in the range that embeddings of time expect, whatever T: t 1000 / T if discrete (so t itself
at T = 1000, as diffusers passes it), 1000 times unit time if continuous. ``log_snr`` is held within `LOG_SNR_TOLD`,
and so is ``c_noise``, ln(sigma / alpha) / 4 (Karras et al. 2022, table 1): within 4.16.
"""

_CLEAN_NUMBERS = {"unit": 0.0, "log_snr": LOG_SNR_TOLD, "c_noise": -0.125 * LOG_SNR_TOLD, "alpha": 1.0, "sigma": 0.0}
"""What a clean part has; ``t`` and ``t_embed`` are as at any t."""


def number_field(schedule: Schedule, name: str, t: Tensor) -> Tensor:
    """Return one of `NUMBER_FIELDS` at t, of t's shape; where that is (B, *counts), of parts, also of clean ones."""
    if t.ndim < 2 or name not in _CLEAN_NUMBERS:
        return NUMBER_FIELDS[name](schedule, t)
    clean, inside = split_clean(schedule, t)
    return torch.where(clean, _CLEAN_NUMBERS[name], NUMBER_FIELDS[name](schedule, inside))


WEIGHT_FIELDS = ("weight", "importance_weight")
"""Loss weights, float32, of t's shape: of the noise level (`diffaug.targets.weight_kinds`), and of how often it is
drawn (`diffaug.times.importance`)."""

PART_FIELDS = ("part_mask",)
"""1 where a part of a sample is to be learned, 0 on context and padding, float32, of t's shape: see
`diffaug.times.parts`. 1 where samples have no parts."""

PAIR_STATES = {"x_s": "s", "x_r": "r"}
"""The states of a pair beside x_t, each with the field of its time."""

THIRD_FIELDS = ("x_r", "r")
PAIR_FIELDS = ("x_s", "s", "interval", "same", "pair_weight", *THIRD_FIELDS)
"""An earlier state of each image and its time; t - s in unit time, float32; whether s is t, bool; the weight of the
pair's loss, float32; and of laws with a third time, s <= r < t, the state and the time. All but the states are of shape
(B,). See `diffaug.targets.pairs`."""

DRAW_FIELDS = ("index", "view", "dataset")
"""What identifies a draw, int64, shape (B,): the sample, its noised copy, and the number of its dataset (of its set in
a `diffaug.Mixture`)."""

FIELDS = (*IMAGE_FIELDS, *NUMBER_FIELDS, *WEIGHT_FIELDS, *PART_FIELDS, *PAIR_FIELDS, *DRAW_FIELDS)


def mixes(
    schedule: Schedule, fields: tuple[str, ...], t: Tensor, scale: float = 1.0, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Return (p, q) of each image field at each t, float32, shape (*t.shape, len(fields), 2).

    Arguments:
        t: native times; where they are of parts, shape (B, *counts), also those of clean ones.
        scale: what p is multiplied by before it is rounded, where x_0 is handed over in a multiple of its own unit.
        sigma_data: the standard deviation of the images in [-1, 1], for F and x_in.
    """
    clean, inside = split_clean(schedule, t) if t.ndim > 1 else (t, t)
    if schedule.discrete:
        made = mix_table(schedule, fields, scale, t.device, sigma_data)[inside]
    else:
        made = _mixes(schedule, fields, inside, scale, sigma_data)
    if inside is t:
        return made
    # The score of a clean part is infinite, and 0 here: nothing is learned from one. The rest are as at any t.
    at_clean = {"x_t": (1, 0), "x_in": (1 / sigma_data, 0), "v": (0, 1), "F": (0, -1), "score": (0, 0)}
    for i, name in enumerate(fields):
        if name in at_clean:
            p, q = at_clean[name]
            made[..., i, 0] = torch.where(clean, p * scale, made[..., i, 0])
            made[..., i, 1] = torch.where(clean, q, made[..., i, 1])
    return made


def _mixes(schedule: Schedule, fields: tuple[str, ...], t: Tensor, scale: float, sigma_data: float) -> Tensor:
    level = Level(schedule, t, sigma_data)
    pairs = [IMAGE_FIELDS[name](level) for name in fields]
    return torch.stack([torch.stack((p * scale, q), -1) for p, q in pairs], -2).float().to(t.device)


@keep
def mix_table(
    schedule: Schedule, fields: tuple[str, ...], scale: float, device: torch.device, sigma_data: float = SIGMA_DATA
) -> Tensor:
    """Return (p, q) of each image field at each t of a discrete schedule, float32, shape (T, len(fields), 2)."""
    return _mixes(schedule, fields, torch.arange(schedule.timesteps), scale, sigma_data).to(device)
