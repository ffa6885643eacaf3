"""The posterior of an encoder: what it returns, and a draw from that, which is a function of the sample's key.

    z = mean + std n,  n ~ N(0, I)

with n keyed as the noise is, under a purpose of its own: an image's z at a visit does not depend on the batch, the
ranks or a resume, and every view and epoch has another. So a store need not freeze one draw, the mode or the mean.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import choice, number, refuse
from diffaug.noise.kinds import gaussian
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.transfer import move
from diffaug.store.moments import Moments

POSTERIORS = ("sample", "mean", "fixed")


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
