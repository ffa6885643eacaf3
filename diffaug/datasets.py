"""The datasets that configs/data/ offers, each as a ready DiffusionDataModule.

Functions, not classes: what is particular to a dataset is where it lies and how it is split; all else is
`DiffusionDataModule`'s, whose options they hand on. Nothing is read before Lightning's ``setup``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from diffaug.checks import integer
from diffaug.data import DiffusionDataModule


def digits(**options: Any) -> DiffusionDataModule:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey, as floats in [-1, 1]; every tenth is for validation.

    Arguments:
        options: `DiffusionDataModule`'s.
    """
    return DiffusionDataModule(
        train=partial(_digits, validation=False), val=partial(_digits, validation=True), **options
    )


def _digits(*, validation: bool) -> Dataset[Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('data=digits needs scikit-learn: pip install "diffaug[train]"') from error
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target)
    chosen = (torch.arange(len(images)) % 10 == 9) == validation
    return TensorDataset(images[chosen], labels[chosen])


def torchvision(
    dataset: Callable[..., Any], *, root: str, download: bool = False, **options: Any
) -> DiffusionDataModule:
    """A torchvision dataset that has ``root``, ``train`` and ``download``: its own test split is for validation.

    Arguments:
        dataset: the class, for example ``torchvision.datasets.CIFAR10``.
        root: the folder that holds it.
        download: whether to fetch it where it is not there.
        options: `DiffusionDataModule`'s.
    """
    split = partial(_split, dataset, root, download)
    return DiffusionDataModule(train=partial(split, True), val=partial(split, False), **options)


def _split(dataset: Callable[..., Any], root: str, download: bool, train: bool) -> Any:
    try:
        return dataset(root=root, train=train, download=download)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{error} Looked in {Path(root).resolve()}: set data.root to the folder that holds the dataset, or "
            "data.download=true to fetch it there."
        ) from error


def image_folder(
    *, root: str, image_size: int, val_share: float = 0.1, seed: int | None = None, **options: Any
) -> DiffusionDataModule:
    """Any folder of photos, of any sizes, in any subfolders: resized and cropped to a square.

    Arguments:
        root: the folder; the first level of subfolders, where there is one, gives the labels.
        image_size: the side of the squares, in pixels.
        val_share: the share of the images that is for validation, in [0, 1).
        options: `DiffusionDataModule`'s.
    """
    from diffaug.folder import ImageFolder

    integer("data.image_size", image_size, 1)
    folder = partial(ImageFolder, root, image_size)
    every = round(1 / val_share) if val_share else 0
    return DiffusionDataModule(
        train=partial(_every, folder, every, False),
        val=partial(_every, folder, every, True) if every else None,
        seed=seed,
        **options,
    )


def _every(folder: Callable[[], Any], every: int, validation: bool) -> Any:
    images = folder()
    if not every:
        return images
    return Subset(images, [i for i in range(len(images)) if (i % every == every - 1) == validation])
