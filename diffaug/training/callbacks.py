"""What a run leaves, as callbacks without their Lightning base: its pictures and its summary."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from diffaug import plots
from diffaug.checks import integer
from diffaug.datamodules.base import NoisingBase
from diffaug.datamodules.lightning_packages import LightningModule, Trainer, check_package
from diffaug.datamodules.module import DiffusionBase
from diffaug.training.denoiser import DenoiserBase

_PRIOR_IMAGES = 2048


class CallbackBase:
    """The base of diffaug's callbacks: each refuses a Trainer of the other package."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_package(self, trainer)


class SamplesBase(CallbackBase):
    """The base of callbacks that sample: keeps the shape of the network's images, and what they are conditioned on."""

    shape: tuple[int, ...] | None = None
    labels: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(pl_module, DenoiserBase):
            return
        self.shape = tuple(getattr(batch, pl_module.input).shape[1:])
        if pl_module.condition is not None:
            self.labels = getattr(batch, pl_module.condition)

    def sampled(self, trainer: Trainer, model: DenoiserBase, count: int, steps: int) -> Tensor | None:
        """Sample under the labels of the last batch, in turn; None before a batch was seen.

        None, too, where samples are no images, but latents.
        """
        if self.shape is None or model.latents or len(self.shape) != 3 or self.shape[0] not in (1, 3):
            return None
        labels = self.labels
        if labels is not None:
            labels = labels[torch.arange(count, device=labels.device) % len(labels)]
        bar = trainer.progress_bar_callback is not None
        return model.sample((count, *self.shape), steps=steps, labels=labels, progress=bar)


class PicturesBase(SamplesBase):
    """Draw schedule.png and forward.png, with their numbers as .csv, when training begins, samples.png when it ends.

    Of latents, which are no images, schedule.png alone.

    Arguments:
        folder: where to.
        rows: how many images forward.png follows.
        samples: how many images samples.png shows; 0 draws none.
        steps: how many calls of the network a sample takes.
    """

    def __init__(self, folder: str, *, rows: int = 4, samples: int = 64, steps: int = 100) -> None:
        self.folder = Path(folder)
        self.rows = integer("callbacks.pictures.rows", rows, 1)
        self.samples = integer("callbacks.pictures.samples", samples, 0)
        self.steps = integer("callbacks.pictures.steps", steps, 1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if not trainer.is_global_zero or not isinstance(data, NoisingBase):
            return
        schedule = data.process.schedule
        plots.schedules({repr(schedule): schedule}).save(self.folder / "schedule.png")
        images = data.clean_images("train", self.rows)
        if images is not None and images.ndim == 4 and images.shape[1] in (1, 3) and not data.latents:
            plots.forward(data.process, images).save(self.folder / "forward.png")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.samples or not isinstance(pl_module, DenoiserBase):
            return
        images = self.sampled(trainer, pl_module, self.samples, self.steps)
        if images is not None:
            plots.samples(images).save(self.folder / "samples.png")


class ProgressBase(SamplesBase):
    """Draw progress.png: samples over the course of training, all from the same noise, taken at validations.

    Place it after the averaging of weights among the callbacks, and the samples are those of the averaged weights.

    Arguments:
        folder: where to.
        samples: how many images a row shows.
        steps: how many calls of the network a sample takes.
        every: at every how many validations a row is taken.
    """

    def __init__(self, folder: str, *, samples: int = 8, steps: int = 50, every: int = 1) -> None:
        self.folder = Path(folder)
        self.samples = integer("callbacks.progress.samples", samples, 1)
        self.steps = integer("callbacks.progress.steps", steps, 1)
        self.every = integer("callbacks.progress.every", every, 1)
        self.taken: list[tuple[int, Tensor]] = []
        self._validations = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or not isinstance(pl_module, DenoiserBase):
            return
        self._validations += 1
        if trainer.state.fn != "fit" or self._validations % self.every:
            return
        images = self.sampled(trainer, pl_module, self.samples, self.steps)
        if images is not None:
            self.taken.append((trainer.global_step, images.cpu()))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.taken:
            plots.progress(self.taken).save(self.folder / "progress.png")

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken, self._validations = list(state_dict["taken"]), state_dict["validations"]


class SummaryBase(CallbackBase):
    """Write summary.json after every validation; where a run has none, when it ends.

    Arguments:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self._seconds = Path(folder), 0.0
        self._began: float | None = None  # while it trains

    @property
    def seconds(self) -> float:
        """How long the run has trained, what it went on from included."""
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds, self._began = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = state_dict["seconds"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        data = trainer.datamodule
        if not trainer.is_global_zero or not isinstance(data, NoisingBase):
            return
        loss = trainer.callback_metrics.get("val_loss")
        images = None if data.encodes else data.clean_images("train", _PRIOR_IMAGES)
        summary = {
            "val_loss": None if loss is None else float(loss),
            "prior_kl_bits_per_dim": None if images is None else data.process.prior_kl_bits_per_dim(images),
            "seed": data.seed,
            "schedule": repr(data.process.schedule),
            "steps": trainer.global_step,
            "seconds": round(self.seconds, 1),
        }
        classes = _classes(data.images("train").dataset) if isinstance(data, DiffusionBase) else None
        if classes:
            summary["classes"] = classes  # the name of each label
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _classes(dataset: Any) -> list[str] | None:
    """Return the names of a dataset's classes, in the order of their numbers; None where it has none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return list(map(str, names)) if isinstance(names, (list, tuple)) and any(names) else None
