"""A schedule that is given as a table: typed in, or read from a file."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaug.checks import choice, one_of, refuse
from diffaug.schedules.base import Schedule, betas_of

KEYS = ("betas", "alpha_bars")


@dataclass(frozen=True)
class Tabulated(Schedule):
    """A discrete schedule by its own table of betas or alpha_bars; T is the table's length.

    The default of configs/schedule/tabulated.yaml is the six steps with which DiffWave samples fast (Kong et al. 2021,
    "DiffWave: A Versatile Diffusion Model for Audio Synthesis").

    Arguments:
        values: numbers; or the path of a .npy, .npz or .csv file, which is read at once (see `from_file`).
        key: what the numbers are: ``betas``, each in (0, 1), where the last may be 1; or ``alpha_bars``, each in
            (0, 1) and none above the one before, where the last may be 0.

    Two are equal if their numbers and key are, wherever they came from.
    """

    values: tuple[float, ...]
    key: str = one_of("betas", KEYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        values = _read(Path(self.values), self.key) if isinstance(self.values, (str, Path)) else self.values
        if not isinstance(values, Iterable):
            raise refuse("schedule.values", values, "a list of numbers in [0, 1], or the path of a file")
        values = values.tolist() if isinstance(values, (np.ndarray, Tensor)) else list(values)
        object.__setattr__(self, "values", _checked(values, self.key))

    @property
    def timesteps(self) -> int:
        return len(self.values)

    def __hash__(self) -> int:
        return hash((self.key, len(self.values), self.values[0], self.values[-1], sum(self.values)))

    @classmethod
    def from_file(cls, path: str | Path, key: str = "betas") -> "Tabulated":
        """Read a table from a file; the schedule holds its numbers and no longer knows the file.

        Arguments:
            path: a .npy file of one array; a .npz file, whose array called ``key`` is taken, or its only one; or a .csv
                file, whose column called ``key`` is taken, or its only one (a header is not needed then).
            key: betas or alpha_bars.
        """
        return cls(_checked(_read(Path(path), choice("schedule.key", key, KEYS)), key), key)

    def _log_snr_table(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        if self.key == "alpha_bars":
            return torch.logit(values)
        log_alpha_bars = torch.log1p(-values).cumsum(0)
        return log_alpha_bars - torch.log(-torch.expm1(log_alpha_bars))

    def _alpha_bars(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        return values if self.key == "alpha_bars" else (1.0 - values).cumprod(0)

    def _betas(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        return values if self.key == "betas" else betas_of(torch.logit(values))


def _checked(values: list[object], key: str) -> tuple[float, ...]:
    wanted = "a list of numbers in (0, 1)"
    if not values:
        raise refuse("schedule.values", values, f"{wanted}, at least one")
    numbers: list[float] = []
    for place, value in enumerate(values):
        where = f"schedule.values[{place}]"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise refuse(where, value, "a finite number in (0, 1)")
        edge = 1 if key == "betas" else 0
        if not 0 < value < 1 and not (value == edge and place == len(values) - 1):
            raise refuse(where, value, f"in (0, 1), as {key} are (only the last may be {edge})")
        if key == "alpha_bars" and numbers and value > numbers[-1]:
            raise refuse(where, value, f"in (0, {numbers[-1]}], as alpha_bars never rise: noise grows with t")
        numbers.append(float(value))
    return tuple(numbers)


def _read(path: Path, key: str) -> list[object]:
    if not path.is_file():
        raise FileNotFoundError(f"schedule.values: there is no file {path} (from {Path.cwd()}).")
    kind = path.suffix.lower()
    if kind == ".csv":
        return _read_csv(path, key)
    if kind not in (".npy", ".npz"):
        raise refuse("schedule.values", str(path), "the path of a .npy, .npz or .csv file")
    loaded = np.load(path, allow_pickle=False)
    if kind == ".npz":
        name = _only_name(path, key, loaded.files, "arrays")
        loaded = loaded[name]
    if loaded.ndim != 1 or loaded.dtype.kind not in "fiu":
        raise refuse("schedule.values", f"{loaded.dtype} of shape {loaded.shape}", f"one row of numbers in {path}")
    return loaded.astype(np.float64).tolist()


def _read_csv(path: Path, key: str) -> list[object]:
    with path.open(newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(cell.strip() for cell in row)]
    if not rows:
        raise refuse("schedule.values", str(path), "a file with numbers in it")
    header = None if all(map(_is_number, rows[0])) else rows.pop(0)
    if header is None and len(rows[0]) > 1:
        raise refuse("schedule.values", str(path), f"one column, or columns with names, one of them {key}")
    column = header.index(_only_name(path, key, header, "columns")) if header else 0
    cells = [row[column] if column < len(row) else "" for row in rows]
    return [float(cell) if _is_number(cell) else cell for cell in cells]


def _only_name(path: Path, key: str, names: list[str], what: str) -> str:
    if key in names:
        return key
    if len(names) == 1 and names[0] not in KEYS:
        return names[0]
    raise refuse("schedule.key", key, f"a name that is there: {path} has the {what} {', '.join(names)}")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
