"""Several images of an item: refused where nothing is said of them, flipped and cropped alike where it is."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from scipy import stats
from shared import Items, Stream, assert_alike, together, write
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from diffaug import Bucketed, Buckets, DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.images.aligned import Aligned
from diffaug.pytorch_lightning import store
from diffaug.schedules import Rectified
from diffaug.store import Store
from diffaug.times import Stratified, Uniform

SIZE = 8
ROLES = {"image": "target", "low_res": "condition", "mask": "mask"}
FLIP = v2.RandomHorizontalFlip()


def coordinates() -> torch.Tensor:
    """An image whose pixels are their rows and columns, and a third that is neither."""
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.stack([row, column, (3 * row + 5 * column) % 7]).to(torch.uint8)


def inside(image: torch.Tensor) -> torch.Tensor:
    """The mask that belongs to an image of coordinates: no flip or crop of it is another's."""
    return (image[..., :1, :, :] * 5 + image[..., 1:2, :, :] * 3) % 4 == 0


def aligned(i: int) -> dict[str, Any]:
    image = coordinates()
    return {"image": image, "low_res": image.flip(0), "mask": inside(image).to(torch.uint8)}


def floats(i: int) -> dict[str, Any]:
    return {name: part / 8 if name != "mask" else part for name, part in aligned(i).items()}


def process(*fields: str, **options: Any) -> ForwardProcess:
    return ForwardProcess(LinearBeta(), fields=("x_0", "t", *fields), compile=False, **options)


def module(make: Callable[[int], Any] = aligned, size: int = 12, **options: Any) -> DiffusionDataModule:
    options = {"images": ROLES, "process": process("low_res", "mask", "index"), "seed": 3, "batch_size": 4, **options}
    return DiffusionDataModule(Items(make, size), **options)


def batches(data: DiffusionDataModule) -> list[Any]:
    data.setup("fit")
    return [data.noise(batch) for batch in data.train_dataloader()]


def check(batch: Any, scale: float) -> set[bytes]:
    """Check that the three parts of each sample show the same pixels; return what geometries were seen."""
    image, low_res = (((part + 1) / 2 * scale).round().long() for part in (batch.x_0, batch.low_res))
    assert torch.equal(image, low_res.flip(1))
    assert torch.equal(batch.mask.long(), inside(image).long())
    return {sample[:2].byte().numpy().tobytes() for sample in image}


# Alike in every draw.

GEOMETRY = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomCrop(5)])


@pytest.mark.parametrize(
    ("count", "workers"), [(500, 0), pytest.param(10_000, 2, marks=pytest.mark.slow)], ids=["here", "in workers"]
)
def test_a_transform_keeps_them_in_step(count: int, workers: int):
    data = module(size=count, transform=GEOMETRY, num_workers=workers, batch_size=50)
    found: set[bytes] = set()
    for batch in batches(data):
        found |= check(batch, 255)
    assert len(found) == 4 * 4 * 4  # both flips, and every corner of the crop


@pytest.mark.parametrize("count", [120, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_device_transform_keeps_them_in_step(count: int):
    found: set[bytes] = set()
    for batch in batches(module(size=count, device_transform=GEOMETRY, batch_size=1)):
        found |= check(batch, 255)
    assert len(found) > 40


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("device_transform", 500),
        pytest.param("device_transform", 10_000, marks=pytest.mark.slow),
        pytest.param("transform", 10_000, marks=pytest.mark.slow),  # in workers
    ],
)
def test_kornia_keeps_them_in_step(where: str, count: int):
    kornia = pytest.importorskip("kornia.augmentation")
    flips = kornia.RandomHorizontalFlip(), kornia.RandomVerticalFlip(), kornia.RandomCrop((5, 5))
    augment = kornia.AugmentationSequential(
        *flips, data_keys=["input"], **({"keepdim": True} if where[0] == "t" else {})
    )
    whole = process("low_res", "mask", "index", value_range=(0, 1))
    found: set[bytes] = set()
    workers = 2 if where == "transform" else 0
    for batch in batches(module(floats, count, process=whole, batch_size=50, num_workers=workers, **{where: augment})):
        assert batch.mask.dtype == torch.uint8
        found |= check(batch, 8)
    assert len(found) == 64


