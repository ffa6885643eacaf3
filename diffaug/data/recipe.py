"""What a run trains on: kept in checkpoints, compared on a resume."""

import logging
from typing import Any

_log = logging.getLogger("diffaug")


def check_recipe(ours: dict[str, Any], theirs: dict[str, Any], allow: bool) -> None:
    """Refuse a checkpoint of another recipe, with the difference; or, where that is allowed, say it in the log."""
    changed = [f"{key}: {theirs[key]} -> {ours[key]}" for key in ours if key in theirs and theirs[key] != ours[key]]
    if changed and not allow:
        raise ValueError(
            "This checkpoint was trained on another recipe than the one given now:\n  "
            + "\n  ".join(changed)
            + "\nResume with the old values, or set data.allow_changed_recipe=true if you mean to change them."
        )
    if changed:
        _log.warning("going on with a changed recipe: %s", "; ".join(changed))
