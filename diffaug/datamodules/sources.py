"""Sources of data: the user's datasets, built and validated by some of their items before training."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from diffaug.checks import integer, refuse
from diffaug.datasets.indexed import index_dataset, is_function, is_stream
from diffaug.datasets.mixture import Mixture
from diffaug.images.aligned import Aligned
from diffaug.images.roles import spell
from diffaug.loader.dataset import Images
from diffaug.randomness.keys import COUNTED_BITS, DATASET_BITS, STAGES
from diffaug.store.moments import Stored
from diffaug.store.reader import Store

_log = logging.getLogger("diffaug")

_LOOKED_AT = 32  # images of a dataset, before training
Source = Dataset[Any] | Callable[[], Dataset[Any]]


def are_datasets(source: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a list is one of several datasets, and not itself a dataset: a list of items."""
    items = (Tensor, np.ndarray, tuple, list, Mapping, int, float, Image)
    return isinstance(source, (list, tuple)) and not any(isinstance(part, items) for part in source)


def list_sources(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """List each stage's datasets, or functions that make them: none, one or several.

    Raises:
        ValueError: there are several for training, or one is a path.
    """
    listed: dict[str, list[Any]] = {}
    for stage, source in given.items():
        listed[stage] = [*source] if are_datasets(source) else [] if source is None else [source]
        for part in listed[stage]:
            if isinstance(part, (str, os.PathLike)):
                raise ValueError(
                    f"data.{stage} must be a dataset, or a function that makes one, but got the path {str(part)!r}. Of "
                    f"a folder of images diffaug.ImageFolder({str(part)!r}, image_size=64) is the dataset; on "
                    f"the command line: data=image_folder data.root={part}"
                )
    if are_datasets(given["train"]):
        raise refuse(
            "data.train",
            given["train"],
            "one dataset; join several by diffaug.Mixture, or by torch.utils.data.ConcatDataset",
        )
    return listed


def check_shape(shape: Any) -> tuple[int, ...] | None:
    """Check ``data.image_shape``; an empty one is None."""
    if shape is not None and (isinstance(shape, str) or not isinstance(shape, Sequence)):
        raise refuse("data.image_shape", shape, "a list of whole numbers, for example [3, 64, 64]")
    return tuple(integer("each of data.image_shape", side, 1) for side in shape or ()) or None


def list_functions(sources: Sequence[Any]) -> list[Callable[[], Any]]:
    """List the functions that make a stage's datasets, or the sets of its mixture."""
    parts: list[Any] = []
    for source in sources:
        parts += source.sources.values() if isinstance(source, Mixture) else [source]
    return [part for part in parts if is_function(part)]


def dataset_name(stage: str, number: int, many: bool) -> str:
    """Name a dataset as errors call it."""
    integer(f"the number of data.{stage} datasets", number, 0, 2**DATASET_BITS - 1)
    return f"data.{stage}[{number}]" if many else f"data.{stage}"


def build_images(
    source: Source,
    *,
    stage: str,
    number: int,
    name: str,
    seed: int,
    image_shape: tuple[int, ...] | None,
    look: bool = True,
    **options: Any,
) -> Images:
    """Build a dataset ready for its loader, and validate some of its items.

    Arguments:
        source: the dataset, or a function that makes it.
        stage, number: which it is.
        name: how errors call it.
        seed: what its transforms' draws are keyed by, beside the sample.
        image_shape: what its first image must have; None takes whatever comes.
        look: whether some of its images are looked at.
        options: of `Images`.
    """
    dataset: Any = _part(source() if is_function(source) else source, name)
    dataset = dataset.build() if isinstance(dataset, Mixture) else index_dataset(dataset, name)
    streams = is_stream(dataset)
    if isinstance(dataset, Mixture) and stage != "train":
        raise refuse(name, dataset, f"one dataset, or a list of the sets: data.{stage} goes through each by itself")
    if not streams and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        wanted = "a map-style dataset, with a length and items by index, or a torch.utils.data.IterableDataset"
        raise refuse(name, dataset, wanted)
    if not streams and not 0 < len(dataset) <= 2**COUNTED_BITS:
        raise ValueError(
            f"{name} must hold at least one image, but {type(dataset).__name__} has length {len(dataset)}."
        )
    images = Images(dataset, name=name, domain=(seed, STAGES[stage], number), **options)
    if look and not streams:
        look_at(images, image_shape)
    return images


def _part(dataset: Any, name: str) -> Any:
    """Return a Subset of a dataset with buckets, as random_split makes it, as that dataset's own part; of a store too.

    Raises:
        ValueError: the dataset has none, so that the buckets of the subset's samples are not known.
    """
    if type(dataset) is not Subset:
        return dataset
    whole = _part(dataset.dataset, name)
    if getattr(whole, "bucket_of", None) is None and type(whole) is not Store:
        return dataset
    if not hasattr(whole, "only"):
        wanted = (
            f"a dataset that knows its buckets: give {type(whole).__name__} a method only(indices), or its own part"
        )
        raise refuse(name, dataset, wanted)
    return whole.only(list(dataset.indices))


def look_at(images: Images, image_shape: tuple[int, ...] | None) -> None:
    """Look at some images of a dataset: refuse another shape than is said, warn of another range."""
    (first, _, extra), name = images[images.place(0)], images.name
    shape = tuple(first.shape)
    floats: list[str | None] = [None] if first.is_floating_point() else []  # the target, and conditions by name
    floats += images.aligned.unranged(extra)
    if images.check_range and floats:
        shards: Any = getattr(images.dataset, "shard_sizes", None) or [len(images)]
        chosen = spread_indices(shards[0] or 1, _LOOKED_AT)  # of the first shard: others may be far away
        for part in floats:
            samples = (images[images.place(index)] for index in chosen)
            some = (image if part is None else extra[part] for image, _, extra in samples)
            where = name if part is None else f"{part} of {name}"
            warn_of_half_range(
                some, images.value_range, f"{where}, of which {len(chosen)} images were looked at,", part
            )
    if any("std" in store.split.fields for store in _stores(images.dataset)):
        shape = shape[1:]  # of latents, which come as two moments
    if image_shape is not None and shape != image_shape:
        raise ValueError(
            f"data.image_shape says {list(image_shape)}, but {name}[0] has shape {list(shape)}: set it to the "
            "shape of your images (the network is built to it)."
        )


def check_stores(dataset: Any, name: str, encoder: object, aligned: Aligned, fields: Collection[str]) -> None:
    """Refuse a store of mean and deviation where nothing draws from them: both would be noised, as if an image. And one
    of conditions or masks of which nothing is said: they would be handed on as they are stored."""
    for store in _stores(dataset):
        if aligned.roles is None and store.roles.keys() & set(fields) - {"image"}:
            raise ValueError(
                f"{name} reads the store {str(store.root)!r}, which was made with data.images. Say it again, "
                f"data.images={spell(store.roles)}; or data.images={{image: target}} if nothing else is an image."
            )
        if "std" in store.split.fields and not isinstance(encoder, Stored):
            raise ValueError(
                f"{name} reads the store of latents {str(store.root)!r}, whose rows are a mean and a deviation to "
                "draw from: data=store does so. Here set data.encoder={_target_: diffaug.store.Stored, "
                "deviations: true}, and data.latent_stats to the mean and std in store.json."
            )


def _stores(dataset: Any) -> list[Store]:
    """List the stores that a dataset is, or is put together of."""
    if isinstance(dataset, Subset):
        return _stores(dataset.dataset)
    if isinstance(dataset, (Mixture, ConcatDataset)):
        return [
            store
            for part in (dataset.sets if isinstance(dataset, Mixture) else dataset.datasets)
            for store in _stores(part)
        ]
    return [dataset] if isinstance(dataset, Store) else []


def warn_of_half_range(
    images: Iterable[Tensor], value_range: tuple[float, float] | None, where: str, condition: str | None = None
) -> None:
    """Say in the log where float images look as if they lay in [0, 1], and that is not their stated range.

    They are gone through only as far as the first that has a value below 0.

    Arguments:
        images: targets, or conditions of which no range is declared.
        value_range: the process's.
        where: how the line calls them.
        condition: the condition's name.
    """
    low, high = value_range or (0.0, 1.0)
    if low >= 0:
        return
    highest = 0.0
    for image in images:
        if float(image.min()) < 0:
            return
        highest = max(highest, float(image.max()))
    if highest > high / 2:
        said = "process.value_range=[0,1]"
        if condition is not None:
            said = f"data.images.{condition}={{role: condition, value_range: [0, 1]}}"
        _log.warning(
            "%s has no value below 0, though process.value_range is [%g, %g]: if your images are in [0, 1] "
            "(torchvision's ToTensor), set %s",
            where,
            low,
            high,
            said,
        )


def largest_bucket(dataset: Any) -> NDArray[np.int64] | None:
    """Return the samples of a dataset's largest bucket; None for a dataset without buckets, whose images are alike."""
    bucket_of = getattr(dataset, "bucket_of", None)
    return None if bucket_of is None else np.flatnonzero(bucket_of == np.bincount(bucket_of).argmax())


def spread_indices(size: int, count: int) -> list[int]:
    """Spread up to so many indices evenly over a dataset."""
    last = max(min(count, size) - 1, 1)
    return sorted({place * (size - 1) // last for place in range(min(count, size))})