def test_a_mask_is_never_interpolated_and_colours_are_the_images_alone():
    colours = v2.ColorJitter(0.5, 0.5, 0.5)
    turns = v2.Compose([v2.RandomAffine(30, (0.2, 0.2), (0.7, 1.3)), v2.RandomResizedCrop(6, antialias=True), colours])
    for where in ("transform", "device_transform"):
        made = batches(module(size=60, batch_size=5, **{where: turns}))
        masks = torch.cat([batch.mask for batch in made])
        assert masks.shape == (60, 1, 6, 6)
        assert masks.unique().tolist() == [0, 1]
        assert not torch.equal(*(torch.cat([getattr(batch, name) for batch in made]) for name in ("x_0", "low_res")))
    dark = batches(module(transform=v2.Lambda(lambda image: image * 0, tv_tensors.Image)))
    assert all(batch.x_0.eq(-1).all() and batch.low_res.eq(-1).all() and batch.mask.any() for batch in dark)


def test_draws_are_the_sample_s_own():
    def seen(batch_size: int) -> dict[int, Any]:
        made = batches(module(transform=GEOMETRY, batch_size=batch_size))
        return {int(row[-1]): row for batch in made for row in zip(*batch, strict=True)}

    one, other = seen(4), seen(5)
    assert one.keys() == other.keys() == set(range(12))
    assert all(all(map(torch.equal, one[i], other[i])) for i in one)


# What they are afterwards.


def test_conditions_are_scaled_as_the_target_is_and_masks_stay():
    def make(i: int) -> tuple[Any, ...]:
        white = Image.new("RGB", (4, 4), "white")
        high = torch.full((1, 2, 2), 65535).to(torch.uint16)
        parts = white.convert("1"), white.convert("L"), torch.ones(4, 4, dtype=torch.bool), np.full((4, 4), 0.5, "f4")
        return white, torch.ones(3, 2, 2), high, *parts

    half = {"role": "condition", "scale": 0.5}
    roles = [half, half, "mask", "mask", "mask", "mask"]
    names = ["label", *(f"item_{i}" for i in range(2, 7))]
    data = module(
        make,
        images={"item_0": "target", **dict(zip(names, roles, strict=True))},
        process=process(*names, value_range=(0, 2)),
        views=2,
    )
    batch = batches(data)[0]
    assert batch.x_0.shape == (8, 3, 4, 4)
    assert batch.x_0.eq(1).all()
    assert batch.label.shape == (8, 3, 2, 2)  # of another size: nothing moves them
    assert batch.label.eq(0).all()  # 1 in [0, 2]
    assert batch.item_2.eq(1).all()
    assert (batch.item_3.dtype, batch.item_4.dtype, batch.item_5.dtype) == (torch.bool, torch.uint8, torch.bool)
    assert (batch.item_3.shape, batch.item_4.shape, batch.item_5.shape) == ((8, 1, 4, 4), (8, 1, 4, 4), (8, 4, 4))
    assert batch.item_3.all()
    assert batch.item_4.eq(255).all()
    assert batch.item_6.eq(0.5).all()
    assert all(type(part) is torch.Tensor for part in batch)


def test_a_palette_s_indices_are_a_mask():
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("L")
    palette = Image.frombytes("P", (4, 4), palette.tobytes())
    palette.putpalette([200] * 768)
    data = module(
        lambda i: {"image": Image.new("RGB", (4, 4)), "mask": palette},
        images={"image": "target", "mask": "mask"},
        process=process("mask"),
        transform=v2.RandomHorizontalFlip(p=1.0),
    )
    assert torch.equal(batches(data)[0].mask[0, 0], torch.arange(16).view(4, 4).flip(1))


