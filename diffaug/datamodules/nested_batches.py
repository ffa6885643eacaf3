"""Several loaders side by side: a nest of dicts, lists and tuples, and batches that are nested alike."""

from collections.abc import Callable
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def map_parts(function: Callable[[Any], Any], loaders: Any, batch: Any) -> Any:
    """Apply a function to the parts of a batch that stand where ``loaders`` has its leaves.

    A list of loaders makes a list, of a batch that a hook has made a tuple of, too.

    Raises:
        ValueError: they are not nested alike.
    """
    if isinstance(loaders, (list, tuple)) and isinstance(batch, (list, tuple)):
        loaders, batch = [*loaders], [*batch]
    _, spec = tree_flatten(loaders)
    try:
        parts = spec.flatten_up_to(batch)
    except ValueError as error:
        raise ValueError(
            f"The batch must be nested as its loaders are, {_shape(loaders)}, but it is {_shape(batch)}: the wrapped "
            "DataModule's hooks must keep the sub-batches of several loaders apart, so that each gets its own noise."
        ) from error
    return tree_unflatten([function(part) for part in parts], spec)


def is_leaf(nest: Any) -> bool:
    """Return whether it is one loader, or none, and no nest of several."""
    return not isinstance(nest, (dict, list, tuple))


def _shape(nest: Any) -> str:
    """Write a nest with an asterisk for each leaf."""
    leaves, spec = tree_flatten(nest)
    return shorten(str(tree_unflatten(["*"] * len(leaves), spec)).replace("'*'", "*"), 100, placeholder=" ...")


def device_of(batch: Any) -> torch.device:
    """Return the device of the first tensor in a batch; the CPU where there is none."""
    return next((leaf.device for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), torch.device("cpu"))
