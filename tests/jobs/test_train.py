"""The main job, as a user starts it: real processes, real files."""

import csv
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT
from tiny import OVERRIDES, TWO, environment, losses, train

SHARED = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.slow


QUICK = (
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "callbacks.pictures.steps=3",
    "data.batch_size=16",
    "trainer.limit_val_batches=2",
)


@pytest.mark.parametrize("name", ["meanflow", "shortcut"])
def test_a_recipe_of_pairs_runs(name, tmp_path):
    words = ("callbacks=none", "trainer.max_steps=20", "data.batch_size=16", "trainer.limit_val_batches=1")
    train(tmp_path, f"experiment={name}", "hydra.run.dir=run", "trainer.log_every_n_steps=20", *words)
    assert [step for step, _ in losses(tmp_path / "run")] == [19]


def test_a_run_leaves_its_files(tmp_path):
    done = train(tmp_path, "hydra.run.dir=run", *QUICK)
    run = tmp_path / "run"
    for name in (".hydra/config.yaml", "checkpoints/last.ckpt", "metrics.csv", "summary.json"):
        assert (run / name).is_file(), name
    for name in ("schedule.png", "forward.png", "samples.png"):
        assert name in done.stdout
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200
    summary = json.loads((run / "summary.json").read_text())
    assert summary["prior_kl_bits_per_dim"] == pytest.approx(2.09e-5, rel=1e-2)
    assert summary["schedule"] == "LinearBeta(timesteps=1000, beta_start=0.0001, beta_end=0.02, rescale=False)"
    assert summary["seed"] == 0
    assert summary["steps"] == 4
    assert 0 < summary["val_loss"] < 10
    assert re.search(r"bits per dimension", done.stdout)
    torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_a_run_without_validation_ends_with_a_summary(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("L", (16, 16), 40 * i).save(tmp_path / "images" / f"{i}.png")
    data = ("data=image_folder", "data.root=images", "data.image_size=16", "data.channels=1", "data.val_share=0")
    done = train(tmp_path, *OVERRIDES, "hydra.run.dir=run", *data)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"] is None
    assert re.search(r"2 steps in .*\n.*\n  validation loss  not measured", done.stdout)


def test_a_finished_run_is_made_longer_under_its_own_recipe(tmp_path):
    """One that was killed goes on in `test_interruptions`."""
    options = (*OVERRIDES, "hydra.run.dir=run")
    train(tmp_path, *options)
    train(tmp_path, *options, "ckpt_path=last", "trainer.max_steps=5")
    assert [step for step, _ in losses(tmp_path / "run")] == [0, 1, 2, 3, 4]
    other = train(tmp_path, *options, "ckpt_path=last", "model.target=v", expect=1)
    assert re.search(r"(?s)another recipe.*target: epsilon -> v", other.stderr)


@pytest.mark.parametrize("choice", ["trainer.precision=bf16-mixed", "trainer=debug"])
def test_other_recipes_train(choice, tmp_path):
    train(tmp_path, "hydra.run.dir=run", *QUICK, choice)


def test_photos(tmp_path):
    if not (SHARED / "photos").is_dir():
        pytest.skip("the photos are not here")
    root = os.path.relpath(SHARED / "photos", tmp_path)
    train(tmp_path, "hydra.run.dir=run", *QUICK, "data=image_folder", f"data.root={root}", "data.image_size=32")
    assert (tmp_path / "run" / "forward.png").is_file()


def test_torchrun(tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    words += [*OVERRIDES, *TWO, "hydra.run.dir=run"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment(tmp_path)
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob("*-of-*")} == {"-0-of-2", "-1-of-2"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()


@pytest.mark.gpu
def test_fsdp(tmp_path):
    """Sharded over the GPUs that are there; the noise comes before the strategy and does not know of it."""
    sharded = ("hydra.run.dir=run", "trainer=fsdp", f"trainer.devices={torch.cuda.device_count()}", "~callbacks.ema")
    train(tmp_path, *QUICK, *sharded, fresh=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
    train(tmp_path, *QUICK[1:], *sharded, "ckpt_path=last", "trainer.max_steps=6", fresh=True)


def test_clips_train_with_a_time_for_each_frame(tmp_path):
    clips = ("experiment=diffusion_forcing", "data.image_shape=[4,1,12,12]", "model.network.width=8")
    clips += ("process.compile=false",)  # it takes half a minute
    law = ("part_law@process.parts.law=context", "process.fields=[x_t,v,t,part_mask]", "callbacks=loss_by_level")
    steps_of = ("trainer.max_steps=20", "trainer.val_check_interval=20", "trainer.log_every_n_steps=1")
    rest = ("data.batch_size=16", "trainer.limit_val_batches=2", "callbacks.progress.samples=1")
    train(tmp_path, "hydra.run.dir=run", *clips, *law, *steps_of, *rest)
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert len(found) == 20
    assert sum(found[-5:]) < sum(found[:5])
    with (tmp_path / "run/loss_by_level.csv").open() as file:
        counts = [int(row["count"]) for row in csv.DictReader(file)]
    assert sum(counts) == 20 * 16 * 3 + 2 * 16 * 3  # frames that are learned, one of four being given


def test_photos_of_their_own_proportions_on_two_ranks(tmp_path):
    """Under a schedule that follows each batch's size."""
    photos, generator = tmp_path / "photos", np.random.default_rng(0)
    photos.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(60):
        height, width = ((40, 40), (40, 60), (60, 40))[number % 3]
        soft = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
        soft.save(photos / f"{number}.jpg", exif=turned if number % 6 == 1 else Image.Exif())
    overrides = ["data=image_folder", "data.root=photos", "data.buckets.area=256", "data.batch_size=4"]
    overrides += ["schedule=shifted", "schedule.image=auto", "schedule.base_image=16", "data.buckets.crop=random"]
    overrides += ["data.buckets.hflip=0.5", "process.fields=[x_t,epsilon,t,original_size,crop,target_size]"]
    overrides += ["trainer.max_steps=20", "trainer.log_every_n_steps=1", "callbacks.pictures.samples=4"]
    overrides += ["callbacks.pictures.steps=3", "hydra.run.dir=run", "process.compile=false", "data.num_workers=0"]
    train(tmp_path, *overrides, *TWO)
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert len(found) == 20
    assert np.isfinite(found).all()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "image='auto'" in summary["schedule"]
    assert np.isfinite(summary["val_loss"])
    assert (photos / ".diffaug-sizes.npz").is_file()
