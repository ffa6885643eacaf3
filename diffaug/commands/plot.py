"""plot: what its pictures need beside schedules and recipes: an image, labels, the rows of loss_by_level.csv."""

import csv
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaug.datamodules.module import DiffusionBase
from diffaug.plots.curves import LEVEL_COLUMNS


def first_image(data: DiffusionBase) -> Tensor:
    """Return the first training image, in [-1, 1], shape (C, H, W).

    Raises:
        ValueError: there is none, or it is no image.
    """
    data.setup("fit")
    images = data.clean_images("train", 1)
    if images is None or images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = None if images is None else tuple(images.shape[1:])
        raise ValueError(f"A strip wants an image of shape (1 or 3, H, W) from data.train, but its first is {shape}.")
    return data.process.scale(images)[0]


def first_images(data: DiffusionBase) -> Tensor:
    """Return the first training clip, (1, F, C, H, W) or (1, C, F, H, W), or the first eight images, (8, C, H, W).

    Raises:
        ValueError: there is none.
    """
    data.setup("fit")
    images = data.clean_images("train", 8)
    if images is None:
        raise ValueError("plot parts wants clips or images from data.train, which is a stream.")
    return images[:1] if images.ndim == 5 else images


def write_label(name: str, group: str) -> str:
    """Write a choice with overrides as a legend says it: "cosine,schedule.timesteps=4000" as "cosine, T = 4000".

    Arguments:
        group: of the choice; its own keys go by their last part.
    """
    choice, *overrides = name.split(",")
    words = [choice]
    for override in overrides:
        key, equals, value = override.lstrip("+").partition("=")
        key = key.rpartition("@")[2]  # schedule@schedule.base=cosine
        key = "T" if key == "schedule.timesteps" else key.removeprefix(f"{group.rpartition('@')[2]}.")
        words.append(f"{key} = {value}" if equals else override)
    return ", ".join(words)


def read_levels(name: str) -> list[tuple[Any, ...]]:
    """Read the rows of a run's loss_by_level.csv, from the run's folder or the file's own name."""
    path = Path(name)
    path = path / "loss_by_level.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: train with callbacks=loss_by_level.")
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    if tuple(head) != LEVEL_COLUMNS:
        raise ValueError(f"{path} is no loss_by_level.csv: its columns are {head}.")
    return [
        (row[0], int(row[1]), int(row[2]), *map(float, row[3:5]), int(row[5]), *map(float, row[6:9]), row[9])
        for row in rows
    ]