def test_a_small_condition_is_made_inside_the_transform():
    def halve(parts: dict[str, Any]) -> dict[str, Any]:
        assert {name: type(part) for name, part in parts.items()} == {
            "image": tv_tensors.Image,
            "low_res": tv_tensors.Image,
            "mask": tv_tensors.Mask,
        }
        parts = FLIP(parts)
        return {**parts, "low_res": parts["image"][:, ::2, ::2]}

    data = module(transform=halve, images={**ROLES, "low_res": {"role": "condition", "scale": 0.5}})
    for batch in batches(data):
        assert torch.equal(batch.low_res, batch.x_0[..., ::2, ::2])


@pytest.mark.parametrize("where", ["transform", "device_transform", None])
def test_a_condition_has_a_range_of_its_own(where: str | None):
    """Depths in [0, 8], of any dtype and without a channel, beside bytes, and beside latents, which have no range."""
    dtypes = (torch.float32, torch.uint8, torch.uint16, torch.int32)

    def make(i: int) -> dict[str, Any]:
        return {"image": coordinates(), **{f"depth_{n}": coordinates()[0].to(dtype) for n, dtype in enumerate(dtypes)}}

    names = [f"depth_{n}" for n in range(len(dtypes))]
    span = {"role": "condition", "value_range": [0, 8]}
    images: dict[str, Any] = {"image": "target", **dict.fromkeys(names, span)}
    moved = {} if where is None else {where: FLIP}
    batch = batches(module(make, images=images, process=process(*names), **moved))[0]
    for name in names:
        torch.testing.assert_close((getattr(batch, name) + 1) * 4, (batch.x_0[:, :1] + 1) * 127.5)
    latents = process(*names, value_range=None)
    of_latents = batches(module(make, images=images, process=latents, **moved))[0]
    assert torch.equal(of_latents.depth_0, batch.depth_0)
    for name in names:
        wrong = {**images, name: {**span, "value_range": [0, 6]}}
        with pytest.raises(
            ValueError, match=rf"{name} of .* spans \[0, 7\], outside data\.images\.{name}\.value_range="
        ):
            batches(module(make, images=wrong, process=latents, **moved))


def low(height: int, width: int) -> Callable[[int], dict[str, Any]]:
    return lambda i: {**aligned(i), "low_res": torch.zeros(3, height, width)}


def shrink(parts: dict[str, Any]) -> dict[str, Any]:
    return {**parts, "low_res": parts["low_res"][..., ::4, ::4]}


@pytest.mark.parametrize(
    ("make", "scale", "options", "message"),
    [
        (
            low(2, 2),
            1,
            {},
            r"low_res has the height and width of 'image', but in data\.train\[0\] it is 2 x 2 beside 8 x 8\. "
            r"Say data\.images\.low_res=\{role: condition, scale: 0\.25\}, or resize it\.$",
        ),
        (
            low(8, 8),
            0.25,
            {},
            r"has 0\.25 times the height and .* is 8 x 8 beside 8 x 8\. Say data\.images\.low_res=condition, or resize",
        ),
        (
            low(4, 2),
            0.5,
            {},
            r"it is 4 x 2 beside 8 x 8\. It shows another part, or is stretched: crop, or resize it\.$",
        ),
        (aligned, 0.5, {"transform": shrink}, r"data\.train\[0\] it is 2 x 2 beside 8 x 8\. Say .*scale: 0\.25"),
        (aligned, 0.5, {"device_transform": shrink}, r"but in a batch it is 2 x 2 beside 8 x 8\. Say .*scale: 0\.25"),
        (lambda i: {**aligned(i), "mask": torch.zeros(1, 4, 4)}, 1, {}, r"\.mask=\{role: mask, scale: 0\.5\}"),
    ],
)
def test_a_condition_of_another_ratio_than_declared_is_refused(
    make: Any, scale: float, options: dict[str, Any], message: str
):
    declared = "condition" if scale == 1 else {"role": "condition", "scale": scale}
    with pytest.raises(ValueError, match=message):
        batches(module(make, images={**ROLES, "low_res": declared}, **options))


