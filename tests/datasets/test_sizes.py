"""Sizes of a folder's images: read from headers, kept beside them, and read again where a file has changed."""

import logging
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffaug import Buckets, ImageFolder
from diffaug.datasets import sizes
from diffaug.datasets.sizes import NAME, read_size, read_sizes

KINDS = ("jpg", "png", "webp", "tif", "gif", "bmp", "jp2", "ppm")


@pytest.fixture
def headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers have been read, by name."""
    read: list[str] = []

    def watched(path: str) -> tuple[int, int]:
        read.append(Path(path).name)
        return read_size(path)

    monkeypatch.setattr(sizes, "read_size", watched)
    return read


def folder_of(folder: Path, **shapes: tuple[int, int]) -> list[str]:
    """Write images of these (height, width), and return their names."""
    for name, (height, width) in shapes.items():
        Image.new("RGB", (width, height)).save(folder / f"{name}.png")
    return [f"{name}.png" for name in shapes]


def read(folder: Path, names: list[str]) -> list[list[int]]:
    return read_sizes(folder, names, "Mend it.").tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
def test_sizes_are_as_pillow_turns_the_image(tmp_path: Path, kind: str, orientation: int | None):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / f"x.{kind}"
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image)
    assert read_size(str(path)) == (turned.height, turned.width)
    if kind in ("jpg", "png", "webp", "tif"):
        assert read_size(str(path)) == ((30, 20) if (orientation or 1) >= 5 else (20, 30))


def late(folder: Path, kind: bytes, content: bytes) -> str:
    """A PNG of 20 x 30 with one more chunk, behind its pixels."""
    path = folder / "late.png"
    Image.effect_noise((30, 20), 90).save(path)
    whole = path.read_bytes()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    return str(path)


def test_an_orientation_behind_a_pngs_pixels_is_found(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = late(tmp_path, b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    assert ImageOps.exif_transpose(Image.open(path)).size == (20, 30)
    assert read_size(path) == (30, 20)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    path = late(tmp_path, b"iTXt", xmp)
    assert ImageOps.exif_transpose(Image.open(path)).size == (20, 30)
    assert read_size(path) == (30, 20)


def test_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files whose pixels are cut off have a size all the same, and none is decoded."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the pixels were read")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8))
    for kind in ("jpg", "png", "webp", "bmp"):
        path = tmp_path / f"x.{kind}"
        noise.save(path)
        if kind != "webp":  # Pillow wants it whole
            path.write_bytes(path.read_bytes()[:2000])
        assert read_size(str(path)) == (200, 300)


def test_a_second_reading_opens_no_image(tmp_path: Path, headers: list[str], caplog: pytest.LogCaptureFixture):
    names = folder_of(tmp_path, a=(20, 30), b=(40, 50))
    with caplog.at_level(logging.INFO, "diffaug"):
        assert read(tmp_path, names) == [[20, 30], [40, 50]]
    assert f"the sizes of 2 images read from their headers in 0.0 s; kept in {tmp_path / NAME}" in caplog.text
    assert headers == names
    assert sorted(os.listdir(tmp_path)) == [NAME, *names]
    assert read(tmp_path, names) == [[20, 30], [40, 50]]
    assert read(tmp_path, names[1:]) == [[40, 50]]
    assert read(tmp_path, names[::-1]) == [[40, 50], [20, 30]]
    assert headers == names


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def lengthen(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [touch, lengthen])
def test_a_file_of_another_length_or_time_is_read_again(
    tmp_path: Path, headers: list[str], change: Callable[[Path], None]
):
    names = folder_of(tmp_path, a=(20, 30), b=(40, 50), c=(60, 70))
    read(tmp_path, names)
    headers.clear()
    change(tmp_path / "b.png")
    assert read(tmp_path, names) == [[20, 30], [40, 50], [60, 70]]
    assert headers == ["b.png"]
    assert read(tmp_path, names) == [[20, 30], [40, 50], [60, 70]]
    assert headers == ["b.png"]


def test_another_image_in_its_place_comes_with_its_size(tmp_path: Path):
    names = folder_of(tmp_path, a=(20, 30), b=(40, 50))
    read(tmp_path, names)
    folder_of(tmp_path, b=(41, 50))
    os.utime(tmp_path / "b.png", ns=(1, 1))
    assert read(tmp_path, names) == [[20, 30], [41, 50]]


def test_files_that_come_and_go(tmp_path: Path, headers: list[str]):
    names = folder_of(tmp_path, a=(20, 30), b=(40, 50))
    read(tmp_path, names)
    names = ["b.png", *folder_of(tmp_path, c=(60, 70))]
    (tmp_path / "a.png").unlink()
    headers.clear()
    assert read(tmp_path, names) == [[40, 50], [60, 70]]
    assert headers == ["c.png"]
    assert read(tmp_path, names) == [[40, 50], [60, 70]]
    assert headers == ["c.png"]


def test_names_of_any_bytes(tmp_path: Path, headers: list[str]):
    names = [os.fsdecode(b"\xff\n.png"), "\N{SNOWMAN}.png"]
    for number, name in enumerate(names):
        Image.new("L", (7, 5 + number)).save(tmp_path / name)
    for _ in range(2):
        assert read(tmp_path, names) == [[5, 7], [6, 7]]
    assert len(headers) == 2


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\3\4 cut off"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes):
    names = folder_of(tmp_path, a=(20, 30))
    (tmp_path / NAME).write_bytes(content)
    assert read(tmp_path, names) == [[20, 30]]
    assert f"{tmp_path / NAME} is left aside, and written anew: " in caplog.text
    caplog.clear()
    assert read(tmp_path, names) == [[20, 30]]
    assert caplog.text == ""


def test_a_file_that_holds_something_else_is_written_anew(tmp_path: Path, headers: list[str]):
    names = folder_of(tmp_path, a=(20, 30))
    for wrong in ({"format": 0}, {"rows": np.zeros((3, 4), np.int64)}, {"rows": np.zeros((1, 4), np.float64)}):
        kept = {"format": 1, "names": np.frombuffer(b"a.png", np.uint8), "rows": np.zeros((1, 4), np.int64), **wrong}
        with (tmp_path / NAME).open("wb") as file:
            np.savez(file, **kept)
        headers.clear()
        assert read(tmp_path, names) == [[20, 30]]
        assert headers == names


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, headers: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sizes, "_save", refuse)
    names = folder_of(tmp_path, a=(20, 30))
    with caplog.at_level(logging.INFO, "diffaug"):
        assert read(tmp_path, names) == [[20, 30]]
    assert f"not kept for the next run, as {tmp_path / NAME} cannot be written: Permission denied" in caplog.text
    assert read(tmp_path, names) == [[20, 30]]
    assert headers == names, "within a run it is known"
    assert os.listdir(tmp_path) == names


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = folder_of(tmp_path, a=(20, 30))
    read(tmp_path, names)
    before = (tmp_path / NAME).read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    names += folder_of(tmp_path, b=(40, 50))
    assert read(tmp_path, names) == [[20, 30], [40, 50]]
    assert (tmp_path / NAME).read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == [NAME, *names]


def test_headers_that_cannot_be_read_are_counted(tmp_path: Path):
    names = folder_of(tmp_path, a=(20, 30))
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(b"nothing")
    (tmp_path / "d.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        ValueError,
        match=r"^The size of 3 of 4 images cannot be read\. The first: .*b\.png cannot .* Mend it\.$",
    ):
        read(tmp_path, [*names, "b.png", "c.png", "d.png"])
    with pytest.raises(ValueError, match=r"The first: .*b\.png .* data\.on_error=skip, once this has listed"):
        ImageFolder(str(tmp_path), buckets=Buckets(area=64))


def test_the_kept_file_is_no_image_of_the_folder(tmp_path: Path):
    folder_of(tmp_path, a=(20, 30))
    (tmp_path / "deeper").mkdir()
    folder_of(tmp_path / "deeper", b=(30, 20))
    for _ in range(2):
        folder = ImageFolder(str(tmp_path), buckets=Buckets(area=64))
        assert folder.names == ["a.png", "deeper/b.png"]
        assert folder.sizes.tolist() == [[20, 30], [30, 20]]
