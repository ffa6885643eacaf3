"""Of every recipe: a draw is a function of its sample's key, and of nothing else."""

import pytest
import torch
from shared import recipes

from diffaug import ForwardProcess

RECIPES = recipes()
IMAGES = torch.arange(24 * 3 * 8 * 8).mul(37).remainder(251).to(torch.uint8).view(24, 3, 8, 8)
INDEX = torch.arange(24) * 1_000_003 % 2**35
PLACE = torch.arange(24) + 96  # in the epoch's order
SOME = ([7], slice(1, None, 2), torch.randperm(24, generator=torch.Generator().manual_seed(0))[:13])
SLOW = ("two times of schedule", "target", "weight")  # more numbers of the same times


KEY = {"seed": 2**40 + 7, "position": PLACE, "handed": PLACE}


def check(name: str, process: ForwardProcess, images: torch.Tensor) -> None:
    before = images.clone()
    whole = process(images, INDEX, epoch=3, **KEY)
    assert torch.equal(images, before), name
    for which in SOME:
        key = {**KEY, "position": PLACE[which], "handed": PLACE[which]}
        some = process(images[which], INDEX[which], epoch=3, **key)
        for field, one, of_all in zip(process.fields, some, whole, strict=True):
            assert torch.equal(one, of_all[which]), (name, field)
    assert not torch.equal(process(images, INDEX, epoch=4, **KEY).x_t, whole.x_t), name


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in RECIPES])
def test_a_draw_does_not_depend_on_its_batch(kind, same_random_state):
    """Alone, on one of two ranks, in another batch and order: the same bits; in another epoch others."""
    made = {name: make(False) for name, make in RECIPES[kind].items()}
    for name, process in made.items():
        if process is not None:
            check(name, process, IMAGES)
        if kind == "noise":
            check(name, process, IMAGES[:, :1, :7, :5])  # a size that 4 does not divide
