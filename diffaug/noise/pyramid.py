"""Noise at many resolutions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import integer, number
from diffaug.noise.kinds import Noise, gaussian, per_sample, sums
from diffaug.noise.philox import Keys, Purpose, lanes

_INTERPOLATIONS = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class Pyramid(Noise):
    """epsilon + sum over i of discount^i times noise drawn at 1 / 2^i of the resolution and enlarged to it.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training". Each sample is divided by its own standard
    deviation (around its mean, over all its elements), so that it is 1 for every sample. The original shrinks by a
    random factor between 2 and 4 at each level; here it is 2, so that the shapes are the same for every sample.

    Arguments:
        discount: what a level counts against the finer one before it, in (0, 1]; 0.9 in the source.
        levels: how many coarser levels at most, >= 1; they end where the shortest side would be less than 1.
    """

    discount: float = 0.9
    levels: int = 10

    def __post_init__(self) -> None:
        value = number("noise.discount", self.discount, 0, 1, open_low=True)
        object.__setattr__(self, "discount", value)
        integer("noise.levels", self.levels, 1, 32)

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        channels, *sides = x_0.shape[1:]
        if x_0.ndim not in _INTERPOLATIONS or min(sides) < 2:
            raise ValueError(
                f"noise={self!r} is made at coarser resolutions, which samples of shape {tuple(x_0.shape[1:])} do not "
                "have: it needs images of shape (B, C, L), (B, C, H, W) or (B, C, D, H, W) with sides of 2 or more. "
                "Use noise=gaussian."
            )
        total = gaussian(keys, (channels, *sides))
        first = 0
        for level in range(1, min(self.levels, min(sides).bit_length() - 1) + 1):
            shape = (channels, *(side // 2**level for side in sides))
            coarse = gaussian(keys, shape, Purpose.PYRAMID, first)
            first += 4 * lanes(math.prod(shape))
            total = total + self.discount**level * torch.nn.functional.interpolate(
                coarse, size=sides, mode=_INTERPOLATIONS[x_0.ndim], align_corners=False
            )
        centred = total - per_sample(sums(total) / total[0].numel(), total)
        return total / per_sample((sums(centred.square()) / total[0].numel()).sqrt(), total)
