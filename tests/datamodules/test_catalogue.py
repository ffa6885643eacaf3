"""The datasets of configs/data: where they are read from, how they are split, what is refused."""

import shutil
from collections import Counter
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT
from torchvision.datasets import CIFAR10, SVHN, FashionMNIST

from diffaug import DiffusionDataModule, ForwardProcess
from diffaug.datamodules.catalogue import held_out
from diffaug.pytorch_lightning import digits, image_folder, torchvision
from diffaug.schedules import LinearBeta

DATA = ROOT.parent / "shared" / "data"
PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "label"), compile=False)


def real(name: str) -> Path:
    """A folder of real data beside the repository; the test is skipped where it is not there."""
    if not (DATA / name).is_dir():
        pytest.skip(f"needs the real images of ../shared/data/{name}, which are not here")
    return DATA / name


def photos(folder: Path, count: int) -> Path:
    """Plain grey pictures in two classes; picture i has the value i."""
    for i in range(count):
        path = folder / ("cats" if i < count // 2 else "dogs") / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 6), i, np.uint8)).save(path)
    return folder


def values(data: DiffusionDataModule, stage: str) -> list[int]:
    images = data.images(stage).dataset
    return [int(images[i][0][0, 0, 0]) for i in range(len(images))]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_held_out_share_is_binomial(share: float):
    """Of 20,000 names; within 4.9 standard deviations: false alarm 1e-6."""
    held = held_out([f"cats/{i}.png" for i in range(20000)], share)
    assert abs(len(held) - 20000 * share) < 4.9 * sqrt(20000 * share * (1 - share))


def test_a_held_out_image_stays_so_when_others_come_and_go():
    names = [f"{top}/{i}.png" for top in "abc" for i in range(100)]
    held = {names[i] for i in held_out(names, 0.1)}
    more = sorted([*names[::2], *(f"aa/{i}.jpg" for i in range(50))])
    now = {more[i] for i in held_out(more, 0.1)}
    assert now & set(names) == held & set(more)
    assert {names[i] for i in held_out(names, 0.3)} > held
    assert held_out(names, 0.0) == []
    assert len(held_out(names[:3], 1e-9)) == 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 0.75])
def test_image_folder_is_split_without_loss_or_overlap(tmp_path: Path, share: float):
    data = image_folder(root=str(photos(tmp_path, 20)), image_size=4, val_share=share, process=PROCESS)
    data.setup("fit")
    train = values(data, "train")
    val = values(data, "val") if share else []
    assert bool(val) == bool(share)
    assert sorted(train + val) == list(range(20))


def test_a_file_that_comes_is_refused_on_a_resume(tmp_path: Path):
    def data() -> DiffusionDataModule:
        made = image_folder(root=str(photos(tmp_path, 20)), image_size=4, process=PROCESS, seed=0)
        made.setup("fit")
        return made

    state = data().state_dict()
    data().load_state_dict(state)
    Image.new("L", (4, 4)).save(tmp_path / "cats" / "new.png")
    with pytest.raises(ValueError, match=r"(?s)another recipe.*(train|val)\.images: (\d+) -> \d+.*files: \w+ -> \w+"):
        data().load_state_dict(state)
    (tmp_path / "cats" / "new.png").unlink()
    (tmp_path / "zebras").mkdir()
    (tmp_path / "dogs" / "0019.png").rename(tmp_path / "zebras" / "0019.png")
    with pytest.raises(ValueError, match=r"(?s)another recipe.*classes: \['cats', 'dogs'\] -> \['cats', 'dogs', 'z"):
        data().load_state_dict(state)


