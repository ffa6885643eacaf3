"""On a real GPU, recipe by recipe: the CPU's numbers, and nothing waits.

The recipes are those of `test_no_wait`, which asks the same of a GPU that is not there.
"""

import pytest
import torch
from shared import recipes

KINDS = ("schedule", "times", "coverage", "noise", "pair")
RECIPES = {f"{kind}: {name}": make for kind in KINDS for name, make in recipes()[kind].items() if "EDM" not in name}


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
        options["handed"] = options["position"]
        expected = eager(images, index, **options)
        process(there, index, **options)  # tables cross once
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = process(there, index, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for field, a, b in zip(process.fields, expected, got, strict=True):
            assert b.device.type == device.type
            if not a.is_floating_point():
                assert torch.equal(a, b.cpu()), (stage, field)
            else:
                off = (a - b.cpu()).abs().max() / a.abs().max().clamp_min(1)
                assert off <= 1e-6, (stage, field, float(off))
