"""Bucketed: the user's own map-style dataset, its images fitted to buckets."""

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from diffaug.checks import instance, refuse
from diffaug.datasets.buckets import Buckets, fields, without_empty
from diffaug.datasets.indexed import own_recipe
from diffaug.images.aligned import Aligned
from diffaug.images.fit import Size, fit_mask, fit_tensor
from diffaug.images.items import as_mask, as_tensor, name_parts, take_apart

_UINT16 = (0.0, 65535.0)


class Bucketed(Dataset[dict[str, Any]]):
    """A dataset whose images are fitted to buckets by a table of their sizes, which is known without reading them.

    An item is a dict: the image, a tensor of its bucket's height and width, called ``image`` (or ``image_key``, where
    that is a name); everything else that the dataset yields, by name; and ``original_size``, ``crop`` and
    ``target_size`` (`diffaug.datasets.buckets.fields`).

    For example, of 3 photos:

        data = DiffusionDataModule(Bucketed(photos, [(480, 640), (640, 480), (500, 500)], Buckets(area=65536)), ...)

    Arguments:
        dataset: map-style; its images are PIL images, tensors (C, H, W) or numpy arrays, of 8 bits, 16 or float.
            Latents must be of their buckets' sizes already: resizing them would make others of them.
        sizes: (height, width) of each item's image, as the dataset yields it.
        buckets: the shapes, and how an image is fitted to one.
        image_key: which part of an item is the image; None where there is only one.
        images: what each image of an item is, where there are several, as ``data.images`` says it: conditions and masks
            are fitted as the target is, masks without interpolation. They must be of its size.

    Attributes:
        bucket_of: the number of each item's bucket, int64, shape (N,).
        bucket_shapes: (height, width) of each bucket.
        sizes: the table, int64, shape (N, 2).

    Raises:
        ValueError: a size that is not known, or no table; on reading, an image of another size than its row says.
    """

    def __init__(
        self,
        dataset: Any,
        sizes: Sequence[Sequence[int]] | NDArray[np.int64],
        buckets: Buckets,
        image_key: str | int | None = None,
        images: Mapping[str, str | Mapping[str, Any]] | None = None,
    ) -> None:
        self.buckets = instance("data.buckets", buckets, Buckets, "a diffaug.Buckets")
        self.dataset, self.aligned = dataset, Aligned(images, image_key)
        self.sizes = _table(sizes, len(dataset))
        self.bucket_of, self.bucket_shapes = buckets.assign(self.sizes, "item {}".format)
        self.indices: NDArray[np.int64] = np.arange(len(self.sizes))

    def only(self, indices: Sequence[int]) -> "Bucketed":
        """Return the same with these items only, numbered anew; each keeps the shape of its bucket."""
        part, chosen = copy(self), np.asarray(indices, np.int64)
        part.indices, part.sizes = self.indices[chosen], self.sizes[chosen]
        part.bucket_of, part.bucket_shapes = without_empty(self.bucket_of[chosen], self.bucket_shapes)
        return part

    def recipe(self) -> dict[str, Any]:
        """Return what a resume compares: the buckets, which item is in which, and what the dataset says of itself."""
        return {**own_recipe(self.dataset), **describe_buckets(self.buckets, self.bucket_of)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = int(self.indices[index])
        where = f"item {at} of {type(self.dataset).__name__}"
        item, key = self.dataset[at], self.aligned.target
        image, extra = take_apart(item, key, where)
        self.aligned.check_declared(name_parts(item), image, extra, where, "Bucketed", batch=False, key="images")
        self.aligned.check_held(extra, where)
        pixels = _pixels(image, where)
        size: Size = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        if tuple(pixels.shape[1:]) != size:
            raise ValueError(
                f"{where} is {' x '.join(map(str, pixels.shape[1:]))} (height x width), but the table of sizes that "
                f"its bucket was chosen by says {size[0]} x {size[1]}. Mend the table."
            )
        shape = self.bucket_shapes[self.bucket_of[index]]
        placed = self.buckets.place(size, shape)
        made = {key if isinstance(key, str) else "image": fit_tensor(pixels, shape, placed.corner)}
        for name, role in self.aligned.beside.items():
            which = f"{name} of {where}"
            part, how = (
                (as_mask(extra.pop(name), which), fit_mask)
                if role == "mask"
                else (_pixels(extra.pop(name), which), fit_tensor)
            )
            if tuple(part.shape[-2:]) != size:
                raise ValueError(
                    f"{which} must be of the image's height and width, {size}, but is {tuple(part.shape)}. (A smaller "
                    "one is made by data.transform, from one of that size, after what is random there.)"
                )
            made[name] = how(part, shape, placed.corner)
        made = {name: part.flip(-1) if placed.flipped else part for name, part in made.items()}
        made |= fields(size, placed.crop, shape)
        if clash := sorted(made.keys() & extra.keys()):
            raise ValueError(f"{where} has parts named {clash}, which Bucketed makes itself: rename them.")
        return {**made, **extra}


def describe_buckets(buckets: Buckets, bucket_of: NDArray[np.int64]) -> dict[str, Any]:
    """Return what a recipe says of buckets: how they are made, and a digest of which image is in which."""
    digest = hashlib.blake2b(np.asarray(bucket_of, np.int64).tobytes(), digest_size=16).hexdigest()
    return {"buckets": repr(buckets), "bucket_of": digest}


def _table(sizes: Any, count: int) -> NDArray[np.int64]:
    if len(sizes) != count:
        raise ValueError(f"sizes must have a row for each of the dataset's {count} items, but has {len(sizes)}.")
    unknown = [] if _is_known(sizes) else [index for index, row in enumerate(sizes) if not _is_size(row)]
    if unknown:
        raise ValueError(
            f"sizes must be (height, width) for each item, whole numbers of pixels, but {len(unknown)} of {count} are "
            f"not known. The first is of item {unknown[0]}: {sizes[unknown[0]]!r}. Read them from the images, or leave "
            "these items out of the dataset."
        )
    return np.array(sizes, np.int64).reshape(-1, 2)


def _is_known(sizes: Any) -> bool:
    """Return whether a table is an array of which all is as it should be, so that its rows need not be looked at."""
    return isinstance(sizes, np.ndarray) and sizes.dtype.kind in "iu" and sizes.shape[1:] == (2,) and sizes.min() > 0


def _is_size(row: Any) -> bool:
    try:
        height, width = row
    except (TypeError, ValueError):
        return False
    return all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in (height, width))


def _pixels(image: Any, where: str) -> Tensor:
    """Return an image of any kind as a tensor (C, H, W): uint8, uint16 or float."""
    deep = getattr(image, "dtype", None) in (np.uint16, torch.uint16)
    deep = deep or str(getattr(image, "mode", "")).startswith("I;16")
    tensor = as_tensor(image, where, _UINT16)
    if tensor.ndim != 3:
        raise refuse(where, tensor, "an image, (channels, height, width), where it is to be fitted to a bucket")
    return tensor.round_().to(torch.uint16) if deep else tensor
