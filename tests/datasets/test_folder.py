"""Image files as they come from the world: each kind's pixels, and what is refused."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffaug.datasets.folder import ImageFolder

SIZE = 8
RED, WHITE = (255, 0, 0), (255, 255, 255)


def only(folder: Path, image: Any, name: str = "x.png", *, size: int = SIZE, channels: int = 3, **options: Any) -> Any:
    """Save one image (or bytes), read it as a folder: uint8, shape (channels, size, size)."""
    if isinstance(image, bytes):
        (folder / name).write_bytes(image)
    else:
        image.save(folder / name, **options)
    dataset = ImageFolder(str(folder), size, channels=channels)
    assert len(dataset) == 1
    pixels, label = dataset[0]
    assert (pixels.dtype, tuple(pixels.shape), label) == (torch.uint8, (channels, size, size), 0)
    return pixels


def level(pixels: torch.Tensor) -> list[int]:
    """The one colour of a plain image."""
    flat = pixels.flatten(1)
    assert (flat == flat[:, :1]).all(), "the image is not of one colour"
    return flat[:, 0].tolist()


def ramp(values: Any, dtype: str) -> np.ndarray:
    """Rows of equal value: SIZE rows, so that a read at SIZE keeps them as they are."""
    return np.repeat(np.asarray(values, dtype)[:, None], SIZE, 1)


@pytest.mark.parametrize(
    ("mode", "colour", "name", "seen"),
    [
        ("L", 77, "x.png", [77, 77, 77]),
        ("RGB", (10, 20, 30), "x.png", [10, 20, 30]),
        ("RGB", (10, 20, 30), "x.bmp", [10, 20, 30]),
        ("RGB", (10, 20, 30), "x.TIFF", [10, 20, 30]),
        ("RGB", (10, 20, 30), "x.ppm", [10, 20, 30]),
        ("1", 1, "x.png", [255, 255, 255]),
        ("1", 0, "x.tif", [0, 0, 0]),
        ("LA", (77, 255), "x.png", [77, 77, 77]),
        ("LA", (77, 0), "x.png", [255, 255, 255]),
        ("LA", (0, 102), "x.png", [153, 153, 153]),
        ("RGBA", (10, 20, 30, 255), "x.png", [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), "x.webp", [255, 255, 255]),
        ("RGBA", (255, 0, 0, 51), "x.png", [255, 204, 204]),
        ("CMYK", (0, 255, 255, 0), "x.tif", [255, 0, 0]),
        ("YCbCr", (100, 128, 128), "x.tif", [100, 100, 100]),
    ],
)
def test_modes(tmp_path: Path, mode: str, colour: Any, name: str, seen: list[int]):
    options = {"lossless": True} if name.endswith("webp") else {}
    if mode == "YCbCr" and Image.__version__ < "13":
        pytest.skip("Pillow before 13 cannot read the YCbCr TIFF that it writes")
    assert level(only(tmp_path, Image.new(mode, (12, 9), colour), name, **options)) == seen


def test_cmyk_jpeg(tmp_path: Path):
    pixels = only(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "x.jpg", quality=95)
    assert (pixels.int() - torch.tensor([255, 0, 0])[:, None, None]).abs().max() <= 3


@pytest.mark.parametrize(("transparent", "seen"), [(None, [10, 20, 30]), (1, [255, 255, 255]), (0, [10, 20, 30])])
def test_palette(tmp_path: Path, transparent: int | None, seen: list[int]):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([1, 2, 3, 10, 20, 30])
    options = {} if transparent is None else {"transparency": transparent}
    assert level(only(tmp_path, image, **options)) == seen


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "I;16"])
def test_a_transparent_colour_is_laid_over_white(tmp_path: Path, mode: str):
    colour: Any = {"1": 0, "L": 7, "RGB": (1, 2, 3), "I;16": 9}[mode]
    image = Image.new(mode, (SIZE, SIZE), colour)
    other: Any = {"1": 0, "L": 100, "RGB": (100, 100, 100), "I;16": 100 * 257}[mode]
    image.paste(other, (0, 0, SIZE, SIZE // 2))
    pixels = only(tmp_path, image, transparency=colour)
    assert level(pixels[:, SIZE // 2 :]) == [255, 255, 255]
    assert level(pixels[:, : SIZE // 2 - 2]) == ([255] * 3 if mode == "1" else [100] * 3)


def test_16_bits_are_scaled_by_their_depth(tmp_path: Path):
    values = [0, 128, 129, 257, 1000, 30000, 65407, 65535]
    seen = [0, 0, 1, 1, 4, 117, 255, 255]
    for name in ("x.png", "x.tif"):
        folder = tmp_path / name[2:]
        folder.mkdir()
        assert only(folder, Image.fromarray(ramp(values, "uint16")), name)[0, :, 0].tolist() == seen


def test_16_bit_pgm(tmp_path: Path):
    header = f"P5 {SIZE} {SIZE} 65535\n".encode()
    values = [0, 128, 129, 257, 1000, 30000, 65407, 65535]
    pixels = only(tmp_path, header + ramp(values, ">u2").tobytes(), "x.pgm", channels=1)
    assert pixels[0, :, 3].tolist() == [0, 0, 1, 1, 4, 117, 255, 255]


def tiff(pixels: bytes, bits: int, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A SIZE x SIZE grey TIFF, written by hand: Pillow writes no odd kinds.

    Photometric 0 is white at 0, 1 black at 0; sample formats are 1 unsigned, 2 signed, 3 float (TIFF 6.0).
    """
    tags = [(256, SIZE), (257, SIZE), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, SIZE)]
    tags += [(279, len(pixels)), (339, sample_format)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + directory + struct.pack("<I", 0)


def test_12_bits_are_scaled_by_their_depth(tmp_path: Path):
    values = [0, 16, 100, 1000, 2048, 3000, 4000, 4095]
    bits = "".join(f"{value:012b}" for value in np.repeat(values, SIZE))
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big")
    pixels = only(tmp_path, tiff(packed, 12), "x.tif", channels=1)
    assert pixels[0, :, 0].tolist() == [round(value / 4095 * 255) for value in values]


@pytest.mark.parametrize(
    ("dtype", "bits", "photometric", "sample_format", "depth"),
    [
        ("<u2", 16, 0, 1, 65535),
        ("u1", 8, 0, 1, 255),
        ("<f4", 32, 0, 3, 1),
        ("<i2", 16, 1, 2, 32767),
        ("i1", 8, 1, 2, 127),
        ("<i4", 32, 1, 2, 65535),
    ],
)
def test_inverted_and_signed_tiffs(
    tmp_path: Path, dtype: str, bits: int, photometric: int, sample_format: int, depth: int
):
    values = np.linspace(0, depth, SIZE).astype(dtype)
    file = tiff(ramp(values, dtype).tobytes(), bits, photometric=photometric, sample_format=sample_format)
    seen = np.rint(values.astype(float) / depth * 255)
    pixels = only(tmp_path, file, "x.tif", channels=1)
    assert pixels[0, :, 0].tolist() == (255 - seen if photometric == 0 else seen).tolist()


@pytest.mark.parametrize(("dtype", "bits", "depth"), [("<i2", 16, 32767), ("i1", 8, 127)])
def test_negative_pixels_are_refused(tmp_path: Path, dtype: str, bits: int, depth: int):
    file = tiff(ramp([-5] * SIZE, dtype).tobytes(), bits, sample_format=2)
    with pytest.raises(ValueError, match=rf"span \[-5, -5\], but must lie in \[0, {depth}\].*; data\.bits says how"):
        only(tmp_path, file, "x.tif")


def test_12_bits_stored_in_16(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    values = [0, 16, 100, 1000, 2048, 3000, 4000, 4095]
    for i, name in enumerate(("a.tif", "b.png")):
        Image.fromarray(ramp(values, "uint16")).save(tmp_path / name)
        assert ImageFolder(str(tmp_path), SIZE, channels=1, bits=12)[i][0][0, :, 0].tolist() == [
            round(value / 4095 * 255) for value in values
        ]
    (tmp_path / "c.pgm").write_bytes(f"P5 {SIZE} {SIZE} 4095\n".encode() + ramp(values, ">u2").tobytes())
    pgm = ImageFolder(str(tmp_path), SIZE, channels=1, bits=12)[2][0]  # it says its own depth
    assert pgm[0, :, 0].tolist() == [round(value / 4095 * 255) for value in values]
    ImageFolder(str(tmp_path), SIZE, bits=16).warn_of_depth()
    assert "nearly black" not in caplog.text
    ImageFolder(str(tmp_path), SIZE).warn_of_depth()
    assert "none of 2 16-bit files looked at has a pixel above 4095" in caplog.text
    assert "set data.bits=12" in caplog.text
    with pytest.raises(ValueError, match=r"span \[0, 4095\], but must lie in \[0, 1023\]"):
        ImageFolder(str(tmp_path), SIZE, bits=10)[0]
    with pytest.raises(ValueError, match=r"data\.bits must be a whole number in \[1, 16\], but got 17"):
        ImageFolder(str(tmp_path), SIZE, bits=17)


def test_bits_are_of_deep_files_only(tmp_path: Path):
    values = np.linspace(0, 255, SIZE).astype("u1")
    Image.fromarray(ramp(values, "u1")).save(tmp_path / "a.png")
    (tmp_path / "b.tif").write_bytes(tiff(ramp(values, "u1").tobytes(), 8))
    for bits in (1, 7, 12):
        for pixels, _ in ImageFolder(str(tmp_path), SIZE, channels=1, bits=bits):
            assert pixels[0, :, 0].tolist() == values.tolist(), bits


def test_files_of_16_bits_and_of_8_draw_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Image.fromarray(ramp([0] * SIZE, "uint16")).save(tmp_path / "a.png")
    Image.fromarray(ramp(range(SIZE), "uint8")).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"broken")
    ImageFolder(str(tmp_path), SIZE).warn_of_depth()  # an all black file says nothing
    Image.fromarray(ramp([7] * SIZE, "uint16")).save(tmp_path / "d.png")
    Image.fromarray(ramp([40000] * SIZE, "uint16")).save(tmp_path / "e.png")
    ImageFolder(str(tmp_path), SIZE).warn_of_depth()
    assert caplog.text == ""


def test_32_bits_within_16(tmp_path: Path):
    values = [0, 128, 129, 257, 1000, 30000, 65407, 65535]
    pixels = only(tmp_path, Image.fromarray(ramp(values, "int32")), "x.tif", channels=1)
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 1, 4, 117, 255, 255]


