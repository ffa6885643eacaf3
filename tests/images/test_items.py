"""One item of a dataset taken apart: which part is the image, what an image is, and what is refused."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from diffaug.images.items import as_tensor, check_range, take_apart

IMAGE = Image.new("RGB", (6, 4), (1, 2, 3))


class Pair(NamedTuple):
    picture: Any
    kind: Any


# What an item is made of.


@pytest.mark.parametrize(
    ("item", "key", "extra"),
    [
        (IMAGE, None, {}),
        ((IMAGE, 3), None, {"label": 3}),
        ([IMAGE, 3, "a", 5], None, {"label": 3, "item_2": "a", "item_3": 5}),
        ((3, IMAGE), None, {"item_0": 3}),
        ((torch.zeros(2, 2), IMAGE), 1, {"item_0": torch.zeros(2, 2)}),
        ((torch.zeros(2, 2), IMAGE), "label", {"item_0": torch.zeros(2, 2)}),
        ({"image": IMAGE, "kind": 3, 7: "seven"}, None, {"kind": 3, "7": "seven"}),
        ({"image": IMAGE, "mask": torch.zeros(2, 2)}, "image", {"mask": torch.zeros(2, 2)}),
        ({0: IMAGE, 1: torch.zeros(2, 2)}, 0, {"1": torch.zeros(2, 2)}),
        (Pair(IMAGE, 3), None, {"kind": 3}),
        (Pair(IMAGE, torch.zeros(2, 2)), "picture", {"kind": torch.zeros(2, 2)}),
        (Pair(IMAGE, torch.zeros(2, 2)), 0, {"kind": torch.zeros(2, 2)}),
    ],
)
def test_split(item: Any, key: str | int | None, extra: dict[str, Any]):
    before = dict(item) if isinstance(item, dict) else None
    image, rest = take_apart(item, key, "data.train[0]")
    assert image is IMAGE
    assert repr(rest) == repr(extra)
    assert before is None or before.keys() == item.keys()


@pytest.mark.parametrize(
    ("item", "key", "message"),
    [
        (3, None, r"data\.train\[5\] holds no image: item_0 \(int\)\."),
        ((), None, r"data\.train\[5\] holds no image: nothing\."),
        ({"path": "x.png"}, None, r"data\.train\[5\] holds no image: path \(str\)\."),
        (
            (IMAGE, torch.zeros(2, 3)),
            None,
            r"holds 2 images: item_0 \(PIL image 6x4 of mode RGB\), "
            r"label \(Tensor of shape \(2, 3\) and dtype torch\.float32\).*data\.image_key",
        ),
        (
            {"a": IMAGE, "b": IMAGE},
            "c",
            r"data\.image_key='c' is not in data\.train\[5\], which holds a \(.*\), b \(.*\)",
        ),
        ((IMAGE, 3), 2, r"data\.image_key=2 is not in data\.train\[5\]"),
        ((IMAGE, 3), -1, r"data\.image_key=-1 is not in data\.train\[5\]"),
        ({"image": IMAGE, "t": 3, "sigma": 1}, None, r"has parts named \['sigma', 't'\].*Rename them"),
    ],
)
def test_split_refuses(item: Any, key: str | int | None, message: str):
    with pytest.raises(ValueError, match=message):
        take_apart(item, key, "data.train[5]")


# What an image is.


@pytest.mark.parametrize(
    ("mode", "colour", "channels"),
    [
        ("L", 5, [5]),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (1, 2, 3, 4), [1, 2, 3, 4]),
        ("LA", (1, 2), [1, 2]),
        ("1", 1, [255]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("YCbCr", (100, 128, 128), [100, 100, 100]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
    ],
)
def test_pil_modes(mode: str, colour: Any, channels: list[int]):
    tensor = as_tensor(Image.new(mode, (6, 4), colour), "x")
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor, torch.tensor(channels, dtype=torch.uint8)[:, None, None].expand(-1, 4, 6))


@pytest.mark.parametrize(("transparent", "seen"), [(None, [10, 20, 30]), (1, [255, 255, 255])])
def test_pil_palette(transparent: int | None, seen: list[int]):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([1, 2, 3, 10, 20, 30])
    if transparent is not None:
        image.info["transparency"] = transparent
    assert as_tensor(image, "x")[:, 2, 2].tolist() == seen


@pytest.mark.parametrize("make", [Image.fromarray, np.asarray, torch.from_numpy], ids=["pil", "numpy", "torch"])
def test_16_bits_are_mapped_to_the_value_range(make: Callable[[Any], Any]):
    values = np.array([[0, 13107, 65535]], np.uint16)
    tensor = as_tensor(make(values), "x", (-1, 1))
    assert tensor.dtype == torch.float32
    assert tensor.flatten().tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)
    assert as_tensor(make(values), "x", (0, 2)).flatten().tolist() == pytest.approx([0, 0.4, 2], abs=1e-6)


def test_big_endian_16_bits():
    for image in (Image.frombytes("I;16B", (1, 1), bytes([50, 255])), np.array([[50 * 256 + 255]], ">u2")):
        assert as_tensor(image, "x", (0, 65535)).item() == pytest.approx(50 * 256 + 255)


@pytest.mark.parametrize(
    ("shape", "seen"),
    [
        ((5, 6), (1, 5, 6)),
        ((2, 9), (1, 2, 9)),
        ((5, 6, 1), (1, 5, 6)),
        ((5, 6, 3), (3, 5, 6)),
        ((20, 30, 13), (13, 20, 30)),
    ],
)
def test_numpy_layouts(shape: tuple[int, ...], seen: tuple[int, ...]):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    tensor = as_tensor(array, "x")
    assert tuple(tensor.shape) == seen
    channel, row, column = (side - 1 for side in seen)
    assert tensor[channel, row, column] == (array[row, column] if array.ndim == 2 else array[row, column, channel])
    tensor.zero_()
    assert array.any(), "the user's array is not to be written to"


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 32, 4), (16, 64, 64), (8, 8, 8), (7,), (2, 3, 8, 8)])
def test_numpy_layouts_in_doubt_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"data\.train\[2\] is a numpy array of shape .*torch\.from_numpy\(array\)"):
        as_tensor(np.zeros(shape, np.uint8), "data.train[2]")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(5),
        torch.zeros(2, 5),
        torch.zeros(3, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.half),
    ],
)
def test_a_tensor_is_taken_as_it_is(tensor: torch.Tensor):
    assert as_tensor(tensor, "x") is tensor


def test_a_tv_tensor_becomes_a_plain_one():
    tensor = as_tensor(tv_tensors.Image(torch.ones(3, 4, 4, dtype=torch.uint8)), "x")
    assert type(tensor) is torch.Tensor
    assert tensor.sum() == 48


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.bool), r"data\.train\[7\] has dtype torch\.bool, .*\.float\(\).*a mask"),
        (torch.zeros(2, 2, dtype=torch.int64), r"has dtype torch\.int64, .*\.to\(torch\.uint8\) if"),
        (torch.zeros(2, 2, dtype=torch.complex64), r"has dtype torch\.complex64"),
        (np.zeros((2, 2), bool), r"has dtype torch\.bool"),
        (np.zeros((2, 2), np.int32), r"has dtype torch\.int32"),
        (np.zeros((2, 2), object), r"is a numpy array of dtype object"),
        (Image.new("I", (2, 2)), r"has dtype torch\.int32"),
        (torch.zeros(0, 3), r"is empty or a single number: Tensor of shape \(0, 3\)"),
        (torch.tensor(1.0), r"is empty or a single number"),
        ("x.png", r"must be a PIL image, a tensor or a numpy array, but is str"),
    ],
)
def test_as_tensor_refuses(image: Any, message: str):
    with pytest.raises(ValueError, match=message):
        as_tensor(image, "data.train[7]")


def test_check_range():
    check_range(torch.tensor([-1.0005, 1.0005]), (-1, 1), "x")
    check_range(torch.rand(3, 4, requires_grad=True), (0, 1), "x")
    for bad, seen in ((1.01, r"\[0, 1\.01\]"), (-2.0, r"\[-2, 0\]")):
        message = rf"data\.val\[1\] spans {seen}, outside process\.value_range=\[-1, 1\]\. Set process\.value_range"
        with pytest.raises(ValueError, match=message):
            check_range(torch.tensor([0.0, bad]), (-1, 1), "data.val[1]")
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"x holds values that are nan or infinite: 1 of 2"):
            check_range(torch.tensor([0.0, bad]), (-1, 1), "x")
    with pytest.raises(ValueError, match=r"For latents set process\.value_range=null"):
        check_range(torch.tensor([4.0]), (-1, 1), "x")


def test_latents_are_of_any_finite_values():
    check_range(torch.tensor([-70.0, 900.0]), None, "x")
    for bad in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=r"data\.val\[1\] holds values that are nan or infinite: 1 of 2"):
            check_range(torch.tensor([0.0, bad]), None, "data.val[1]")
    assert as_tensor(np.array([[0, 65535]], np.uint16), "x", None).flatten().tolist() == [-1, 1]
