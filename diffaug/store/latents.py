"""What a store of latents holds: an encoder's moments, rounded to a dtype, and what they come to over the dataset."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.checks import flag
from diffaug.store.moments import Moments

DTYPES = ("float32", "float16", "bfloat16")


class Latents:
    """Encodes batches to the rows of a store, and sums up those of a shard.

    Arguments:
        encode: from a batch of images, as the loader gives it, to moments.
        dtype: of the rows, by its name.
        allow_rounding: whether rounding to that may be by more than the posterior's deviation.
        pixels: whether the images are kept beside.
    """

    def __init__(
        self, encode: Callable[[Tensor], Moments], dtype: str, allow_rounding: bool, pixels: bool = False
    ) -> None:
        self._encode, self.dtype, self.allow_rounding = encode, dtype, flag("allow_rounding", allow_rounding)
        self.pixels = flag("pixels", pixels)
        self._sums: list[dict[str, Any]] = []

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """Return ``mean`` and, of a distribution, ``std``, each float32 of shape (B, *); and ``pixels``, if kept."""
        made = {name: part for name, part in self._encode(image)._asdict().items() if part is not None}
        return {**made, "pixels": image} if self.pixels else made

    def rows(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """Round the moments of a batch to the rows that are stored, on the CPU, and sum them up.

        Arguments:
            made: ``mean`` and ``std`` among others.

        Raises:
            ValueError: they are not finite, before or after; or are rounded by more than the distribution's own
                deviation.
        """
        if isinstance(made["mean"], list):  # of shapes of their own
            names = [name for name in ("mean", "std") if name in made]
            alone = [self.rows({name: made[name][i][None] for name in names}) for i in range(len(made["mean"]))]
            return {name: [one[name][0] for one in alone] for name in names}
        moments = {name: made[name].cpu().float().contiguous() for name in ("mean", "std") if name in made}
        rows = {name: part.to(getattr(torch, self.dtype)) for name, part in moments.items()}
        error = max(float((rows[name].float() - part).abs().max()) for name, part in moments.items())
        std = moments.get("std")
        median = None if std is None else float(std.median())
        for name, part in moments.items():
            if not bool(rows[name].isfinite().all()):
                highest, end = float(part.abs().max()), torch.finfo(getattr(torch, self.dtype)).max
                what = f"goes up to {highest:.3g}, but {self.dtype} ends at {end:.3g}: take dtype=float32"
                if not bool(part.isfinite().all()):
                    what = "is NaN or infinite in places, as data.encoder made it"
                raise ValueError(f"The {name} of these latents {what}.")
        if error > (median or math.inf) and not self.allow_rounding:
            than = "" if median is None else f", which is more than the posterior's median deviation, {median:.3g}"
            raise ValueError(
                f"dtype={self.dtype} rounds these latents by up to {error:.3g}{than}. Take dtype=float32, or say that "
                "it may be so: allow_rounding=true."
            )
        self._sums.append({**_sums(moments["mean"], std), "error": error, "median": median})
        return rows

    def take_sums(self) -> dict[str, Any]:
        """Return what the rows since the last call come to, in plain types."""
        sums, self._sums = _joined(self._sums), []
        return sums


def _sums(mean: Tensor, std: Tensor | None) -> dict[str, Any]:
    """Sum up z = mean + std n over images and pixels, for each channel: in float64, by one thread, in one order."""
    z = mean.numpy().astype(np.float64)
    squares = np.square(z) + (0.0 if std is None else np.square(std.numpy().astype(np.float64)))
    axes = (0, *range(2, z.ndim))
    return {
        "count": z.size // z.shape[1],
        "sum": z.sum(axes).tolist(),
        "squares": squares.sum(axes).tolist(),
    }


def _joined(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    parts = list(sums)
    medians = [part["median"] for part in parts if part["median"] is not None]
    return {
        "count": sum(part["count"] for part in parts),
        "sum": [math.fsum(channel) for channel in zip(*(part["sum"] for part in parts), strict=True)],
        "squares": [math.fsum(channel) for channel in zip(*(part["squares"] for part in parts), strict=True)],
        "error": max(part["error"] for part in parts),
        "median": statistics.median(medians) if medians else None,
    }


def summarise(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn the sums of shards into what store.json says of latents: each channel's mean and standard deviation."""
    whole = _joined(sums)
    mean = [total / whole["count"] for total in whole["sum"]]
    squares = [total / whole["count"] for total in whole["squares"]]
    std = [math.sqrt(max(square - one * one, 0.0)) for square, one in zip(squares, mean, strict=True)]
    if min(std) == 0:
        raise ValueError(f"Channel {std.index(0)} of these latents is the same everywhere: it cannot be scaled.")
    return {
        "mean": mean,
        "std": std,
        "deviations": whole["median"] is not None,
        "largest_error": whole["error"],
        "median_deviation": whole["median"],
    }
