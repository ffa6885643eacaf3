"""What a Trainer can do for a diffusion run: its pictures, and its summary."""

import csv
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from diffaug import plots
from diffaug.data import DiffusionDataModule
from diffaug.denoiser import Denoiser
from diffaug.images import Place, collate

_log = logging.getLogger("diffaug")
_PRIOR_IMAGES = 2048


def training_images(data: DiffusionDataModule, count: int) -> Tensor:
    """Up to so many training images, spread evenly over the dataset, on the CPU, before any noise."""
    images = data.images("train")
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).long().unique().tolist()
    return collate(images.__getitems__([Place(i, 0, 0, 0) for i in chosen])).image


class Pictures(Callback):
    """Draw schedule.png and forward.png when training begins, samples.png when it ends.

    Arguments:
        folder: where to.
        rows: how many images forward.png follows.
        samples: how many images samples.png shows; 0 draws none.
        steps: how many calls of the network a sample takes.
    """

    def __init__(self, folder: str, *, rows: int = 4, samples: int = 64, steps: int = 100) -> None:
        self.folder, self.rows, self.samples, self.steps = Path(folder), rows, samples, steps

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.is_global_zero or not isinstance(data, DiffusionDataModule):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        plots.schedule(data.process.schedule).savefig(self.folder / "schedule.png", dpi=150)
        images = training_images(data, self.rows)
        if images.ndim == 4:
            plots.forward(data.process, images).savefig(self.folder / "forward.png", dpi=150)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.is_global_zero or not self.samples or not isinstance(pl_module, Denoiser):
            return
        shape = training_images(data, 1).shape[1:]
        images = pl_module.sample((self.samples, *shape), steps=self.steps)
        plots.samples(images).savefig(self.folder / "samples.png", dpi=150)


class Summary(Callback):
    """Write summary.json after the last validation, and say in a few lines what the run came to.

    Arguments:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.seconds = Path(folder), 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.monotonic() - self._began

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(data, DiffusionDataModule):
            return
        loss = trainer.callback_metrics.get("val_loss")
        summary = {
            "val_loss": None if loss is None else float(loss),
            "prior_kl_bits_per_dim": data.process.prior_kl_bits_per_dim(training_images(data, _PRIOR_IMAGES)),
            "seed": data.seed,
            "schedule": repr(data.process.schedule),
            "steps": trainer.global_step,
            "seconds": round(self.seconds or time.monotonic() - getattr(self, "_began", time.monotonic()), 1),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


class RunLogger(CSVLogger):
    """metrics.csv in the run's own folder; a resumed run goes on writing where the earlier one stopped.

    (Lightning's CSVLogger deletes the earlier rows.)

    Arguments:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            path = Path(self.log_dir) / "metrics.csv"
            earlier = path.read_text() if path.exists() else None
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                writer = super().experiment
            if earlier:
                path.write_text(earlier)
                writer.metrics_keys = next(csv.reader(earlier.splitlines()))
        return self._experiment
