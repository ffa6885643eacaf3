"""Going on under what of Lightning saves, averages and searches: its callbacks, its Tuner, its learning rates."""

import io
from datetime import timedelta
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.tuner import Tuner
from resumable import FEW, Memory, Model, Saver, differences, fit, whole_run
from small_data import own, wrapped

from diffaug.pytorch_lightning import LastCheckpoint

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_lightning", "draws_once")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_last": True},
        {"save_top_k": -1},
        {"save_top_k": -1, "every_n_epochs": 2},
        {"save_top_k": -1, "every_n_train_steps": 1},
        {"save_top_k": -1, "every_n_train_steps": 3, "save_last": True},
        {"save_top_k": -1, "train_time_interval": timedelta(microseconds=1)},
        {"save_top_k": 2, "monitor": "val_loss", "mode": "max"},
        {"save_top_k": -1, "save_on_train_epoch_end": True},
        {"save_top_k": -1, "save_on_train_epoch_end": False},
        {"save_weights_only": True, "save_last": True},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "cut", [{"max_steps": 8}, {"max_epochs": 2}, {"max_steps": 8, "val_check_interval": 2}], ids=str
)
def test_lightnings_checkpoints_are_gone_on_from(options, cut, tmp_path):
    """ModelCheckpoint at its defaults and at each of its options, where the fit ends with an epoch and inside one."""
    whole, memory = whole_run(own), Memory()
    fit(own(), memory, callbacks=(ModelCheckpoint(tmp_path, **options),), enable_checkpointing=True, **cut)
    assert memory.files or options.get("every_n_epochs") == 2
    if options.get("save_weights_only"):
        with pytest.raises(KeyError, match="contains only the model"):
            differences(own, memory, whole)
        return
    wrong = differences(own, memory, whole)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("make", [own, wrapped])
def test_weights_that_are_averaged_at_the_end(make):
    memory, swa = Memory(), {"swa_lrs": 0.05, "swa_epoch_start": 1}
    whole, _ = fit(make(), memory, callbacks=(StochasticWeightAveraging(**swa), Saver(FEW)))
    assert len(whole.seen) == 15
    plain, _ = fit(make())
    assert whole.seen == plain.seen
    for path, done in memory.done.items():
        if "fit_end" not in path:
            rest, _ = fit(make(), memory, path, callbacks=(StochasticWeightAveraging(**swa),))
            assert rest.seen == whole.seen[done:], path


@pytest.mark.slow
@pytest.mark.parametrize("make", [own, wrapped])
@pytest.mark.parametrize("epochs", [3, -1])
def test_a_search_for_a_learning_rate_leaves_no_trace(make, epochs, tmp_path):
    """Lightning's finder trains some batches, and goes back: then the whole run comes."""
    options = {"max_epochs": epochs, "max_steps": 15, "default_root_dir": tmp_path}
    whole, _ = fit(make(), **options)
    found, _ = fit(make(), callbacks=(LearningRateFinder(num_training_steps=7),), **options)
    assert found.seen[-15:] == whole.seen
    assert len(found.seen) > 15


@pytest.mark.slow
def test_a_search_for_a_batch_size_leaves_no_trace(tmp_path):
    """Lightning's scaler tries sizes for some batches each; the run after it is that of the size it found."""
    data, model = own(batch_size=2), Model()
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    found = Tuner(trainer).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=3, init_val=2)
    assert found == data.batch_size == 4
    model.seen.clear()
    trainer.fit(model, datamodule=data)
    whole, _ = fit(own(batch_size=4))
    assert model.seen == whole.seen


@pytest.mark.parametrize("minutes", [10, 1e-9], ids=["at the end", "when due"])
def test_the_last_checkpoint_knows_the_best_of_its_own_step(minutes, tmp_path):
    """Where it was saved in the step before a validation too: else a worse one after it would take the best's place."""

    class Better(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1 / len(self.seen))

    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss", enable_version_counter=False)
    memory = Memory()
    options = {"max_steps": 4, "val_check_interval": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    fit(own(), memory, model=Better(), callbacks=(best, LastCheckpoint(str(tmp_path), minutes=minutes)), **options)
    held = torch.load(io.BytesIO(memory.files[str(tmp_path / "last.ckpt")]), weights_only=True)
    assert held["global_step"] == 4
    assert held["callbacks"][best.state_key]["best_model_score"] == 1 / 4


@pytest.mark.slow
@pytest.mark.parametrize(("interval", "accumulate"), [("epoch", 1), ("step", 2)])
def test_learning_rates_go_on_exactly(interval, accumulate):
    """Also from a checkpoint of an epoch's end that was saved before Lightning had set the rate of the next."""

    class Falls(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return self.weight.sum()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            falls = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falls, "interval": interval}}

    memory, options = Memory(), {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    whole, _ = fit(own(), memory, model=Falls(), callbacks=(Saver(FEW),), **options)
    for path, done in memory.done.items():
        rest, _ = fit(own(), memory, path, model=Falls(), **options)
        assert rest.seen == whole.seen[done:], path


@pytest.mark.parametrize("plateau", [True, False])
def test_a_rate_that_falls_by_a_metric_goes_on_with_a_warning(plateau, caplog):
    class Falls(Model):
        def configure_optimizers(self) -> Any:
            optimizer, kinds = torch.optim.SGD(self.parameters(), lr=1.0), torch.optim.lr_scheduler
            falls = kinds.ReduceLROnPlateau(optimizer) if plateau else kinds.StepLR(optimizer, 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falls, "monitor": "val_loss"}}

    memory = Memory()
    fit(own(), memory, model=Falls(), callbacks=(Saver(("on_validation_end",)),))
    assert "the learning rate may fall" not in caplog.text
    fit(own(), memory, [*memory.files][1], model=Falls())
    assert ("the learning rate may fall later" in caplog.text) == plateau


class TwoOptimizers(Model):
    """Steps two optimizers by hand in each batch, so that global_step goes by two."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([self.weight], lr=0.01), torch.optim.SGD([self.weight], lr=0.01)]


@pytest.mark.parametrize("max_steps", [5, 6])
def test_two_optimizers_that_step_past_max_steps_leave_their_last_checkpoint(max_steps, tmp_path):
    whole, _ = fit(own(), model=TwoOptimizers())
    memory, last = Memory(), LastCheckpoint(str(tmp_path))
    options = {"max_steps": max_steps, "enable_checkpointing": True}
    cut, _ = fit(own(), memory, model=TwoOptimizers(), callbacks=(last,), **options)
    assert cut.seen == whole.seen[:3]
    rest, _ = fit(own(), memory, str(tmp_path / "last.ckpt"), model=TwoOptimizers())
    assert rest.seen == whole.seen[3:]
