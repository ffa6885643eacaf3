"""check: a reading of every image of a dataset before training, and a list of those that cannot be read.

An image folder's list is written down, so that ``data.on_error=skip`` leaves out the same files in every epoch, on
every rank and after every resume: what is skipped as it comes would move the indices that noise and order are keyed by.
"""

import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffaug.checks import integer
from diffaug.datamodules.module import DiffusionBase
from diffaug.datasets.broken import write
from diffaug.datasets.folder import ImageFolder
from diffaug.datasets.indexed import is_stream
from diffaug.encoding.unwrap import check_own
from diffaug.loader.batch import Place
from diffaug.loader.dataset import Images
from diffaug.randomness.keys import STAGES

_SHOWN = 20
_BATCH = 16


class _Problem(NamedTuple):
    """What is wrong with an item, in words, and whether that is of the item or of the moment."""

    text: str
    lasting: bool


class _Problems(Dataset[tuple[int, _Problem | None]]):
    """What is wrong with each item of a dataset: (index, problem or None)."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, _Problem | None]:
        dataset: Any = self.images.dataset
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of files that it reads all the same
            if isinstance(dataset, ImageFolder):
                found = dataset.problem(index)
                return index, found and _Problem(*found)
            try:
                self.images[Place(index, 0, 0, 0)]
            except Exception as error:  # whatever the user's dataset or transform may raise
                own = f"{self.images.name}[{index}] "  # what our own errors begin with
                return index, _Problem(f"{str(error).removeprefix(own)} ({type(error).__name__})", True)
        return index, None


class Checked(NamedTuple):
    """What a check found.

    Attributes:
        text: to be printed.
        fine: whether every image was read, and none is broken.
    """

    text: str
    fine: bool


def check(data: DiffusionBase, *, workers: int | None = None) -> Checked:
    """Read every image of every stage, and say which are broken; a folder's list of them is written.

    A file that could not be read for a reason that may pass, such as a missing permission or too many open files, is
    said and not listed: what is on the list is left out for good.

    Arguments:
        workers: processes that read; None is one for each CPU core, 0 reads in this process.

    Raises:
        ValueError: the list could not be written; that is tried before anything is read.
    """
    check_own(data, "check")
    workers = _cores() if workers is None else integer("workers", workers, 0)
    data.prepare_data()
    parts = [images for stage in STAGES for images in data.build(stage, look=False)]
    streams = [images.name for images in parts if is_stream(images.dataset)]
    parts = [images for images in parts if images.name not in streams]
    lists = {images.dataset.broken_list: {} for images in parts if isinstance(images.dataset, ImageFolder)}
    for path in lists:
        _try_to_write(path)
    began, count = time.perf_counter(), sum(map(len, parts))
    broken: list[str] = []
    unread: list[str] = []
    with tqdm(total=count, desc="Reading", unit=" images", disable=None) as bar:
        for images in parts:
            for found in _read(images, workers):
                bar.update(len(found))
                for index, problem in found:
                    if problem is not None:
                        (broken if problem.lasting else unread).append(f"{_called(images, index)} {problem.text}")
                        if problem.lasting and isinstance(images.dataset, ImageFolder):
                            lists[images.dataset.broken_list][images.dataset.names[index]] = problem.text
                bar.set_postfix(broken=len(broken), refresh=False)
    seconds = time.perf_counter() - began
    lines = [
        f"{count} images read in {seconds:.0f} s, {len(broken) or 'none'} broken{':' * bool(broken)}",
        *_shown(broken),
    ]
    if unread:
        lines += [f"{len(unread)} could not be read for a reason that may pass, and are not listed:", *_shown(unread)]
    lines += [f"{name} is a stream, which is not read beforehand: nothing is known of its images" for name in streams]
    for path, problems in lists.items():
        write(path, problems)
        lines.append(
            f"The list is in {path}: data.on_error=skip leaves out what is on it."
            if problems
            else f"{path} is an empty list, for data.on_error=skip."
        )
    text = "\n".join(lines).encode(errors="surrogateescape").decode(errors="replace")  # names may be of any bytes
    return Checked(text, not broken and not unread and not streams)


def _shown(problems: list[str]) -> list[str]:
    more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return [*(f"  {line}" for line in sorted(problems)[:_SHOWN]), *more]


def _read(images: Images, workers: int) -> Iterator[list[tuple[int, _Problem | None]]]:
    options = {"num_workers": workers, "batch_size": _BATCH, "collate_fn": list, "generator": torch.Generator()}
    return iter(DataLoader(_Problems(images), **options))


def _called(images: Images, index: int) -> str:
    dataset: Any = images.dataset
    return dataset.names[index] if isinstance(dataset, ImageFolder) else f"{images.name}[{index}]"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _try_to_write(path: Path) -> None:
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"The list of broken files cannot be written to {path}: {error.strerror}. Say where it may "
            "be, here and when you train: data.broken_list=FILE"
        ) from None
