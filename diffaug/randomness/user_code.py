"""The global random states of torch, numpy and Python: keyed by the sample where the user's code draws from them, and
left as they were found."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import or_
from typing import Any, ClassVar, TypeVar

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


def _moved(before: _States, now: _States) -> tuple[bool, bool, bool]:
    return (
        not torch.equal(now[0], before[0]),
        now[1][2:] != before[1][2:] or not np.array_equal(now[1][1], before[1][1]),
        now[2] != before[2],
    )


def _seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed & _MASK_32)  # its CPU generator would drop more bits in silence


def _seed_numpy(seed: int) -> None:
    np.random.seed(seed >> 32)  # noqa: NPY002


_SEEDERS = (_seed_torch, _seed_numpy, random.seed)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Run the user's code, which may draw from torch's, numpy's or Python's global state, and put the states back."""
    states = _states()
    try:
        yield
    finally:
        _restore(states)


@contextmanager
def keyed_random_state(device: torch.device, *key: int) -> Iterator[None]:
    """Run the user's code on a device under random states of this key, and put the states back.

    All three global states are keyed, and the device's own. Reading and setting an accelerator's state touches two
    numbers that its driver keeps on the host: it does not wait for the device.
    """
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    before = None if accelerator is None else accelerator.get_rng_state(device)
    with untouched_random_state():
        sample_seed(*key)
        try:
            if accelerator is not None:
                with accelerator.device(device):
                    accelerator.manual_seed(mixed(*key))
            yield
        finally:
            if accelerator is not None:
                accelerator.set_rng_state(before, device)


def sample_seed(*key: int) -> None:
    """Seed all three global states by a key of whole numbers, each up to 64 bits. Use within the guard above."""
    seed = mixed(*key)
    for seeder in _SEEDERS:
        seeder(seed)


def mixed(*key: int, state: int = 0) -> int:
    """64 bits of a key: splitmix64's finaliser (Steele, Lea and Flood 2014), chained over its numbers.

    ``mixed(a, b, c)`` is ``mixed(c, state=mixed(a, b))``.
    """
    for number in key:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & _MASK_64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK_64
        state ^= state >> 31
    return state


class KeyedCalls:
    """Call the user's code once for each item, what it draws from the global random states being the item's own.

    Seeding the three states takes some 7 microseconds, a third of reading a 28x28 image, and most code draws from one
    of them or none. So a state is seeded for every item from the moment it is first seen to move. The calls of that
    moment, which drew from an unseeded state, are made again: the result is always that of seeding everything.

    (Code that draws and puts the state back itself goes unseen; without a seed of its own it would draw the same at
    every call anyway. Generators of its own are its own to seed.)

    In the main process the states are put back afterwards; in a worker process nothing else draws from them.
    """

    _left: ClassVar[_States | None] = None  # in a worker, how the last call of any of these left them, where known

    def __init__(self) -> None:
        self.drawn = (False, False, False)  # whether torch's, numpy's, Python's state has been seen to move

    def __call__(
        self, function: Callable[[Any], _Result], items: Sequence[Any], seeds: Callable[[], Sequence[int]]
    ) -> list[_Result]:
        """``[function(item) for item in items]``, each call under the states of its 64-bit seed."""
        in_worker = get_worker_info() is not None
        if in_worker and all(self.drawn):
            KeyedCalls._left = None
            return self._run(function, items, seeds)
        # To read the states takes 45 microseconds. In a worker they are as the last call left them: nothing else draws
        # there, and if something did, that would only be taken for a draw of the items'.
        before, untouched = KeyedCalls._left or _states(), False
        try:
            while True:
                results = self._run(function, items, seeds)
                after = _states()
                drawn = tuple(map(or_, self.drawn, _moved(before, after)))
                KeyedCalls._left = after if in_worker else None
                if drawn == self.drawn:
                    untouched = not any(drawn)
                    return results
                self.drawn = drawn
        finally:
            if not in_worker and not untouched:
                _restore(before)

    def _run(
        self, function: Callable[[Any], _Result], items: Sequence[Any], seeds: Callable[[], Sequence[int]]
    ) -> list[_Result]:
        seeders = [seeder for seeder, drawn in zip(_SEEDERS, self.drawn, strict=True) if drawn]
        if not seeders:
            return [function(item) for item in items]
        results = []
        for item, seed in zip(items, seeds(), strict=True):
            for seeder in seeders:
                seeder(seed)
            results.append(function(item))
        return results


def draws(function: Callable[[], _Result]) -> tuple[_Result, bool]:
    """A function's result, and whether it drew from any of the three global states, which are put back."""
    before = _states()
    try:
        return function(), any(_moved(before, _states()))
    finally:
        _restore(before)
