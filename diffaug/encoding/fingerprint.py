"""The fingerprint of a store: files, some of the items, options, the encoder's weights, versions, in plain types."""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from diffaug.datamodules.module import DiffusionBase
from diffaug.datamodules.recipe import describe
from diffaug.datamodules.sources import spread_indices
from diffaug.datasets.indexed import describe_dataset
from diffaug.encoding.unwrap import Collated
from diffaug.encoding.writing import Source
from diffaug.loader.batch import Place
from diffaug.loader.dataset import Images
from diffaug.randomness.user_code import detect_draws

LOOKED_AT = 16  # items whose bytes are part of the fingerprint
_LIBRARIES = ("torch", "numpy", "pillow")


def fingerprint(data: DiffusionBase, sources: Sequence[Source]) -> dict[str, Any]:
    """Describe what makes a store.

    Arguments:
        data: the DataModule.
        sources: what is stored of it.

    Raises:
        ValueError: items are not the same when they are read again.
    """
    return {
        **{
            source.split.folder: {
                "dataset": type(source.images.dataset).__name__,
                **describe_dataset(source.images.dataset),
                "sizes and times of the files": _digest(source.files),
                "items looked at": _looked_at(source),
                "kept": list(source.images.wanted),
                "variants": list(source.split.variants),
                "drawn by seed": source.images.domain[0] if source.split.variants[0].isdecimal() else None,
            }
            for source in sources
        },
        "transform": describe(data.transform),
        "eval_transform": describe(data.eval_transform),
        "encoder": describe(data._noiser.encoder),
        "weights": digest_weights(data._noiser.encoder),
        "image_key": data.aligned.target,
        "images": data.aligned.roles,
        "value_range": data.process.value_range and list(data.process.value_range),
        # diffaug's own from the code: a checkout that is not installed has no other.
        "versions": {"diffaug": import_module("diffaug").__version__, **{name: version(name) for name in _LIBRARIES}},
    }


def digest_weights(encoder: Any) -> str | None:
    """Return a digest of the weights of a network, or of those that a function holds: bound, or in its closure."""
    inside = [encoder, getattr(encoder, "__self__", None), *getattr(encoder, "args", ())]
    inside += [cell.cell_contents for cell in getattr(encoder, "__closure__", None) or ()]
    inside += getattr(encoder, "__dict__", {}).values()
    digest = hashlib.blake2b(digest_size=8)
    networks = [part for part in inside if isinstance(part, nn.Module)]
    for network in networks:
        for name, weight in network.state_dict().items():
            digest.update(f"{name} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if networks else None


def list_files(dataset: Any) -> list[str] | None:
    """List what a dataset's items are read from, a line of JSON each: name, bytes, time of change in nanoseconds.

    None where it names no files, or is a stream. Names are those within the dataset's folder, so that this may move.
    """
    if isinstance(dataset, Subset):
        inner = list_files(dataset.dataset)
        return inner and [inner[index] for index in dataset.indices]
    if isinstance(dataset, Collated):
        return list_files(dataset.dataset)
    paths = getattr(dataset, "paths", None) or [sample[0] for sample in getattr(dataset, "samples", [])]
    if not paths or len(paths) != len(dataset) or not all(isinstance(path, str) for path in paths):
        return None
    root = str(getattr(dataset, "root", ""))
    names = getattr(dataset, "names", None) or [path.removeprefix(root).lstrip("/\\") for path in paths]
    lines = []
    for name, path in zip(names, paths, strict=True):
        status = os.stat(path)
        lines.append(json.dumps([name, status.st_size, status.st_mtime_ns]))
    return lines


def draws_at_random(images: Images) -> bool:
    """Return whether reading some of the items draws random numbers, of torch's, numpy's or Python's global state."""
    places = [Place(row, 0, 0, 0) for row in spread_indices(len(images), LOOKED_AT)]
    return any(detect_draws(lambda place=place: images.read(place))[1] for place in places)


def _digest(files: list[str] | None) -> str | None:
    if files is None:
        return None
    return f"{len(files)} files, {hashlib.blake2b(''.join(files).encode(), digest_size=8).hexdigest()}"


def _looked_at(source: Source) -> str:
    """Return a digest of some items, read twice: what is inside a user's function shows there."""

    def digest() -> str:
        made = hashlib.blake2b(digest_size=8)
        for row in spread_indices(source.split.items, LOOKED_AT):
            image, _, extra = source.read(row)
            made.update(image.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            made.update(repr(extra).encode(errors="surrogatepass"))
        return made.hexdigest()

    once = digest()
    if digest() != once:
        raise ValueError(
            f"Items of {source.images.name} are not the same when they are read again: the dataset or data.transform "
            "draws random numbers of its own. A store would keep one draw for ever: set that with data=store instead."
        )
    return once
