"""Checkpoints that an interruption cannot spoil: written whole or not at all, often enough, and when told to end."""

import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from diffaug.checks import integer, number

_log = logging.getLogger("diffaug")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # the end that a system, and that submitit, announces


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint on a local disk is there whole, under its name, or the one before it is.

    It is written beside its place, flushed to the disk, and renamed. (Lightning's own goes by way of the system's
    folder for temporary files; onto another disk that is a copy, which a full disk or a kill cuts short.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        part = place.with_name(f".{place.name}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, place)
            _sync_folder(place.parent)
        except (OSError, RuntimeError) as error:  # torch says a full disk by a RuntimeError
            written = part.stat().st_size if part.exists() else 0
            part.unlink(missing_ok=True)
            free = shutil.disk_usage(place.parent).free if place.parent.is_dir() else 0
            before = "The one before it is whole" if place.is_file() else "There is none before it"
            raise OSError(
                f"The checkpoint {place} could not be written: {error}. It got to {written:,} bytes; "
                f"{free:,} bytes are free there. {before}. Make room, or set hydra.run.dir to a folder "
                "on another disk, and go on by ckpt_path=last."
            ) from error

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        try:
            return super().load_checkpoint(path, *arguments, **options)
        except (FileNotFoundError, PermissionError):
            raise
        except (EOFError, OSError, RuntimeError) as error:
            raise RuntimeError(
                f"The checkpoint {path} cannot be read, so it was cut short or is none: {error}. Set ckpt_path to "
                "another one; ckpt_path=null begins from the start."
            ) from error


def _sync_folder(folder: Path) -> None:
    """Flush the folder's list of names too, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt``: every so many minutes, after each validation, at the end, and when the run is told to end.

    Told by SIGTERM, the ranks agree on a step after which all of them save, and end. Under submitit they save, and go
    on until its own signal, SIGUSR2: then rank 0 puts the job back into the queue, and all end. Training alone does
    this: what comes within a validation takes effect after it. (Lightning's ModelCheckpoint leaves last.ckpt as it was
    wherever a validation was not among the best, and its time interval costs the ranks a broadcast at every step.)

    Arguments:
        folder: where to.
        minutes: the most that a run which is killed loses.
        every: after how many steps, at least 1, several ranks ask each other whether it is time; one asks at each.
    """

    def __init__(self, folder: str, *, minutes: float = 10.0, every: int = 20) -> None:
        self.path = Path(folder, "last.ckpt")
        self.minutes = number("callbacks.last.minutes", minutes, low=0, open_low=True)
        self.every = integer("callbacks.last.every", every, low=1)
        self._saved, self._seen, self._when = -1, -1, time.monotonic()
        self._told: set[int] = set()
        self._ending: signal.Signals | None = None
        self._before: dict[int, Any] = {}  # whose signals they were

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ending, self._when, self._seen, self._saved = None, time.monotonic(), trainer.global_step, -1
        for number_ in _SIGNALS:
            if number_ == signal.SIGTERM or callable(signal.getsignal(number_)):
                try:
                    self._before[number_] = signal.signal(number_, lambda told, _: self._told.add(told))
                except ValueError:  # not the main thread, where no signal arrives
                    break

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == trainer.max_steps:
            self._save(trainer)
        if step == self._seen or (trainer.world_size > 1 and step % self.every):
            return  # within an accumulation, whose gradients no checkpoint holds; or not yet
        self._seen = step
        due = trainer.should_stop or (trainer.is_global_zero and time.monotonic() - self._when >= 60 * self.minutes)
        known = [due, *(number_ in self._told for number_ in _SIGNALS)]
        if trainer.world_size > 1:  # what any rank knows, all do
            mine = torch.tensor(known, dtype=torch.int32, device=trainer.strategy.root_device)
            known = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        if any(known):
            self._save(trainer)
        _, terminate, requeue = known
        if requeue:
            self._ending = signal.SIGUSR2
        elif terminate and signal.SIGUSR2 not in self._before:
            self._ending = signal.SIGTERM
        self._told.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._end(trainer)  # here, for the loggers have the step by now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()  # too late to save: a callback that averages has put the averages in the weights' place

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _save(self, trainer: pl.Trainer) -> None:
        trial = trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.global_step != self._saved and not trial:
            trainer.save_checkpoint(self.path)
            self._saved, self._when = trainer.global_step, time.monotonic()

    def _end(self, trainer: pl.Trainer) -> None:
        told, self._ending = self._ending, None
        if told is None:
            return
        before = self._before.get(told)
        self._restore()
        if trainer.is_global_zero:
            _log.warning(
                "%s: saved step %d to %s, and ending. The same command with hydra.run.dir=%s goes on from there.",
                told.name,
                trainer.global_step,
                self.path,
                self.path.parent.parent,
            )
            if told == signal.SIGUSR2 and callable(before):
                before(told, None)  # submitit's: puts the job back into the queue, and exits
            raise SystemExit(128 + told)
        raise SystemExit(0)  # this rank did as it was told; an error here would end rank 0 before it is done

    def _restore(self) -> None:
        for number_, handler in self._before.items():
            signal.signal(number_, handler)
        self._before = {}
