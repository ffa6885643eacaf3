"""Conversions from x_t and one target to any other field.

x_t = alpha x_0 + sigma epsilon and source = p x_0 + q epsilon are two equations in x_0 and epsilon. Solved, every
other field is a x_t + b source, with numbers a and b that depend on t alone. Write [A, B] = p_A q_B - q_A p_B; then

    a = [target, source] / [x_t, source],    b = [x_t, target] / [x_t, source].

[x_t, source] is alpha^2 + sigma^2 for v, alpha + sigma for flow, -sqrt(D) / sigma_data for F: never 0. It is alpha for
epsilon and -sigma for x_0. Where source holds only noise (p = 0) or only image (q = 0) the common factor is cancelled
by hand, so that epsilon and score turn into each other where alpha = 0 too. What remains is impossible, not unstable:
x_t and epsilon are the same thing where alpha = 0 and say nothing about x_0; so are x_t and x_0 where sigma = 0.

a and b are computed in float64, but images are multiplied in float32: an alpha that is not 0 but too small for that
(`LinearBeta` from some 15,000 timesteps on) is as bad as 0. So what counts as possible is decided after the cast.
"""

import torch
from torch import Tensor

from diffaug.checks import choice
from diffaug.schedules import Schedule
from diffaug.schedules.level import SIGMA_DATA, Level, Mix
from diffaug.schedules.numbers import hypot, per_sample
from diffaug.targets.fields import IMAGE_FIELDS, INPUTS, TARGETS

_ROOM = 2.0**-16
"""The share of a dtype's greatest number that a or b may have: values up to 65,536 times it do not overflow."""


def convert(
    schedule: Schedule,
    source: str,
    target: str,
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Convert x_t and one image field to another.

    Arguments:
        source: what ``prediction`` is, a name of `TARGETS`.
        target: what is wanted, a name of `IMAGE_FIELDS`.
        prediction: float, shape (B, *).
        x_t: the noised images, float, shape (B, *).
        t: native times, shape (B,).
        sigma_data: the standard deviation of the images, for F and x_in.

    Returns:
        Of x_t's shape, in float32 or the wider dtype of the two.

    Raises:
        ValueError: the source says nothing about the target at one of these times; on the CPU only, since looking at
            values halts an accelerator: ask `convertible` there.
    """
    a, b = _solve(schedule, source, target, t, sigma_data)
    dtype = torch.promote_types(torch.promote_types(x_t.dtype, prediction.dtype), torch.float32)
    possible = _possible(a, b, dtype)
    if t.device.type == "cpu" and not bool(possible.all()):
        at = sorted({time.item() for time in t[~possible]})[:5]
        raise ValueError(
            f"{target} cannot be had from {source} at t in {at} of {schedule!r}: alpha or sigma is 0 there, or too "
            f"small for {str(dtype).removeprefix('torch.')}, so that x_t and {source} say the same thing. Predict v, "
            "flow, velocity or F, or keep away from that end."
        )
    a, b = (per_sample(c.to(dtype).to(x_t.device), x_t) for c in (a, b))
    return a * x_t + b * prediction


def convertible(
    schedule: Schedule,
    source: str,
    target: str,
    t: Tensor,
    sigma_data: float = SIGMA_DATA,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return at which of these times x_t and the source determine the target: bool, of t's shape and device.

    Arguments:
        dtype: of the images: what `convert` multiplies in.
    """
    return _possible(*_solve(schedule, source, target, t, sigma_data), dtype).to(t.device)


def _possible(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max * _ROOM
    return (a.abs() <= most) & (b.abs() <= most)  # false for what is not a number


def recover(
    schedule: Schedule, target: str, prediction: Tensor, x_t: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA
) -> tuple[Tensor, Tensor]:
    """Recover x_0 and epsilon from x_t and any target, as a network predicts it; see `convert`."""
    return (
        convert(schedule, target, "x_0", prediction, x_t, t, sigma_data),
        convert(schedule, target, "epsilon", prediction, x_t, t, sigma_data),
    )


def as_input(schedule: Schedule, name: str, x_t: Tensor, t: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """Return x_t as the network is given it: itself, or x_in = x_t / sqrt(D). For sampling, where x_0 is not known.

    Arguments:
        name: a name of `INPUTS`.
        x_t: float, shape (B, *).
        t: native times, shape (B,).
    """
    choice("input", name, INPUTS)
    if name == "x_t":
        return x_t
    level = Level(schedule, t, sigma_data)
    factor = 1 / hypot(level.sigma, level.alpha * sigma_data)
    factor = factor.to(torch.promote_types(x_t.dtype, torch.float32)).to(x_t.device)
    return per_sample(factor, x_t) * x_t


def check_target(schedule: Schedule, target: str) -> None:
    """Refuse a target that cannot be sampled from: epsilon or score where a step has no signal left for float32.

    Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.2. The end of a
    continuous schedule is a single point, never drawn: there the target is allowed.
    """
    choice("model.target", target, TARGETS)
    _, end = schedule.ends
    if schedule.discrete and not bool(convertible(schedule, target, "x_0", end[None])):
        alpha = schedule.alpha_sigma(end, torch.float64)[0].item()
        raise ValueError(
            f"model.target={target} cannot be trained with {schedule!r}: alpha is {alpha:.3g} at t = {end.item()}, "
            f"where x_t is all noise and {target} says nothing about the image. Set model.target to v, x_0, flow or F"
            + ("." if alpha == 0 else ", or the schedule so that it keeps more signal.")
        )


def _solve(schedule: Schedule, source: str, target: str, t: Tensor, sigma_data: float) -> Mix:
    choice("source", source, TARGETS)
    choice("target", target, tuple(IMAGE_FIELDS))
    level = Level(schedule, t, sigma_data)
    if source == target:
        return torch.zeros_like(level.alpha), torch.ones_like(level.alpha)
    alpha, sigma = level.coefficients
    p, q = IMAGE_FIELDS[source](level)
    wanted_p, wanted_q = IMAGE_FIELDS[target](level)
    determinant = alpha * q - sigma * p
    a = (wanted_p * q - wanted_q * p) / determinant
    b = (alpha * wanted_q - sigma * wanted_p) / determinant
    noise, image = p == 0, q == 0
    a = torch.where(noise, _share(wanted_p, alpha), torch.where(image, _share(wanted_q, sigma), a))
    rest = wanted_q - sigma * _share(wanted_p, alpha)
    from_noise = torch.where(q.isinf() & (rest != 0), torch.nan, rest / q)  # score where sigma = 0 is no number
    from_image = (wanted_p - alpha * _share(wanted_q, sigma)) / p
    return a, torch.where(noise, from_noise, torch.where(image, from_image, b))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, 0.0, part / whole)
