"""Going on from any checkpoint, under any Trainer setting: exactly. See `resumable`."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint, Timer
from resumable import FEW, HOOKS, Fails, Memory, Model, Saver, differences, fit, whole_run
from shared import SizedStream, Stream
from small_data import FIELDS, buckets, images, mixture, own, side_by_side, stream, wrapped
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.times import PerImage, Stratified, Uniform

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_lightning", "draws_once")]


def covered(coverage: Any) -> Callable[[], DiffusionDataModule]:
    process = ForwardProcess(LinearBeta(), Uniform(coverage=coverage), fields=FIELDS, compile=False)
    return lambda: own(process=process)


def shuffled(count: int) -> DataLoader[Any]:
    return DataLoader(images(count), 4, shuffle=True)


TWO = (lambda: shuffled(22), lambda: DataLoader(images(7), 4))
WITH_STREAM = (lambda: shuffled(7), lambda: DataLoader(Stream(images(22)), 4))
SETTINGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (own, {}),
    "wrapped": (wrapped, {}),
    "no_max_epochs": (own, {"max_epochs": -1, "max_steps": 13}),
    "accumulate": (own, {"accumulate_grad_batches": 2}),
    "val_check_2": (own, {"val_check_interval": 2}),
    "val_check_half": (wrapped, {"val_check_interval": 0.5}),
    "val_check_over_epochs": (own, {"val_check_interval": 3, "check_val_every_n_epoch": None}),
    "val_every_2_epochs": (own, {"check_val_every_n_epoch": 2}),
    "limit_3": (own, {"limit_train_batches": 3}),
    "limit_3_wrapped": (wrapped, {"limit_train_batches": 3}),
    "limit_0.6": (own, {"limit_train_batches": 0.6}),
    "no_validation": (own, {"limit_val_batches": 0}),
    "overfit": (own, {"overfit_batches": 2}),
    "overfit_wrapped": (wrapped, {"overfit_batches": 2}),
    "no_sanity": (own, {"num_sanity_val_steps": 0}),
    "reload": (own, {"reload_dataloaders_every_n_epochs": 1}),
    "reload_wrapped": (wrapped, {"reload_dataloaders_every_n_epochs": 1}),
    "drop_last": (lambda: own(19, drop_last=True), {}),
    "uneven_accumulate": (lambda: own(18), {"accumulate_grad_batches": 3}),
    "views": (lambda: own(views=2), {}),
    "not_shuffled": (lambda: own(shuffle=False), {}),
    "stratified": (covered(Stratified()), {}),
    "per_image": (covered(PerImage()), {}),
    "buckets": (buckets, {}),
    "buckets_accumulate": (buckets, {"accumulate_grad_batches": 2}),
    "buckets_limit": (buckets, {"limit_train_batches": 0.6}),
    "buckets_overfit": (buckets, {"overfit_batches": 2}),
    "mixture": (mixture, {}),
    "mixture_overfit": (mixture, {"overfit_batches": 2}),
    "weighted": (lambda: own(sampler=WeightedRandomSampler([1.0] * 10 + [3.0] * 10, 18)), {}),
    "replacement": (lambda: wrapped(lambda: DataLoader(images(), 4, sampler=RandomSampler(images(), True, 18))), {}),
    "stream": (lambda: stream(val=images(6)), {}),
    "sized_stream": (lambda: stream(kind=SizedStream), {}),
    "limited_stream": (stream, {"limit_train_batches": 3}),
    **{mode: (side_by_side(mode, *TWO), {}) for mode in ("max_size_cycle", "max_size", "min_size")},
    "limited_cycle": (side_by_side("max_size_cycle", *TWO), {"limit_train_batches": 4}),
    **{f"stream_{mode}": (side_by_side(mode, *WITH_STREAM), {}) for mode in ("max_size_cycle", "min_size")},
    "short_stream_cycle": (
        side_by_side("max_size_cycle", lambda: shuffled(26), lambda: DataLoader(Stream(images(9)), 4)),
        {},
    ),
}
QUICK = ("plain",)
THOROUGH = ("wrapped", "accumulate", "val_check_2")
THREE = ("wrapped", "val_every_2_epochs", "mixture")
"""The settings that a third epoch adds something to: an epoch between two others, or what comes in the third."""


@pytest.mark.parametrize(
    "setting", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_every_checkpoint_is_gone_on_from_exactly(setting):
    make, options = SETTINGS[setting]
    options = {"max_epochs": 3 if setting in THREE else 2, **options}
    memory = Memory()
    whole, trainer = fit(make(), memory, callbacks=(Saver(HOOKS if setting in THOROUGH else FEW),), **options)
    assert len(memory.files) > 15
    wrong = differences(make, memory, whole.seen, trainer.global_step, **options)
    assert not wrong, "\n".join(wrong)


class Stops(Callback):
    """Tells the Trainer to stop at a step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 8:
            trainer.should_stop = True


class CountingTimer(Timer):
    """Lightning's Timer, whose clock counts steps."""

    def time_elapsed(self, stage: Any = "train") -> float:
        return float(getattr(self, "steps", 0))

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps = trainer.global_step
        super().on_train_batch_end(trainer, *args)