@pytest.mark.parametrize(("side", "scale"), [(2, 0.25), (2, 0.3), (3, 0.3), (16, 2)])
def test_a_ratio_holds_to_within_a_pixel(side: int, scale: float):
    declared = {**ROLES, "low_res": {"role": "condition", "scale": scale}}
    data = module(low(side, side), images=declared)
    assert batches(data)[0].low_res.shape == (4, 3, side, side)
    assert data.aligned.roles == declared  # what a checkpoint compares


def test_evaluation_has_them_together_too():
    data = module(val=Items(aligned), eval_transform=v2.Compose([v2.RandomHorizontalFlip(p=1.0), v2.CenterCrop(4)]))
    data.setup("fit")
    batch = data.noise(next(iter(data.val_dataloader())), stage="val")
    check(batch, 255)
    assert batch.x_0.shape == (4, 3, 4, 4)


# Undeclared.

PICTURE = Image.new("RGB", (6, 4))


@pytest.mark.parametrize(
    ("item", "options", "line"),
    [
        ({"image": PICTURE, "mask": Image.new("L", (6, 4))}, {"image_key": "image"}, "{image: target, mask: mask}"),
        ({"image": PICTURE, "edges": PICTURE}, {"image_key": "image"}, "{image: target, edges: condition}"),
        ({"image": PICTURE, "mask": torch.zeros(4, 6)}, {"image_key": "image"}, "{image: target, mask: mask}"),
        ((PICTURE, np.zeros((4, 6, 3)), np.zeros((4, 6, 1))), {"image_key": 0}, None),
        (
            (np.zeros((2, 6, 3), "f4"), torch.zeros(3, 4, 4)),
            {"image_key": "item_0"},
            "{item_0: target, label: condition}",
        ),
    ],
    ids=["masks", "conditions", "a mask of two dimensions", "a tuple", "any size"],
)
@pytest.mark.parametrize("where", ["transform", "device_transform"])
def test_undeclared_they_are_refused(item: Any, options: dict[str, Any], line: str | None, where: str):
    line = line or "{item_0: target, label: condition, item_2: mask}"
    names = [part.split(":")[0] for part in line[1:-1].split(", ")]
    data = module(lambda i: item, images=None, process=process(*names[1:]), **{where: FLIP}, **options)
    with pytest.raises(ValueError, match=rf"data\.train\[0\] holds {len(names)} images: {names[0]} ") as caught:
        data.setup("fit")
    assert f"data.{where} would flip or crop {names[0]} alone" in str(caught.value)
    assert f"data.images={line};" in str(caught.value)
    assert f"data.images={{{names[0]}: target}} if nothing else" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (("mask",), {}),
        ((), {"transform": FLIP}),
        (("text",), {"transform": FLIP}),
        (("mask",), {"transform": FLIP, "images": {"image": "target"}, "image_key": None}),
    ],
    ids=["no transform", "not wanted", "no image", "said to be none"],
)
def test_what_a_transform_does_not_harm_is_not_refused(wanted: tuple[str, ...], options: dict[str, Any]):
    item = {"image": torch.zeros(3, 4, 4), "mask": torch.zeros(1, 4, 4), "text": torch.zeros(77, 5)}
    batch = batches(
        module(lambda i: item, **{"images": None, "image_key": "image", "process": process(*wanted), **options})
    )
    assert batch[0].x_0.shape == (4, 3, 4, 4)


def test_undeclared_images_of_evaluation_and_of_streams_are_refused():
    def pair(i: int) -> Any:
        return torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)

    options = {"images": None, "image_key": 0, "process": process("label")}
    with pytest.raises(ValueError, match=r"data\.val\[0\] holds 2 images: .*data\.eval_transform would flip"):
        module(pair, val=Items(pair), eval_transform=FLIP, **options).setup("fit")

    data = DiffusionDataModule(Stream([pair(0)] * 3), transform=FLIP, seed=0, batch_size=2, **options)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"holds 2 images: .*data\.images=\{item_0: target, label: condition\}"):
        next(iter(data.train_dataloader()))


