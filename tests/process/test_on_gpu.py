"""On a real GPU, recipe by recipe: the CPU's numbers, and nothing waits.

The recipes are those of `test_no_wait`, which asks the same of a GPU that is not there.
"""

import pytest
import torch
from shared import recipes

from diffaug import ForwardProcess, LinearBeta

KINDS = ("schedule", "times", "coverage", "noise", "pair")
RECIPES = {f"{kind}: {name}": make for kind in KINDS for name, make in recipes()[kind].items() if "EDM" not in name}


def check(process: ForwardProcess, eager: ForwardProcess, device: torch.device, index_there: torch.device) -> None:
    images, index = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6) * 1_000_003 + 2**33
    there, place = images.to(device), torch.arange(6)
    for stage in ("train", "val"):
        key = {"seed": 2**63 + 5, "stage": stage, "epoch": 2**19, "view": 3}
        expected = eager(images, index, **key, position=place, handed=place)
        options = {**key, "position": place.to(index_there), "handed": place.to(index_there)}
        own = index.to(index_there)
        process(there, own, **options)  # tables cross once
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = process(there, own, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for field, a, b in zip(process.fields, expected, got, strict=True):
            assert b.device.type == device.type
            if not a.is_floating_point():
                assert torch.equal(a, b.cpu()), (stage, field)
            else:
                off = (a - b.cpu()).abs().max() / a.abs().max().clamp_min(1)
                assert off <= 1e-6, (stage, field, float(off))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "eager"])
def test_the_cpu_s_numbers_and_nothing_waits(name: str, compile: bool, device: torch.device) -> None:
    process, eager = RECIPES[name](compile), RECIPES[name](False)
    if process is None or eager is None:
        pytest.skip("the two do not go together")
    check(process, eager, device, torch.device("cpu"))


@pytest.mark.gpu
def test_keys_on_the_gpu_are_right_too(device: torch.device) -> None:
    check(ForwardProcess(LinearBeta()), ForwardProcess(LinearBeta(), compile=False), device, device)
