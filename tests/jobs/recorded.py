"""A training run that writes down every triple it is given: run by tests as a process of its own, and killed.

python recorded.py OUT '{"devices": 2, ...}' trains on 75 small images; each rank appends what its training_step and
validation_step receive to OUT/train-RANK and OUT/val-RANK, one pickle a batch, on disk before the step ends.
"""

import importlib
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from diffaug import (
    EDM,
    DiffusionDataModule,
    ForwardProcess,
    LinearBeta,
    LogNormal,
    Mixture,
    Pair,
    Parts,
    Rectified,
    TwoLevelParts,
)
from diffaug.pytorch_lightning import store
from diffaug.times import ConstantDecrement, SigmaRatio

FIELDS = ("x_t", "epsilon", "t", "index", "view", "dataset")
RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: {"schedule": LinearBeta()},
    "parts": lambda: {"schedule": LinearBeta(), "parts": Parts(axis=(-2, -1), block=2, law=TwoLevelParts())},
    "curriculum": lambda: {
        "schedule": EDM(),
        "times": LogNormal(),
        "pair": Pair(SigmaRatio(last_stage=8, samples=140)),  # it rises within the run
        "fields": (*FIELDS, "s", "x_s", "interval", "pair_weight"),
    },
    "groups": lambda: {
        "schedule": Rectified(),
        "pair": Pair(ConstantDecrement(group=2)),
        "fields": (*FIELDS, "s", "x_s", "r", "x_r"),
    },
}


def images(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8))


class Shapes(Dataset[torch.Tensor]):
    """Images of three shapes, and so in three buckets."""

    def __init__(self, count: int) -> None:
        self.bucket_of = np.arange(count) * 5 % 7 // 3

    def __len__(self) -> int:
        return len(self.bucket_of)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, 2, (2, 4, 6)[self.bucket_of[index]]), index, dtype=torch.uint8)


def training_set(kind: str, count: int, root: str) -> Any:
    if kind == "litdata":
        return importlib.import_module("litdata").StreamingDataset(root)
    if kind == "mosaic":
        if "RANK" in os.environ:  # else it makes a process group of its own, and the next one, of Lightning, may hang
            torch.distributed.init_process_group("gloo")
        return importlib.import_module("streaming").StreamingDataset(local=root, batch_size=1, shuffle=False)
    if kind == "mixture":
        return Mixture({"few": images(7, 0), "many": images(count, 1)}, weights={"few": 1, "many": 2})
    return Shapes(count) if kind == "buckets" else images(count, 0)


class Images(pl.LightningDataModule):
    """What a user has: the images of `training_set` in loaders of their own."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(75, 0), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(10, 1), self.batch_size)


class Spread(torch.nn.Module):
    """An encoder that returns a distribution, of each image by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, images: torch.Tensor) -> torch.distributions.Normal:
        mean = self.weight * torch.nn.functional.avg_pool2d(images, 2)
        return torch.distributions.Normal(mean, 0.1 + mean.abs() / 3)


class Recorder(pl.LightningModule):
    """A one-parameter model that keeps what it is shown."""

    def __init__(self, out: str, kill_at: int | None, sync: bool = False) -> None:
        super().__init__()
        self.out, self.kill_at, self.sync = out, kill_at, sync
        self.weight = torch.nn.Parameter(torch.ones(1))

    def _write(self, stage: str, batch: Any) -> None:
        values = {name: getattr(batch, name).cpu() for name in batch._fields}
        values |= {"epoch": self.current_epoch, "step": self.global_step}
        with open(f"{self.out}/{stage}-{self.global_rank}", "ab") as file:
            pickle.dump(values, file)
            file.flush()
            os.fsync(file.fileno())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self._write("train", batch)
        if self.kill_at is not None and self.trainer.fit_loop.epoch_loop.total_batch_idx == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return (self.weight * batch.x_t).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._write(f"val{dataloader_idx}", batch)
        if self.sync:
            self.log("mean", batch.x_t.mean(), sync_dist=True, on_step=True, batch_size=len(batch.t))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(out: str, options: dict[str, Any]) -> None:
    Path(out).mkdir(parents=True, exist_ok=True)
    if options.get("no_compiler_on") == int(os.environ.get("LOCAL_RANK", "0")):
        from torch._inductor import config

        config.cpp.cxx = (None, "/bin/false")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{out}/empty"
    devices = options.get("devices", 1)
    if "seeds" in options:  # the usual remedy for ranks that draw alike
        pl.seed_everything(options["seeds"] + int(os.environ.get("LOCAL_RANK", "0")))
    root = options.get("store")
    made: dict[str, Any] = {
        "train": training_set(options.get("kind", "plain"), options.get("train", 75), options.get("root", "")),
        "val": [images(count, 1) for count in options.get("val", [10, 10])],
        "encoder": Spread() if options.get("encoder") else None,
    }
    recipe = {"fields": FIELDS, **RECIPES[options.get("recipe", "plain")]()}
    process = ForwardProcess(**recipe, compile=options.get("compile", False), value_range=None if root else (-1, 1))
    batch_size = options.get("batch_size", 8)
    data = (partial(store, root=root) if root else partial(DiffusionDataModule, **made))(
        process=process,
        seed=None if "seeds" in options else 11,
        batch_size=batch_size,
        num_workers=options.get("num_workers", 0),
        persistent_workers=options.get("persistent_workers", False),
        views=options.get("views", 1),
        shuffle=options.get("shuffle", True),
    )
    if options.get("wrapped"):
        data = DiffusionDataModule.wrap(Images(batch_size), process, seed=11)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=options.get("strategy", "ddp" if devices > 1 else "auto"),
        max_epochs=options.get("max_epochs", 3),
        accumulate_grad_batches=options.get("accumulate", 1),
        precision=options.get("precision", "32-true"),
        num_sanity_val_steps=options.get("sanity", 0),
        callbacks=[ModelCheckpoint(out, save_last=True, every_n_train_steps=options.get("every", 3), save_top_k=0)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    ckpt_path = options.get("ckpt_path") if rank in options.get("sees_it", [rank]) else None
    trainer.fit(Recorder(out, options.get("kill_at"), options.get("sync", False)), data, ckpt_path=ckpt_path)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
