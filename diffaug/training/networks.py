"""Refusals of networks that do not fit the recipe, or their images."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffaug.times import Parts


def check_conditioning(network: nn.Module, condition: str | None) -> None:
    """Refuse a diffusers network that takes labels where it is given none, or takes none where it is given some."""
    config: Any = getattr(network, "config", None)
    if not isinstance(config, Mapping) or "num_class_embeds" not in config:
        return
    classes = config["num_class_embeds"]
    takes = classes is not None or config.get("class_embed_type") is not None
    if condition is not None and not takes:
        raise ValueError(
            f"model.condition={condition} gives the network labels, but {type(network).__name__} has no embedding of "
            "classes: set model.network.num_class_embeds to how many there are, and one more where labels are dropped."
        )
    if condition is None and takes:
        raise ValueError(
            f"model.network.num_class_embeds={classes} makes a network of labels, but model.condition gives it none: "
            "set model.condition=label, and process.fields to hold label too."
        )


def explain_size(network: nn.Module, x: Tensor, error: RuntimeError) -> None:
    """Raise in place of a network's error where the sides of its images do not fit how often it halves them."""
    blocks = getattr(getattr(network, "config", None), "block_out_channels", None) or [0]
    multiple = 2 ** (len(blocks) - 1)
    if any(side % multiple for side in x.shape[2:]):
        raise ValueError(
            f"model.network, a {type(network).__name__} of {len(blocks)} levels, needs images whose sides are "
            f"multiples of {multiple}, but these are of shape {tuple(x.shape[1:])}. Set data.image_size to a multiple "
            "(or crop them in the transforms), or give model.network.block_out_channels fewer levels."
        ) from error


def check_parts(network: nn.Module, parts: Parts | None, fields: tuple[str, ...]) -> None:
    """Refuse a network of one time an image where parts have their own, and fields that do not say which are given."""
    if parts is None:
        return
    if type(network).__name__.startswith("UNet2D"):
        raise ValueError(
            f"process.parts gives each part of a sample its own t, but {type(network).__name__} takes one time for "
            "each image: set model.network to one that takes times of t's shape, such as model=causal_frames for clips."
        )
    if parts.masks and "part_mask" not in fields:
        raise ValueError(f"The model needs part_mask in process.fields, which is {list(fields)}, for {parts!r}.")
