"""The middle square: the pixels that Pillow's resizing gave, the same bits everywhere, read where they lie."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from diffaug.datasets.folder import ImageFolder
from diffaug.images import fit as fitting
from diffaug.images.fit import fit
from diffaug.images.pixels import plain

SHARED = tuple(map(int, Image.__version__.split(".")[:2])) >= (11, 2)


def waves(width: int, height: int, channels: int = 3) -> np.ndarray:
    """A picture of soft waves and sharp edges: float64 in [0, 1], shape (height, width, channels)."""
    y, x = np.mgrid[:height, :width] / 20
    soft = np.stack([np.sin(x * (1 + c) + np.cos(y)) for c in range(channels)], -1)
    return (0.5 + 0.35 * soft + 0.15 * np.sign(np.sin(x + y))[:, :, None]).clip(0, 1)


def odd_files(folder: Path, width: int, height: int) -> None:
    """Write one file of each kind."""
    rgb = Image.fromarray((waves(width, height) * 255).astype(np.uint8))
    rgba = Image.fromarray((waves(width, height, 4) * 255).astype(np.uint8))
    deep = (waves(width, height, 1)[:, :, 0] * 65535).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode in ("1", "L", "P", "RGB"):
        rgb.convert(mode, dither=Image.Dither.NONE).save(folder / f"{mode}.png")
    for name in ("x.jpg", "x.webp", "x.gif", "x.bmp", "x.tif", "x.ppm"):
        rgb.save(folder / name)
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    rgb.save(folder / "turned.jpg", exif=turned)
    rgba.save(folder / "turned.png", exif=turned)
    rgba.save(folder / "alpha.png")
    rgba.convert("LA").save(folder / "grey_alpha.png")
    rgb.convert("P", dither=Image.Dither.NONE).save(folder / "palette_alpha.png", transparency=3)
    rgb.save(folder / "one_colour_transparent.png", transparency=rgb.getpixel((3, 3)))
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    Image.fromarray(deep.astype(np.float32) / 65535).save(folder / "float.tif")


def by_pillow(dataset: ImageFolder, path: str) -> torch.Tensor:
    """A file as it was read when Pillow resized (then the square lay between two pixels where the middle does)."""
    size = dataset.image_size
    with Image.open(path) as image:
        image.draft(None, (4 * size, 4 * size))
        depth, inverted = dataset._depth(image)
        image = plain(ImageOps.exif_transpose(image), depth, inverted)
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    if image.mode == "F":
        image = Image.fromarray(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8))
    pixels = np.array(image.convert({1: "L", 3: "RGB"}[dataset.channels]))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("width", "height", "size", "channels"),
    [
        (90, 60, 8, 3),
        (90, 60, 32, 1),
        (60, 90, 100, 3),
        (64, 64, 16, 1),
        (64, 64, 64, 3),
        (91, 60, 32, 3),
        (60, 91, 100, 1),
    ],
)
def test_odd_files_keep_their_pixels(tmp_path: Path, width: int, height: int, size: int, channels: int):
    odd_files(tmp_path, width, height)
    dataset = ImageFolder(str(tmp_path), size, channels=channels)
    assert len(dataset) == 22
    for index, path in enumerate(dataset.paths):
        pixels, _ = dataset[index]
        before = by_pillow(dataset, path)
        assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (torch.uint8, before.shape, True)
        assert (pixels.double() - before).abs().mean() < 1, path


def test_a_jpeg_is_turned_where_pillow_turns_it_by_its_xmp(tmp_path: Path):  # Pillow 11.0 does not
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    Image.fromarray((waves(32, 32, 1)[:, :, 0] * 255).astype(np.uint8)).save(tmp_path / "x.jpg", xmp=xmp.encode())
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg"))
    assert torch.equal(ImageFolder(str(tmp_path), 16, channels=1)[0][0], fit(turned, (16, 16), 1))


def test_the_left_or_upper_square_where_the_middle_is_between(tmp_path: Path):
    picture = np.arange(72, dtype=np.uint8)
    for size in ((9, 8), (8, 9)):
        array = picture.reshape(size[::-1])
        image = Image.fromarray(array)
        assert torch.equal(fit(image, (8, 8), 1)[0], torch.from_numpy(array[:8, :8].copy()))
        assert torch.equal(fit(image.convert("RGB"), (8, 8), 3)[2], torch.from_numpy(array[:8, :8].copy()))


@pytest.mark.skipif(not SHARED, reason="Pillow before 11.2 shares nothing")
def test_pixels_are_read_where_they_lie():
    image = Image.fromarray((waves(50, 40) * 255).astype(np.uint8))
    copied, shared = np.array(image), fitting._shared(image)
    assert shared.shape == (40, 50, 4)
    assert np.array_equal(shared[:, :, :3], copied)
    image.putpixel((7, 5), (1, 2, 3))
    assert shared[5, 7, :3].tolist() == [1, 2, 3], "the pixels were copied"
    del image
    gc.collect()
    filled = [Image.new("RGB", (50, 40), "red") for _ in range(100)]  # would lie where the image was
    copied[5, 7] = (1, 2, 3)
    assert np.array_equal(shared[:, :, :3], copied), filled


def test_a_large_image_lies_in_pieces_and_is_copied():
    noise = np.random.default_rng(0).integers(0, 256, (2000, 2300, 3), dtype=np.uint8)
    large = Image.fromarray(noise)  # 18 MB; Pillow's pieces are of 16
    assert fitting._shared(large).shape == (2000, 2300, 3)
    whole = fit(large, (64, 64), 3)
    part = fit(large.crop((150, 0, 2150, 2000)), (64, 64), 3)  # 16 MB
    assert torch.equal(whole, part)


def test_copied_pixels_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    image = Image.fromarray((waves(93, 60) * 255).astype(np.uint8))
    shared = [fit(image, (size, size), channels) for size in (8, 60, 100) for channels in (1, 3)]
    monkeypatch.setattr(fitting, "_shared", np.array)
    copied = [fit(image, (size, size), channels) for size in (8, 60, 100) for channels in (1, 3)]
    assert all(map(torch.equal, shared, copied))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_and_workers_change_no_bit(tmp_path: Path, two_threads: None):
    odd_files(tmp_path, 301, 200)
    dataset = ImageFolder(str(tmp_path), 64)
    two = [pixels for pixels, _ in dataset]
    of_workers = [pixels[0] for pixels, _ in DataLoader(dataset, num_workers=2)]
    torch.set_num_threads(1)
    one = [pixels for pixels, _ in dataset]
    assert all(map(torch.equal, two, one))
    assert all(map(torch.equal, of_workers, one))


DIGEST = """
import hashlib, sys
from diffaug.datasets.folder import ImageFolder
digest = hashlib.sha256()
for size in (16, 64, 300):
    for pixels, _ in ImageFolder(sys.argv[1], size):
        digest.update(pixels.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_a_cpu_without_vector_instructions_gives_the_same_bits(tmp_path: Path):
    odd_files(tmp_path, 301, 200)

    def digest(**environment: str) -> Any:
        command = [sys.executable, "-c", DIGEST, str(tmp_path)]
        done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
        return done.stdout

    here = digest()
    assert len(here) == 65
    assert here == digest(ATEN_CPU_CAPABILITY="default")
