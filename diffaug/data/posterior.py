"""The posterior of an encoder: what it returns, and a draw from that, which is a function of the sample's key.

    z = mean + std n,  n ~ N(0, I)

with n keyed as the noise is, under a purpose of its own: an image's z at a visit does not depend on the batch, the
ranks or a resume, and every view and epoch has another. So a store need not freeze one draw, the mode or the mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaug.checks import choice, number, refuse
from diffaug.noise.kinds import gaussian
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.transfer import move

POSTERIORS = ("sample", "mean", "fixed")


class Moments(NamedTuple):
    """What an encoder makes of a batch.

    Attributes:
        mean: of the latents, or they themselves; float32, shape (B, *).
        std: their standard deviation, likewise; None of an encoder that returns no distribution.
    """

    mean: Tensor
    std: Tensor | None

    @classmethod
    def of(cls, out: Any, count: int, name: str = "data.encoder") -> "Moments":
        """Take what an encoder returned for so many images.

        A tensor; a distribution with ``mean`` and ``std`` (or ``stddev``, as torch's); or, of diffusers, an output
        that holds one as ``latent_dist``, or a tensor as ``latents``.

        Raises:
            ValueError: it is none of these, or not of so many images.
        """
        inner: Any = getattr(out, "latent_dist", getattr(out, "latents", out))
        parts: tuple[Any, ...] = (inner,) if isinstance(inner, Tensor) else (getattr(inner, "mean", None), _std(inner))
        if not all(isinstance(part, Tensor) and part.ndim > 1 and len(part) == count for part in parts):
            shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
            came = " and ".join(map(str, shapes)) or type(out).__name__
            raise ValueError(
                f"{name} must return a tensor with as many images as it was given, ({count}, ...), or a distribution "
                f"whose mean and std are such tensors, but it returned {came}. A diffusers VAE is given as it is."
            )
        mean, *std = (_plain(part).float() for part in parts)
        return cls(mean, std[0] if std else None)

    def repeat(self, views: int) -> "Moments":
        """Return the moments of so many views of each image, side by side."""
        std = None if self.std is None else self.std.repeat_interleave(views, 0)
        return Moments(self.mean.repeat_interleave(views, 0), std)


def _std(distribution: Any) -> Any:
    return getattr(distribution, "std", getattr(distribution, "stddev", None))


def _plain(tensor: Tensor) -> Tensor:
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


@dataclass(frozen=True)
class Stored:
    """The encoder of a store's rows: it takes apart what `diffaug.data.store.Store` has put side by side.

    Arguments:
        deviations: whether rows are (2, *), mean and standard deviation, or latents alone.
    """

    deviations: bool

    def __call__(self, rows: Tensor) -> Any:
        return Moments(*rows.unbind(1)) if self.deviations else rows


class Posterior:
    """Draws latents from an encoder's moments, and scales their channels.

    Arguments:
        kind: "sample" draws anew at every visit, "fixed" draws once for each image, "mean" takes the mean.
        stats: ``mean`` and ``std`` of each channel over the dataset; with them, latents have mean 0 and the standard
            deviation ``sigma_data``. None leaves them as they are.
        sigma_data: the process's.
    """

    def __init__(self, kind: str, stats: Mapping[str, Any] | None, sigma_data: float) -> None:
        self.kind = choice("data.posterior", kind, POSTERIORS)
        self.stats = None if stats is None else _checked(stats)
        self.sigma_data = sigma_data

    def __call__(self, moments: Moments, keys: Keys) -> Tensor:
        """Return latents, float32, shape (B, *).

        Arguments:
            keys: of the B samples, those of the noise; where the posterior is fixed, of epoch and view 0.
        """
        z, std = moments
        if std is not None and self.kind != "mean":
            z = z + std * gaussian(keys.to(z.device), tuple(z.shape[1:]), Purpose.POSTERIOR)
        return z if self.stats is None else self._scaled(z, self.stats)

    def _scaled(self, z: Tensor, stats: dict[str, list[float]]) -> Tensor:
        if len(stats["mean"]) != z.shape[1]:
            raise ValueError(
                f"data.latent_stats has {len(stats['mean'])} channels, but the latents have shape {tuple(z.shape[1:])}."
            )
        factors = [self.sigma_data / std for std in stats["std"]]
        rows = [torch.tensor(row, dtype=torch.float32, device="cpu") for row in (stats["mean"], factors)]
        mean, factor = (row.view(-1, *[1] * (z.ndim - 2)) for row in move(rows, z.device))
        return (z - mean) * factor


def _checked(stats: Any) -> dict[str, list[float]]:
    if not isinstance(stats, Mapping) or set(stats) != {"mean", "std"} or len(stats["mean"]) != len(stats["std"]):
        raise refuse("data.latent_stats", stats, "{mean: [...], std: [...]}, a number for each channel of the latents")
    means = [number("each mean of data.latent_stats", value) for value in stats["mean"]]
    return {"mean": means, "std": [number("each std of data.latent_stats", value, above=0) for value in stats["std"]]}
