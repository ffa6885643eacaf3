"""The global random states: left as they were found."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_MASK_64 = 2**64 - 1


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Run the user's code, which may draw from torch's, numpy's or Python's global state, and put the states back."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the state users draw from
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def sample_seed(*key: int) -> None:
    """Seed all three global states by a key of whole numbers, each up to 64 bits. Use within the guard above."""
    seed = mixed(*key)
    torch.default_generator.manual_seed(seed & 0xFFFFFFFF)  # more bits would be dropped in silence
    np.random.seed(seed >> 32)  # noqa: NPY002
    random.seed(seed)


def mixed(*key: int) -> int:
    """64 bits of a key: splitmix64's finaliser (Steele, Lea and Flood 2014), chained over its numbers."""
    state = 0
    for number in key:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state
