"""Helpers for numbers: float64 on any device, tables kept for the next call, files, broadcasting over samples."""

import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaug.checks import refuse

P = ParamSpec("P")
T = TypeVar("T")


def keep(function: Callable[P, T]) -> Callable[P, T]:
    """Keep the results of a function of values that can be hashed, and run it outside the caller's torch context.

    Outside inference mode even when first asked for inside: a tensor made there would break a later training. On the
    CPU, whatever torch's default device: a schedule's own code need not say where.
    """

    @functools.lru_cache(maxsize=256)
    @functools.wraps(function)
    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return function(*args, **kwargs)

    return cast("Callable[P, T]", kept)  # pyright forgets the arguments of what lru_cache returns


def where_float64_is(x: Tensor) -> Tensor:
    """Return x, on the CPU if its own device has no float64."""
    return x.cpu() if x.device.type == "mps" else x


def in_float64(function: Callable[[Tensor], Tensor], t: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a function to t in float64 and round its result once; to float32 on a device that has no float64."""
    result = function(where_float64_is(t).double())
    if t.device.type != result.device.type and dtype == torch.float64:
        dtype = torch.float32
    return result.to(dtype).to(t.device)


def _evenly(function: Callable[..., Tensor], *numbers: Tensor) -> Tensor:
    """Apply an elementwise function to float64 numbers of one shape: each by the same instructions, anywhere in them.

    On the CPU torch takes the last few of a tensor, which fill no vector, and the last few of each thread's share,
    through another form of some functions (sigmoid, pow, hypot), off by a last bit at times. That bit tells where the
    exact value is halfway between two float32 numbers, as 1 - t often is: a sample's coefficients would depend on its
    place in the batch.
    """
    size = numbers[0].numel()
    rest = -size % _VECTORS
    if not numbers[0].is_cpu or (not rest and size <= _ONE_THREAD):
        return function(*numbers)
    padded = [torch.nn.functional.pad(some.flatten(), (0, rest)) for some in numbers]
    starts = range(0, size, _ONE_THREAD)
    made = [function(*(some[start : start + _ONE_THREAD] for some in padded)) for start in starts]
    return (made[0] if len(made) == 1 else torch.cat(made))[:size].view(numbers[0].shape)


_VECTORS = 16  # the most float64 numbers that a step of torch's loops takes, on any CPU
_ONE_THREAD = 2**14  # fewer than torch shares out among threads


def sigmoid(x: Tensor) -> Tensor:
    """Compute the logistic function of float64 numbers."""
    return _evenly(torch.sigmoid, x)


def power(x: Tensor, exponent: float) -> Tensor:
    """Compute powers of float64 numbers."""

    def raised(base: Tensor) -> Tensor:
        return base**exponent

    return _evenly(raised, x)


def hypot(a: Tensor, b: Tensor) -> Tensor:
    """Compute the root of a^2 + b^2 of float64 numbers of one shape, without overflow."""
    return _evenly(torch.hypot, a, b)


def log_odds(log_p: Tensor) -> Tensor:
    """Return ln(p / (1 - p)) of ln p: with its digits where p is nearly 1."""
    return log_p - torch.log(-torch.expm1(log_p))


def per_sample(number: Tensor, like: Tensor) -> Tensor:
    """Return one number a sample, shape (B,), with a dimension of 1 for each of ``like``'s others."""
    return number.view(-1, *(1,) * (like.ndim - 1))


def read_numbers(where: str, path: str | Path, names: Sequence[str] = ()) -> list[float | str]:
    """Read one row of numbers from a .npy, .npz or .csv file.

    Arguments:
        where: the YAML key that names the file, for the error.
        names: how the numbers may be called, the wanted name first: an array of a .npz, a column of a .csv with a
            header. An only one is taken too, unless its name is another of these. A .csv without a header is one column
            or one line.

    Returns:
        Floats; a cell of a .csv that is no number is text, for the caller to refuse.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise refuse(where, str(path), f"numbers, or a file of them; there is no such file from {Path.cwd()}")
    if path.suffix not in (".npy", ".npz", ".csv"):
        raise refuse(where, str(path), "numbers, or the path of a .npy, .npz or .csv file of them")
    try:
        columns = _read_csv(path) if path.suffix == ".csv" else _read_arrays(path)
    except Exception as error:  # numpy raises five kinds for a damaged file
        raise refuse(where, str(path), f"the path of a whole {path.suffix} file of numbers") from error
    if names and names[0] in columns:
        values = columns[names[0]]
    elif len(columns) == 1 and not columns.keys() & set(names):
        (values,) = columns.values()
    else:
        called = f", called {names[0]}" if names else ""
        raise refuse(where, str(path), f"a file with one row of numbers{called}; it has {', '.join(columns) or 'none'}")
    if isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in "fiu":
            raise refuse(where, values, f"one row of numbers in {path}")
        values = values.astype(np.float64).tolist()
    return values


def _read_arrays(path: Path) -> dict[str, NDArray[Any] | list[float | str]]:
    loaded = np.load(path, allow_pickle=False)
    return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)


def _read_csv(path: Path) -> dict[str, NDArray[Any] | list[float | str]]:
    with path.open(newline="") as file:
        rows = [[_parse(cell.strip()) for cell in row] for row in csv.reader(file) if any(map(str.strip, row))]
    if len(rows) == 1 and not any(isinstance(cell, str) for cell in rows[0]):
        return {"": rows[0]}
    if rows and any(isinstance(cell, str) for cell in rows[0]):
        header = [str(name) for name in rows.pop(0)]
    else:
        header = [f"column {k + 1}" for k in range(max(map(len, rows), default=0))]
    return {name: [row[k] if k < len(row) else "" for row in rows] for k, name in enumerate(header)}


def _parse(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell
