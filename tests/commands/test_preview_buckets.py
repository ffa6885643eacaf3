"""What preview says of buckets, and that check lists broken files of a folder with buckets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaug import Bucketed, Buckets, DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.__main__ import main
from diffaug.commands.preview import preview
from diffaug.commands.preview_buckets import measure, table


def folder_of(folder: Path, *shapes: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(shapes):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_measures_by_hand():
    sizes = np.array([[64, 64], [128, 160], [32, 32], [56, 72]])
    square, wide = measure(sizes, np.array([0, 0, 0, 1]), [(64, 64), (56, 72)], 2)
    assert square == pytest.approx((64, 64, 3, 1.5, (0 + 0.2 + 0) / 3, 1 / 3, 2.0))
    assert wide == pytest.approx((56, 72, 1, 0.5, 0.0, 0.0, 1.0))
    head, columns, first, second = table([square, wide])
    assert head.startswith("buckets          2: batches an epoch,")
    assert columns.split() == ["height", "x", "width", "images", "batches", "cut", "enlarged"]
    assert first.split() == ["64", "x", "64", "3", "1.5", "6.7%", "33.3%", "x", "2.00"]
    assert second.split() == ["56", "x", "72", "1", "0.5", "0.0%", "none"]


@pytest.mark.slow
def test_preview_lists_every_bucket_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    folder_of(photos, *[(16, 16)] * 3, *[(16, 24)] * 6)
    out = tmp_path / "seen.png"
    overrides = ["data=image_folder", f"data.root={photos}", "data.buckets.shapes=[[8,8],[8,12]]", "data.val_share=0"]
    overrides += ["process.compile=false", "data.num_workers=0", "data.batch_size=3", f"out={out}"]
    assert main(["preview", *overrides]) == 0
    printed = capsys.readouterr().out
    assert "images           9, looked at are those (3, 8, 12), uint8" in printed
    assert "buckets          2: " in printed
    assert str(tmp_path / "seen_buckets.png") in printed
    assert (tmp_path / "seen_buckets.png").stat().st_size > 1000
    lines = (tmp_path / "seen_buckets.csv").read_text().splitlines()
    assert lines[0] == "height,width,images,batches,cropped,enlarged,factor"
    assert lines[1:] == ["8,12,6,2.0,0.0,0.0,1.0", "8,8,3,1.0,0.0,0.0,1.0"]


def test_preview_of_a_dataset_with_a_table():
    images = [torch.randint(0, 256, (3, 16, width), dtype=torch.uint8) for width in (16, 16, 16, 24)]
    dataset = Bucketed(images, [(16, image.shape[2]) for image in images], Buckets(shapes=[[8, 8], [8, 12]]))
    process = ForwardProcess(LinearBeta(), compile=False)
    seen = preview(DiffusionDataModule(dataset, process=process, batch_size=2))
    assert seen.buckets is not None
    assert [row[:3] for row in seen.buckets.rows] == [(8, 12, 1), (8, 8, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["original_size", "crop"])
def test_preview_lists_the_buckets_of_a_store(keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos = tmp_path / "photos"
    photos.mkdir()
    folder_of(photos, *[(16, 16)] * 3, *[(16, 20)] * 6)
    overrides = ["data=image_folder", f"data.root={photos}", "data.buckets.shapes=[[8,8],[8,12]]", "data.val_share=0"]
    overrides += ["process.compile=false", "data.num_workers=0", "data.batch_size=3", "trainer=cpu"]
    assert main(["encode", *overrides, f"keep={keep}", f"out={tmp_path / 'made'}"]) == 0
    lines = {}
    for name, given in {"folder": overrides[:-1], "store": ["data=store", f"data.root={tmp_path / 'made'}"]}.items():
        given = [*given, "data.batch_size=3", "data.num_workers=0", "process.compile=false"]
        capsys.readouterr()
        assert main(["preview", *given, f"out={tmp_path / name}.png"]) == 0
        lines[name] = capsys.readouterr().out.splitlines()[:5]
        assert (tmp_path / f"{name}_buckets.png").stat().st_size > 1000
    assert "looked at are those" in lines["store"][0]
    assert len(lines["folder"][3].split()) == 7
    if keep == "original_size":
        assert lines["store"] == lines["folder"]
    else:  # how large the images were is not in the store
        assert lines["store"][3].split() == [*lines["folder"][3].split()[:5], "unknown", "unknown"]


def test_check_lists_broken_files_of_a_folder_with_buckets(tmp_path: Path):
    folder_of(tmp_path, (16, 16), (16, 24))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    overrides = ["data=image_folder", f"data.root={tmp_path}", "data.buckets.area=64", "workers=0"]
    assert main(["check", *overrides]) == 3
    assert list(json.loads((tmp_path / ".diffaug-broken.json").read_text())["broken"]) == ["broken.png"]
