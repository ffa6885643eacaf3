"""LastCheckpointBase: last.ckpt, saved periodically and on SIGTERM or Ctrl-C."""

import logging
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from diffaug.checks import integer, number
from diffaug.datamodules.lightning_packages import LightningModule, Trainer
from diffaug.training.callbacks import CallbackBase
from diffaug.training.checkpoint_io import claim

_log = logging.getLogger("diffaug")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # by which a system, submitit and a user tell of the end
_TWICE = 0.3  # seconds within which one Ctrl-C may come twice: to every process, and handed on by a parent
_HEARD = (
    b"\nCtrl-C: saving after this step (or the validation under way), then ending. Once more ends at once, unsaved.\n"
)


class LastCheckpointBase(CallbackBase):
    """Keep ``last.ckpt``: every so many minutes, after each validation, at the end, and when the run is told to end.

    Told by SIGTERM, or by SIGINT (Ctrl-C), the ranks agree on a step after which all of them save, and end; a second
    SIGINT ends a process at once. Under submitit SIGTERM makes them save and go on until its own signal, SIGUSR2: then
    rank 0 puts the job back into the queue, and all end. Training alone does this: what comes within a validation takes
    effect after it. (Lightning's ModelCheckpoint leaves last.ckpt as it was wherever a validation was not among the
    best, and its time interval costs the ranks a broadcast at every step.)

    A fit claims its folder, and a second run that would write there is refused.

    Arguments:
        folder: where to.
        minutes: the most that a run which is killed loses.
        every: after how many steps, at least 1, several ranks ask each other whether it is time; one asks at each.
    """

    def __init__(self, folder: str, *, minutes: float = 10.0, every: int = 20) -> None:
        self.path = Path(folder, "last.ckpt")
        self.minutes = number("callbacks.last.minutes", minutes, above=0)
        self.every = integer("callbacks.last.every", every, at_least=1)
        self._saved, self._seen, self._when = -1, -1, time.monotonic()
        self._told: set[int] = set()
        self._ending: signal.Signals | None = None
        self._before: dict[int, Any] = {}  # whose signals they were
        self._claim: IO[str] | None = None
        self._fits = self._speaks = False  # whether a fit that saves is under way, and whether this rank says so

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or trainer.fast_dev_run:
            return
        refusal = None
        if trainer.is_global_zero and self._claim is None:
            claimed = claim(self.path.parent)
            if isinstance(claimed, str):
                refusal = claimed
            else:
                self._claim = claimed
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:  # all ranks end; an error of another would end rank 0 before it has said why
            raise RuntimeError(refusal) if trainer.is_global_zero else SystemExit(0)
        self._fits, self._speaks = True, trainer.is_global_zero
        register_after_fork(self, LastCheckpointBase._keep_forked)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._fits:
            return
        self._keep_spawned(trainer)
        self._told = set()
        self._ending, self._when, self._seen, self._saved = None, time.monotonic(), trainer.global_step, -1
        for number_ in _SIGNALS:
            if number_ == signal.SIGTERM or callable(signal.getsignal(number_)):
                try:
                    self._before[number_] = signal.signal(number_, self._hear)
                except ValueError:  # not the main thread, where no signal arrives
                    break

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fits:
            self._keep_spawned(trainer)  # its loaders may be new ones

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if 0 < trainer.max_steps <= step:  # several optimizers step past it
            self._save(trainer)
        if step == self._seen or (trainer.world_size > 1 and step % self.every):
            return  # within an accumulation, whose gradients no checkpoint holds; or not yet
        self._seen = step
        due = trainer.should_stop or (trainer.is_global_zero and time.monotonic() - self._when >= 60 * self.minutes)
        if self._agree(trainer, due):
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end(trainer)  # here, for the loggers have the step by now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._saved = -1  # one saved before it does not know that this validation was the best
            self._save(trainer)
            self._agree(trainer)  # all ranks are here, so what was heard within it need not wait for ``every`` steps

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # too late to save: a callback that averages has put the averages in the weights' place
        if self._fits and self._saved >= 0:
            self._agree(trainer)
            self._end(trainer)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _hear(self, told: int, _: Any) -> None:
        """Note a signal; after the first SIGINT leave the second to the system, which waits for nothing."""
        if told != signal.SIGINT:
            self._told.add(told)
        elif told not in self._told:  # else it is the same one again
            self._told.add(told)
            time.sleep(_TWICE)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self._speaks:
                os.write(2, _HEARD)  # a log may be in the middle of a line here

    def _keep_forked(self) -> None:
        """Make processes forked from this one, such as a loader's workers, ignore SIGINT."""
        if self._fits:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _keep_spawned(self, trainer: Trainer) -> None:
        """Make workers that are not forked ignore SIGINT too."""
        for loader in tree_leaves([trainer.train_dataloader, trainer.val_dataloaders]):
            if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, _IgnoreInterrupt):
                loader.worker_init_fn = _IgnoreInterrupt(loader.worker_init_fn)

    def _agree(self, trainer: Trainer, due: bool = False) -> bool:
        """Agree over the ranks whether to save: on any of them it is due, or a signal came since last asked."""
        heard, self._told = self._told, set()
        known = [due, *(number_ in heard for number_ in _SIGNALS)]
        if trainer.world_size > 1:  # what any rank knows, all do
            mine = torch.tensor(known, dtype=torch.int32, device=trainer.strategy.root_device)
            known = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        _, terminate, requeue, interrupt = known
        if interrupt:
            self._ending = signal.SIGINT
        elif requeue:
            self._ending = signal.SIGUSR2
        elif terminate and signal.SIGUSR2 not in self._before:
            self._ending = signal.SIGTERM
        return any(known)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved and self._fits:
            trainer.save_checkpoint(self.path, weights_only=False)  # unsaid, Lightning logs what it takes
            self._saved, self._when = trainer.global_step, time.monotonic()

    def _end(self, trainer: Trainer) -> None:
        told, self._ending = self._ending, None
        if told is None:
            return
        before = self._before.get(told)
        self._restore()
        if trainer.is_global_zero:
            _log.warning(
                "%s: saved step %d to %s, and ending. The same command with hydra.run.dir=%s goes on from there.",
                told.name,
                self._saved,
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

    def _release(self) -> None:
        self._fits = False
        if self._claim is not None:
            self._claim.close()
            self._claim = None


class _IgnoreInterrupt:
    """A worker_init_fn of a loader: its workers ignore SIGINT, which a terminal sends to every process."""

    def __init__(self, inner: Callable[[int], object] | None) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.inner is not None:
            self.inner(worker)
