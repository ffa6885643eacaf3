"""The one form in which diffaug refuses a value: what was wrong, what came, what was wanted, where it is set.

Every public constructor checks its fields with these functions, so that `schedule.beta_end=abc` on the command
line (which Hydra accepts: a string is a value like any other) fails before any data is read.
"""

import math
from collections.abc import Collection
from typing import Any


def refuse(where: str, value: Any, wanted: str) -> ValueError:
    """Return the error for a bad value.

    Arguments:
        where: the YAML key that sets the value, for example ``schedule.beta_end``.
        value: what came; of tensors and arrays their dtype and shape are said.
        wanted: what was wanted, as the end of the sentence "... must be".
    """
    array = hasattr(value, "dtype") and hasattr(value, "shape")
    came = f"{value.dtype} of shape {tuple(value.shape)}" if array else repr(value)
    return ValueError(f"{where} must be {wanted}, but got {came} ({type(value).__name__}).")


def number(
    where: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float, or raise `ValueError` if it is no finite number between ``low`` and ``high``."""
    wanted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    if low == -math.inf and high == math.inf:
        wanted = "a finite number"
    elif high == math.inf:
        wanted = f"a number {'>' if open_low else '>='} {low:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refuse(where, value, wanted)
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        raise refuse(where, value, wanted)
    return float(value)


def integer(where: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value``, or raise `ValueError` if it is no whole number in ``[low, high]``."""
    wanted = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise refuse(where, value, wanted)
    return value


def flag(where: str, value: Any) -> bool:
    """Return ``value``, or raise `ValueError` if it is not True or False.

    Hydra hands on the words no, off and yes of a command line as strings, all of which Python takes for true.
    """
    if not isinstance(value, bool):
        raise refuse(where, value, "true or false")
    return value


def choice(where: str, value: Any, choices: Collection[Any]) -> Any:
    """Return ``value``, or raise `ValueError` if it is not one of ``choices``."""
    if value not in choices:
        raise refuse(where, value, f"one of {', '.join(map(repr, choices))}")
    return value
