"""The general pass over a batch: noise of any kind, drawn before it is mixed, and an earlier state of each image."""

import torch
from torch import Tensor

from diffaug.noise import gaussian
from diffaug.process import kernel
from diffaug.process.arguments import Parts
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.transfer import move
from diffaug.targets import INPUTS, TARGETS, interval, mixes


def mix_any_noise(
    process: Parts, x_0: Tensor, key: Keys, t: Tensor, s: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Draw noise of any kind, and mix the image-shaped fields and the pair's from it.

    Arguments:
        process: the parts of a ForwardProcess.
        x_0: float32 in [-1, 1], or latents, shape (B, *).
        key: of the B images.
        t: native times, shape (B,), where they were drawn.
        s: the earlier ones of the process's pair, likewise; None without one.
        dtype: of the image-shaped fields.
    """
    there, schedule = key.to(x_0.device), process.schedule.at_shape(x_0.shape)
    epsilon = process.noise.draw(there, x_0)
    mixed = process.noise.perturb(there, epsilon)
    made: dict[str, Tensor] = {}
    for group, noise in ((INPUTS, mixed), (TARGETS, epsilon)):
        some = tuple(name for name in process.fields if name in group)
        if some:
            (mix,) = move([mixes(schedule, some, t, 0.5, process.sigma_data)], x_0.device)
            made |= name_fields(some, kernel.mix_given(x_0.flatten(1), noise.flatten(1), mix, 0.0, dtype), x_0)
    if process.pair is None or s is None:
        return made
    made |= {"s": s, "same": s == t}
    if "interval" in process.fields:
        made["interval"] = interval(schedule, t, s)
    if "x_s" in process.fields:
        mix, fresh = move(process.pair.mix(schedule, t, s, 0.5), x_0.device)
        (x_s,) = kernel.mix_given(x_0.flatten(1), mixed.flatten(1), mix, 0.0, torch.float32)
        if process.pair.noise == "chain":
            x_s = x_s + fresh[:, None] * gaussian(there, (x_s.shape[1],), Purpose.PAIR)
        made["x_s"] = x_s.to(dtype).view(x_0.shape)
    return made


def name_fields(names: tuple[str, ...], fields: list[Tensor], like: Tensor) -> dict[str, Tensor]:
    """Name the fields of a pass, each of the shape of the images again."""
    return {name: field.view(like.shape) for name, field in zip(names, fields, strict=True)}
