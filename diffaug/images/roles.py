"""Roles of an item's images, as ``data.images`` states them: target, condition or mask, and what more is said."""

from collections.abc import Mapping
from typing import Any

from diffaug.checks import choice, number, refuse, span

ROLES = ("target", "condition", "mask")
Range = tuple[float, float]


def read_role(where: str, said: Any) -> str | dict[str, Any]:
    """Check what is said of an image and return it in plain types, to keep and to compare: a role, or a dict of more.

    Arguments:
        where: the key that says it.
        said: a role; or a dict of ``role``, ``scale`` and, of a condition, ``value_range``.
    """
    if not isinstance(said, Mapping):
        return choice(where, str(said), ROLES)
    if "role" not in said or not said.keys() <= {"role", "scale", "value_range"}:
        wanted = "a role, or a dict of role, scale and value_range, {role: condition, scale: 0.25}"
        raise refuse(where, dict(said), wanted)
    role = choice(f"{where}.role", str(said["role"]), ROLES)
    if len(said) == 1:
        return role
    if role == "target":
        wanted = "target alone: the others' scales are of its size, and its range is process.value_range"
        raise refuse(where, dict(said), wanted)
    made: dict[str, Any] = {"role": role}
    if "scale" in said:
        made["scale"] = number(f"{where}.scale", said["scale"], above=0)
    if "value_range" in said:
        if role != "condition":
            raise refuse(where, dict(said), "of role condition to have a value_range: a mask stays as it is")
        made["value_range"] = list(span(f"{where}.value_range", said["value_range"]))
    return made


def spell(roles: Mapping[str, str | Mapping[str, Any]]) -> str:
    """Write roles as a line of YAML, as a command line takes them."""
    parts = {
        name: said if isinstance(said, str) else f"{{{', '.join(f'{key}: {value}' for key, value in said.items())}}}"
        for name, said in roles.items()
    }
    return f"{{{', '.join(f'{name}: {said}' for name, said in parts.items())}}}"