def test_16_bit_colour_keeps_its_high_byte(tmp_path: Path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", 0, 30000, 65535) * SIZE
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", SIZE, SIZE, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(row * SIZE)) + chunk(b"IEND", b"")
    assert level(only(tmp_path, png)) == [0, 117, 255]


def test_float_in_the_unit_range(tmp_path: Path):
    values = [0, 0.001, 0.003, 0.1, 0.25, 0.5, 0.9, 1]
    pixels = only(tmp_path, Image.fromarray(ramp(values, "float32")), "x.tif", channels=1)
    assert pixels[0, :, 0].tolist() == [round(value * 255) for value in values]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ramp(range(SIZE), "float32"), r"mode F and span \[0, 7\], but must lie in \[0, 1\]"),
        (ramp([-0.5] * SIZE, "float32"), r"mode F and span \[-0\.5, -0\.5\], but must lie in \[0, 1\]"),
        (ramp([np.nan] * SIZE, "float32"), r"mode F and span \[nan, nan\]"),
        (ramp([70000] * SIZE, "int32"), r"mode I and span \[70000, 70000\], but must lie in \[0, 65535\]"),
        (ramp([-3] * SIZE, "int32"), r"mode I and span \[-3, -3\]"),
    ],
)
def test_values_outside_the_depth_are_refused(tmp_path: Path, array: np.ndarray, message: str):
    with pytest.raises(ValueError, match=rf"Sample 0, .*x\.tif, cannot be read: its pixels are of {message}"):
        only(tmp_path, Image.fromarray(array), "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("I;16", "x.png"), ("I;16", "x.tif"), ("RGB", "x.jpg")],
)
def test_exif_orientation(tmp_path: Path, orientation: int, mode: str, name: str):
    corners = np.zeros((SIZE, SIZE), np.uint8)
    corners[:4, :4], corners[:4, 4:], corners[4:, :4] = 250, 170, 80
    image = Image.fromarray(corners)
    image = Image.fromarray(corners.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if name == "x.jpg" else {}
    pixels = only(tmp_path, image, name, channels=1, exif=exif, **options)[0]
    stored = {  # EXIF 2.32, table 4: where the stored first row and first column are seen
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).T,
        8: np.rot90,
    }
    assert np.abs(pixels.int().numpy() - stored[orientation](corners)).max() <= (2 if name == "x.jpg" else 0)


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str):
    first, second = (Image.new("RGB", (SIZE, SIZE), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    options = {"lossless": True} if name == "x.webp" else {}
    assert level(only(tmp_path, first, name, save_all=True, append_images=[second], **options)) == [255, 0, 0]


@pytest.mark.parametrize("size", [(20000, 2), (2, 20000), (30000, 1)])
def test_very_wide_and_very_high(tmp_path: Path, size: tuple[int, int]):
    image = Image.new("RGB", size, (0, 0, 0))
    middle = [max(0, side // 2 - 4) for side in size]  # the square, and what its edges are interpolated with
    image.paste((10, 20, 30), (*middle, *(min(side, corner + 8) for side, corner in zip(size, middle, strict=True))))
    assert level(only(tmp_path, image, size=256)) == [10, 20, 30]


def test_the_middle_square_is_kept(tmp_path: Path):
    image = Image.new("RGB", (32, 8), RED)
    image.paste((0, 0, 255), (12, 0, 20, 8))
    assert level(only(tmp_path, image)) == [0, 0, 255]


def test_small_images_are_enlarged(tmp_path: Path):
    pixels = only(tmp_path, Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8)), channels=1)[0].int()
    assert (pixels.diff(dim=1) >= 0).all()
    assert pixels[:, 0].max() < 20
    assert pixels[:, -1].min() > 235


def test_grey_of_a_colour_is_its_luma(tmp_path: Path):
    assert level(only(tmp_path, Image.new("RGB", (9, 9), RED), channels=1)) == [76]  # 0.299 x 255, ITU-R 601


def test_a_deep_image_is_resized_in_full_depth(tmp_path: Path):
    array = np.tile(np.array([[120, 120, 120, 380]], np.uint16), (64, 16))  # 0.47 and 1.48 of 255; 0.72 on average
    assert level(only(tmp_path, Image.fromarray(array), channels=1)) == [1]  # 0.25 in 8 bits: 0


def test_a_fast_jpeg_looks_as_one_decoded_in_full(tmp_path: Path):
    y, x = np.mgrid[:1200, :1600] / 100
    waves = [np.sin(x * (3 + c) + np.cos(y * 2)) * 90 + np.sin(40 * x * y / 10) * 30 + 128 for c in range(3)]
    image = Image.fromarray(np.stack(waves, -1).astype(np.uint8))
    image.save(tmp_path / "x.jpg", quality=90)
    fast = ImageFolder(str(tmp_path), 64)[0][0].double()
    (tmp_path / "x.png").write_bytes(png_of(tmp_path / "x.jpg"))
    full = ImageFolder(str(tmp_path), 64)[1][0].double()
    assert 0 < (fast - full).abs().mean() < 0.25  # above 0: the fast way was taken; at half the size it is 0.40


def png_of(jpeg: Path) -> bytes:
    buffer = io.BytesIO()
    Image.open(jpeg).save(buffer, "png", compress_level=0)
    return buffer.getvalue()


def encoded(ending: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, ending)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["jpeg", "png", "gif", "bmp", "tiff", "webp", "ppm"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.97])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_truncated_file_is_named(tmp_path: Path, ending: str, kept: float):
    good = encoded(ending)
    (tmp_path / f"a.{ending}").write_bytes(good)
    (tmp_path / f"b.{ending}").write_bytes(good[: int(len(good) * kept)])
    dataset = ImageFolder(str(tmp_path), SIZE)
    assert dataset[0][0].shape == (3, SIZE, SIZE)
    with pytest.raises(ValueError, match=rf"^Sample 1, .*b\.{ending}, cannot be read: .*Remove or replace the file\."):
        dataset[1]


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", b"\0" * 5000, b"GIF89a"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes):
    with pytest.raises(ValueError, match=r"^Sample 0, .*x\.jpg, cannot be read: .*Remove or replace the file\."):
        only(tmp_path, content, "x.jpg")


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    message = (
        r"Sample 0, .*x\.png, is suspiciously large: Image size \(400 pixels\).*raise PIL\.Image\.MAX_IMAGE_PIXELS"
    )
    with pytest.raises(ValueError, match=message):
        only(tmp_path, Image.new("L", (20, 20)))


def test_a_link_to_nowhere_is_named(tmp_path: Path):
    (tmp_path / "x.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"Sample 0, .*x\.png, cannot be read: .*FileNotFoundError"):
        ImageFolder(str(tmp_path), SIZE)[0]


def test_labels_are_the_top_folders(tmp_path: Path):
    places = ["b/z.png", "b/deep/er/a.png", "a/y.JPG", "top.png", "b/.hidden.png", ".cache/x.png", "a/notes.txt"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(tmp_path / place, "png")
    dataset = ImageFolder(str(tmp_path), SIZE)
    found = [os.path.relpath(path, tmp_path).replace(os.sep, "/") for path in dataset.paths]
    assert found == ["a/y.JPG", "b/deep/er/a.png", "b/z.png", "top.png"]
    assert dataset.classes == ["a", "b", ""]
    assert dataset.labels == [0, 1, 1, 2]
    assert [label for _, label in (dataset[i] for i in range(4))] == dataset.labels
    part = dataset.only([3, 1])
    assert (part.labels, part.classes, len(part)) == ([2, 1], ["a", "b", ""], 2)
    assert dataset.recipe() != part.recipe() == dataset.only([3, 1]).recipe()
    assert part.paths == [dataset.paths[3], dataset.paths[1]]
    assert len(dataset) == 4


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    (tmp_path / "in" / "cats").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "in" / "cats" / "x.png")
    Image.new("L", (2, 2)).save(tmp_path / "out" / "y.png")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dogs").symlink_to(tmp_path / "out")
    dataset = ImageFolder(str(tmp_path / "in"), SIZE)
    assert [Path(path).name for path in dataset.paths] == ["x.png", "y.png"]
    assert dataset.classes == ["cats", "dogs"]


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.* holds no images: .*\(it is empty\)"):
        ImageFolder(str(tmp_path), SIZE)
    (tmp_path / "x.heic").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"data\.root=.* holds no images: .*\(it holds \.heic\)"):
        ImageFolder(str(tmp_path), SIZE)


def test_bad_options_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data\.channels must be one of 1, 3, but got 2"):
        ImageFolder(str(tmp_path), SIZE, channels=2)
    with pytest.raises(ValueError, match=r"data\.image_size must be a whole number >= 1, but got 0"):
        ImageFolder(str(tmp_path), 0)


def test_left_out_files_are_counted_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "notes.txt").write_text("not a picture")
    with caplog.at_level("INFO", logger="diffaug"):
        only(tmp_path, ImageOps.invert(Image.new("L", (4, 4))))
    assert "1 images; files of other kinds are left out: 1 .txt" in caplog.text
