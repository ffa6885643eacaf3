"""On a real GPU, recipe by recipe: the CPU's numbers, and nothing waits.

The recipes are those of `test_no_wait`, which asks the same of a GPU that is not there.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared import SCHEDULES, names, part, recipe, schedule_of

from diffaug import ForwardProcess, LinearBeta, Rectified
from diffaug.targets import FIELDS, PAIR_FIELDS, Pair
from diffaug.times import Uniform

EVERY = tuple(name for name in FIELDS if name not in PAIR_FIELDS and name != "score")


def recipes() -> dict[str, Callable[[bool], ForwardProcess | None]]:
    """A maker of each process, compiled or not, by a name."""
    found: dict[str, Any] = {}
    for name in SCHEDULES:
        options = {"fields": EVERY, "weight": part("weight", "min_snr"), "target": "v"}
        found[f"schedule={name}"] = functools.partial(recipe, schedule_of(name), **options)
    for schedule in (LinearBeta(), Rectified()):
        of, make = type(schedule).__name__, functools.partial(recipe, schedule)
        for name in names("times"):
            found[f"{of} times={name}"] = functools.partial(make, name)
        for name in names("coverage"):
            times = Uniform(coverage=part("coverage", name))
            found[f"{of} coverage={name}"] = functools.partial(ForwardProcess, schedule, times)
        for name in names("noise"):
            found[f"{of} noise={name}"] = functools.partial(make, noise=part("noise", name))
        for law in ("same", "chain"):
            found[f"{of} pair={law}"] = functools.partial(make, pair=Pair(noise=law), fields=("x_t", "x_s", "s", "t"))
    return {name: lambda compile, make=make: make(compile=compile) for name, make in found.items()}


RECIPES = recipes()


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_the_cpu_s_numbers_and_nothing_waits(name: str, compile: bool, device: torch.device) -> None:
    process, eager = RECIPES[name](compile), RECIPES[name](False)
    if process is None or eager is None:
        pytest.skip("the two do not go together")
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    there, index = images.to(device), torch.arange(6) * 1_000_003 + 2**33
    for stage in ("train", "val"):
        options = {"seed": 2**63 + 5, "stage": stage, "epoch": 2**19, "view": 3, "position": torch.arange(6)}
        expected = eager(images, index, **options)
        process(there, index, **options)  # tables cross once
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = process(there, index, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for field, a, b in zip(process.fields, expected, got, strict=True):
            assert b.device.type == device.type
            if a.dtype is torch.int64:
                assert torch.equal(a, b.cpu()), (stage, field)
            else:
                off = (a - b.cpu()).abs().max() / a.abs().max().clamp_min(1)
                assert off <= 1e-6, (stage, field, float(off))
