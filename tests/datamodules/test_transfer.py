"""What a batch does to an accelerator on its way there, through the hooks and a training step: nothing waits for it.

Every call is made twice, as a table may cross to the device once; the second call is looked at. See `watched`.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

watched = pytest.importorskip("watched", reason="needs torch's private names where they were", exc_type=ImportError)

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Rectified  # noqa: E402
from diffaug.datamodules import wrapped  # noqa: E402
from diffaug.loader.batch import Batch  # noqa: E402
from diffaug.on_device.labels import LabelDropout  # noqa: E402
from diffaug.process import compiler  # noqa: E402
from diffaug.pytorch_lightning import Denoiser, LossByLevel  # noqa: E402
from diffaug.randomness.host_to_device import move  # noqa: E402
from diffaug.randomness.keys import Keys  # noqa: E402
from diffaug.targets import MinSNR  # noqa: E402
from diffaug.times import Importance, Uniform  # noqa: E402

FIELDS = ("x_t", "epsilon", "t", "label", "index", "view")


class Texts(Dataset[Any]):
    def __init__(self) -> None:
        self.images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.images[index], f"text {index}"


NUMBERS = TensorDataset(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified()])
@pytest.mark.parametrize(("dataset", "null"), [(NUMBERS, 10), (Texts(), "")])
def test_the_whole_hook(schedule, dataset, null):
    process = ForwardProcess(schedule, fields=FIELDS)
    options: dict[str, Any] = {"label_dropout": 0.5, "null_label": null, "views": 2}
    data = DiffusionDataModule(dataset, dataset, process=process, seed=0, batch_size=4, **options)
    data.setup("fit")
    for stage, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        with watched.watched() as watch:
            for batch in loader:
                watch.clear()
                sent = data.transfer_batch_to_device(batch, watched.DEVICE, 0)
                assert watch.operations == (2 if dataset is NUMBERS else 1), "the images and the labels"
                made = data.noise(sent, stage=stage)
                assert made.x_t.device == made.t.device == made.index.device == watched.DEVICE
            assert watch.waits == []
            assert watch.operations <= 20


class Inner(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(NUMBERS, batch_size=4)


@pytest.mark.parametrize("known", [True, False], ids=["indexed", "stream"])
def test_the_hooks_of_a_wrapped_module(known, monkeypatch):
    # To key the device's own random state needs a driver.
    monkeypatch.setattr(wrapped, "keyed_random_state", lambda *_: contextlib.nullcontext())
    data = DiffusionDataModule.wrap(Inner(), ForwardProcess(Rectified(), fields=FIELDS), seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compiler_for", lambda _: False)  # on the CPU: here it is of no interest
        data.setup("fit")
    with watched.watched() as watch:
        for batch in data.train_dataloader():
            watch.clear()
            batch = data.on_before_batch_transfer(batch if known else Batch(batch.content, [None]), 0)
            made = data.noise(data.transfer_batch_to_device(batch, watched.DEVICE, 0))
            assert made.x_t.device == watched.DEVICE
            assert watch.waits == []
        assert watch.operations <= 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty((), device=watched.DEVICE))

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.scale * x + time.view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified()])
def test_a_step_of_the_denoiser_and_its_losses_by_level(schedule, monkeypatch):
    monkeypatch.setattr(Denoiser, "log", lambda *_, **__: None)
    times = Importance() if schedule.discrete else Uniform()
    process = ForwardProcess(schedule, times, fields=("x_t", "v", "t"), target="v", weight=MinSNR())
    callback = LossByLevel()
    trainer: Any = SimpleNamespace(datamodule=None, sanity_checking=False)
    with watched.watched() as watch:
        x, index = watched.on_device(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4)
        model = Denoiser(Net(), process, target="v")
        for step in range(2):
            watch.clear()
            batch = process(x, index)
            callback.on_train_batch_end(trainer, model, model.training_step(batch, step), batch, step)
            callback.on_validation_batch_end(trainer, model, model.validation_step(batch, step), batch, step)
        assert watch.waits == []


def test_label_dropout_where_the_keys_are_on_the_device():
    dropout = LabelDropout(0.5, 10, "label", ("label",))
    with watched.watched() as watch:
        coins, label = Keys.pack(watched.on_device(4, dtype=torch.int64)), watched.on_device(4, 2)
        for _ in range(2):
            watch.clear()
            dropout(label, coins)
        assert watch.waits == []


def test_numbers_cross_in_one_copy():
    parts = [torch.arange(3), torch.rand(3, 2), torch.tensor([True, False, True]), torch.tensor(2.5), torch.empty(0, 4)]
    with watched.watched() as watch:
        there = watched.on_device(2)
        watch.clear()
        sent = move([*parts, there], watched.DEVICE)
        assert [(s.shape, s.dtype) for s in sent] == [(p.shape, p.dtype) for p in [*parts, there]]
        assert sent[-1] is there
        assert (watch.operations, watch.waits) == (1, [])


def test_what_crosses_is_what_was_sent(device):
    parts = [torch.arange(3), torch.rand(3, 2), torch.tensor([True, False, True]), torch.tensor(2.5), torch.empty(0, 4)]
    elsewhere = device if device.type != "cpu" else torch.device("meta")
    # A device that is no device: what is packed is read back before it leaves.
    real = torch.Tensor.to
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: self)
        sent = move(parts, elsewhere)
    assert all(torch.equal(real(s, "cpu"), p) for s, p in zip(sent, parts, strict=True))
    assert all(s.data_ptr() % 64 == sent[0].data_ptr() % 64 for s in sent if s.numel())