def test_image_folder_in_a_loader(tmp_path: Path):
    data = image_folder(root=str(photos(tmp_path, 10)), image_size=4, channels=1, process=PROCESS, batch_size=8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.image.dtype == torch.uint8
    assert batch.image.shape == (8, 1, 4, 4)
    assert set(batch.extra["label"].tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1.0}, r"data\.val_share must be a number in \[0, 1\), but got 1\.0"),
        ({"val_share": -0.1}, r"data\.val_share must be a number in \[0, 1\), but got -0\.1"),
        ({"val_share": float("nan")}, r"data\.val_share must be a number in \[0, 1\), but got nan"),
        ({"val_share": "half"}, r"data\.val_share must be a number in \[0, 1\), but got 'half' \(str\)"),
        ({"image_size": 0}, r"data\.image_size must be a whole number >= 1, but got 0"),
        ({"image_size": 6.4}, r"data\.image_size must be a whole number >= 1, but got 6\.4"),
        ({"bits": 0}, r"data\.bits must be a whole number in \[1, 16\], but got 0"),
        ({"channels": 4}, r"data\.channels must be one of 1, 3, but got 4"),
    ],
)
def test_image_folder_refuses_options_before_reading(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        image_folder(**{"root": "nowhere", "image_size": 8, "process": PROCESS, **options})


def test_image_folder_missing_is_said_in_setup(tmp_path: Path):
    data = image_folder(root=str(tmp_path / "nowhere"), image_size=8, process=PROCESS)
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*nowhere' is not a folder \(looked for /"):
        data.setup("fit")


def test_dark_16_bit_files_are_said_in_setup(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for i in range(40):
        Image.fromarray(np.full((4, 4), 100 * i, np.uint16)).save(tmp_path / f"{i:02}.png")
    image_folder(root=str(tmp_path), image_size=4, process=PROCESS).setup("fit")
    assert caplog.text.count("set data.bits=12") == 1


def test_image_folder_of_one_needs_no_validation(tmp_path: Path):
    root = str(photos(tmp_path, 1))
    with pytest.raises(ValueError, match=r"data\.val_share=0\.1 leaves no image for training: .* holds 1"):
        image_folder(root=root, image_size=4, process=PROCESS).setup("fit")
    image_folder(root=root, image_size=4, val_share=0, process=PROCESS).setup("fit")


def test_digits():
    pytest.importorskip("sklearn")
    data = digits(process=PROCESS, image_shape=(1, 8, 8))
    data.setup("fit")
    train, val = data.images("train").dataset, data.images("val").dataset
    assert (len(train), len(val)) == (1618, 179)
    both = torch.cat([train.tensors[0], val.tensors[0]])
    assert both.shape == (1797, 1, 8, 8)
    assert (both.min(), both.max()) == (-1, 1)
    assert set(Counter(val.tensors[1].tolist())) == set(range(10))


def test_torchvision_missing(tmp_path: Path):
    data = torchvision(FashionMNIST, root=str(tmp_path), process=PROCESS)
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)FashionMNIST cannot be read from data\.root=.* download it\. Set data\.root.*data\.download=true",
    ):
        data.setup("fit")


def test_torchvision_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(FashionMNIST, "download", offline)
    data = torchvision(FashionMNIST, root=str(tmp_path), download=True, process=PROCESS)
    with pytest.raises(
        FileNotFoundError, match=r"no network\. It could not be fetched.*the folder that holds the dataset\.$"
    ):
        data.prepare_data()


def test_torchvision_of_another_form():
    with pytest.raises(
        ValueError, match=r"data\.dataset must take root, train and download, but SVHN takes root, split"
    ):
        torchvision(SVHN, root="data", process=PROCESS)


@pytest.mark.slow
def test_fashion_mnist_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raw = real("fashion-mnist") / "FashionMNIST" / "raw"
    there = tmp_path / "FashionMNIST" / "raw"
    there.mkdir(parents=True)
    for file in raw.glob("*.gz"):
        (there / file.name).symlink_to(file)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data = torchvision(FashionMNIST, root=str(tmp_path), download=True, process=PROCESS, image_shape=(1, 28, 28))
    data.prepare_data()
    data.setup("fit")
    train = data.images("train").dataset
    assert (len(train), len(data.images("val"))) == (60000, 10000)
    assert int(train.data.sum(dtype=torch.int64)) == 3431114169
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch.image[:, 0], data.images("val").dataset.data[: len(batch.image)])
    shutil.rmtree(there)  # 55 MB unpacked


class CIFAR10Test(CIFAR10):
    """The test split, which is all there is here."""

    train_list: list = []


@pytest.mark.slow
def test_cifar10_test_split():
    data = DiffusionDataModule(
        val=CIFAR10Test(str(real("cifar10")), train=False), process=PROCESS, batch_size=500, image_shape=(3, 32, 32)
    )
    data.setup("validate")
    total, squares, labels = 0, 0, Counter()
    for batch in data.val_dataloader():
        assert batch.image.dtype == torch.uint8
        pixels = batch.image.double() / 127.5 - 1
        total, squares = total + pixels.sum(), squares + pixels.square().sum()
        labels.update(batch.extra["label"].tolist())
    count = 10000 * 3 * 32 * 32
    assert total / count == pytest.approx(-0.046830, abs=5e-7)
    assert squares / count == pytest.approx(0.254638, abs=5e-7)
    assert labels == dict.fromkeys(range(10), 1000)


def test_photos():
    data = image_folder(root=str(real("photos")), image_size=64, process=PROCESS, batch_size=40)
    data.setup("fit")
    assert (len(data.images("train")), len(data.images("val"))) == (359, 41)
    assert data.images("train").dataset.classes == ["animals", "food", "objects", "plants", "scenery"]
    batch = next(iter(data.val_dataloader()))
    assert batch.image.shape == (40, 3, 64, 64)
    assert 90 < batch.image.double().mean() < 140
    assert (batch.image.double().flatten(1).std(1) > 10).all()