@pytest.mark.parametrize(
    ("options", "callbacks"),
    [
        ({"max_steps": 8}, ()),
        ({"max_steps": 8, "accumulate_grad_batches": 1, "val_check_interval": 2}, ()),
        ({"max_steps": 10}, ()),
        ({"max_epochs": 2}, ()),
        ({"max_epochs": -1, "max_steps": 8}, ()),
        ({}, (Stops,)),
        ({"min_epochs": 1}, (Stops,)),
        ({}, (lambda: CountingTimer({"seconds": 8}),)),
        ({}, (lambda: EarlyStopping("val_loss", patience=1, mode="min"),)),
        ({"val_check_interval": 2}, (lambda: EarlyStopping("val_loss", patience=1, mode="min"),)),
    ],
    ids=[
        "steps",
        "steps_val",
        "steps_at_the_end",
        "epochs",
        "no_epochs",
        "stop",
        "stop_min",
        "timer",
        "early",
        "early_inside",
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("make", [own, wrapped])
def test_a_run_that_was_cut_off_goes_on_exactly(make, options, callbacks):
    """By max_steps, a callback, a timer, inside an epoch or at its end: then made longer from near there."""
    whole, memory = whole_run(make), Memory()
    cut, trainer = fit(make(), memory, callbacks=(*(c() for c in callbacks), Saver(FEW)), **options)
    trainer.save_checkpoint("by hand, after the fit")
    assert 0 < len(cut.seen) < len(whole)
    assert cut.seen == whole[: len(cut.seen)]
    memory.done = {path: done for path, done in memory.done.items() if done >= len(cut.seen) - 1}
    wrong = differences(make, memory, whole)
    assert not wrong, "\n".join(wrong)


def test_one_trainer_that_fits_again_goes_on_where_it_was():
    whole, _ = fit(own())
    for steps in (5, 8):
        data, model = own(), Model()
        model, trainer = fit(data, model=model, max_steps=steps)
        assert model.seen == whole.seen[:steps]
        trainer.fit_loop.epoch_loop.max_steps = -1
        trainer.fit(model, data)
        assert model.seen == whole.seen, steps


def test_a_new_trainer_begins_anew():
    data = own()
    first, _ = fit(data, max_steps=8)
    again, _ = fit(data)
    assert again.seen[:8] == first.seen
    assert len(again.seen) == 15


NOT_OF_A_BATCH = ("fit_start", "sanity_check_end", "train_start", "train_end", "fit_end")
NOT_OF_A_BATCH += ("validation_epoch_start", "validation_epoch_end")
FAILING = [hook for hook in HOOKS if hook.removeprefix("on_") not in NOT_OF_A_BATCH]


@pytest.mark.slow
@pytest.mark.parametrize("hook", FAILING)
@pytest.mark.parametrize(
    "save",
    [lambda folder: OnExceptionCheckpoint(folder), lambda folder: ModelCheckpoint(folder, save_on_exception=True)],
    ids=["OnExceptionCheckpoint", "ModelCheckpoint"],
)
def test_a_batch_that_failed_comes_again(hook, save, tmp_path):
    saved = 0
    for call in (1, 2) if "epoch" in hook or "validation" in hook else (1, 3, 5, 6):
        memory, model = Memory(), Model()
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(own(), memory, model=model, callbacks=(save(tmp_path), Fails(hook, call)), enable_checkpointing=True)
        saved += len(memory.files)  # none where ModelCheckpoint has saved this step already, or none was taken
        wrong = differences(own, memory, whole_run(own))
        assert not wrong, "\n".join(wrong)
    assert saved or "validation" in hook  # Lightning 2.6.0's ModelCheckpoint saves nothing there


@pytest.mark.parametrize("make", [own, wrapped])
def test_overfit_batches_trains_the_same_few_noised_afresh(make):
    model, _ = fit(make(), overfit_batches=2)
    assert [x[:2] for x in model.seen] == [(epoch, batch) for epoch in range(3) for batch in range(2)]
    index = [parts[0][3] for _, _, parts in model.seen]
    assert index[:2] == index[2:4] == index[4:]
    assert index[0] == torch.arange(4).numpy().tobytes()
    assert len({parts[0][1] for _, _, parts in model.seen}) == 6


def test_a_fit_takes_the_seed_of_its_own_seed_everything(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    data, seen = own(seed=None), []
    for seed in (1, 2, 1):
        with torch.random.fork_rng():
            pl.seed_everything(seed, verbose=False)
        seen.append(fit(data)[0].seen)
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]
    assert data.seed == 1


@pytest.mark.slow
@pytest.mark.parametrize(("make", "persistent"), [(own, False), (wrapped, True)])
def test_workers_change_nothing(make, persistent):
    options = {"num_workers": 2, "persistent_workers": persistent}
    memory = Memory()
    plain, _ = fit(make())

    def with_workers() -> Any:
        return own(**options) if make is own else wrapped(lambda: DataLoader(images(), 4, shuffle=True, **options))

    whole, _ = fit(with_workers(), memory, callbacks=(Saver(("on_train_batch_end", "on_train_epoch_end")),))
    assert whole.seen == plain.seen
    memory.done = {path: done for path, done in memory.done.items() if done in (2, 5, 9, 15)}
    wrong = differences(with_workers, memory, whole.seen)
    assert not wrong, "\n".join(wrong)


def test_a_trial_run_leaves_no_state_and_goes_on_from_none(tmp_path):
    data = own()
    trial, _ = fit(data, fast_dev_run=2)
    whole, _ = fit(data, memory := Memory(), callbacks=(Saver(("on_validation_end",)),))
    assert trial.seen == whole.seen[:2]
    with pytest.raises(ValueError, match=r"fast_dev_run .* not on from a checkpoint.*ckpt_path=null"):
        fit(own(), memory, [*memory.files][1], fast_dev_run=2)


def test_a_finished_run_that_is_given_again_counts_its_steps_as_before():
    """What is logged of it then, such as its validation, is of the last step and not of one before."""
    memory = Memory()
    fit(own(), memory, callbacks=(Saver(FEW),), max_steps=4)
    path = next(path for path, done in memory.done.items() if done == 4)
    _, trainer = fit(own(), memory, path, max_steps=4)
    assert trainer.global_step == trainer.fit_loop.epoch_loop._batches_that_stepped == 4
