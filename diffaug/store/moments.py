"""Moments: the mean and the standard deviation of latents, as an encoder returns or a store holds them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


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
        std = getattr(inner, "std", getattr(inner, "stddev", None))
        parts: tuple[Any, ...] = (inner,) if isinstance(inner, Tensor) else (getattr(inner, "mean", None), std)
        if not all(isinstance(part, Tensor) and part.ndim > 1 and len(part) == count for part in parts):
            shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
            came = " and ".join(map(str, shapes)) or type(out).__name__
            raise ValueError(
                f"{name} must return a tensor with as many images as it was given, ({count}, ...), or a distribution "
                f"whose mean and std are such tensors, but it returned {came}. A diffusers VAE is given as it is."
            )
        mean, *deviation = (part.as_subclass(Tensor).float() for part in parts)
        return cls(mean, deviation[0] if deviation else None)

    def repeat(self, views: int) -> "Moments":
        """Return the moments of so many views of each image, side by side."""
        std = None if self.std is None else self.std.repeat_interleave(views, 0)
        return Moments(self.mean.repeat_interleave(views, 0), std)


@dataclass(frozen=True)
class Stored:
    """The encoder of a store's rows: it takes apart what `diffaug.store.Store` has put side by side.

    Arguments:
        deviations: whether rows are (2, *), mean and standard deviation, or latents alone.
    """

    deviations: bool

    def __call__(self, rows: Tensor) -> Any:
        return Moments(*rows.unbind(1)) if self.deviations else rows
