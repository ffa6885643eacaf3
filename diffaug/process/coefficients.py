"""Coefficients: what every image-shaped field of a recipe is of x_0, of epsilon and of a second noise.

A field is p x_0 + q epsilon. Two recipes have fields with a part of a second noise, xi, which is drawn beside epsilon:
an earlier state under the chain's law (`diffaug.targets.pairs`), and whatever an input perturbation is mixed into. Then
each field has an r of its own, p x_0 + q epsilon + r xi, which is 0 for the others.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffaug.process.arguments import Components
from diffaug.randomness.keys import Purpose
from diffaug.schedules import Schedule
from diffaug.targets import INPUTS, PAIR_STATES, mixes


def purposes(process: Components) -> tuple[Purpose, ...]:
    """Return by which purposes a recipe's noises are drawn: epsilon's, and xi's where a field has a part of it."""
    names = set(process.fields)
    if process.pair is not None and process.pair.noise == "chain" and names & {*PAIR_STATES}:
        return Purpose.EPSILON, Purpose.PAIR
    if process.noise.perturbation and names & {*INPUTS, *PAIR_STATES}:
        return Purpose.EPSILON, Purpose.PERTURBATION
    return (Purpose.EPSILON,)


def coefficients(
    process: Components,
    schedule: Schedule,
    names: tuple[str, ...],
    t: Tensor,
    earlier: Mapping[str, Tensor],
    scale: float,
    planes: tuple[int, ...] = (),
) -> Tensor:
    """Return (p, q) of each field, or (p, q, r) where the recipe has a second noise: float32, (B, F, 2 or 3, *planes).

    Arguments:
        process: what a ForwardProcess is made of.
        schedule: of which t is a native time.
        names: the fields: those of `IMAGE_FIELDS`, then the states of a pair.
        t: native times, shape (B,), or (B, *) where a sample's parts have their own.
        earlier: the times of the pair's states by the states' names, each of t's shape.
        scale: as in `mixes`.
        planes: where parts have times of their own, how these lie along the images; see `kernel.draw_and_mix`.
    """
    of_t, states = (tuple(name for name in names if (name in earlier) == later) for later in (False, True))
    mix = [mixes(schedule, of_t, t, scale, process.sigma_data)] if of_t else []
    r = [torch.zeros_like(t, dtype=torch.float32)] * len(of_t)
    for name in states:
        assert process.pair is not None
        its_mix, its_r = process.pair.mix(schedule, t, earlier[name], scale)
        mix.append(its_mix)
        r.append(its_r)
    whole = torch.cat(mix, -2) if states else mix[0]
    noises = purposes(process)
    if Purpose.PERTURBATION in noises:
        noised = [name in earlier or name in INPUTS for name in names]
        r = [q * (process.noise.perturbation * yes) for q, yes in zip(whole[..., 1].unbind(-1), noised, strict=True)]
    if len(noises) > 1:
        whole = torch.cat((whole, torch.stack(r, -1)[..., None]), -1)
    return whole.movedim((-2, -1), (1, 2)).reshape(len(t), len(names), 1 + len(noises), *planes) if planes else whole
