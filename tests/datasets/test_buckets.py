"""Buckets: the list, the nearest, images that are covered and never stretched, and what is said of each."""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset, default_collate

from diffaug import Bucketed, Buckets, ForwardProcess, ImageFolder, LinearBeta
from diffaug.datasets.buckets import read_buckets
from diffaug.images.fit import fit, fit_tensor, part_of
from diffaug.pytorch_lightning import image_folder

PROCESS = ForwardProcess(LinearBeta(), compile=False)


@pytest.mark.parametrize("area", [4096, 60000, 65536, 512 * 512 + 1, 1024 * 1024])
@pytest.mark.parametrize("step", [1, 8, 64])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 4.0])
def test_the_list(area: int, step: int, ratio: float):
    shapes = Buckets(area=area, step=step, max_ratio=ratio).list_shapes()
    assert len(set(shapes)) == len(shapes)
    assert {(w, h) for h, w in shapes} == set(shapes)
    assert any(h == w for h, w in shapes)
    for h, w in shapes:
        assert h % step == w % step == 0
        assert max(h, w) <= ratio * min(h, w)
        assert abs(h * w - area) <= step * (math.sqrt(area) + step / 2)
    if ratio > 1 and step < 64:  # no wide gap: neighbours are within two steps of each other
        assert all(abs(a[0] - b[0]) <= 4 * step for a, b in pairwise(shapes))


def test_a_list_by_hand():
    square = [(48, 88), (56, 72), (64, 64), (72, 56), (88, 48)]
    assert Buckets(area=4096).list_shapes() == square
    buckets = Buckets(shapes=[[64, 32], [32, 64], [40, 40]])
    assert buckets.list_shapes() == [(32, 64), (40, 40), (64, 32)]
    assert eval(repr(buckets)) == buckets
    assert hash(eval(repr(buckets))) == hash(buckets)


def test_the_nearest_loses_least_and_turned_images_are_treated_alike():
    generator = np.random.default_rng(0)
    sizes = generator.integers(100, 1000, (500, 2))
    buckets = Buckets(area=4096, step=8, max_ratio=3)
    bucket_of, shapes = buckets.assign(sizes)
    turned, turned_shapes = buckets.assign(sizes[:, ::-1])
    for (h, w), bucket, other in zip(sizes.tolist(), bucket_of, turned, strict=True):
        lost = [1 - min(w * a / (h * b), h * b / (w * a)) for a, b in shapes]
        assert lost[bucket] == pytest.approx(min(lost))
        assert turned_shapes[other] == shapes[bucket][::-1]


