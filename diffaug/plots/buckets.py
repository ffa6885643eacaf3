"""Buckets: images of each shape, as a batch holds them, with what fitting them cost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from diffaug.plots.images import fill
from diffaug.plots.picture import Picture, new_figure

COLUMNS = 8


class Bucket(NamedTuple):
    """What there is to say of a bucket.

    Attributes:
        height, width: of its images.
        images: how many images it holds.
        batches: how many batches an epoch has of it, on average.
        cropped: the share of an image that is cut away, on average; nan where the images' own sizes are not known.
        enlarged: the share of its images that are enlarged; likewise.
        factor: by how much these are, on average; 1 where none is.
    """

    height: int
    width: int
    images: int
    batches: float
    cropped: float
    enlarged: float
    factor: float


def buckets(listed: Sequence[Bucket], some: Sequence[Tensor]) -> Picture:
    """Draw a row of images for each bucket.

    Arguments:
        some: images of each bucket in [-1, 1], shape (B, C, H, W), of which the first eight are shown.
    """
    figure = new_figure(1.05 * COLUMNS + 1.35, 1.0 * len(listed) + 0.3)
    cut = ["" if math.isnan(one.cropped) else f", {one.cropped:.0%} cut" for one in listed]
    labels = [f"{one.height} x {one.width}\n{one.images}{lost}" for one, lost in zip(listed, cut, strict=True)]
    fill(figure, [images[:COLUMNS] for images in some], labels=labels, columns=COLUMNS, fontsize=7)
    return Picture(figure, Bucket._fields, list(listed))
