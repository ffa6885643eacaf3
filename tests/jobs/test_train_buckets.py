"""Photos of their own proportions trained on by the main job: two ranks, a schedule that follows each batch's size."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import server
from PIL import Image
from test_train import command
from tiny import TWO, environment

pytestmark = pytest.mark.slow


def test_twenty_steps_on_two_ranks(tmp_path: Path):
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    for number in range(60):
        height, width = ((40, 40), (40, 60), (60, 40))[number % 3]
        soft = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        soft.save(photos / f"{number}.jpg", exif=turned(number % 6 == 1))
    overrides = ["data=image_folder", "data.root=photos", "data.buckets.area=256", "data.batch_size=4"]
    overrides += ["schedule=shifted", "schedule.image=auto", "schedule.base_image=16", "data.buckets.crop=random"]
    overrides += ["data.buckets.hflip=0.5", "process.fields=[x_t,epsilon,t,original_size,crop,target_size]"]
    overrides += ["trainer.max_steps=20", "trainer.log_every_n_steps=1", "callbacks.pictures.samples=4"]
    overrides += ["callbacks.pictures.steps=3", "hydra.run.dir=run", "process.compile=false", "data.num_workers=0"]
    done = server.run(command(*overrides, *TWO), tmp_path, environment(tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(losses) == 20
    assert np.isfinite(losses).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "image='auto'" in summary["schedule"]
    assert np.isfinite(summary["val_loss"])
    assert (photos / ".diffaug-sizes.npz").is_file()


def turned(yes: bool) -> Image.Exif:
    exif = Image.Exif()
    if yes:
        exif[0x0112] = 6
    return exif
