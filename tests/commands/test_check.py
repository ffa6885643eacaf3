"""check: which images of a dataset are broken; and the list by which an image folder leaves them out."""

import errno
import json
import os
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.__main__ import main
from diffaug.commands.check import check
from diffaug.datasets.broken import NAME
from diffaug.datasets.folder import ImageFolder
from diffaug.pytorch_lightning import image_folder

PROCESS = ForwardProcess(LinearBeta(), compile=False)
BROKEN = ["cats/004.png", "dogs/015.png", "gone/only.png"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty pictures of two classes, two of them cut short, and a third class of nothing but a broken file."""
    folder = tmp_path / "photos"
    for i in range(20):
        path = folder / ("cats" if i < 10 else "dogs") / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(path)
    (folder / "gone").mkdir()
    (folder / "gone" / "only.png").write_bytes(b"<html>404</html>")
    for name in BROKEN[:2]:
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    return folder


def data(root: Path, **options) -> DiffusionDataModule:
    return image_folder(root=str(root), image_size=8, process=PROCESS, **options)


def test_a_list_of_what_is_broken_is_said_and_written(photos):
    said = check(data(photos), workers=0).text.splitlines()
    assert said[0].startswith("21 images read in")
    assert said[0].endswith("3 broken:")
    assert [line.split()[0] for line in said[1:4]] == BROKEN  # sorted, though the validation part is read last
    assert said[4] == f"The list is in {photos / NAME}: data.on_error=skip leaves out what is on it."
    listed = json.loads((photos / NAME).read_text())["broken"]
    assert list(listed) == BROKEN
    assert "cannot be read: cannot identify image file" in listed["gone/only.png"]


def test_what_may_pass_is_said_and_not_listed(photos, monkeypatch):
    """A full table of open files, or a folder that is closed today, leaves out no file for good."""
    opened = Image.open
    passing = {"dogs/010.png": OSError(errno.EMFILE, "Too many open files"), "dogs/011.png": MemoryError("no memory")}

    def refuse(path):
        name = "/".join(Path(path).parts[-2:])
        if name in passing:
            raise passing[name]
        return opened(path)

    monkeypatch.setattr(Image, "open", refuse)
    (photos / "cats" / "nowhere.png").symlink_to(photos / "none")
    found = check(data(photos), workers=0)
    assert not found.fine
    assert "\n2 could not be read for a reason that may pass, and are not listed:\n  dogs/010.png " in found.text
    assert "Too many open files" in found.text
    listed = json.loads((photos / NAME).read_text())["broken"]
    assert sorted(listed) == sorted([*BROKEN, "cats/nowhere.png"])
    (photos / NAME).unlink()
    for name in listed:
        (photos / name).unlink()
    assert not check(data(photos), workers=0).fine
    passing.clear()
    assert check(data(photos), workers=0).fine


def test_a_list_is_written_whole_or_not_at_all(photos, monkeypatch):
    check(data(photos), workers=0)
    before = (photos / NAME).read_text()
    files = sorted(photos.iterdir())

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        check(data(photos), workers=0)
    assert (photos / NAME).read_text() == before
    assert sorted(photos.iterdir()) == files


def test_skip_leaves_out_what_is_on_the_list_and_no_other(photos):
    check(data(photos), workers=0)
    whole, part = ImageFolder(str(photos), 8), ImageFolder(str(photos), 8, on_error="skip")
    assert part.names == [name for name in whole.names if name not in BROKEN]
    assert part.classes == whole.classes == ["cats", "dogs", "gone"]  # labels, and their number, stay
    assert part.labels == [0] * 9 + [1] * 9
    assert part.recipe()["files"] != whole.recipe()["files"]
    assert [int(part[i][0][0, 0, 0]) for i in range(18)] == [i for i in range(20) if i not in (4, 15)]
    (photos / "cats" / "new.png").write_bytes(b"")
    again = ImageFolder(str(photos), 8, on_error="skip")
    with pytest.raises(
        ValueError,
        match=rf"new\.png, cannot be read: .* It is not on the list of broken files, .*{NAME}; this makes the list "
        rf"anew: python -m diffaug check data=image_folder data\.root={photos}$",
    ):
        again[again.names.index("cats/new.png")]


def test_a_broken_file_names_the_way_to_skip_it(photos):
    folder = ImageFolder(str(photos), 8, bits=12, broken_list="a list.json")
    message = (
        r"Sample 4, .*004\.png, cannot be read: .*data\.on_error=skip, once this has listed them: python -m diffaug "
        rf"check data=image_folder data\.root={photos} data\.bits=12 'data\.broken_list=\"a list\.json\"'$"
    )
    with pytest.raises(ValueError, match=message):
        folder[4]


def test_what_is_skipped_moves_no_image_between_training_and_validation(photos):
    check(data(photos), workers=0)
    every, good = data(photos, val_share=0.4), data(photos, val_share=0.4, on_error="skip")
    for made in (every, good):
        for stage in ("train", "val"):
            made._datasets[stage] = made.build(stage, look=False)
    for stage in ("train", "val"):
        names = every.images(stage).dataset.names
        assert good.images(stage).dataset.names == [name for name in names if name not in BROKEN]


def test_without_a_list_skip_says_how_to_make_it(photos, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"there is no .*{NAME}\. This writes it: python -m diffaug check data=image_folder"
    ):
        data(photos, on_error="skip").setup("fit")
    (photos / NAME).write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"is no list of broken files\. This writes it: python -m diffaug check"):
        data(photos, on_error="skip").setup("fit")
    (photos / NAME).write_text(json.dumps({"broken": dict.fromkeys(ImageFolder(str(photos), 8).names, "")}))
    with pytest.raises(ValueError, match=r"All 21 images of data\.root='.*photos' are broken"):
        data(photos, on_error="skip").setup("fit")
    with pytest.raises(ValueError, match=r"data\.on_error must be one of 'raise', 'skip', but got 'ignore'"):
        data(photos, on_error="ignore")


def test_a_list_elsewhere(photos, tmp_path):
    elsewhere = tmp_path / "broken.json"
    check(data(photos, broken_list=str(elsewhere)), workers=0)
    assert not (photos / NAME).exists()
    assert len(ImageFolder(str(photos), 8, on_error="skip", broken_list=str(elsewhere))) == 18
    with pytest.raises(ValueError, match=r"cannot be written to .*nowhere/b\.json: No such .*data\.broken_list=FILE$"):
        check(data(photos, broken_list=str(tmp_path / "nowhere" / "b.json")), workers=0)


@pytest.mark.skipif(os.name != "posix", reason="names are text there")
def test_names_of_any_bytes(photos):
    name = os.fsdecode(b"\xff\xfe.png")
    (photos / name).write_bytes(b"")
    assert "\ufffd\ufffd.png cannot be read" in check(data(photos), workers=0).text
    assert name not in ImageFolder(str(photos), 8, on_error="skip").names


def test_many_are_counted(photos):
    for i in range(40):
        (photos / f"{i}.png").write_bytes(b"")
    assert "\n  and 23 more\n" in check(data(photos), workers=0).text


class Stream(IterableDataset):
    def __iter__(self):
        raise AssertionError("read")


def test_any_dataset_is_checked():
    images = torch.zeros(50, 1, 4, 4)
    images[7], images[30] = torch.nan, 3.0
    made = DiffusionDataModule(TensorDataset(images), [TensorDataset(images[:10]), Stream()], process=PROCESS)
    said = check(made, workers=0).text
    assert "60 images read in 0 s, 3 broken:" in said
    assert "\n  data.train[30] spans [3, 3], outside process.value_range" in said
    for name in ("data.train[7]", "data.val[0][7]"):
        assert f"\n  {name} holds values that are nan or infinite: 16 of 16." in said
    assert "\ndata.val[1] is a stream, which is not read beforehand: nothing is known of its images" in said
    stream = check(DiffusionDataModule(TensorDataset(images[:5]), Stream(), process=PROCESS), workers=0)
    assert not stream.fine
    (fine,) = check(DiffusionDataModule(TensorDataset(images[:5]), process=PROCESS), workers=0).text.splitlines()
    assert fine.endswith("none broken")


def test_an_item_that_cannot_be_had_is_named():
    class Dataset(list):
        def __getitem__(self, index):
            return {0: torch.zeros(1, 4, 4)}[index]

    said = check(DiffusionDataModule(Dataset([0, 1]), process=PROCESS), workers=0).text
    assert "\n  data.train[1] 1 (KeyError)" in said


@pytest.mark.parametrize("name", ["my photos (1), x=y", 'a "b" c', "it's"])
def test_the_command_that_is_named_can_be_given_as_it_stands(photos, tmp_path, name, capsys):
    root = photos.rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="This writes it: ") as error:
        ImageFolder(str(root), 8, on_error="skip")
    words = shlex.split(str(error.value).split("This writes it: ")[1])
    assert main([*words[3:], "workers=0"]) == 3, capsys.readouterr().err
    assert len(ImageFolder(str(root), 8, on_error="skip")) == 18


@pytest.mark.slow
def test_the_command(photos, capsys):
    command = ["check", "data=image_folder", f"data.root={photos}", "data.image_size=8"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*command, "data.on_error=skip", "workers=2"]) == 3
    assert "21 images read in" in capsys.readouterr().out
    assert len(ImageFolder(str(photos), 8, on_error="skip")) == 18
    assert main([*command, "workers=two"]) == 1
    assert "workers must be a whole number >= 0, but got 'two'" in capsys.readouterr().err
