"""The splits of a store, train and val: one for each dataset, with what its rows are."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaug.checks import choice, integer
from diffaug.datamodules.module import DiffusionBase
from diffaug.datamodules.sources import look_at
from diffaug.encoding.fingerprint import draws_at_random, list_files
from diffaug.encoding.writing import OF_IMAGES, VARIANTS, Source, check_storable, read_row
from diffaug.images.items import take_apart
from diffaug.loader.batch import Batch, collate
from diffaug.loader.dataset import Images
from diffaug.randomness.user_code import untouched_random_state
from diffaug.store.latents import Latents
from diffaug.store.layout import TEXT, Field, Split
from diffaug.store.shards import choose_shard_rows

_STAGES = ("train", "val", "test")
_DRAWS = 1000  # of an image, at most


def choose_splits(
    data: DiffusionBase,
    latents: Latents | None,
    device: torch.device,
    *,
    keep: Sequence[str] | None,
    variants: Sequence[str] | int,
    differ: Sequence[str],
) -> dict[str, list[Source]]:
    """Look at the datasets of a DataModule, and say of each, by stage, which split of a store it becomes.

    Arguments:
        data: the DataModule.
        latents: made of its images, if any are.
        device: where they are made.
        keep, variants, differ: as `diffaug.commands.encode.encode` takes them.

    Raises:
        ValueError: something cannot be stored, or an option names what is not there.
    """
    drawn = isinstance(variants, int)
    if isinstance(variants, int):
        variants = [str(draw) for draw in range(integer("variants", variants, 1, _DRAWS))]
    for variant in () if drawn else variants or ("",):
        choice("each of variants", variant, VARIANTS)
    found: dict[str, list[Source]] = {}
    for stage in _STAGES:
        chosen = tuple(variants) if stage == "train" else ("0",) if drawn else ("identity",)
        for number, images in enumerate(data.build(stage, look=False)):
            _prepare(images, data, chosen, keep)
            first = collate([read_row(images, 0, chosen[0], "0")])
            fields = _fields(first, images.name)
            if latents is not None:
                fields = {**_encoded(data, latents, first.image.to(device)), **fields}
                del fields["image"]
            rows = len(images) * len(chosen)
            shard_rows = choose_shard_rows(rows, sum(max(field.bytes, 1) for field in fields.values()))  # of the first
            for name in differ:
                choice("each of differ", name, tuple(first.extra))
            shapes, bucket_bytes = getattr(images.dataset, "bucket_shapes", None), 0.0
            for name, field in fields.items():
                if name in OF_IMAGES and shapes is not None:
                    areas = np.prod(shapes, 1)[images.dataset.bucket_of]
                    bucket_bytes += field.bytes * float(areas.mean() / areas[0])
                    fields[name] = Field(field.dtype, (field.shape[0], -1, -1))
                elif name in differ:
                    fields[name] = Field(field.dtype, (-1, *field.shape[1:]))
            folder = f"{stage}-{number}" if stage in data.listed else stage
            split = Split(folder, rows, shard_rows, fields, chosen, shapes and tuple(shapes))
            source = Source(images, split, list_files(images.dataset), bucket_bytes=bucket_bytes)
            found.setdefault(stage, []).append(source)
    if not found:
        raise ValueError("This DataModule has no data for train, val or test: there is nothing to store.")
    return found


def _prepare(images: Images, data: DiffusionBase, variants: Sequence[str], keep: Sequence[str] | None) -> None:
    """Refuse a dataset that cannot be stored as these variants, and say in it which parts beside the image are kept."""
    check_storable(images)
    with untouched_random_state():
        _, extra = take_apart(images.item(images.place(0)), data.aligned.target, f"{images.name}[0]")
    for name in keep or ():
        choice("each of keep", name, tuple(extra))
    images.wanted = tuple(name for name in extra if keep is None or name in keep)
    if "hflip" in variants:
        images.moved_by = images.moved_by or "variants"
    look_at(images, data.image_shape)
    if images.name == "data.train" and variants[0].isdecimal() and not draws_at_random(images):
        raise ValueError(
            f"variants={len(variants)} stores so many draws of each training image, but reading {images.name} draws no "
            "random numbers, so they would be alike: give data.transform one that draws, such as torchvision's "
            "RandomCrop."
        )


def _fields(batch: Batch, name: str) -> dict[str, Field]:
    """Return what rows a batch of one item makes, by name."""
    fields = {"image": _field(batch.image)}
    for key, value in batch.extra.items():
        texts = isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
        if not (isinstance(value, Tensor) or texts) or key in OF_IMAGES or not re.fullmatch(r"\w[\w-]*", key):
            raise ValueError(
                f"{key!r} of {name} cannot be stored: beside the image a store holds numbers, tensors of one shape and "
                f"texts, named by letters, digits and _ and not {', '.join(OF_IMAGES)}. Say what to keep: keep=label"
            )
        fields[key] = Field(TEXT) if texts else _field(value)
    return fields


def _encoded(data: DiffusionBase, latents: Latents, image: Tensor) -> dict[str, Field]:
    """Return what rows the encoder makes, and refuse one that draws."""
    once, again = (data._noiser.encode(image, (key,)).mean for key in range(2))
    scale = float(once.abs().max())  # NaN or infinite is refused as the rows are made
    if math.isfinite(scale) and not torch.allclose(once, again, rtol=1e-3, atol=1e-5 * scale):
        raise ValueError(
            "data.encoder draws random numbers: a store would keep one draw for ever. Give one that returns the "
            "distribution, with its mean and std (a diffusers VAE as it is): then every visit has a draw of its own."
        )
    made = latents.encode(image)
    fields = {name: _field(rows) for name, rows in {**made, **latents.rows(made)}.items()}
    latents.take_sums()
    return fields


def _field(rows: Any) -> Field:
    return Field(str(rows.dtype).removeprefix("torch."), tuple(rows.shape[1:]))
