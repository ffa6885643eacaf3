"""What preview says of a dataset with buckets: how many images each holds, and what fitting them costs."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffaug.loader.batch import collate
from diffaug.loader.dataset import Images
from diffaug.plots.buckets import COLUMNS, Bucket, buckets
from diffaug.plots.picture import Picture
from diffaug.process import ForwardProcess


def measure(sizes: NDArray[np.int64] | None, bucket_of: NDArray[np.int64], shapes: Any, batch: int) -> list[Bucket]:
    """Measure each bucket.

    Arguments:
        sizes: height and width of each image, shape (N, 2); None where they are not known.
        bucket_of: the number of each image's bucket, shape (N,).
        shapes: (height, width) of each bucket.
        batch: images a batch, over all ranks.
    """
    listed = []
    sizes = np.full((len(bucket_of), 2), np.nan) if sizes is None else sizes
    for number, (height, width) in enumerate(shapes):
        factors = np.array([height, width]) / sizes[bucket_of == number]  # what each side is scaled by, if alone
        scale, least = factors.max(1), factors.min(1)
        larger = scale[scale > 1]
        listed.append(
            Bucket(
                height,
                width,
                len(factors),
                len(factors) / batch,
                float((1 - least / scale).mean()),
                len(larger) / len(factors) if np.isfinite(scale).all() else math.nan,
                float(larger.mean()) if len(larger) else 1.0,
            )
        )
    return listed


def table(listed: list[Bucket]) -> list[str]:
    """Format the buckets, a line each."""
    lines = [
        f"buckets          {len(listed)}: batches an epoch, the share of an image cut away, of images enlarged",
        f"                 {'height x width':>14}  {'images':>8}  {'batches':>8}  {'cut':>7}  {'enlarged':>14}",
    ]
    for one in listed:
        cut, enlarged = f"{one.cropped:.1%}", f"{one.enlarged:.1%} x {one.factor:.2f}" if one.enlarged else "none"
        if math.isnan(one.cropped):
            cut = enlarged = "unknown"
        lines.append(
            f"                 {one.height:>6} x {one.width:<5}  {one.images:>8}  {one.batches:>8.1f}  "
            f"{cut:>7}  {enlarged:>14}"
        )
    return lines


def draw(process: ForwardProcess, images: Images, listed: list[Bucket]) -> Picture:
    """Draw some images of each bucket, as a loader reads them in the first epoch."""
    bucket_of: NDArray[np.int64] = images.dataset.bucket_of
    some = []
    for number in range(len(listed)):
        members = np.flatnonzero(bucket_of == number)[:: max(1, listed[number].images // COLUMNS)][:COLUMNS]
        some.append(process.scale(collate(images.__getitems__([images.place(int(i)) for i in members])).image))
    return buckets(listed, some)
