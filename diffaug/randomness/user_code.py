"""The global random states of torch, numpy and Python: keyed by the sample where the user's code draws from them, and
left as they were found."""

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_MASK_32, _MASK_64 = 2**32 - 1, 2**64 - 1
_States = tuple[Tensor, Any, Any]
_Result = TypeVar("_Result")


def _states() -> _States:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the state users draw from


def _restore(states: _States) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def _moved(before: _States, now: _States) -> bool:
    return (
        not torch.equal(now[0], before[0])
        or now[1][2:] != before[1][2:]
        or not np.array_equal(now[1][1], before[1][1])
        or now[2] != before[2]
    )


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed & _MASK_32)  # its CPU generator would drop more bits in silence
    np.random.seed(seed >> 32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def untouched_random_state() -> Generator[None]:
    """Run the user's code, which may draw from torch's, numpy's or Python's global state, and put the states back."""
    states = _states()
    try:
        yield
    finally:
        _restore(states)


@contextmanager
def keyed_random_state(device: torch.device, *key: int) -> Generator[None]:
    """Run the user's code on a device under random states of this key, and put the states back.

    All three global states are keyed, and the device's own. Reading and setting an accelerator's state touches two
    numbers that its driver keeps on the host: it does not wait for the device.
    """
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    before = None if accelerator is None else accelerator.get_rng_state(device)
    with untouched_random_state():
        seed_all(*key)
        try:
            if accelerator is not None:
                with accelerator.device(device):
                    accelerator.manual_seed(mix_key(*key))
            yield
        finally:
            if accelerator is not None:
                accelerator.set_rng_state(before, device)


def seed_all(*key: int) -> None:
    """Seed all three global states by a key of whole numbers, each up to 64 bits. Use within the guard above."""
    _seed_all(mix_key(*key))


def mix_key(*key: int, state: int = 0) -> int:
    """Hash a key to 64 bits: splitmix64's finaliser (Steele, Lea and Flood 2014), chained over its numbers.

    ``mix_key(a, b, c)`` is ``mix_key(c, state=mix_key(a, b))``.
    """
    for number in key:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state


def call_keyed(function: Callable[[Any], _Result], items: Sequence[Any], seeds: Sequence[int]) -> list[_Result]:
    """Call a function of each item, under global random states of the item's own 64-bit seed.

    In the main process the states are put back afterwards; in a worker process nothing else draws from them. (Code
    with generators of its own seeds them itself.)
    """
    results: list[_Result] = []
    with untouched_random_state() if get_worker_info() is None else nullcontext():
        for item, seed in zip(items, seeds, strict=True):
            _seed_all(seed)
            results.append(function(item))
    return results


def detect_draws(function: Callable[[], _Result]) -> tuple[_Result, bool]:
    """Return a function's result and whether it drew from any of the three global states, which are put back."""
    before = _states()
    try:
        return function(), _moved(before, _states())
    finally:
        _restore(before)
