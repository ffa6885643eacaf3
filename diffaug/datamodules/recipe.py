"""The recipe of a run, in plain types: kept in checkpoints, compared on a resume and between ranks."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

_log = logging.getLogger("diffaug")


def check_recipe(ours: Mapping[str, Any], theirs: Mapping[str, Any], allow: bool, advice: str = "") -> None:
    """Refuse a checkpoint of another recipe, with the difference; or, where that is allowed, say it in the log.

    Arguments:
        ours, theirs: the recipe of now, and the checkpoint's.
        allow: whether it may be another.
        advice: what more the refusal says.
    """
    changed = differences(ours, theirs)
    if changed and not allow:
        raise ValueError(
            "This checkpoint was trained on another recipe than the one given now:\n  "
            + "\n  ".join(changed)
            + "\nResume with the old values, or set data.allow_changed_recipe=true if you mean to change them."
            + advice
        )
    if changed:
        _log.warning("going on with a changed recipe: %s", "; ".join(changed))


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """List the entries that two recipes have both and that differ, a line each."""
    ours, theirs = _flat(ours), _flat(theirs)
    return [f"{key}: {theirs[key]} -> {ours[key]}" for key in ours if key in theirs and theirs[key] != ours[key]]


def check_ranks(trainer: Any, recipe: Mapping[str, Any]) -> None:
    """Refuse ranks that would train on different recipes: each would take its share of another order.

    Every rank must come here; on every rank the same error is raised.
    """
    distributed = torch.distributed
    if not trainer or trainer.world_size == 1 or not distributed.is_available() or not distributed.is_initialized():
        return
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, _flat(recipe))
    for rank, other in enumerate(everyone):
        keys = dict.fromkeys([*everyone[0], *other])
        unlike = [f"{key}: {everyone[0].get(key)} on rank 0, {other.get(key)} on rank {rank}" for key in keys]
        unlike = [line for line, key in zip(unlike, keys, strict=True) if everyone[0].get(key) != other.get(key)]
        if unlike:
            raise ValueError(
                "The ranks disagree on what they train on:\n  "
                + "\n  ".join(unlike)
                + "\nGive all ranks the same: they share one order of the images out among them, and their noise "
                "differs by itself, as each image has its own (seed_everything(42), not 42 + rank). A checkpoint to go "
                "on from must lie where every node reads it."
            )


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """List a recipe's entries, those of its parts by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def describe(thing: Any) -> str | None:
    """Say what something of the user's is, alike in every process that makes it; None for None.

    A function by its name, a network by its class and size, anything else by its ``repr`` where that holds no address:
    what is inside a function, or in a network's weights, goes unseen.
    """
    if thing is None:
        return None
    if isinstance(thing, partial):
        return f"partial of {describe(thing.func)}"
    if isinstance(thing, nn.Module) and any(True for _ in thing.parameters()):
        return f"{type(thing).__qualname__} of {sum(p.numel() for p in thing.parameters())} parameters"
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    text = " ".join(repr(thing).split())
    return re.sub(r"[^\s(\[]*? at 0x[0-9a-f]+", "", text) if len(text) < 1000 else type(thing).__qualname__
