"""LossByLevelBase: the loss by noise level, in training and in validation."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaug import plots
from diffaug.checks import choice, refuse
from diffaug.datamodules.lightning_packages import LightningModule, Trainer
from diffaug.plots.curves import LEVEL_COLUMNS, LEVEL_EDGES
from diffaug.plots.picture import write_csv
from diffaug.schedules import Schedule
from diffaug.schedules.numbers import keep
from diffaug.training.callbacks import CallbackBase

_log = logging.getLogger("diffaug")
_EDGES = {"log_snr": LEVEL_EDGES, "unit": tuple(k / 10 for k in range(11))}


class LossByLevelBase(CallbackBase):
    """Report the mean, spread and count of the loss in bins of log-SNR or of unit time.

    One number for the whole loss hides what a recipe changes: most of it is decided at a few noise levels. At every
    validation, or where there is none at every epoch's end, each bin that held a sample is logged to every logger of
    the trainer, as ``val_loss_by_log_snr/-2_to_0/mean``, ``/std`` (over samples), ``/count`` and ``/weighted`` (the
    mean of weight times error), and as ``train_loss_by_log_snr/...`` for the training steps since the report before.
    Empty bins are not logged. Sums, in float64, are added over the ranks before they are divided, so a rank's share
    makes no difference.

    A LightningModule's ``training_step`` and ``validation_step`` must return a dict with ``t`` and ``errors``, and
    ``weights`` and ``mask`` (1 for what counts) where there are any, shape (B,) each, as
    `diffaug.training.denoiser.DenoiserBase`'s do.

    Arguments:
        folder: where loss_by_level.png and loss_by_level.csv go; None draws nothing.
        over: log_snr or unit.
        edges: of the bins, rising, infinities among them if wanted; a bin holds its lower edge, and what lies beyond
            the outer edges is in no bin. None takes bins of 2 nats from -8 to 8 and what is beyond, or tenths.
        schedule: None takes that of the LightningModule's, or the DataModule's, ``process``.
    """

    def __init__(
        self,
        folder: str | None = None,
        *,
        over: str = "log_snr",
        edges: Sequence[float] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.over, self.schedule = choice("callbacks.loss_by_level.over", over, tuple(_EDGES)), schedule
        self.edges = tuple(float(edge) for edge in edges) if edges is not None else _EDGES[over]
        if len(self.edges) < 2 or not all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise refuse("callbacks.loss_by_level.edges", list(self.edges), "numbers that rise, at least two")
        self.rows: list[tuple[Any, ...]] = []
        self._sums: dict[str, Tensor] = {}
        self._told = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._add("train", trainer, pl_module, outputs, batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking:
            self._add(f"val_{dataloader_idx}" if dataloader_idx else "val", trainer, pl_module, outputs, batch)

    def _add(self, stage: str, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not isinstance(outputs, dict) or not {"t", "errors"} <= set(outputs):
            if not self._told:
                _log.warning("LossByLevel: %s_step must return a dict with t and errors, shape (B,) each", stage)
                self._told = True
            return
        t, errors = outputs["t"], outputs["errors"]
        levels = self._levels(trainer, pl_module, t, batch)
        sums = sum_bins(levels, errors, outputs.get("weights"), self.edges, outputs.get("mask"))
        self._sums[stage] = self._sums[stage] + sums if stage in self._sums else sums

    def _levels(self, trainer: Trainer, pl_module: LightningModule, t: Tensor, batch: Any) -> Tensor:
        if self.schedule is None:
            holders: tuple[Any, ...] = (pl_module, trainer.datamodule)
            found: list[Any] = [holder.process for holder in holders if hasattr(holder, "process")]
            if not found:
                raise ValueError(
                    "LossByLevel: neither the LightningModule nor the DataModule has a process: set schedule=."
                )
            self.schedule = found[0].schedule
        if self.over != "log_snr":
            return self.schedule.to_unit(t)
        parts = batch if isinstance(batch, tuple) else ()
        images = next((part for part in parts if isinstance(part, Tensor) and part.ndim >= 4), None)
        return (self.schedule if images is None else self.schedule.at_shape(images.shape)).log_snr(t)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            self._report(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        """Log and keep what was added since the last report; every rank must come here, for the sums are shared."""
        metrics: dict[str, float] = {}
        rows: list[tuple[Any, ...]] = []
        for stage in sorted(self._sums):
            sums = trainer.strategy.reduce(self._sums[stage], reduce_op="sum")
            for low, high, count, mean, std, weighted in summarise_bins(torch.as_tensor(sums), self.edges):
                place = (stage, trainer.global_step, trainer.current_epoch, low, high)
                rows.append((*place, int(count), mean, std, weighted, self.over))
                numbers = {"mean": mean, "std": std, "count": count, "weighted": weighted}
                name = f"{stage}_loss_by_{self.over}/{_name(low, high)}"
                metrics |= {f"{name}/{what}": number for what, number in numbers.items()}
        self._sums = {}
        again = {row[:2] for row in rows}  # validated once more at the same step, after training: the later counts
        self.rows = [row for row in self.rows if row[:2] not in again] + rows
        if metrics:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
            if self.folder is not None and trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_csv(self.folder / "loss_by_level.csv", LEVEL_COLUMNS, self.rows)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if self.folder is not None and trainer.is_global_zero and self.rows:
            plots.levels(self.rows).save(self.folder / "loss_by_level.png")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [tuple(row) for row in state_dict["rows"]]


def sum_bins(
    levels: Tensor, errors: Tensor, weights: Tensor | None, edges: Sequence[float], mask: Tensor | None = None
) -> Tensor:
    """Sum each bin's samples, errors, squared and weighted errors; float64, shape (K, 4), on errors' device.

    Arguments:
        levels, errors, weights: shape (B,) each; None weighs every error 1.
        edges: of the bins, rising.
        mask: 1 where an error counts and 0 where not, shape (B,); None counts all.
    """
    dtype = torch.float32 if errors.device.type == "mps" else torch.float64  # no float64 there
    errors = errors.detach().to(dtype)
    weighted = errors if weights is None else errors * weights.detach().to(dtype)
    border = _border(tuple(edges), dtype, errors.device)
    # Bin 0 and the last are beyond the outer edges; at an infinite edge, an infinite level lies in the bin beside it.
    place = torch.bucketize(levels.detach().to(dtype), border, right=True)
    if math.isinf(edges[-1]):
        place = place.clamp_max(len(edges) - 1)
    terms = torch.stack([torch.ones_like(errors), errors, errors.square(), weighted], 1)
    terms = terms if mask is None else terms * mask[:, None]
    sums = torch.zeros(len(edges) + 1, 4, dtype=dtype, device=errors.device)
    return sums.index_add_(0, place, terms)[1:-1]


@keep
def _border(edges: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the edges on a device, kept: to copy them there at every step would halt it at every step."""
    return torch.tensor(edges, dtype=dtype, device=device)


def summarise_bins(sums: Tensor, edges: Sequence[float]) -> list[tuple[float, ...]]:
    """Return (low, high, count, mean, standard deviation, weighted mean) of each bin that is not empty."""
    found = []
    for low, high, (count, total, squares, weighted) in zip(edges, edges[1:], sums.tolist(), strict=False):
        if count:
            mean = total / count
            found.append((low, high, count, mean, math.sqrt(max(squares / count - mean**2, 0.0)), weighted / count))
    return found


def _name(low: float, high: float) -> str:
    if low == -math.inf:
        return f"below_{high:g}"
    return f"from_{low:g}" if high == math.inf else f"{low:g}_to_{high:g}"
