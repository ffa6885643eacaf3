"""Conditioning augmentation: noise on a condition, with a time of its own, which is a field beside it.

A network that enlarges what another made is trained on low-resolution images noised at a random s, and told s, so that
it does not trust them further than they deserve (Ho, Saharia, Chan, Fleet, Norouzi and Salimans 2022, "Cascaded
diffusion models for high fidelity image generation", section 4.2; there s is searched for afterwards, for sampling).
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import instance, refuse
from diffaug.process import ForwardProcess
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.user_code import mix_key
from diffaug.targets import FIELDS
from diffaug.times import Importance, Independent


class ConditionNoise:
    """Noises some conditions of a batch: each by its own process, in every stage by that one's own times.

    A draw is a function of what the target's is of and of the condition's name, under a seed made of both. So it is
    independent of the target's t and noise, and of another condition's; each view has its own.

    Arguments:
        processes: a ForwardProcess for each, by its name.
        conditions: the names that there are.
    """

    def __init__(self, processes: Mapping[str, ForwardProcess] | None, conditions: Collection[str]) -> None:
        self.processes = dict(processes or {})
        for name, process in self.processes.items():
            where = f"data.condition_noise.{name}"
            if name not in conditions:
                wanted = f"of conditions that data.images names: {', '.join(conditions) or 'there are none'}"
                raise refuse("data.condition_noise", [*self.processes], wanted)
            instance(where, process, ForwardProcess, "a ForwardProcess")
            if not isinstance(process.times.coverage, Independent) or isinstance(process.times, Importance):
                raise refuse(f"{where}.times", process.times, "of independent coverage and a fixed density")
            if process.value_range not in (None, (-1.0, 1.0)):
                raise refuse(f"{where}.value_range", process.value_range, "[-1, 1], in which conditions are")
            if self.time_of(name) in FIELDS:
                raise ValueError(f"The time of {name} would be {self.time_of(name)}, a field of diffaug's: rename it.")
        self.made = [self.time_of(name) for name in self.processes]

    @staticmethod
    def time_of(name: str) -> str:
        """Return the name of the field that holds a condition's time."""
        return f"{name}_t"

    def __call__(
        self, extra: dict[str, Any], pack: Callable[..., Keys], seed: int, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        """Noise the conditions among a batch's further fields, float32 in [-1, 1], shape (B, *); add their times.

        Arguments:
            pack: makes the samples' keys under a seed.
            seed: the run's.
            dtype: of what comes out; None is the process's.
        """
        made: dict[str, Tensor] = {}
        for name, process in self.processes.items():
            number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
            key = pack(seed=mix_key(seed, Purpose.CONDITION, number))
            # Eager: whether it is compiled is settled for all ranks together, of the target's images only.
            drawn = process.draw(extra[name], key, times=process.times, dtype=dtype, eager=True)
            made |= {name: drawn.x_t, self.time_of(name): drawn.t}
        return extra | made
