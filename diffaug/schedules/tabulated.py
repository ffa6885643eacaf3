"""A schedule by its own table of numbers, given as a list or read from a file."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import instance, one_of, refuse
from diffaug.schedules.base import Schedule, betas_of
from diffaug.schedules.numbers import log_odds, read_numbers

KEYS = ("betas", "alpha_bars")


@dataclass(frozen=True)
class Tabulated(Schedule):
    """A discrete schedule by its own table of betas or alpha_bars; T is the table's length.

    The default of configs/schedule/tabulated.yaml is the six steps with which DiffWave samples fast (Kong et al. 2021,
    "DiffWave: A Versatile Diffusion Model for Audio Synthesis").

    Arguments:
        values: numbers; or the path of a file of them, read at once: a .npy of one array; a .npz, of whose arrays that
            called ``key`` is taken, or the only one; or a .csv, and so of its columns (where there is but one, a header
            is not needed).
        key: what the numbers are: ``betas``, each in (0, 1), where the last may be 1; or ``alpha_bars``, each in
            (0, 1) and none above the one before, where the last may be 0.

    Two are equal if their numbers and key are, wherever they came from.
    """

    values: tuple[float, ...]
    key: str = one_of("betas", KEYS)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "values", _check_values(_list_values(self.values, self.key), self.key))

    @property
    def timesteps(self) -> int:
        return len(self.values)

    def __hash__(self) -> int:
        return hash((self.key, len(self.values), self.values[0], self.values[-1], sum(self.values)))

    def compute_log_snr_table(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        return torch.logit(values) if self.key == "alpha_bars" else log_odds(torch.log1p(-values).cumsum(0))

    def compute_alpha_bars(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        return values if self.key == "alpha_bars" else (1.0 - values).cumprod(0)

    def compute_betas(self) -> Tensor:
        values = torch.tensor(self.values, dtype=torch.float64)
        return values if self.key == "betas" else betas_of(torch.logit(values))


def _list_values(values: Any, key: str) -> Sequence[object]:
    if isinstance(values, (str, Path)):
        return read_numbers("schedule.values", values, (key, *KEYS))
    values = values.tolist() if hasattr(values, "tolist") else values  # of a tensor or an array
    instance("schedule.values", values, Iterable, "a list of numbers in [0, 1], or the path of a file")
    return list(values)


def _check_values(values: Sequence[object], key: str) -> tuple[float, ...]:
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
