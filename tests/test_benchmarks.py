"""The benchmarks run: what they print is looked at by people, that they still work by this test."""

import os
import sys

import pytest
import server
import torch
from PIL import Image
from shared import ROOT

sys.path.append(str(ROOT / "benchmarks"))


def run(name: str, *words: object) -> str:
    """What a benchmark prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, words)]
    done = server.run(command, ROOT, {**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_forward_runs(tmp_path):
    out = tmp_path / "tables.md"
    run("forward", "--seconds", 0.01, "--largest", 32, "--markdown", out)
    text = out.read_text()
    for name in ("diffaug compiled", "diffaug eager", "by hand", "the bytes alone", "Growth"):
        assert name in text


@pytest.mark.slow
def test_pairs_run(tmp_path):
    out = tmp_path / "tables.md"
    run("pairs", "--turns", 1, "--markdown", out)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")]
    times = {row[0]: float(row[1]) for row in rows if len(row) == 3}
    assert len(times) == 11
    assert all(ms > 0 for ms in times.values())


@pytest.mark.slow
def test_gains_run(tmp_path):
    tables, picture = tmp_path / "tables.md", tmp_path / "gains.png"
    run("gains", "--seeds", 2, "--steps", 40, "--repeats", 4, "--markdown", tables, "--picture", picture)
    text = tables.read_text()
    for name in ("one fresh draw", "stratified", "per_image", "8 ranks alike", "Steps after which"):
        assert name in text
    assert "nan" not in text
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_folder_runs(tmp_path):
    out, photos = tmp_path / "table.md", tmp_path / "photos"
    (photos / "cats").mkdir(parents=True)
    for i, size in enumerate([(60, 40), (40, 60), (50, 50)]):
        Image.new("RGB", size, "red").save(photos / "cats" / f"{i}.jpg")
    run("folder", photos, "--sizes", 8, 16, "--turns", 2, "--markdown", out)
    header, _, *rows = out.read_text().splitlines()
    assert "torchvision" in header
    assert "diffaug" in header
    assert [row.split(" | ")[0] for row in rows] == ["| 8", "| 16"]
    assert all(float(ratio) > 0 for row in rows for ratio in row.strip("| ").split(" | "))


@pytest.mark.slow
def test_sizes_run(tmp_path):
    out = tmp_path / "table.md"
    run("sizes", "--files", 1500, "--turns", 1, "--folder", tmp_path, "--markdown", out)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["sizes", "folder"]
    assert all(float(number) > 0 for row in rows for number in row[1:])
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_store_runs():
    said = run("store", "--sizes", 16, "--rows", 200, "--rounds", 1, "--seconds", 0.1)
    rows = [line for line in said.splitlines() if line.startswith(("| photos", "| 200 random"))]
    assert len(rows) == 2
    assert all(float(row.split("|")[4]) > 1 for row in rows)


def test_ranks_alike_have_one_noise_for_different_images():
    from gains import WAYS

    images = torch.randint(0, 256, (16, 1, 4, 4), dtype=torch.uint8)
    index, epoch = torch.randperm(16), torch.full((16,), 3)
    drawn = {name: WAYS[name].draw(images, index, epoch, torch.arange(16), 0) for name in WAYS}
    for name, ranks in (("2 ranks alike", 2), ("8 ranks alike", 8)):
        t, epsilon = drawn[name].t.view(-1, ranks), drawn[name].epsilon.view(-1, ranks, 16)
        assert (t == t[:, :1]).all()
        assert (epsilon == epsilon[:, :1]).all()
        assert len(epsilon[:, 0].unique(dim=0)) == 16 // ranks
        assert torch.equal(epsilon[:, 0], drawn["independent"].epsilon.view(-1, ranks, 16)[:, 0])
    assert len(drawn["independent"].epsilon.unique(dim=0)) == 16
    for name in ("stratified", "antithetic", "sobol", "per_image"):  # they differ from independent in t alone
        assert torch.equal(drawn[name].epsilon, drawn["independent"].epsilon)
        assert not torch.equal(drawn[name].t, drawn["independent"].t)


def test_the_trace_is_that_of_the_gradients_covariance():
    from gains import WAYS, Denoiser, compute_gradient, measure

    torch.manual_seed(0)
    network, images = Denoiser(16, 4), torch.randint(0, 256, (60, 1, 4, 4), dtype=torch.uint8)
    noisy = WAYS["sobol"].draw(images, torch.arange(60), torch.full((60,), 3), torch.arange(60), 0)
    batches = [[field[10 * i : 10 * i + 10] for field in noisy] for i in range(6)]
    gradients, losses = zip(*(compute_gradient(network, batch) for batch in batches), strict=True)
    trace, variance = measure(network, noisy, 6)
    assert trace == pytest.approx(torch.stack(gradients).double().var(0).sum().item(), rel=1e-6)
    assert variance == pytest.approx(torch.tensor(losses).double().var().item(), rel=1e-5)
