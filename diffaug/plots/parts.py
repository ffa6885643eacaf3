"""A clip, or a few images, noised part by part under several laws."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffaug.plots.images import fill
from diffaug.plots.picture import Picture, new_figure, table
from diffaug.process import ForwardProcess


def parts(named: Mapping[str, ForwardProcess], images: Tensor, *, seed: int = 0) -> Picture:
    """Draw the frames of a clip, each at its own noise level, which is said below it; or images with their patches.

    Above is x_0, then comes a row for each process, all of the same noise.

    Arguments:
        named: processes with ``parts`` and the fields x_t, x_0, t and log_snr, by the names they go by in the picture.
        images: as the processes take them, grey or RGB: one clip, (1, F, C, H, W) or (1, C, F, H, W) as the parts say,
            or images, (B, C, H, W).
    """
    drawn: list[Tensor] = []
    captions: list[list[str]] = []
    rows: list[tuple[Any, ...]] = []
    for name, process in named.items():
        if process.parts is None or images.ndim not in (4, 5) or (images.ndim == 5 and len(images) > 1):
            raise ValueError(
                f"plot parts wants process.parts, and a clip or images, but {name} has {process.parts} and the images "
                f"are of shape {tuple(images.shape)}: set parts=frames data=moving_digits, or parts=patches."
            )
        index = torch.arange(len(images))
        batch = process(images, index, position=index, seed=seed)
        states, clean, t, log_snr = batch.x_t, batch.x_0, batch.t, batch.log_snr
        if images.ndim == 5:
            frames = process.parts.planes(images.shape).index(t.shape[1]) + 1
            states, clean = states.movedim(frames, 1)[0], clean.movedim(frames, 1)[0]
            t, log_snr = t[0], log_snr[0]
        shown = states / states.flatten(1).std(1).clamp_min(1).view(-1, 1, 1, 1)  # what variance exploding hides
        drawn += [shown] if drawn else [clean, shown]
        captions.append([_say(time) for time in t.tolist()] if t.shape == (len(states),) else [""] * len(states))
        rows += [(name, part, *pair) for part, pair in enumerate(table(t.flatten(), log_snr.flatten()))]
    columns, (height, width) = len(drawn[0]), drawn[0].shape[-2:]
    figure = new_figure(1.05 * columns + 1.35, (1.05 * height / width + 0.2) * len(drawn) + 0.1)
    fill(figure, drawn, labels=["$x_0$", *named], captions=[[""] * columns, *captions])
    return Picture(figure, ("law", "part", "t", "log_snr"), rows)


def _say(t: float) -> str:
    return "clean" if t < 0 or (t == 0.0 and isinstance(t, float)) else f"t = {t:.3g}"
