"""A run that is stopped and gone on with, in memory: what the tests of resumes share.

One run saves checkpoints at the hooks it is told; `differences` goes on from each in a new Trainer and lists where what
comes is not, bit for bit, what the first run handed out after the batches that were done.
"""

import functools
import io
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Callback

HOOKS = (
    "on_fit_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)


class Model(pl.LightningModule):
    """Keeps what it is given; fails in ``fails`` = (hook, batch of the run)."""

    def __init__(self, fails: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[Any] = []
        self.fails, self.learning_rate = fails, 0.1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        known = [part and tuple(value.tobytes() for value in map(torch.Tensor.numpy, part)) for part in parts]
        self.seen.append((self.current_epoch, batch_idx, known))
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", float(len(self.seen)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Fails(Callback):
    """Raises in one hook, at its nth call."""

    def __init__(self, hook: str, call: int) -> None:
        self.calls = 0

        def fail(*_: Any, **__: Any) -> None:
            self.calls += 1
            if self.calls == call:
                raise RuntimeError("as the test wants it")

        setattr(self, hook, fail)


class Memory(CheckpointIO):
    """Checkpoints in memory, each with the number of batches that were done when it was saved."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.done: dict[str, int] = {}
        self.trainer: Any = None

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        file = io.BytesIO()
        torch.save(checkpoint, file)
        self.files[str(path)] = file.getvalue()
        self.done[str(path)] = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        return torch.load(io.BytesIO(self.files[str(path)]), weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        pass  # what a callback has replaced must be gone on from exactly too

    def different(self) -> list[tuple[str, int]]:
        """Return those to go on from: of hooks between which nothing happened, which saved the same bytes, one."""
        last = {(self.files[path], done): path for path, done in self.done.items()}
        return [(path, done) for (_, done), path in last.items()]


class Saver(Callback):
    """Saves at every call of the given hooks."""

    def __init__(self, hooks: tuple[str, ...] = HOOKS) -> None:
        for hook in hooks:
            setattr(self, hook, self._saving(hook))

    def _saving(self, hook: str) -> Callable[..., None]:
        def save(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            memory = trainer.strategy.checkpoint_io
            trainer.save_checkpoint(f"{len(memory.files):04}-{hook}")

        return save


def fit(
    data: pl.LightningDataModule,
    memory: Memory | None = None,
    resumed: str | None = None,
    model: Model | None = None,
    callbacks: tuple[Callback, ...] = (),
    **options: Any,
) -> tuple[Model, pl.Trainer]:
    model, memory = model or Model(), memory or Memory()
    memory.trainer = trainer = pl.Trainer(
        **{"max_epochs": 3, "enable_checkpointing": False, **options},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
        plugins=[memory],
    )
    trainer.fit(model, data, ckpt_path=resumed)
    return model, trainer


@functools.cache
def whole_run(make: Callable[[], Any]) -> list[Any]:
    """What a run of three epochs is given that nothing stops; made once."""
    return fit(make())[0].seen


FEW = (
    "on_fit_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_fit_end",
)


def differences(
    make: Callable[[], Any], memory: Memory, whole: list[Any], steps: int | None = None, **options: Any
) -> list[str]:
    """Where what comes after a checkpoint is not the tail of the whole run."""
    wrong = []
    for path, done in memory.different():
        rest, trainer = fit(make(), memory, path, **options)
        count = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.global_step
        if rest.seen != whole[done:] or (steps is not None and rest.seen and count != (steps, steps)):
            wrong.append(f"{path}: after {done} batches come {[x[:2] for x in rest.seen]}, steps {count} of {steps}")
    return wrong
