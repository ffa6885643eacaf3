"""The datasets that configs/data/ offers, each as a ready DiffusionDataModule of the class that is given.

Functions, not classes: what is particular to a dataset is where it lies and how it is split; all else is
`DiffusionDataModule`'s, whose options they hand on. Nothing is read before Lightning's ``setup``.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, TensorDataset

from diffaug.checks import choice, flag, integer, number, refuse
from diffaug.datamodules.module import DiffusionBase
from diffaug.datasets.broken import ON_ERROR
from diffaug.datasets.buckets import Buckets, read_buckets
from diffaug.store.layout import read_info
from diffaug.store.moments import Stored
from diffaug.store.reader import Store

Module = TypeVar("Module", bound=DiffusionBase)


def digits(module: type[Module], **options: Any) -> Module:
    """Return scikit-learn's 1,797 handwritten digits, 8x8, grey, floats in [-1, 1]; every tenth is for validation.

    Arguments:
        module: the class of DataModule to make.
        options: `DiffusionDataModule`'s.
    """
    return module(train=partial(_digits, validation=False), val=partial(_digits, validation=True), **options)


def moving_digits(module: type[Module], *, image_shape: Sequence[int] = (8, 1, 16, 16), **options: Any) -> Module:
    """Return clips made of `digits`, uint8: each digit moves over a dark square and bounces at its edges.

    Where it begins and how fast it moves, a pixel or two a frame along each side, is its own.

    Arguments:
        module: the class of DataModule to make.
        image_shape: of a clip, (frames, 1, height, width), the sides at least 8.
        options: `DiffusionDataModule`'s.
    """
    frames, *_, height, width = shape = tuple(image_shape)
    if len(shape) != 4 or shape[1] != 1 or min(height, width) < 8 or frames < 1:
        raise refuse("data.image_shape", list(shape), "[frames, 1, height, width], the sides at least 8")
    part = partial(_moving_digits, frames, height, width)
    made = {"train": partial(part, validation=False), "val": partial(part, validation=True)}
    return module(**made, image_shape=shape, **options)


def _moving_digits(frames: int, height: int, width: int, *, validation: bool) -> Dataset[Any]:
    images, labels = _digits(validation=validation)[:]
    images = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8)
    clips = torch.zeros(len(images), frames, 1, height, width, dtype=torch.uint8, device="cpu")
    drawn = torch.randint(2**31, (len(images), 4), generator=torch.Generator().manual_seed(0), device="cpu").tolist()
    for clip, image, (y, x, dy, dx) in zip(clips, images, drawn, strict=True):
        for f, frame in enumerate(clip):
            top, left = (
                room - abs((begin + f * (speed % 2 + 1)) % (2 * room) - room) if room else 0
                for room, begin, speed in ((height - 8, y, dy), (width - 8, x, dx))
            )
            frame[0, top : top + 8, left : left + 8] = image
    return TensorDataset(clips, labels)


def _digits(*, validation: bool) -> Dataset[Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('data=digits needs scikit-learn: pip install "diffaug[train]"') from error
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target)
    chosen = (torch.arange(len(images), device="cpu") % 10 == 9) == validation
    return TensorDataset(images[chosen], labels[chosen])


def torchvision(
    module: type[Module], dataset: Callable[..., Any], *, root: str, download: bool = False, **options: Any
) -> Module:
    """Return a torchvision dataset that takes ``root``, ``train``, ``download``; its own test split is for validation.

    Arguments:
        module: the class of DataModule to make.
        dataset: the class, for example ``torchvision.datasets.CIFAR10``.
        root: the folder that holds it.
        download: whether to fetch it where it is not there.
        options: `DiffusionDataModule`'s.

    Raises:
        ValueError: the class takes other arguments.
        FileNotFoundError: in ``setup``, where the dataset is not in ``root`` and may or could not be fetched.
    """
    flag("data.download", download)
    name = getattr(dataset, "__name__", repr(dataset))
    taken = list(signature(dataset).parameters)
    if not {"root", "train", "download"} <= set(taken):
        raise ValueError(
            f"data.dataset must take root, train and download, but {name} takes {', '.join(taken)}. For another kind "
            "of dataset give train= and val= to DiffusionDataModule, as functions that make them."
        )
    split = partial(_split, dataset, root, download)
    return module(train=partial(split, True), val=partial(split, False), **options)


def _split(dataset: Callable[..., Any], root: str, download: bool, train: bool) -> Any:
    try:
        return dataset(root=root, train=train, download=download)
    except (RuntimeError, OSError) as error:  # torchvision's own, and what a network or a disk may say
        name = getattr(dataset, "__name__", repr(dataset))
        remedy = "" if download else ", or data.download=true to fetch it there"
        tried = " It could not be fetched there either." if download else ""
        said = str(error).rstrip(". \n")  # torchvision's ends without a stop
        raise FileNotFoundError(
            f"{name} cannot be read from data.root={root!r} ({Path(root).resolve()}): {said}.{tried} Set data.root to "
            f"the folder that holds the dataset{remedy}."
        ) from error


def image_folder(
    module: type[Module],
    *,
    root: str,
    image_size: int | None = None,
    buckets: Buckets | Mapping[str, Any] | None = None,
    channels: int = 3,
    bits: int | None = None,
    on_error: str = "raise",
    broken_list: str | None = None,
    val_share: float = 0.1,
    **options: Any,
) -> Module:
    """Return any folder of images, of any sizes and modes, in any subfolders: see `diffaug.ImageFolder`.

    Arguments:
        module: the class of DataModule to make.
        root: the folder; the first level of subfolders, where there is one, gives the labels.
        image_size: the side of the squares, in pixels; it says nothing where there are buckets.
        buckets: the shapes that images are fitted to instead, each to the nearest (`diffaug.Buckets`, or its arguments
            by name, where None for both area and shapes is no buckets). The list is one for training and validation;
            what is for validation is cut in the middle and not flipped.
        channels: 3 for RGB, 1 for grey.
        bits: how many bits of a grey pixel are used, where files have room for more; None takes all the file's.
        on_error: "raise" refuses a broken file when it is its turn; "skip" leaves out those that
            ``python -m diffaug check`` has put on its list.
        broken_list: the file of that list; None is a hidden one in the folder.
        val_share: the share of the images that is for validation, in [0, 1), one image at least where it is not 0:
            chosen by a hash of each file's path within the folder, so that none of them moves when others come or go.
        options: `DiffusionDataModule`'s.

    Raises:
        ValueError: a value that cannot be.
        FileNotFoundError: in ``setup``, where there is no such folder, no image in it, or no list to skip by.
    """
    choice("data.channels", channels, (1, 3))
    made = read_buckets(buckets)
    if made is None:
        integer("data.image_size", image_size, 1)
    else:
        image_size, shape = None, options.get("image_shape")
        if shape is not None and (len(shape) != 3 or (shape[1], shape[2]) != (None, None) or shape[0] != channels):
            wanted = f"null, or [{channels}, null, null], where data.buckets gives images of several shapes"
            raise refuse("data.image_shape", shape, wanted)
        options["image_shape"] = None
    share = number("data.val_share", val_share, at_least=0, below=1)
    if bits is not None:
        integer("data.bits", bits, 1, 16)
    choice("data.on_error", on_error, ON_ERROR)
    images = {"root": root, "image_size": image_size, "buckets": made, "channels": channels, "bits": bits}
    part = partial(_part, {**images, "on_error": on_error, "broken_list": broken_list}, share)
    return module(train=partial(part, False), val=partial(part, True) if share else None, **options)


def _part(folder: dict[str, Any], share: float, validation: bool) -> Dataset[Any]:
    from diffaug.datasets.folder import ImageFolder

    if validation and folder["buckets"] is not None:
        folder = {**folder, "buckets": replace(folder["buckets"], crop="center", hflip=0.0)}
    images = ImageFolder(**folder)
    chosen = held_out(images.names, share)
    if not validation:
        held = set(chosen)
        chosen = [index for index in range(len(images)) if index not in held]
        images.warn_of_depth()
    if not chosen:
        raise ValueError(
            f"data.val_share={share:g} leaves no image for training: data.root={images.root!r} holds {len(images)}. "
            "Add images, or set data.val_share=0 to train without validation."
        )
    return images.only(chosen)


def store(module: type[Module], *, root: str, **options: Any) -> Module:
    """Return a store that ``python -m diffaug encode`` has written: see `diffaug.store.Store`.

    Latents come with the ``latent_stats`` of their training set, unless others are given.

    Arguments:
        module: the class of DataModule to make.
        root: the store's folder, which is looked into at once: it says what stages there are.
        options: `DiffusionDataModule`'s.

    Raises:
        FileNotFoundError: there is no store.
        ValueError: it holds latents, and the process says otherwise; in ``setup``, where it is not finished, or a file
            of it is missing or cut short.
    """
    info = read_info(root)
    splits, latents = info["splits"], info["latents"]
    if options.get("encoder") is not None:
        raise ValueError(
            "data=store reads what is encoded, or images: data.encoder goes with the dataset, or with encode."
        )
    made = {stage: [partial(Store, root, stage, number) for number in range(len(splits[stage]))] for stage in splits}
    several = {stage: (each if len(each) > 1 else each[0]) for stage, each in made.items()}
    options["image_key"] = "image"
    if None in (options.get("image_shape") or ()):  # of buckets, whose shapes differ
        options["image_shape"] = None
    made_for, given = info["made_from"].get("value_range"), options["process"].value_range
    given = given and list(given)
    if (
        latents is None
        and given != made_for
        and any(split.floats for of_stage in splits.values() for split in of_stage)
    ):
        raise ValueError(
            f"The images of data.root={root!r} are floats in {made_for}, but process.value_range={given}: set it to "
            "that (null where that is None)."
        )
    if latents is not None:
        if options["process"].value_range is not None:
            raise ValueError(f"data.root={root!r} holds latents, which have no range: set process.value_range=null.")
        options["encoder"] = Stored(latents["deviations"])
        if options.get("latent_stats") is None:
            options["latent_stats"] = {name: latents[name] for name in ("mean", "std")}
    return module(**several, **options)


def held_out(names: Sequence[str], share: float) -> list[int]:
    """Choose the files for validation: those whose name's hash lies in the lowest share of all hashes.

    Where none does and the share is not 0, the one with the lowest hash. So whether a file is one of them depends on
    its own name, however many others there are.
    """
    if not share:
        return []
    hashes = [
        int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        for name in names
    ]
    held = [index for index, number_ in enumerate(hashes) if number_ < share * 2**64]
    return held or [hashes.index(min(hashes))]
