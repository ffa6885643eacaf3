"""A store of another LightningDataModule: of the datasets in its loaders, or refused."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from shared import Stream, assert_alike, pictures, seen, trainer
from torch.utils.data import DataLoader, Dataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.commands.check import check
from diffaug.commands.encode import encode
from diffaug.commands.preview import preview
from diffaug.pytorch_lightning import Encoding, store
from diffaug.store import Store

PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "index", "label"), compile=False)


class Inner(pl.LightningDataModule):
    """Knows nothing of diffusion."""

    def __init__(self, train: Any, val: Any = None) -> None:
        super().__init__()
        self.loaders = {"train": train, "val": val}
        self.sets: list[str] = []

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.sets.append(stage)

    def train_dataloader(self) -> Any:
        return self.loaders["train"]

    def val_dataloader(self) -> Any:
        return self.loaders["val"] or DataLoader(pictures(6), 4)


class Hooked(Inner):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def write(inner: Any, out: Path, **options: Any) -> Path:
    encode(DiffusionDataModule.wrap(inner, PROCESS, seed=3), str(out), trainer(), Encoding, **options)
    return out


def test_its_store_gives_the_very_batches(tmp_path):
    inner = Inner(DataLoader(pictures(10), 4, shuffle=True))
    out = write(inner, tmp_path / "made")
    assert inner.sets == ["fit"]
    live, ours = (
        seen(DiffusionDataModule.wrap(inner, PROCESS, seed=3)),
        seen(store(root=str(out), process=PROCESS, seed=3, batch_size=4)),
    )
    for stage in ("train", "val"):
        assert_alike(live[stage], ours[stage])


class Told(Dataset[Any]):
    """Images that a collate function takes out of their items."""

    paths = [__file__] * 5

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Any:
        return {"pixels": [[i, i + 1]], "text": "abcde"[i] * 3}


def collate(items: list[Any]) -> Any:
    images = torch.tensor([item["pixels"] for item in items], dtype=torch.uint8)
    return {"image": images[:, None], "text": [item["text"] for item in items]}


def test_a_collate_function_is_called_for_each_item(tmp_path):
    val = [DataLoader(Told(), 2, collate_fn=collate), DataLoader(pictures(2), 2)]
    out = write(Inner(DataLoader(Told(), 2, collate_fn=collate), val), tmp_path / "made")
    row = Store(str(out))[2]
    assert row["image"].tolist() == [[[2, 3]]]
    assert row["text"] == "ccc"
    assert [len(Store(str(out), "val", number)) for number in (0, 1)] == [5, 2]
    assert len((out / "train" / "files.jsonl").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (
            Hooked(None),
            r"Hooked\.on_after_batch_transfer is of whole batches, on their way to the device: a store holds",
        ),
        (Inner([1, 2]), r"Inner\.train_dataloader\(\) gives a int that is not torch's DataLoader over single items"),
        (Inner(DataLoader(pictures(2), None)), r"gives a DataLoader that is not torch's DataLoader over single items"),
        (Inner(DataLoader(Stream())), r"data\.train is a stream, whose items have no index to be stored by"),
        (Inner([DataLoader(pictures(2))] * 2), r"data\.train must be one dataset; join several by diffaug\.Mixture"),
    ],
)
def test_what_cannot_be_taken_out_is_refused(inner, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(inner, tmp_path / "made")


def test_what_is_no_data_module_of_ours_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data must be a DiffusionDataModule, which wraps another one by its wrap"):
        encode(Inner(None), str(tmp_path / "made"), trainer(), Encoding)
    wrapped: Any = DiffusionDataModule.wrap(Inner(None), PROCESS)
    for command in (check, preview):
        with pytest.raises(ValueError, match=rf"datasets for {command.__name__}; of one that is wrapped make a store"):
            command(wrapped)
