"""Going on where the times are drawn by the losses so far: each batch is learned from once."""

from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import OnExceptionCheckpoint
from resumable import HOOKS, Fails, Memory, Model, Saver, fit
from small_data import FIELDS, own

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.times import Importance

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_lightning", "draws_once")]


class Learns(Model):
    """Lets the process learn from losses that depend on the sample and on the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.datamodule.process.times.update(batch.t, 1.0 + batch.index.float() ** 2 * (1 + self.current_epoch))
        return super().training_step(batch, batch_idx)


def learning() -> DiffusionDataModule:
    times = Importance(history=2)
    return own(process=ForwardProcess(LinearBeta(timesteps=3), times, fields=FIELDS, compile=False))


@pytest.mark.slow
@pytest.mark.parametrize("fails", [None, "on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_a_batch_that_comes_again_is_learned_from_once(fails, tmp_path):
    """Those of a batch that is not done are not in a checkpoint, whether it failed or not (then: any there can be)."""
    whole, _ = fit(learning(), memory := Memory(), model=Learns(), callbacks=(Saver(HOOKS),), max_epochs=2)
    memories = [] if fails else [memory]
    for call in (3, 6, 9) if fails else ():
        memories.append(Memory())
        callbacks = (OnExceptionCheckpoint(tmp_path), Fails(fails, call))
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(learning(), memories[-1], model=Learns(), callbacks=callbacks, enable_checkpointing=True, max_epochs=2)
    for memory in memories:
        assert memory.done
        for path, done in memory.different():
            rest, _ = fit(learning(), memory, path, model=Learns(), max_epochs=2)
            assert rest.seen == whole.seen[done:], path


def test_a_trainer_that_fits_again_learns_once_from_the_batch_that_failed():
    whole, _ = fit(learning(), model=Learns())
    for call in (5, 6, 8):  # the last batch of an epoch, the first of the next, and one inside it
        data, model, memory = learning(), Learns(), Memory()
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(data, memory, model=model, callbacks=(Fails("on_before_backward", call),))
        assert model.seen.pop() == whole.seen[call - 1], "its step failed"
        memory.trainer.fit(model, data)
        assert model.seen == whole.seen, call


def test_a_fit_begins_without_the_losses_of_another():
    data = learning()
    first, _ = fit(data, model=Learns())
    again, _ = fit(data, model=Learns())
    assert again.seen == first.seen
