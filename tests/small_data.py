"""DataModules of a few small images: owned, wrapped, streamed, bucketed, mixed. What resumes are tried on."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from shared import Shapes, Stream
from torch.utils.data import DataLoader, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Mixture

FIELDS = ("x_t", "epsilon", "t", "index", "view")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)


def images(count: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous())


def own(count: int = 20, process: ForwardProcess = PROCESS, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(images(count), images(6), process=process, **{"batch_size": 4, "seed": 5, **options})


class Inner(pl.LightningDataModule):
    def __init__(self, train: Callable[[], Any]) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> Any:
        return self.train()

    def val_dataloader(self) -> Any:
        return DataLoader(images(6), 4)


def wrapped(train: Callable[[], Any] = lambda: DataLoader(images(), 4, shuffle=True), **options: Any) -> Any:
    return DiffusionDataModule.wrap(Inner(train), PROCESS, **{"seed": 5, **options})


def stream(count: int = 18, batch_size: int = 4, kind: type[Stream] = Stream, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(kind(images(count)), process=PROCESS, **{"batch_size": batch_size, "seed": 5, **options})


def side_by_side(mode: str, *loaders: Callable[[], DataLoader[Any]]) -> Callable[[], Any]:
    return lambda: wrapped(lambda: CombinedLoader({str(i): loader() for i, loader in enumerate(loaders)}, mode))


def buckets(batch_size: int = 4, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(
        Shapes(22), Shapes(9), process=PROCESS, **{"batch_size": batch_size, "seed": 5, **options}
    )


def mixture(batch_size: int = 4, **weights: float) -> DiffusionDataModule:
    sets = {"few": images(3), "many": images(18)}
    mixed = Mixture(sets, {0: {"few": 1, "many": 1}, 2: weights or {"few": 2, "many": 1}})
    return DiffusionDataModule(mixed, images(6), process=PROCESS, batch_size=batch_size, seed=5)
