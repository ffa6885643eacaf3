"""Buckets: images of their own proportions, each brought to the nearest of a few shapes of near-equal area.

Cropping all to squares loses a third of a 3:2 photo. So text-to-image models are trained on batches of one shape each,
a scheme that NovelAI published in 2022. What others do:

- NovelAI (github.com/NovelAI/novelai-aspect-ratio-bucketing) lists, for every width in steps of 64, the largest height
  within a number of pixels, and the same for heights; the nearest is by the logarithm of the ratio.
- kohya-ss/sd-scripts has nearly that list, but takes the nearest by the difference of width / height, which judges a
  tall image otherwise than the same one lying; small images are enlarged, or keep a size of their own.
- SDXL (Podell et al. 2023, appendix I) lists shapes in steps of 64 around 1024 x 1024, of ratios up to 4.

Here the areas lie around the wanted one, not below it. Nearest is by the logarithm, so that the bucket of an image is
the one that loses least of it: covering the ratio b by the ratio r loses 1 - min(r / b, b / r).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.checks import bounded, check_fields, integer, one_of, refuse
from diffaug.images.fit import Size, middle, part_of

_SHOWN = 8


class Placed(NamedTuple):
    """Where an image is cut.

    Attributes:
        corner: top and left of the part that is kept, in the image's own pixels.
        crop: the same in pixels of the image scaled to cover its bucket, and of the flipped one where it is flipped.
        flipped: whether what is kept is flipped, left to right.
    """

    corner: Size
    crop: Size
    flipped: bool


@dataclass(frozen=True)
class Buckets:
    """A list of shapes, and how an image is fitted to the nearest: covered, cropped, never stretched.

    With ``area`` the list is made: for every multiple of ``step`` as one side, up to that of the square, the multiple
    as the other side that comes nearest to the area, both ways round, and the square; the long side at most
    ``max_ratio`` times the short one. All areas lie within step (sqrt(area) + step / 2) of ``area``. Or ``shapes`` is
    the list.

    Arguments:
        area: the pixels of a bucket, about: 65536 is 256 x 256. At least step^2.
        step: what all sides are multiples of, at least 1: what the network divides them by, times an encoder's 8.
        max_ratio: the longest shape's long side by its short one, in [1, 64]; longer images are cropped to that.
        shapes: the list instead, [[height, width], ...], no two of one ratio; step and max_ratio say nothing then.
        upscale: "refuse" refuses images that are smaller than their bucket; "allow" enlarges them.
        min_images: a bucket with fewer images than this is refused, at least 1. A bucket without any is left out.
        crop: "center" keeps the middle of an image, "random" any part, drawn anew at each visit.
        hflip: the probability in [0, 1] that an image is flipped, left to right.
    """

    area: int | None = bounded(None, at_least=1)
    step: int = bounded(8, at_least=1)
    max_ratio: float = bounded(2.0, at_least=1, at_most=64)
    shapes: Sequence[Sequence[int]] | None = None
    upscale: str = one_of("refuse", ("refuse", "allow"))
    min_images: int = bounded(1, at_least=1)
    crop: str = one_of("center", ("center", "random"))
    hflip: float = bounded(0.0, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_fields(self, "data.buckets")
        if (self.area is None) == (self.shapes is None):
            both = "only one of them is" if self.shapes is not None else "either is"
            raise ValueError(
                f"data.buckets.area and data.buckets.shapes make the list of buckets: {both} to be given, but got "
                f"{self.area} and {self.shapes}."
            )
        if self.area is not None and self.area < self.step**2:
            raise refuse("data.buckets.area", self.area, f"a whole number >= data.buckets.step^2, {self.step**2}")
        if self.shapes is not None:
            object.__setattr__(self, "shapes", _checked(self.shapes))

    def list_shapes(self) -> list[Size]:
        """List the shapes, (height, width), from the widest to the highest."""
        if self.area is None:
            return sorted(((h, w) for h, w in self.shapes or ()), key=lambda shape: shape[0] / shape[1])
        side, step = math.sqrt(self.area), self.step
        square = _nearest(side, step)
        shapes = {(square, square)}
        for short in range(step, square + 1, step):
            other = _nearest(self.area / short, step)
            if max(short, other) <= self.max_ratio * min(short, other):
                shapes |= {(short, other), (other, short)}
        return sorted(shapes, key=lambda shape: shape[0] / shape[1])

    def assign(
        self, sizes: NDArray[np.int64], name: Callable[[int], str] = "image {}".format
    ) -> tuple[NDArray[np.int64], list[Size]]:
        """Find the bucket of each image.

        Arguments:
            sizes: height and width of each image, shape (N, 2).
            name: what errors call an image.

        Returns:
            The number of each image's bucket, int64, shape (N,), and the shapes of the buckets that hold any.

        Raises:
            ValueError: an image is smaller than its bucket, and upscale is "refuse"; or a bucket holds too few.
        """
        shapes = np.array(self.list_shapes(), np.int64)
        ratios = np.log(shapes[:, 0]) - np.log(shapes[:, 1])
        borders = (ratios[1:] + ratios[:-1]) / 2
        nearest = np.searchsorted(borders, np.log(sizes[:, 0]) - np.log(sizes[:, 1]))
        if self.upscale == "refuse":
            _refuse_small(sizes, shapes[nearest], name)
        bucket_of, held = without_empty(nearest, [(int(height), int(width)) for height, width in shapes])
        counts = np.bincount(bucket_of)
        few = [(shape, int(count)) for shape, count in zip(held, counts, strict=True) if count < self.min_images]
        if few:
            listed = ", ".join(f"{h} x {w} with {count}" for (h, w), count in few[:_SHOWN])
            raise ValueError(
                f"data.buckets.min_images={self.min_images}, but {len(few)} of {len(held)} buckets (height x width) "
                f"hold fewer: {listed}{', ...' * (len(few) > _SHOWN)}. Set a larger data.buckets.step or a smaller "
                "data.buckets.max_ratio, so that there are fewer buckets, or a smaller data.buckets.min_images."
            )
        return bucket_of, held

    def place(self, size: Size, shape: Size) -> Placed:
        """Choose where an image is cut, by torch's global random state where anything is left to chance.

        Arguments:
            size: the height and width of the image.
            shape: of its bucket.
        """
        part = part_of(size, shape)
        (top, left), flipped = middle(size, part), False
        if self.crop == "random" or self.hflip:
            down, right, coin = torch.rand(3, dtype=torch.float64).tolist()
            if self.crop == "random":
                top, left = int(down * (size[0] - part[0] + 1)), int(right * (size[1] - part[1] + 1))
            flipped = coin < self.hflip
        seen = size[1] - part[1] - left if flipped else left  # from the flipped image's left edge
        return Placed((top, left), (round(top * shape[0] / part[0]), round(seen * shape[1] / part[1])), flipped)


def without_empty(bucket_of: NDArray[np.int64], shapes: Sequence[Size]) -> tuple[NDArray[np.int64], list[Size]]:
    """Number the buckets anew without those that hold no image, in the same order."""
    used, renumbered = np.unique(bucket_of, return_inverse=True)
    return renumbered.astype(np.int64).reshape(-1), [shapes[number] for number in used]


def fields(size: Size, crop: Size, shape: Size) -> dict[str, Tensor]:
    """Return what an item of a bucket says beside its image, each int64, shape (2,): the conditions of SDXL.

    - original_size: the height and width of the image in its file, turned as its EXIF orientation says.
    - crop: the top and left of what is kept, in pixels of the image scaled to cover its bucket; where that image is
      flipped, of the flipped one.
    - target_size: the height and width of the bucket.
    """
    return {"original_size": torch.tensor(size), "crop": torch.tensor(crop), "target_size": torch.tensor(shape)}


def read_buckets(given: Any) -> Buckets | None:
    """Make buckets of their options by name, as YAML has them; None where there is neither an area nor shapes.

    Arguments:
        given: a mapping of the arguments of `Buckets`; or Buckets, or None, which are returned as they are.

    Raises:
        ValueError: another option is set, but neither of these is.
    """
    if given is None or isinstance(given, Buckets):
        return given
    if not isinstance(given, Mapping):
        raise refuse("data.buckets", given, "a mapping with area, or shapes; or a diffaug.Buckets")
    options: dict[str, Any] = {str(name): value for name, value in given.items()}
    if unknown := sorted(options.keys() - {f.name for f in dataclass_fields(Buckets)}):
        known = ", ".join(f.name for f in dataclass_fields(Buckets))
        raise ValueError(f"data.buckets has no options {unknown}; it has {known}.")
    if options.get("area") is not None or options.get("shapes") is not None:
        return Buckets(**options)
    idle = [f.name for f in dataclass_fields(Buckets) if f.name in options and options[f.name] != f.default]
    if idle:
        raise ValueError(
            f"data.buckets.{idle[0]}={options[idle[0]]} is set, but there are no buckets: set data.buckets.area, for "
            "example 65536, or data.buckets.shapes."
        )
    return None


def _nearest(value: float, step: int) -> int:
    return max(round(value / step), 1) * step


def _checked(shapes: Any) -> tuple[Size, ...]:
    wanted = "a list of [height, width] with at least one, such as [[256, 256], [224, 288]]"
    if isinstance(shapes, str) or not isinstance(shapes, Sequence) or not len(shapes):
        raise refuse("data.buckets.shapes", shapes, wanted)
    listed: dict[float, Size] = {}
    for shape in shapes:
        if isinstance(shape, str) or not isinstance(shape, Sequence) or len(shape) != 2:
            raise refuse("data.buckets.shapes", shapes, wanted)
        height, width = (integer("each side of data.buckets.shapes", side, 1) for side in shape)
        if (before := listed.get(height / width)) is not None:
            raise ValueError(
                f"data.buckets.shapes has two of one ratio, {list(before)} and {[height, width]}: an image would have "
                "no nearest one. Leave one of them out."
            )
        listed[height / width] = height, width
    return tuple(listed.values())


def _refuse_small(sizes: NDArray[np.int64], shapes: NDArray[np.int64], name: Callable[[int], str]) -> None:
    factors = (shapes / sizes).max(1)
    small = np.flatnonzero(factors > 1)
    if len(small):
        first, worst = int(small[0]), int(small[factors[small].argmax()])
        (height, width), (high, wide) = sizes[first], shapes[first]
        raise ValueError(
            f"{len(small)} of {len(sizes)} images are smaller than their bucket. The first is {name(first)}, "
            f"{height} x {width} (height x width), for a bucket of {high} x {wide}; the smallest, {name(worst)}, would "
            f"be enlarged {factors[worst]:.2f} times. Set data.buckets.upscale=allow to enlarge them, or a smaller "
            "data.buckets.area, or leave them out of the dataset."
        )
