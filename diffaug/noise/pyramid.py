"""Noise at many resolutions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.checks import bounded
from diffaug.noise.kinds import Noise, gaussian, sum_samples
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import lanes, words
from diffaug.schedules.numbers import in_float64, per_sample

_MOST = 32  # levels: so many blocks of the generator are kept for their factors


@dataclass(frozen=True)
class Pyramid(Noise):
    """epsilon + sum over i = 0, 1, ... of discount^i times noise drawn at lower and lower resolution, enlarged to it.

    Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training", with the defaults of its code, of which three
    things are easily missed:

    - the sum begins with a second draw at full resolution;
    - the sides shrink cumulatively: each is the one before divided by r^i, with r uniform in [2, 4) for each level. So
      a side of 64 goes to about 21, 2 and 1, and the sum ends at the first level with a side of 1;
    - the sum is divided by its standard deviation over the batch.

    Two things differ, so that a sample's noise is its own: each sample draws its own r, where the code draws one for
    the batch; and it is divided by the standard deviation which that of a large batch of its sizes tends to, the root
    of the mean variance of its elements. Enlarging is (bi-, tri-)linear.

    Arguments:
        discount: what a level counts against the one before it, in (0, 1].
        levels: how many draws are added to epsilon at most, in [1, 32].
    """

    discount: float = bounded(0.9, above=0, at_most=1)
    levels: int = bounded(10, at_least=1, at_most=_MOST)

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        channels, *sides = x_0.shape[1:]
        if x_0.ndim not in (3, 4, 5) or min(sides) < 2:
            raise ValueError(
                f"noise={self!r} is made at coarser resolutions, which samples of shape {tuple(x_0.shape[1:])} do not "
                "have: it needs images of shape (B, C, L), (B, C, H, W) or (B, C, D, H, W) with sides of 2 or more. "
                "Use noise=gaussian."
            )
        # Two independent draws at full resolution are one, sqrt(2) times as strong.
        total = 2**0.5 * gaussian(keys, (channels, *sides))
        variance = torch.full((len(x_0),), 2.0, device=x_0.device)
        first, most, shrunk = 4 * _MOST, list(sides), self.sizes(keys, sides)
        for level in range(1, self.levels):
            if min(most) == 1:
                break
            most = [max(1, side // 2**level) for side in most]
            # The greatest size that a sample may have; each takes a corner as large as its own.
            enlarged = gaussian(keys, (channels, *most), Purpose.PYRAMID, first)
            first += 4 * lanes(enlarged[0].numel())
            share = (shrunk[:, level - 1].amin(1) > 1).float() * self.discount**level  # 0 where it has ended before
            its_variance = share.square()
            for dim, size in enumerate(sides):
                enlarged, mean_square = _enlarge(enlarged, 2 + dim, shrunk[:, level, dim], size)
                its_variance = its_variance * mean_square
            total = total + per_sample(share, total) * enlarged
            variance = variance + its_variance
        return total / per_sample(variance.sqrt(), total)

    def sizes(self, keys: Keys, sides: list[int]) -> Tensor:
        """Draw the sides of each sample's levels, int64, shape (B, levels, len(sides)); of level 0 the image's."""
        word = words(keys, Purpose.PYRAMID, torch.arange(self.levels, device=keys.rows.device))[0]

        def shrink(word: Tensor) -> Tensor:
            factor = 2 + (word + 0.5) * 2.0**-31  # in [2, 4)
            at = [torch.stack([torch.full_like(factor[:, 0], side) for side in sides], 1)]
            for level in range(1, self.levels):
                divisor = torch.ones_like(factor[:, 0])
                for _ in range(level):  # not by a library's power, which may differ between devices
                    divisor = divisor * factor[:, level]
                at.append((at[-1] / divisor[:, None]).floor().clamp_min(1))
            return torch.stack(at, 1)

        return in_float64(shrink, word, torch.int64)


def _enlarge(x: Tensor, dim: int, side: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Interpolate linearly, along one dimension, from the first entries of each sample to a common size.

    Arguments:
        x: float32, shape (B, C, ...).
        side: how many entries each sample has, int64, shape (B,).
        size: how many it gets; entries are the middles of equal cells, as with ``align_corners=False``.

    Returns:
        The enlarged samples, and what the variance of independent entries is multiplied by on average, shape (B,).
    """
    # In whole numbers, so that every device takes the same two neighbours.
    place = ((2 * torch.arange(size, device=x.device) + 1) * side[:, None] - size).clamp_min(0)
    low = place // (2 * size)
    high = torch.minimum(low + 1, side[:, None] - 1)
    part = torch.where(high == low, 0.0, (place - low * (2 * size)).float() / (2 * size))
    shape = [length if d == 0 else size if d == dim else 1 for d, length in enumerate(x.shape)]
    full = [size if d == dim else length for d, length in enumerate(x.shape)]
    left, right = (x.gather(dim, at.view(shape).expand(full)) for at in (low, high))
    mean_square = sum_samples((1 - part).square() + part.square()) / size
    return torch.lerp(left, right, part.view(shape)), mean_square
