"""Of every recipe: a draw is a function of its sample's key, and of nothing else."""

import pytest
import torch
from shared import recipes

RECIPES = recipes()
IMAGES = torch.arange(24 * 3 * 8 * 8).mul(37).remainder(251).to(torch.uint8).view(24, 3, 8, 8)
INDEX = torch.arange(24) * 1_000_003 % 2**35
PLACE = torch.arange(24) + 96  # in the epoch's order
SOME = ([7], slice(5, 13), slice(1, None, 2), torch.randperm(24, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", RECIPES)
def test_a_draw_does_not_depend_on_its_batch(kind, same_random_state):
    """Alone, in another batch, on one of two ranks, in another order: the same bits; in another epoch others."""
    for name, make in RECIPES[kind].items():
        process = make(False)
        if process is None:
            continue
        images, key = IMAGES.clone(), {"seed": 2**40 + 7, "epoch": 3}
        whole = process(images, INDEX, position=PLACE, handed=PLACE, **key)
        assert torch.equal(images, IMAGES), name
        for which in SOME:
            some = process(IMAGES[which], INDEX[which], position=PLACE[which], handed=PLACE[which], **key)
            for field, one, all_of_them in zip(process.fields, some, whole, strict=True):
                assert torch.equal(one, all_of_them[which]), (name, field)
        other = process(IMAGES, INDEX, position=PLACE, handed=PLACE, seed=2**40 + 7, epoch=4)
        assert not torch.equal(other.x_t, whole.x_t), name
