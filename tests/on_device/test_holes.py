"""Holes for inpainting: what each kind is, whose it is, and the image outside of it."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from shared import pictures, together
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.on_device import holes
from diffaug.on_device.holes import Box, Brush, Half
from diffaug.randomness.keys import Keys

FIELDS = ("x_0", "x_t", "t", "hole", "known", "index", "view")
KINDS = [Half(), Box(), Brush(), Brush(strokes=1, lines=9, reach=1.0, width=0.3)]


def module(**options: Any) -> DiffusionDataModule:
    process = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
    return DiffusionDataModule(pictures(), **{"process": process, "seed": 3, "batch_size": 4, **options})


def batches(stage: str = "train", **options: Any) -> list[Any]:
    data = module(**options)
    data.setup("fit")
    return [data.noise(batch, stage=stage) for batch in getattr(data, f"{stage}_dataloader")()]


def keys(count: int, seed: int = 0) -> Keys:
    return Keys.pack(torch.arange(count), seed=seed)


def test_each_half_as_often():
    hole = Half().draw(keys(4000), 4, 5)[:, 0]
    kinds, counts = torch.unique(hole.flatten(1), dim=0, return_counts=True)
    assert sorted(kinds.sum(1).tolist()) == [8, 10, 10, 12]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    for kind in kinds.view(-1, 4, 5):
        assert kind.any(0).sum() * kind.any(1).sum() == kind.sum()


def test_a_box_s_sides_and_places_are_uniform():
    hole = Box(0.25, 0.5).draw(keys(6000), 8, 12)[:, 0]
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None])
    for side, lengths in ((rows, range(2, 5)), (columns, range(3, 7))):
        length, start = side.sum(1), side.int().argmax(1)
        assert all(one[at : at + n].all() for one, at, n in zip(side, start, length, strict=True))
        assert stats.chisquare([int((length == n).sum()) for n in lengths]).pvalue > 1e-6
        for n in lengths:
            places = start[length == n].bincount(minlength=side.shape[1] - n + 1)
            assert len(places) == side.shape[1] - n + 1
            assert stats.chisquare(places.numpy()).pvalue > 1e-6
    assert abs(np.corrcoef(rows.sum(1), columns.sum(1))[0, 1]) < 4.9 / 6000**0.5
    assert Box(1.0, 1.0).draw(keys(2), 3, 4).all()
    assert Box(0.01, 0.01).draw(keys(2), 3, 4).sum() == 2


def test_a_brush_covers_what_lies_within_half_its_width(monkeypatch):
    lines = []
    near = holes._near_line
    monkeypatch.setattr(holes, "_near_line", lambda *given: (lines.append(given), near(*given))[1])
    height, width = 21, 30
    drawn = Brush(strokes=2, lines=3, reach=0.5, width=0.2).draw(keys(40), height, width)[:, 0].numpy()
    assert len(lines) == 6
    expected = np.zeros_like(drawn)
    pixels = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).astype(float)
    for (_, _, start, end, square), sample in itertools.product(lines, range(40)):
        assert square == 4**2
        a, b = (np.array([float(part[sample]) for part in point]) for point in (start, end))
        at = np.clip((pixels - a) @ (b - a) / max((b - a) @ (b - a), 1), 0, 1)[..., None]
        expected[sample] |= np.linalg.norm(pixels - a - at * (b - a), axis=-1) <= 2 + 1e-9
    assert np.array_equal(drawn, expected)
    for number, (before, after) in enumerate(itertools.pairwise(lines)):
        assert all(map(torch.equal, before[3], after[2])) == (number != 2)  # there a new stroke begins
        assert all(part.min() >= 0 and part.max() < side for part, side in zip(after[3], (height, width), strict=True))
        assert all((one - other).abs().max() <= 10 for one, other in zip(after[2], after[3], strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_hole_is_the_sample_s_own(kind: holes.Hole):
    some = kind.draw(keys(50), 9, 9)
    assert some.dtype == torch.bool
    assert some.shape == (50, 1, 9, 9)
    assert torch.equal(some[7:20], kind.draw(keys(50).part(slice(7, 20)), 9, 9))
    assert not torch.equal(some, kind.draw(keys(50, seed=1), 9, 9))
    assert 0.05 < some.float().mean() < 0.95

    def seen(batch_size: int) -> dict[Any, Any]:
        made = batches(hole=kind, batch_size=batch_size, views=2)
        return {tuple(map(int, row[-2:])): row[3:5] for batch in made for row in zip(*batch, strict=True)}

    one, other = seen(4), seen(3)
    assert len(one) == 20
    assert all(all(map(torch.equal, one[key], other[key])) for key in one)


def test_what_is_known_is_the_clean_image_outside():
    for batch in batches(hole=Box(), transform=v2.RandomHorizontalFlip(), device_transform=v2.RandomVerticalFlip()):
        assert torch.equal(batch.known, torch.where(batch.hole, 0.0, batch.x_0))
        mixed = torch.where(batch.hole, batch.x_t, batch.known)
        assert torch.equal(mixed[~batch.hole.expand_as(mixed)], batch.x_0[~batch.hole.expand_as(mixed)])


def test_a_video_has_one_hole_in_all_frames():
    process = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
    for shape in ((4, 3, 2, 6, 5), (4, 6, 5)):
        data = DiffusionDataModule(TensorDataset(torch.rand(shape)), process=process, hole=Half(), image_key=0, seed=3)
        data.setup("fit")
        batch = data.noise(next(iter(data.train_dataloader())))
        assert batch.hole.shape == (4, *(1,) * (len(shape) - 3), 6, 5)
        assert torch.equal(batch.known, torch.where(batch.hole, 0.0, batch.x_0))
    data = DiffusionDataModule(TensorDataset(torch.rand(4, 5)), process=process, hole=Half(), image_key=0, seed=3)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"of data\.hole the images must be of a height and a width, but got .*\(4, 5\)"
    ):
        data.noise(next(iter(data.train_dataloader())))


def test_evaluation_keeps_its_holes():
    a, b = (together(batches("val", val=pictures(), hole=Brush()), "hole") for _ in range(2))
    assert torch.equal(a, b)
    assert len(torch.unique(a.flatten(1), dim=0)) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hole": "box"}, r"data\.hole must be a Box, a Half or a Brush, but got 'box'"),
        ({"hole": Box(), "encoder": torch.nn.Identity()}, r"data\.hole is of images, but here latents are noised"),
        (
            {"hole": Box(), "process": ForwardProcess(LinearBeta(), value_range=None)},
            r"data\.hole is of images, but here latents",
        ),
        ({"hole": Box(), "images": {"image": "target", "hole": "mask"}}, r"data\.hole makes the fields .* other names"),
    ],
)
def test_a_hole_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_numbers_of_a_hole_are_checked():
    with pytest.raises(ValueError, match=r"data\.hole\.least must be at most data\.hole\.most"):
        Box(0.5, 0.25)
    with pytest.raises(ValueError, match=r"data\.hole\.width must be a number in \(0, 1\]"):
        Brush(width=0)
    assert module(hole=Box()).recipe()["hole"] == "Box(least=0.25, most=0.75)"