def test_several_images_without_a_word_name_both_keys():
    with pytest.raises(ValueError, match=r"holds 2 images: .*data\.image_key says which .*data\.images says so too"):
        module(lambda i: (PICTURE, PICTURE), images=None).setup("fit")


# Declared amiss.


@pytest.mark.parametrize(
    ("images", "key", "message"),
    [
        ("image", None, r"data\.images must be a role for each image of an item, .* but got 'image'"),
        (
            {"image": "target", "mask": "masks"},
            None,
            r"data\.images\.mask must be one of 'target', 'condition', 'mask'",
        ),
        (
            {"image": "target", "low_res": {"role": "condition", "ratio": 2}},
            None,
            r"data\.images\.low_res must be a role, or a dict of role, scale and value_range, .*, 'ratio': 2\}",
        ),
        (
            {"image": {"role": "target", "scale": 2}},
            None,
            r"data\.images\.image must be target alone: the others' scales are of its size",
        ),
        (
            {"image": "target", "mask": {"role": "mask", "value_range": [0, 1]}},
            None,
            r"data\.images\.mask must be of role condition to have a value_range",
        ),
        (
            {"image": "target", "depth": {"role": "condition", "value_range": [1, 0]}},
            None,
            r"data\.images\.depth\.value_range must be a pair \[low, high\] with low < high, but got \[1, 0\]",
        ),
        (
            {"image": "target", "mask": {"role": "mask", "scale": 0}},
            None,
            r"data\.images\.mask\.scale must be a number > 0, but got 0",
        ),
        ({"mask": "mask"}, None, r"data\.images must be of exactly one target"),
        ({"a": "target", "b": "target"}, None, r"data\.images must be of exactly one target"),
        ({"image": "target"}, "photo", r"data\.image_key='photo', but data\.images says .* is 'image'"),
    ],
)
def test_roles_are_checked(images: Any, key: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Aligned(images, key)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda i: {"image": PICTURE, "mask": PICTURE},
            {},
            r"data\.images names \['low_res'\], but data\.train\[0\] holds mask beside 'image'",
        ),
        (lambda i: {**aligned(i), "mask": "m.png"}, {}, r"mask of data\.train\[0\] must be a PIL image.*but is str"),
        (lambda i: {**aligned(i), "mask": torch.zeros(3)}, {}, r"mask of data\.train\[0\] must be .*of shape \(3,\)"),
        (
            lambda i: {**aligned(i), "low_res": torch.zeros(3, 8, 8).long()},
            {},
            r"low_res of data\.train\[0\] has dtype",
        ),
        (
            lambda i: {**aligned(i), "low_res": torch.full((3, 8, 8), 2.0)},
            {},
            r"low_res of data\.train\[0\] spans \[2, 2\]",
        ),
        (
            lambda i: {**aligned(i), "low_res": torch.zeros(3, 4, 4)},
            {"transform": FLIP},
            r"data\.transform takes the images of data\.train\[0\] together, so they must be of one height and width, "
            r"but they are image \(3, 8, 8\), low_res \(3, 4, 4\), mask \(1, 8, 8\)\. Resize",
        ),
        (
            lambda i: {**aligned(i), "mask": torch.zeros(1, 8, 4)},
            {"device_transform": FLIP},
            r"data\.device_transform takes the images of the batch together.*mask \(4, 1, 8, 4\)",
        ),
        (
            aligned,
            {"transform": lambda parts: parts["image"]},
            r"must return one of the same names, .* it returned Image",
        ),
        (
            aligned,
            {"device_transform": lambda parts: {"image": parts["image"]}},
            r"must return one of the same names, \['image', 'low_res', 'mask'\]; but it returned a dict of \['image'\]",
        ),
        (
            aligned,
            {"device_transform": lambda parts: {**parts, "mask": parts["mask"][1:]}},
            r"data\.device_transform must return a tensor with as many images .* it returned \(3, 1, 8, 8\)",
        ),
        (
            aligned,
            {"device_transform": lambda parts: {**parts, "low_res": parts["low_res"].float()}},
            r"low_res of data\.device_transform's result spans \[0, 7\], outside process\.value_range=\[-1, 1\]\. "
            r"Say what it spans: data\.images\.low_res=\{role: condition, value_range: \[low, high\]\}",
        ),
    ],
    ids=lambda value: "" if callable(value) or isinstance(value, dict) else None,
)
def test_what_cannot_be_kept_in_step_is_refused(make: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        batches(module(make, **options))


def test_kornia_inside_another_module_is_refused():
    kornia = pytest.importorskip("kornia.augmentation")
    inside_one = torch.nn.Sequential(v2.Identity(), kornia.AugmentationSequential(kornia.RandomHorizontalFlip()))
    with pytest.raises(ValueError, match=r"data\.device_transform holds kornia's AugmentationSequential inside"):
        batches(module(device_transform=inside_one))


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.10 has no notes on exceptions")
@pytest.mark.parametrize("where", ["transform", "device_transform"])
def test_a_transform_of_one_image_is_told_what_it_is_given(where: str):
    with pytest.raises(AttributeError) as caught:
        batches(module(**{where: lambda image: image.float()}))
    assert "which is given a dict of the images that data.images names" in caught.value.__notes__[0]


# Buckets.


@pytest.mark.parametrize("shape", [(6, 10), (8, 8), (3, 5)], ids=str)
def test_buckets_fit_them_together(shape: tuple[int, int]):
    row, column = torch.meshgrid(torch.arange(12), torch.arange(20), indexing="ij")
    image = torch.stack([row, column, row]).float() / 20
    items = [{"image": image, "low_res": image.clone(), "mask": (row + column)[None], "name": "a"}] * 60
    buckets = Buckets(shapes=[shape], crop="random", hflip=0.5)
    fitted = Bucketed(items, [(12, 20)] * 60, buckets, images=ROLES)
    data = DiffusionDataModule(
        fitted, images=ROLES, process=process("low_res", "mask", "name", value_range=(0, 1)), seed=3, batch_size=6
    )
    for batch in batches(data):
        assert torch.equal(batch.low_res, batch.x_0)
        assert batch.mask.shape == (6, 1, *shape)
        there = batch.mask[:, 0] - (batch.x_0[:, :2] + 1).sum(1) * 10  # the pixel that the mask has is near the image's
        assert there.abs().max() <= 2


def test_a_mask_in_a_bucket_is_where_its_image_is():
    image = coordinates()
    items = [{"image": image, "mask": inside(image)}] * 200
    roles = {"image": "target", "mask": "mask"}
    buckets = Buckets(shapes=[[8, 4]], crop="random", hflip=0.5)
    seen = [Bucketed(items, [(8, 8)] * 200, buckets, images=roles)[i] for i in range(200)]
    assert all(torch.equal(item["mask"], inside(item["image"])) for item in seen)
    assert len({item["image"].numpy().tobytes() for item in seen}) == 10


def test_images_in_buckets_that_cannot_be_fitted_are_refused(tmp_path):
    wrong = {"image": coordinates(), "mask": torch.zeros(8, 8)}
    fitted = Bucketed([wrong], [(8, 8)], Buckets(shapes=[[8, 4]]), image_key="image")
    with pytest.raises(
        ValueError, match=r"Bucketed would flip or crop image alone.*: images=\{image: target, mask: mask\}"
    ):
        fitted[0]
    roles = {"image": "target", "mask": "mask"}
    small = Bucketed([{**wrong, "mask": torch.zeros(4, 4)}], [(8, 8)], Buckets(shapes=[[8, 4]]), images=roles)
    with pytest.raises(
        ValueError, match=r"mask of item 0 of list must be of the image's height and width, \(8, 8\), but is"
    ):
        small[0]
    data = DiffusionDataModule(small, images=roles, process=process("mask"), seed=3)
    with pytest.raises(
        ValueError, match=r"data\.train has buckets, and data\.images names \['mask'\] beside the image"
    ):
        write(data, tmp_path)
    left = Bucketed([wrong], [(8, 8)], Buckets(shapes=[[8, 4]]), images={"image": "target"})
    assert left[0]["mask"].shape == (8, 8)


# Another DataModule's, and a store's.


class Inner(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Items(aligned), 4)


def test_those_of_another_datamodule_are_flipped_together():
    options = {"seed": 3, "device_transform": FLIP}
    data = DiffusionDataModule.wrap(Inner(), process("low_res", "mask"), images=ROLES, **options)
    found: set[bytes] = set()
    for batch in batches(data):
        found |= check(batch, 255)
    assert len(found) == 2
    data = DiffusionDataModule.wrap(Inner(), process("mask"), image_key="image", **options)
    with pytest.raises(ValueError, match=r"the batch of Inner\.train_dataloader\(\) holds 2 images: .*mask: mask\}"):
        batches(data)
    batches(DiffusionDataModule.wrap(Inner(), process(), image_key="image", **options))  # the others are not wanted
    data = DiffusionDataModule.wrap(Inner(), process(), images={"image": "target", "masks": "mask"})
    with pytest.raises(
        ValueError, match=r"data\.images names \['masks'\], but the batch of Inner.* holds low_res, mask"
    ):
        batches(data)


def test_a_store_gives_them_alike(tmp_path):
    options = {"transform": GEOMETRY, "process": process("low_res", "mask", "index")}
    write(module(), tmp_path / "a")
    stored = store(root=str(tmp_path / "a"), images=ROLES, seed=3, batch_size=4, **options)
    assert_alike(batches(stored), batches(module(**options)))
    undeclared = store(root=str(tmp_path / "a"), **options)
    with pytest.raises(ValueError, match=r"data\.images=\{image: target, low_res: condition, mask: mask\}"):
        undeclared.setup("fit")


def test_what_a_store_was_told_of_its_images_is_said_again(tmp_path, capsys):
    """Without a transform too: what is handed on as it is stored is not scaled."""
    images = {"photo": "target", "low_res": {"role": "condition", "scale": 0.5}, "mask": {"role": "mask"}}

    def make(i: int) -> dict[str, Any]:
        item = aligned(i)
        return {"photo": item["image"], "low_res": item["low_res"][:, ::2, ::2], "mask": item["mask"]}

    write(module(make, images=images), tmp_path / "a")
    line = "data.images={image: target, low_res: {role: condition, scale: 0.5}, mask: mask}"
    assert f"data=store data.root={tmp_path / 'a'} '{line}'" in capsys.readouterr().out
    fields = process("low_res")
    with pytest.raises(ValueError, match=rf"was made with data\.images\. Say it again, {re.escape(line)}; or"):
        store(root=str(tmp_path / "a"), process=fields).setup("fit")
    plain = store(root=str(tmp_path / "a"), process=fields, images={"image": "target"})
    assert batches(plain)[0].low_res.dtype == torch.uint8
    store(root=str(tmp_path / "a"), process=process()).setup("fit")  # what is not asked for does not matter
    inner = pl.LightningDataModule.from_datasets(Store(str(tmp_path / "a")), batch_size=4)
    with pytest.raises(ValueError, match=r"was made with data\.images"):
        batches(DiffusionDataModule.wrap(inner, fields, image_key="image"))


def test_a_store_s_variants_are_of_all_images(tmp_path):
    write(module(), tmp_path / "a", variants=["identity", "hflip"])
    found: set[bytes] = set()
    data = store(root=str(tmp_path / "a"), images=ROLES, process=process("low_res", "mask"), seed=3, batch_size=4)
    for batch in batches(data):
        found |= check(batch, 255)
    assert len(found) == 2
    data = module(images=None, image_key="image")
    with pytest.raises(ValueError, match=r"variants would flip or crop image alone.*mask: mask\}"):
        write(data, tmp_path / "b", variants=["identity", "hflip"])


def test_a_resume_compares_them():
    assert module().recipe()["images"] == ROLES
    assert module().recipe()["image_key"] == "image"
    assert module(images=None).recipe()["images"] is None


# Conditioning augmentation.


def noised(name: str = "low_res", schedule: Any = Rectified(), **options: Any) -> dict[str, Any]:  # noqa: B008 - frozen
    return {"condition_noise": {name: ForwardProcess(schedule, Uniform(), **options)}}


def test_a_condition_is_noised_at_a_time_of_its_own():
    fields = process("epsilon", "low_res", "low_res_t", "index", "view")
    plain = torch.cat([batch.low_res for batch in batches(module(size=2000, batch_size=500, shuffle=False))])
    made = batches(module(size=2000, batch_size=500, shuffle=False, process=fields, **noised()))
    t, s = (together(made, name).double() for name in ("t", "low_res_t"))
    assert s.dtype == torch.float64
    assert stats.kstest(s.numpy(), "uniform").pvalue > 1e-6
    assert abs(np.corrcoef(t, s)[0, 1]) < 4.9 / 2000**0.5
    level = s.view(-1, 1, 1, 1)
    noise = (together(made, "low_res").double() - (1 - level) * plain) / level  # rectified: (1 - s) x + s noise
    noise = noise[s > 0.1].flatten()
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6
    against = together(made, "epsilon").double()[s > 0.1].flatten()
    assert abs(np.corrcoef(noise, against)[0, 1]) < 4.9 / len(noise) ** 0.5


def test_a_condition_s_noise_is_the_sample_s_own():
    fields = process("low_res", "low_res_t", "mask", "index", "view")

    def seen(**options: Any) -> dict[Any, Any]:
        made = batches(module(process=fields, **{"transform": GEOMETRY, **noised(), **options}))
        return {tuple(map(int, row[-2:])): row for batch in made for row in zip(*batch, strict=True)}

    once = seen(views=2)
    assert len(once) == len({float(row[3]) for row in once.values()}) == 24
    again = seen(views=2, batch_size=5)
    assert all(all(map(torch.equal, once[key], again[key])) for key in once)
    other = seen(views=2, seed=4)
    assert all(once[key][3] != other[key][3] for key in once)


def test_a_condition_is_noised_in_evaluation_alike_each_time():
    data = module(val=Items(aligned), process=process("low_res", "low_res_t"), **noised())
    data.setup("fit")
    a, b = ([data.noise(batch, stage="val") for batch in data.val_dataloader()] for _ in range(2))
    assert_alike(a, b)
    assert len(together(a, "low_res_t").unique()) == 12


def test_in_low_precision_a_condition_is_rounded_once():
    data = module(process=process("low_res", "low_res_t"), shuffle=False, **noised())
    exact = batches(data)[0]
    data._dtype = lambda: torch.bfloat16
    rounded = batches(data)[0]
    assert torch.equal(rounded.low_res, exact.low_res.bfloat16())
    assert torch.equal(rounded.low_res_t, exact.low_res_t)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            noised("edges"),
            r"data\.condition_noise must be of conditions that data\.images names: low_res, but got \['edges'\]",
        ),
        (noised("mask"), r"data\.condition_noise must be of conditions"),
        ({"condition_noise": {"low_res": Rectified()}}, r"data\.condition_noise\.low_res must be a ForwardProcess"),
        (
            {"condition_noise": {"low_res": ForwardProcess(Rectified(), Uniform(coverage=Stratified()))}},
            r"data\.condition_noise\.low_res\.times must be of independent coverage",
        ),
        (noised(value_range=(0, 1)), r"data\.condition_noise\.low_res\.value_range must be \[-1, 1\]"),
        ({"images": {"image": "target", "x": "condition"}, **noised("x")}, r"The time of x would be x_t, a field"),
    ],
)
def test_a_condition_s_noise_is_checked(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_a_resume_compares_a_condition_s_noise():
    assert "Rectified" in module(**noised()).recipe()["condition_noise"]
    assert module().recipe()["condition_noise"] == "{}"