def test_buckets_without_images_are_left_out():
    bucket_of, shapes = Buckets(area=4096).assign(np.array([[100, 100], [200, 100], [101, 100]]))
    assert shapes == [(64, 64), (88, 48)]
    assert (bucket_of.tolist(), bucket_of.dtype) == ([0, 1, 0], np.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"^data\.buckets\.area and data\.buckets\.shapes make the list of buckets: either is to be given, ",
        ),
        ({"area": 64, "shapes": [[8, 8]]}, r"only one of them is to be given, but got 64 and \[\[8, 8\]\]\.$"),
        (
            {"area": 63},
            r"^data\.buckets\.area must be a whole number >= data\.buckets\.step\^2, 64, but got 63",
        ),
        ({"area": 0}, r"^data\.buckets\.area must be a whole number >= 1, but got 0 \(int\)\.$"),
        ({"area": 64, "step": 0}, r"^data\.buckets\.step must be a whole number >= 1, but got 0 \(int\)\.$"),
        ({"area": 64, "max_ratio": 0.5}, r"^data\.buckets\.max_ratio must be a number in \[1, 64\], but got 0\.5"),
        ({"area": 64, "upscale": True}, r"^data\.buckets\.upscale must be one of 'refuse', 'allow', but got True"),
        ({"area": 64, "crop": "centre"}, r"^data\.buckets\.crop must be one of 'center', 'random', but got 'centre'"),
        ({"area": 64, "hflip": 1.5}, r"^data\.buckets\.hflip must be a number in \[0, 1\], but got 1\.5"),
        ({"area": 64, "min_images": 0}, r"^data\.buckets\.min_images must be a whole number >= 1, but got 0"),
        ({"shapes": []}, r"^data\.buckets\.shapes must be a list of \[height, width\] with at least one, such as"),
        ({"shapes": [[8, 8, 8]]}, r"^data\.buckets\.shapes must be a list of \[height, width\]"),
        (
            {"shapes": [[8, 0]]},
            r"^each side of data\.buckets\.shapes must be a whole number >= 1, but got 0 \(int\)\.$",
        ),
        (
            {"shapes": [[8, 8], [16, 8], [16, 16]]},
            r"^data\.buckets\.shapes has two of one ratio, \[8, 8\] and \[16, 16\]: an image would have no nearest one",
        ),
    ],
)
def test_what_no_list_can_be_made_of(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Buckets(**options)


def test_small_images_are_refused_with_their_number_or_enlarged():
    sizes = np.array([[64, 64], [63, 80], [200, 200], [20, 20]])
    with pytest.raises(
        ValueError,
        match=r"^2 of 4 images are smaller than their bucket\. The first is image 1, 63 x 80 \(height x width\), for a "
        r"bucket of 64 x 64; the smallest, image 3, would be enlarged 3\.20 times\. Set data\.buckets\.upscale=allow ",
    ):
        Buckets(shapes=[[64, 64]]).assign(sizes)
    assert Buckets(shapes=[[64, 64]], upscale="allow").assign(sizes)[0].tolist() == [0] * 4


def test_a_bucket_with_too_few_images_is_refused():
    sizes = np.array([[100, 100], [100, 100], [200, 100]])
    with pytest.raises(
        ValueError,
        match=r"^data\.buckets\.min_images=2, but 1 of 2 buckets \(height x width\) hold fewer: 88 x 48 with 1\. Set",
    ):
        Buckets(area=4096, min_images=2).assign(sizes)


def ring(height: int, width: int) -> np.ndarray:
    """A disc in the middle, uint8 (height, width, 3), as high and wide as the shorter side."""
    y, x = np.mgrid[:height, :width]
    far = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) / (min(height, width) / 2)
    return np.repeat(((far < 0.8) * 255).astype(np.uint8)[:, :, None], 3, 2)


