"""The interface of noise, and its kinds: frozen dataclasses that make epsilon from keys and images.

Every number a kind draws is keyed by its sample and its purpose, and every sum over a sample is taken in a fixed
order, so that a sample's noise does not depend on what else is in the batch.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffaug.checks import bounded, check_fields, instance, refuse
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import lanes, normals
from diffaug.schedules.numbers import per_sample


def gaussian(keys: Keys, shape: tuple[int, ...], purpose: int = Purpose.EPSILON, first: int = 0) -> Tensor:
    """Draw independent standard normals, float32, shape (B, *shape).

    Arguments:
        first: how many elements of each sample to pass over, a multiple of 4.
    """
    elements = torch.Size(shape).numel()
    runs = normals(keys, purpose, torch.arange(lanes(elements), device=keys.rows.device) + first // 4)
    return torch.cat(runs, 1)[:, :elements].view(keys.rows.shape[1], *shape)


def sum_samples(x: Tensor) -> Tensor:
    """Return the sum over each sample, shape (B,) from (B, *): halved and added until one number is left.

    A library's reduction may choose its order by the shape of the batch; this order is the sample's own.
    """
    x = x.flatten(1)
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        rest = x[:, 2 * half :]
        x = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((x, rest), 1) if rest.shape[1] else x
    return x[:, 0]


@dataclass(frozen=True)
class Noise(ABC):
    """A kind of noise.

    Attributes:
        standard_normal: whether the noise in x_t is N(0, I), whatever x_0 is. Where it is not, -epsilon / sigma is not
            the score of q(x_t | x_0), and a pair under the chain's law has no x_s.
        perturbation: how many times a second standard normal noise is added to epsilon where it is mixed into an input:
            0, but for input perturbation.
    """

    standard_normal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self, "noise")

    @property
    def perturbation(self) -> float:
        return 0.0

    @property
    def in_pass(self) -> bool:
        """Whether epsilon is drawn within the pass over the images, and not before it."""
        return False

    @abstractmethod
    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        """Draw epsilon, of which targets are made: float32, of x_0's shape; each sample's by its own key and image.

        Arguments:
            keys: of B samples.
            x_0: the images in [-1, 1], float32, shape (B, *).
        """


@dataclass(frozen=True)
class Gaussian(Noise):
    """epsilon ~ N(0, I) (Ho, Jain and Abbeel 2020): the kind that is drawn within the one pass over the image."""

    standard_normal: ClassVar[bool] = True

    @property
    def in_pass(self) -> bool:
        return True

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        return gaussian(keys, tuple(x_0.shape[1:]))


@dataclass(frozen=True)
class Offset(Noise):
    """epsilon + strength xi, with one xi ~ N(0, 1) for each sample and channel.

    Guttenberg 2023, "Diffusion with Offset Noise": it lets a model learn the mean brightness that a schedule with
    signal left at its end hides. Each element has variance 1 + strength^2, any two of one channel covariance
    strength^2; with ``normalize`` both are divided by 1 + strength^2.

    Arguments:
        strength: > 0; 0.1 is usual.
        normalize: whether to divide by sqrt(1 + strength^2), so that each element has variance 1.
    """

    strength: float = bounded(0.1, above=0)
    normalize: bool = False

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        if x_0.ndim < 3:
            raise ValueError(
                f"noise={self!r} shifts each channel as a whole, but samples of shape {tuple(x_0.shape[1:])} have "
                "none: it needs images of shape (B, C, *). Use noise=gaussian."
            )
        shift = gaussian(keys, (x_0.shape[1],), Purpose.OFFSET).view(*x_0.shape[:2], *(1,) * (x_0.ndim - 2))
        epsilon = gaussian(keys, tuple(x_0.shape[1:])) + self.strength * shift
        return epsilon / math.sqrt(1 + self.strength**2) if self.normalize else epsilon


@dataclass(frozen=True)
class StudentT(Noise):
    """A multivariate Student-t at unit variance: epsilon sqrt((nu - 2) / chi2), with one chi2 of nu for each sample.

    Pandey et al. 2024, "Heavy-Tailed Diffusion Models", equation 3, whose variance nu / (nu - 2) is divided out. One
    chi2 serves all elements of a sample: they are uncorrelated, but large together. A chi2 is the sum of nu squared
    normals: exact in law.

    Arguments:
        nu: degrees of freedom, a whole number in [3, 65536]; at 2 and below there is no variance to make 1.
    """

    nu: int = bounded(10, at_least=3, at_most=65536)

    def __post_init__(self) -> None:
        _check_variance(self.nu)
        super().__post_init__()

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        chi_square = sum_samples(gaussian(keys, (self.nu,), Purpose.CHI_SQUARE).square())
        epsilon = gaussian(keys, tuple(x_0.shape[1:]))
        return epsilon * per_sample(torch.sqrt((self.nu - 2) / chi_square), epsilon)


def _check_variance(nu: object) -> None:
    if isinstance(nu, (int, float)) and nu <= 2:
        raise refuse("noise.nu", nu, "a whole number > 2: a Student-t with nu <= 2 has no finite variance")


@dataclass(frozen=True)
class Immiscible(Noise):
    """Of ``candidates`` standard normal draws the one nearest to the image, by the sum of squares.

    The nearest-neighbour form (2025, arXiv 2505.18521) of Li et al. 2024, "Immiscible Diffusion": noise is assigned to
    images so that their paths mix less. Each image chooses among draws of its own, so the choice needs no other image.

    What is chosen is no longer N(0, I): it leans toward its image, and the nearest is also one of the shorter, so each
    element's variance is below 1. Of images with values uniform in [-1, 1] and 4 candidates it is 0.92 at 3 x 8 x 8,
    0.98 at 3 x 32 x 32; the more elements, the nearer to 1. Sampling starts from noise of variance 1 all the same.

    Arguments:
        candidates: k, in [2, 1024]. The work is k times that of gaussian noise.
    """

    candidates: int = bounded(4, at_least=2, at_most=1024)

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        shape = tuple(x_0.shape[1:])
        size = 4 * lanes(x_0[0].numel())
        best = gaussian(keys, shape, Purpose.CANDIDATES)
        least = sum_samples((x_0 - best).square())
        for i in range(1, self.candidates):
            other = gaussian(keys, shape, Purpose.CANDIDATES, i * size)
            distance = sum_samples((x_0 - other).square())
            best = torch.where(per_sample(distance < least, best), other, best)
            least = torch.minimum(least, distance)
        return best


@dataclass(frozen=True)
class InputPerturbation(Noise):
    """x_t is made with epsilon + strength xi, xi ~ N(0, I), while every target is made with epsilon alone.

    Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", algorithm 1. The network learns to
    predict epsilon from an input with a little more noise than t says, as it meets it in sampling. It is the one kind
    under which the batch's epsilon is not all the noise in x_t.

    Arguments:
        strength: > 0; 0.1 in the paper.
        base: the kind of noise that epsilon is.
    """

    strength: float = bounded(0.1, above=0)
    base: Noise = Gaussian()

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("noise.base", self.base, Noise, "a Noise object")
        if isinstance(self.base, InputPerturbation):
            raise ValueError(
                f"noise.base is {self.base!r}: perturbing twice with the same xi only adds the two strengths. Set one "
                "noise.strength."
            )

    def draw(self, keys: Keys, x_0: Tensor) -> Tensor:
        return self.base.draw(keys, x_0)

    @property
    def perturbation(self) -> float:
        return self.strength

    @property
    def in_pass(self) -> bool:
        return self.base.in_pass
