"""Kinds of noise: what epsilon is. A kind is a frozen dataclass that makes epsilon from keys and a shape."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaug.noise.philox import Keys, Purpose, lanes, normals


def gaussian(keys: Keys, shape: tuple[int, ...], purpose: int = Purpose.EPSILON, first: int = 0) -> Tensor:
    """Independent standard normals, float32, shape (B, *shape).

    Arguments:
        first: how many elements of each sample to pass over, a multiple of 4.
    """
    elements = torch.Size(shape).numel()
    runs = normals(keys, purpose, torch.arange(lanes(elements), device=keys.low.device) + first // 4)
    return torch.cat(runs, 1)[:, :elements].unflatten(1, shape)


@dataclass(frozen=True)
class Noise(ABC):
    """A kind of noise. Whatever it does, the epsilon it returns is the noise that is mixed into the image."""

    @abstractmethod
    def draw(self, keys: Keys, shape: tuple[int, ...]) -> Tensor:
        """epsilon of B samples, float32, shape (B, *shape): of each sample's own key alone."""


@dataclass(frozen=True)
class Gaussian(Noise):
    """epsilon ~ N(0, I) (Ho, Jain and Abbeel 2020): the kind that is drawn within the one pass over the image."""

    def draw(self, keys: Keys, shape: tuple[int, ...]) -> Tensor:
        return gaussian(keys, shape)