@pytest.mark.parametrize("size", [(300, 401), (401, 300), (333, 333), (611, 300), (50, 73)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 88), (88, 48), (72, 56)])
def test_a_circle_stays_a_circle(size: tuple[int, int], shape: tuple[int, int]):
    scale = max(shape[0] / size[0], shape[1] / size[1])
    radius = 0.8 * min(size) / 2 * scale
    for of_pillow in (True, False):
        source = ring(*size)
        image = fit(Image.fromarray(source), shape, 3) if of_pillow else fit_tensor(tensor(source), shape)
        assert (image.dtype, tuple(image.shape), image.is_contiguous()) == (torch.uint8, (3, *shape), True)
        lit = image[0].double() / 255
        middle = lit[shape[0] // 2 - 1 : shape[0] // 2 + 1].sum(1).mean(), lit[:, shape[1] // 2].sum()
        for length, side in zip(middle, shape[::-1], strict=True):
            assert float(length) == pytest.approx(min(2 * radius, side), abs=1 + scale)


@pytest.mark.parametrize("size", [(300, 401), (401, 300), (7, 5), (1, 9), (64, 64)])
@pytest.mark.parametrize("shape", [(64, 64), (48, 88), (88, 48)])
def test_a_part_covers_and_is_stretched_by_less_than_a_pixel(size: tuple[int, int], shape: tuple[int, int]):
    high, wide = part_of(size, shape)
    assert (high == size[0]) or (wide == size[1])
    assert 1 <= high <= size[0]
    assert 1 <= wide <= size[1]
    exact = min(size[0], size[1] * shape[0] / shape[1]), min(size[1], size[0] * shape[1] / shape[0])
    assert max(abs(high - max(exact[0], 1)), abs(wide - max(exact[1], 1))) <= 0.5


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_tensors_of_every_kind_are_fitted_alike():
    generator = np.random.default_rng(1)
    soft = np.asarray(Image.fromarray(generator.integers(0, 256, (12, 17, 3), dtype=np.uint8)).resize((170, 120)))
    pixels = tensor(soft.copy())
    eight = fit_tensor(pixels, (48, 56), (0, 3))
    assert torch.equal(eight, fit(Image.fromarray(soft), (48, 56), 3, (0, 3)))
    floats = fit_tensor(pixels / 255, (48, 56), (0, 3))
    assert floats.dtype == torch.float32
    assert (floats * 255 - eight).abs().max() <= 1.01
    assert pixels.min() / 255 <= floats.min()
    assert floats.max() <= pixels.max() / 255
    deep = fit_tensor((pixels.int() * 257).to(torch.uint16), (48, 56), (0, 3))
    assert deep.dtype == torch.uint16
    assert (deep.int() / 257 - floats * 255).abs().max() < 0.01
    assert fit_tensor(pixels.double(), (48, 56)).dtype == torch.float64
    assert torch.equal(fit_tensor(pixels[:2], (48, 56), (0, 3)), eight[:2])
    assert torch.equal(fit_tensor(pixels, (120, 100), (0, 20)), pixels[:, :, 20:120])


def marked(height: int, width: int) -> Image.Image:
    """An image whose red says the row and whose green the column, of every pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(height)[:, None], np.arange(width)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_the_fields_say_where_the_image_was_cut(tmp_path: Path, crop: str, hflip: float):
    """Against cuts by hand of the image, flipped first where it is flipped: the buckets have its own scale."""
    for name, (height, width) in {"a": (40, 61), "b": (61, 40), "c": (43, 40)}.items():
        marked(height, width).save(tmp_path / f"{name}.png")
    buckets = Buckets(shapes=[[40, 48], [48, 40], [40, 40]], crop=crop, hflip=hflip)
    folder = ImageFolder(str(tmp_path), buckets=buckets)
    whole = [tensor(np.array(Image.open(path))) for path in folder.paths]
    torch.manual_seed(0)
    seen = set()
    for turn in range(20):
        for index, source in enumerate(whole):
            item = folder[index]
            top, left = item["crop"].tolist()
            high, wide = item["target_size"].tolist()
            assert item["original_size"].tolist() == list(source.shape[1:])
            shown = source.flip(-1) if hflip else source
            assert torch.equal(item["image"], shown[:, top : top + high, left : left + wide])
            assert item["image"].shape == (3, high, wide)
            seen.add((index, top, left))
            if crop == "center" and turn == 0:
                by_hand = {0: (0, (13 + (hflip == 1)) // 2), 1: (6, 0), 2: (1, 0)}[index]
                assert (top, left) == by_hand
    assert len(seen) == 3 if crop == "center" else len(seen) > 20


def test_a_coin_is_tossed_for_each_visit_and_every_part_is_reached(tmp_path: Path):
    marked(40, 43).save(tmp_path / "x.png")
    folder = ImageFolder(str(tmp_path), buckets=Buckets(shapes=[[40, 40]], crop="random", hflip=0.25))
    torch.manual_seed(1)
    cuts = []
    for _ in range(800):
        item = folder[0]
        cuts.append((bool(item["image"][1, 0, 0] > item["image"][1, 0, 1]), int(item["crop"][1])))
    flips = sum(flipped for flipped, _ in cuts) / 800
    assert abs(flips - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 800)
    for left in range(4):
        share = sum(at == left for _, at in cuts) / 800
        assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 800)


def test_crops_are_in_pixels_of_the_scaled_image(tmp_path: Path):
    marked(80, 122).save(tmp_path / "x.png")
    folder = ImageFolder(str(tmp_path), buckets=Buckets(shapes=[[40, 48]], crop="random"))
    torch.manual_seed(0)
    for _ in range(10):
        item = folder[0]
        columns = item["image"][1, 20].float()  # the column that each pixel came from, on average
        assert abs(columns[5:-5].mean() / 2 - (int(item["crop"][1]) + 23.5)) <= 1
        assert 0 <= int(item["crop"][1]) <= 61 - 48


def test_items_join_into_tensors(tmp_path: Path):
    for number in range(3):
        marked(50 + number, 40).save(tmp_path / f"{number}.png")
    folder = ImageFolder(str(tmp_path), buckets=Buckets(shapes=[[40, 32]]))
    batch = default_collate([folder[index] for index in range(3)])
    assert batch["image"].shape == (3, 3, 40, 32)
    for name in ("original_size", "crop", "target_size"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (3, 2))
    assert batch["original_size"].tolist() == [[50, 40], [51, 40], [52, 40]]
    assert batch["label"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images_are_fitted_as_they_are_seen(tmp_path: Path, ending: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    marked(400, 250).save(tmp_path / f"x.{ending}", exif=exif)
    folder = ImageFolder(str(tmp_path), buckets=Buckets(area=40 * 64))
    size = (250, 400) if orientation >= 5 else (400, 250)
    assert folder.sizes.tolist() == [list(size)]
    assert folder.bucket_shapes == [(40, 64) if orientation >= 5 else (64, 40)]
    item = folder[0]
    assert item["original_size"].tolist() == list(size)
    assert tuple(item["image"].shape[1:]) == folder.bucket_shapes[0]


def test_a_part_keeps_the_shapes_of_its_images(tmp_path: Path):
    for name, size in {"a": (64, 64), "b": (88, 48), "c": (64, 65)}.items():
        marked(*size).save(tmp_path / f"{name}.png")
    folder = ImageFolder(str(tmp_path), buckets=Buckets(area=4096))
    part = folder.only([2, 0])
    assert folder.bucket_shapes == [(64, 64), (88, 48)]
    assert part.bucket_shapes == [(64, 64)]
    last = folder.only([1])
    assert (last.bucket_of.tolist(), last.bucket_shapes, tuple(last[0]["image"].shape)) == (
        [0],
        [(88, 48)],
        (3, 88, 48),
    )
    assert (part.bucket_of.tolist(), part.sizes.tolist()) == ([0, 0], [[64, 65], [64, 64]])
    assert part.recipe()["bucket_of"] != folder.recipe()["bucket_of"]
    assert folder.recipe()["buckets"] == repr(folder.buckets)
    assert "buckets" not in ImageFolder(str(tmp_path), 8).recipe()


def test_one_of_a_size_and_buckets(tmp_path: Path):
    marked(8, 8).save(tmp_path / "x.png")
    for options in ({}, {"image_size": 8, "buckets": Buckets(area=64)}):
        with pytest.raises(ValueError, match=r"^ImageFolder wants image_size or buckets, and not both, but got "):
            ImageFolder(str(tmp_path), **options)
    with pytest.raises(ValueError, match=r"^data\.buckets must be a diffaug\.Buckets, but got 64 \(int\)\.$"):
        ImageFolder(str(tmp_path), buckets=64)


def test_a_file_that_changed_since_is_named(tmp_path: Path):
    marked(80, 40).save(tmp_path / "x.png")
    folder = ImageFolder(str(tmp_path), buckets=Buckets(shapes=[[40, 40]]))
    marked(80, 41).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"^Sample 0, .*x\.png, cannot be read: it was 80 x 40 \(height x width\)"):
        folder[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    marked(80, 40).save(tmp_path / "x.png", exif=exif)
    with pytest.raises(ValueError, match=r"^Sample 0, .*x\.png, cannot be read: it was 80 x 40 \(height x width\)"):
        folder[0]


# The user's own dataset.


def test_any_dataset_by_its_table():
    images = [tensor(np.array(marked(h, w))) for h, w in ((40, 60), (60, 40), (41, 40))]
    labels = ["a", "b", "c"]
    dataset = Bucketed(
        list(zip(images, labels, strict=True)), [(40, 60), (60, 40), (41, 40)], Buckets(shapes=[[40, 48], [40, 40]])
    )
    assert dataset.bucket_shapes == [(40, 48), (40, 40)]
    assert dataset.bucket_of.tolist() == [0, 1, 1]
    item = dataset[0]
    assert (item["label"], item["crop"].tolist(), item["target_size"].tolist()) == ("a", [0, 6], [40, 48])
    assert torch.equal(item["image"], images[0][:, :, 6:54])
    part = dataset.only([2, 0])
    assert (len(part), part.bucket_of.tolist(), part[0]["label"]) == (2, [1, 0], "c")
    assert part.only([1])[0]["label"] == "a"


def test_kinds_of_images():
    picture = marked(40, 60)
    deep = np.full((40, 60), 1000, np.uint16)
    items: list[Any] = [picture, np.array(picture), tensor(np.array(picture)), deep, deep / np.float32(65535)]
    dataset = Bucketed(items, np.full((5, 2), (40, 60)), Buckets(shapes=[[40, 48]]))
    read = [dataset[index]["image"] for index in range(5)]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])
    assert read[3].dtype == torch.uint16
    assert (read[3].int() == 1000).all()
    assert (read[4].dtype, tuple(read[4].shape)) == (torch.float32, (1, 40, 48))


def test_image_keys():
    picture, mask = tensor(np.array(marked(40, 60))), torch.zeros(1, 40, 60)
    rows = [{"pixels": picture, "mask": mask}]
    roles = {"pixels": "target", "mask": "mask"}
    dataset = Bucketed(rows, [(40, 60)], Buckets(shapes=[[40, 48]]), image_key="pixels", images=roles)
    assert set(dataset[0]) == {"pixels", "mask", "original_size", "crop", "target_size"}
    assert dataset[0]["pixels"].shape == (3, 40, 48)
    assert dataset[0]["mask"].shape == (1, 40, 48)
    with pytest.raises(ValueError, match=r"item 0 of list holds 2 images"):
        Bucketed(rows, [(40, 60)], Buckets(shapes=[[40, 48]]))[0]
    named = [{"x": picture, "crop": 3}]
    with pytest.raises(ValueError, match=r"^item 0 of list has parts named \['crop'\], which Bucketed makes itself"):
        Bucketed(named, [(40, 60)], Buckets(shapes=[[40, 48]]))[0]


@pytest.mark.parametrize("row", [None, (0, 5), (-1, 5), (5.0, 5), (5,), (True, 5), "55"])
def test_an_item_of_unknown_size_is_refused(row: Any):
    dataset = [torch.zeros(3, 8, 8)] * 3
    message = f"whole numbers of pixels, but 1 of 3 are not known. The first is of item 1: {row!r}. Read them"
    with pytest.raises(ValueError, match=re.escape(message)):
        Bucketed(dataset, [(8, 8), row, (8, 8)], Buckets(area=64))


def test_tables_that_do_not_fit():
    dataset = TensorDataset(torch.zeros(3, 3, 8, 8))
    with pytest.raises(ValueError, match=r"^sizes must have a row for each of the dataset's 3 items, but has 2\.$"):
        Bucketed(dataset, [(8, 8)] * 2, Buckets(area=64))
    with pytest.raises(ValueError, match=r"1 of 3 are not known\. The first is of item 2: array\(\[8, 0\]\)"):
        Bucketed(dataset, np.array([[8, 8], [8, 8], [8, 0]]), Buckets(area=64))
    with pytest.raises(ValueError, match=r"^data\.buckets must be a diffaug\.Buckets, but got \{'area': 64\} \(dict\)"):
        Bucketed(dataset, [(8, 8)] * 3, {"area": 64})
    wrong = Bucketed(dataset, [(8, 8), (8, 9), (8, 8)], Buckets(area=64))
    with pytest.raises(
        ValueError,
        match=r"^item 1 of TensorDataset is 8 x 8 \(height x width\), but the table of sizes .* says 8 x 9",
    ):
        wrong[1]


# From YAML.


def test_options_by_name():
    assert read_buckets(None) is None
    assert read_buckets({"area": None, "step": 8, "shapes": None, "crop": "center"}) is None
    assert read_buckets({"area": 4096, "step": 16}) == Buckets(area=4096, step=16)
    assert read_buckets({"shapes": [[8, 8]]}) == Buckets(shapes=((8, 8),))
    with pytest.raises(ValueError, match=r"^data\.buckets\.step=16 is set, but there are no buckets: set "):
        read_buckets({"area": None, "step": 16})
    with pytest.raises(ValueError, match=r"^data\.buckets has no options \['size'\]; it has area, step, max_ratio"):
        read_buckets({"size": 3})
    with pytest.raises(ValueError, match=r"^data\.buckets must be a mapping with area, or shapes; or a .* but got 64 "):
        read_buckets(64)


def test_a_folder_split_by_share(tmp_path: Path):
    for number in range(30):
        marked(64 + number % 3, 64 + 24 * (number % 2)).save(tmp_path / f"{number}.png")
    options: dict[str, Any] = {"root": str(tmp_path), "process": PROCESS, "val_share": 0.3}
    data = image_folder(buckets={"area": 4096, "crop": "random", "hflip": 0.5}, image_shape=[3, None, None], **options)
    assert data.image_shape is None
    data.setup()
    train, val = (data.images(stage).dataset for stage in ("train", "val"))
    assert train.bucket_shapes == val.bucket_shapes
    assert len(train) + len(val) == 30
    assert (train.buckets.crop, train.buckets.hflip) == ("random", 0.5)
    assert (val.buckets.crop, val.buckets.hflip) == ("center", 0.0)
    with pytest.raises(ValueError, match=r"^data\.image_shape must be null, or \[3, null, null\], where data\.buckets"):
        image_folder(buckets={"area": 4096}, image_shape=[3, 64, 64], **options)
    with pytest.raises(ValueError, match=r"^data\.image_size must be a whole number >= 1, but got None"):
        image_folder(**options)
