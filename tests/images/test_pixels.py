"""How image files are opened."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffaug.images import pixels


def test_a_small_jpeg_is_read_in_one_go_and_a_large_one_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.JPG"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(path, quality=95)
    size = path.stat().st_size
    assert size > 2**16, "Pillow would read it in one go"
    with pixels.open_image(str(path)) as image:
        assert (image.decodermaxblock, image.format) == (size, "JPEG")
        whole = np.asarray(image)
    monkeypatch.setattr(pixels, "_WHOLE", size - 1)
    with pixels.open_image(str(path)) as image:
        assert image.decodermaxblock == 2**16
        assert (np.asarray(image) == whole).all()


def test_an_error_of_what_is_no_jpeg_names_the_file(tmp_path: Path):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(OSError, match=r"cannot identify image file '.*x\.jpg'"):
        pixels.open_image(str(path))
