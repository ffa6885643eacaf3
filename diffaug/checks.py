"""Checks of values, and the one form of their errors: which key is wrong, what was wanted, what came.

A frozen dataclass states the range of each field beside it, by `bounded` or `one_of`, and its base class checks them
all by `check_fields`, so that `schedule.beta_end=abc` on the command line (which Hydra accepts: a string is a value
like any other) fails before any data is read. The other functions check one value, the arguments of a function for
example.
"""

import inspect
import math
from collections.abc import Collection
from dataclasses import Field, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar

_Object = TypeVar("_Object")


def bounded(
    default: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float | str = math.inf,
    at_most: float | str = math.inf,
) -> Any:
    """Declare a dataclass's field with the range of its values, for `check_fields`.

    Example::

        beta_start: float = bounded(1e-4, above=0, below=1, at_most="beta_end")

    Arguments:
        above, at_least, below, at_most: numbers; below and at_most may be the name of another field of the dataclass,
            whose value is the bound (none where that is None).
    """
    bounds = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    return field(default=default, metadata={name: b for name, b in bounds.items() if b not in (-math.inf, math.inf)})


def one_of(default: Any, choices: Collection[Any]) -> Any:
    """Declare a dataclass's field that has one of a few values, for `check_fields`."""
    return field(default=default, metadata={"choices": choices})


def check_fields(instance: Any, where: str) -> None:
    """Check the fields of a dataclass by their annotations and ranges, and make their numbers of the annotated type.

    Looks at fields that are annotated as float, int or bool, or one of these and None, and at those of `one_of`. A
    float that is a whole number (10.0) is taken for an int, an int for a float; a bool for neither.

    Arguments:
        where: the YAML key of the instance, for example ``schedule``.

    Raises:
        ValueError: with the key of the field.
    """
    for each in fields(instance):
        value = _check_field(f"{where}.{each.name}", getattr(instance, each.name), each)
        object.__setattr__(instance, each.name, value)
    for each in fields(instance):
        value = getattr(instance, each.name)
        for bound in ("below", "at_most"):
            other = each.metadata.get(bound)
            limit = getattr(instance, other) if isinstance(other, str) else None
            if value is None or limit is None:
                continue
            if value > limit or (value == limit and bound == "below"):
                wanted = f"{'less than' if bound == 'below' else 'at most'} {where}.{other}, {limit}"
                raise refuse(f"{where}.{each.name}", value, wanted)


def _check_field(where: str, value: Any, declared: Field[Any]) -> Any:
    if "choices" in declared.metadata:
        return choice(where, value, declared.metadata["choices"])
    # A string where the class's module says `from __future__ import annotations`.
    annotation = declared.type if isinstance(declared.type, str) else inspect.formatannotation(declared.type)
    kinds = annotation.split(" | ")
    kind = kinds[0] if kinds[1:] in ([], ["None"]) else None
    if value is None and "None" in kinds:
        return value
    bounds = {name: bound for name, bound in declared.metadata.items() if not isinstance(bound, str)}
    if kind == "float":
        return number(where, value, **bounds)
    if kind == "int":
        if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        return integer(where, value, **bounds)
    return flag(where, value) if kind == "bool" else value


def refuse(where: str, value: object, wanted: str) -> ValueError:
    """Return the error for a bad value.

    Arguments:
        where: the YAML key that sets the value, for example ``schedule.beta_end``.
        value: what came; of tensors and arrays their dtype and shape are said.
        wanted: what was wanted, as the end of the sentence "... must be".
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    came = repr(value) if dtype is None or shape is None else f"{dtype} of shape {tuple(shape)}"
    return ValueError(f"{where} must be {wanted}, but got {came} ({type(value).__name__}).")


def number(
    where: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """Return ``value`` as a float, or raise `ValueError` if it is no finite number within the bounds."""
    low, high = max(above, at_least), min(below, at_most)
    if low == -math.inf and high == math.inf:
        wanted = "a finite number"
    elif high == math.inf:
        wanted = f"a number {'>' if low == above else '>='} {low:g}"
    else:
        wanted = f"a number in {'(' if low == above else '['}{low:g}, {high:g}{')' if high == below else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refuse(where, value, wanted)
    if not (above < value < below and at_least <= value <= at_most):
        raise refuse(where, value, wanted)
    return float(value)


def span(where: str, value: Any, otherwise: str = "") -> tuple[float, float]:
    """Return a range of values as a pair of floats, or raise `ValueError` if it is none; ``otherwise`` is said then."""
    match value:
        case [first, second]:
            low, high = number(where, first), number(where, second)
            if low < high:
                return low, high
        case _:
            pass
    raise refuse(where, value, f"a pair [low, high] with low < high{otherwise}")


def integer(where: str, value: object, at_least: float = -math.inf, at_most: float = math.inf) -> int:
    """Return ``value``, or raise `ValueError` if it is no whole number within the bounds, both included."""
    wanted = "a whole number"
    if at_least > -math.inf:
        wanted += f" >= {at_least}" if at_most == math.inf else f" in [{at_least}, {at_most}]"
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
        raise refuse(where, value, wanted)
    return value


def flag(where: str, value: object) -> bool:
    """Return ``value``, or raise `ValueError` if it is not True or False.

    Hydra hands on the words no, off and yes of a command line as strings, all of which Python takes for true.
    """
    if not isinstance(value, bool):
        raise refuse(where, value, "true or false")
    return value


def guess(names: Collection[str], known: Collection[str]) -> str:
    """Return the end of a sentence on names that are not known: ": did you mean x_s?", or "." where none is near."""
    of = {name.lower(): name for name in known}
    near = [of[found] for name in names for found in get_close_matches(name.lower(), of, 1)]
    return f": did you mean {', '.join(near)}?" if near else "."


def instance(where: str, value: object, kind: type[_Object], wanted: str) -> _Object:
    """Return ``value``, or raise `ValueError` if it is no object of this class."""
    if not isinstance(value, kind):
        raise refuse(where, value, wanted)
    return value


def choice(where: str, value: _Object, choices: Collection[object]) -> _Object:
    """Return ``value``, or raise `ValueError` if it is not one of ``choices``."""
    if value not in choices:
        raise refuse(where, value, f"one of {', '.join(map(repr, choices))}")
    return value
