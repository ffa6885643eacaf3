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
from diffaug.process.kernel import draw_and_mix
from diffaug.randomness.host_to_device import move
from diffaug.randomness.keys import Keys, Purpose
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

    def __call__(self, moments: Moments, keys: Keys, *, compiled: bool = False) -> Tensor:
        """Return latents, float32, shape (B, *).

        Arguments:
            keys: of the B samples, those of the noise; where the posterior is fixed, of epoch and view 0.
            compiled: whether to draw by the compiled pass, `diffaug.process.kernel`'s; its last bits may differ.
        """
        z, std = moments
        rows, *scales = move([keys.rows, *self._scales(z)], z.device)
        if std is not None and self.kind != "mean":
            mix = torch.stack((torch.full_like(std, 0.5), std), 1)[:, None]  # of 2 z and n
            options: dict[str, Any] = {"compiled": compiled, "purposes": (Purpose.POSTERIOR,)}
            (z,) = draw_and_mix(z, Keys(rows), mix, 0.0, torch.float32, **options)
        if not scales:
            return z
        mean, factor = scales
        return (z - mean) * factor

    def _scales(self, z: Tensor) -> list[Tensor]:
        """Return each channel's mean, and what it is multiplied by, on the host, each of shape (C, 1, ...)."""
        if self.stats is None:
            return []
        if len(self.stats["mean"]) != z.shape[1]:
            raise ValueError(
                f"data.latent_stats has {len(self.stats['mean'])} channels, but the latents have shape "
                f"{tuple(z.shape[1:])}."
            )
        rows = self.stats["mean"], [self.sigma_data / std for std in self.stats["std"]]
        shape = (-1, *[1] * (z.ndim - 2))
        return [torch.tensor(row, dtype=torch.float32, device="cpu").view(shape) for row in rows]


def _checked(stats: Any) -> dict[str, list[float]]:
    if not isinstance(stats, Mapping) or set(stats) != {"mean", "std"} or len(stats["mean"]) != len(stats["std"]):
        raise refuse("data.latent_stats", stats, "{mean: [...], std: [...]}, a number for each channel of the latents")
    means = [number("each mean of data.latent_stats", value) for value in stats["mean"]]
    return {"mean": means, "std": [number("each std of data.latent_stats", value, above=0) for value in stats["std"]]}
