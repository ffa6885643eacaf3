"""Going on from any checkpoint, under any Trainer setting: exactly, or refused.

One run saves a checkpoint at every hook of every batch. Each is gone on from in a new Trainer, and what that hands out
must be, bit for bit, what the first run handed out after the batches that were done when it was saved.
"""

import io
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from shared import Shapes
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Mixture
from diffaug.order.epoch import describe_sampler
from diffaug.pytorch_lightning import LastCheckpoint
from diffaug.times import Importance, PerImage, Stratified, Uniform

pytestmark = pytest.mark.filterwarnings("ignore")
FIELDS = ("x_t", "epsilon", "t", "index", "view")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
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


@pytest.fixture(autouse=True)
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


def images(count: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous())


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


def own(count: int = 20, process: ForwardProcess = PROCESS, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(images(count), images(6), process=process, **{"batch_size": 4, "seed": 5, **options})


class Inner(pl.LightningDataModule):
    def __init__(self, train: Callable[[], Any]) -> None:
        super().__init__()
        self.train = train

    def train_dataloader(self) -> Any:
        return self.train()

    def val_dataloader(self) -> Any:
        return DataLoader(images(6), 4)


def wrapped(train: Callable[[], Any] = lambda: DataLoader(images(), 4, shuffle=True), **options: Any) -> Any:
    return DiffusionDataModule.wrap(Inner(train), PROCESS, **{"seed": 5, **options})


class Numbers(IterableDataset[Any]):
    """A stream, sized or not."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(images(self.count))


class SizedNumbers(Numbers):
    def __len__(self) -> int:
        return self.count


def covered(coverage: Any) -> Callable[[], DiffusionDataModule]:
    process = ForwardProcess(LinearBeta(), Uniform(coverage=coverage), fields=FIELDS, compile=False)
    return lambda: own(process=process)


def side_by_side(mode: str, *loaders: Callable[[], DataLoader[Any]]) -> Callable[[], Any]:
    return lambda: wrapped(lambda: CombinedLoader({str(i): loader() for i, loader in enumerate(loaders)}, mode))


def buckets(batch_size: int = 4, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(
        Shapes(22), Shapes(9), process=PROCESS, **{"batch_size": batch_size, "seed": 5, **options}
    )


def mixture(batch_size: int = 4, **weights: float) -> DiffusionDataModule:
    sets = {"few": images(3), "many": images(18)}
    mixed = Mixture(sets, {0: {"few": 1, "many": 1}, 2: weights or {"few": 2, "many": 1}})
    return DiffusionDataModule(mixed, images(6), process=PROCESS, batch_size=batch_size, seed=5)


TWO = (lambda: DataLoader(images(22), 4, shuffle=True), lambda: DataLoader(images(7), 4))
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
    "stream": (lambda: DiffusionDataModule(Numbers(18), images(6), process=PROCESS, batch_size=4, seed=5), {}),
    "sized_stream": (lambda: DiffusionDataModule(SizedNumbers(18), process=PROCESS, batch_size=4, seed=5), {}),
    "limited_stream": (
        lambda: DiffusionDataModule(Numbers(18), process=PROCESS, batch_size=4, seed=5),
        {"limit_train_batches": 3},
    ),
    **{
        mode: (
            side_by_side(mode, *TWO),
            {},
        )
        for mode in ("max_size_cycle", "max_size", "min_size")
    },
    "limited_cycle": (
        side_by_side("max_size_cycle", *TWO),
        {"limit_train_batches": 4},
    ),
    **{
        f"stream_{mode}": (
            side_by_side(mode, lambda: DataLoader(images(7), 4, shuffle=True), lambda: DataLoader(Numbers(22), 4)),
            {},
        )
        for mode in ("max_size_cycle", "min_size")
    },
    "short_stream_cycle": (
        side_by_side(
            "max_size_cycle", lambda: DataLoader(images(26), 4, shuffle=True), lambda: DataLoader(Numbers(9), 4)
        ),
        {},
    ),
}
QUICK = ("plain", "buckets")
THOROUGH = ("wrapped", "no_max_epochs", "accumulate", "val_check_2")
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
    for path, done in memory.done.items():
        rest, trainer = fit(make(), memory, path, **options)
        count = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.global_step
        if rest.seen != whole[done:] or (steps is not None and rest.seen and count != (steps, steps)):
            wrong.append(f"{path}: after {done} batches come {[x[:2] for x in rest.seen]}, steps {count} of {steps}")
    return wrong


@pytest.mark.parametrize(
    "setting", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_every_checkpoint_is_gone_on_from_exactly(setting):
    make, options = SETTINGS[setting]
    memory = Memory()
    whole, trainer = fit(make(), memory, callbacks=(Saver(HOOKS if setting in THOROUGH else FEW),), **options)
    assert len(memory.files) > 20
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
    """By max_steps, a callback, a timer, inside an epoch or at its end: then made longer."""
    whole, _ = fit(make())
    memory = Memory()
    cut, trainer = fit(make(), memory, callbacks=(*(c() for c in callbacks), Saver(FEW)), **options)
    trainer.save_checkpoint("by hand, after the fit")
    assert 0 < len(cut.seen) < len(whole.seen)
    assert cut.seen == whole.seen[: len(cut.seen)]
    wrong = differences(make, memory, whole.seen)
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


FAILING = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook",
    [
        hook if hook in ("on_train_batch_start", "on_train_batch_end") else pytest.param(hook, marks=pytest.mark.slow)
        for hook in FAILING
    ],
)
@pytest.mark.parametrize(
    "save",
    [lambda folder: OnExceptionCheckpoint(folder), lambda folder: ModelCheckpoint(folder, save_on_exception=True)],
    ids=["OnExceptionCheckpoint", "ModelCheckpoint"],
)
def test_a_batch_that_failed_comes_again(hook, save, tmp_path):
    whole, _ = fit(own())
    saved = 0
    for call in (1, 2) if "epoch" in hook or "validation" in hook else (1, 3, 5, 6):
        memory, model = Memory(), Model()
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(own(), memory, model=model, callbacks=(save(tmp_path), Fails(hook, call)), enable_checkpointing=True)
        saved += len(memory.files)  # none where ModelCheckpoint has saved this step already, or none was taken
        wrong = differences(own, memory, whole.seen)
        assert not wrong, "\n".join(wrong)
    assert saved or "validation" in hook  # Lightning 2.6.0's ModelCheckpoint saves nothing there


class Learns(Model):
    """Lets the process learn from losses that depend on the sample and on the epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trainer.datamodule.process.times.update(batch.t, 1.0 + batch.index.float() ** 2 * (1 + self.current_epoch))
        return super().training_step(batch, batch_idx)


def learning() -> DiffusionDataModule:
    times = Importance(history=2)
    return own(process=ForwardProcess(LinearBeta(timesteps=3), times, fields=FIELDS, compile=False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fails",
    [
        pytest.param(None, marks=pytest.mark.slow),  # from every checkpoint that there can be
        *("on_train_batch_start", "on_before_backward", "on_before_optimizer_step"),
    ],
)
def test_a_batch_that_comes_again_is_learned_from_once(fails, tmp_path):
    """Importance draws by the losses so far: those of a batch that is not done are not in a checkpoint."""
    whole, _ = fit(learning(), memory := Memory(), model=Learns(), callbacks=(Saver(HOOKS),))
    memories = [] if fails else [memory]
    for call in (3, 6, 9) if fails else ():
        memories.append(Memory())
        callbacks = (OnExceptionCheckpoint(tmp_path), Fails(fails, call))
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(learning(), memories[-1], model=Learns(), callbacks=callbacks, enable_checkpointing=True)
    for memory in memories:
        assert memory.done
        for path, done in memory.done.items():
            rest, _ = fit(learning(), memory, path, model=Learns())
            assert rest.seen == whole.seen[done:], path


def test_a_trainer_that_fits_again_learns_once_from_the_batch_that_failed():
    whole, _ = fit(learning(), model=Learns())
    for call in range(5, 12):
        data, model, memory = learning(), Learns(), Memory()
        with pytest.raises(RuntimeError, match="as the test wants it"):
            fit(data, memory, model=model, callbacks=(Fails("on_before_backward", call),))
        assert model.seen.pop() == whole.seen[call - 1], "its step failed"
        memory.trainer.fit(model, data)
        assert model.seen == whole.seen, call


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
    "cut",
    [
        {"max_steps": 8},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"max_steps": 8, "val_check_interval": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_lightnings_checkpoints_are_gone_on_from(options, cut, tmp_path):
    """ModelCheckpoint at its defaults and at each of its options, where the fit ends with an epoch and inside one."""
    whole, _ = fit(own())
    memory = Memory()
    fit(own(), memory, callbacks=(ModelCheckpoint(tmp_path, **options),), enable_checkpointing=True, **cut)
    assert memory.files or options.get("every_n_epochs") == 2
    if options.get("save_weights_only"):
        with pytest.raises(KeyError, match="contains only the model"):
            differences(own, memory, whole.seen)
        return
    wrong = differences(own, memory, whole.seen)
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


class TestOtherBatches:
    """A resume with other batches: after the same samples, or refused with both sizes."""

    def of(self, batch_size: int, **options: Any) -> DiffusionDataModule:
        return own(24, batch_size=batch_size, **options)

    def flat(self, seen: list[Any]) -> list[Any]:
        """Epoch, index, t and noise of each sample, in order."""
        return [
            (epoch, index[8 * i : 8 * i + 8], t[8 * i : 8 * i + 8], epsilon[16 * i : 16 * i + 16])
            for epoch, _, ((_, epsilon, t, index, _),) in seen
            for i in range(len(index) // 8)
        ]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("before", "after"),
        [(4, 8), (8, 4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(2, 12), (6, 4), (4, 4), (8, 24)])],
    )
    def test_goes_on_after_the_same_samples(self, before, after):
        whole, _ = fit(self.of(before))
        every, memory = self.flat(whole.seen), Memory()
        fit(self.of(before), memory, callbacks=(Saver(("on_train_batch_end", "on_train_epoch_end", "on_train_end")),))
        exact = 0
        for path, done in memory.done.items():
            if done * before % 24 % after:
                both = rf"after \d+ batches of {before} images .* A batch is now one of {after}, .*"
                with pytest.raises(ValueError, match=both + rf"times the number of devices to {before} again"):
                    fit(self.of(after), memory, path)
            else:
                rest, _ = fit(self.of(after), memory, path)
                assert self.flat(rest.seen) == every[done * before :], path
                exact += 1
        assert exact >= 6

    def test_counters_follow(self):
        """Lightning's own batch numbers are those of a run in the new batches."""
        memory = Memory()
        fit(self.of(4), memory, callbacks=(Saver(("on_train_batch_end",)),))
        whole, _ = fit(self.of(8))
        path = next(path for path, done in memory.done.items() if done == 8)
        rest, _ = fit(self.of(8), memory, path)
        assert [x[:2] for x in rest.seen] == [x[:2] for x in whole.seen[4:]]

    def test_what_an_epoch_goes_through_must_stay(self):
        memory = Memory()
        fit(self.of(4), memory, callbacks=(Saver(("on_train_epoch_end",)),), limit_train_batches=3, max_epochs=1)
        (path,) = memory.files
        text = r"An epoch of this run goes through 12 images, but now it would go through 24.*limit_train_batches"
        with pytest.raises(ValueError, match=text):
            fit(self.of(4), memory, path)
        with pytest.raises(ValueError, match="12 images, but now it would go through 16"):
            fit(self.of(8), memory, path, limit_train_batches=2)
        rest, _ = fit(self.of(4, allow_changed_recipe=True), memory, path, max_epochs=2)
        assert [x[:2] for x in rest.seen] == [(1, i) for i in range(6)]
        rest, _ = fit(self.of(6), memory, path, limit_train_batches=2, max_epochs=2)
        assert len(rest.seen) == 2

    def test_it_can_be_allowed(self, caplog):
        memory = Memory()
        fit(self.of(4), memory, callbacks=(Saver(("on_train_batch_end",)),), max_steps=3)
        path = list(memory.files)[-1]
        rest, _ = fit(self.of(8, allow_changed_recipe=True), memory, path, max_epochs=1)
        assert [x[1] for x in rest.seen] == [1, 2]  # four images come twice, none is left out
        assert "after 3 batches of 4 images" in caplog.text

    def test_loaders_side_by_side_change_together(self):
        def two(a: int, b: int) -> Any:
            return side_by_side(
                "max_size_cycle",
                lambda: DataLoader(images(24), a, shuffle=True),
                lambda: DataLoader(images(12), b, shuffle=True),
            )()

        memory = Memory()
        fit(two(4, 2), memory, callbacks=(Saver(("on_train_batch_end",)),), max_steps=2)
        path = list(memory.files)[-1]
        rest, _ = fit(two(8, 4), memory, path, max_epochs=1)
        assert [x[1] for x in rest.seen] == [1, 2]
        with pytest.raises(ValueError, match="side by side have changed by different factors"):
            fit(two(8, 2), memory, path)

    def test_a_loader_that_has_begun_again(self):
        """Its laps end with a short batch, which other batches do not have in the same place."""

        def two(size: int) -> Any:
            short = lambda: DataLoader(images(9), size, shuffle=True)  # noqa: E731
            return side_by_side("max_size_cycle", lambda: DataLoader(images(24), size, shuffle=True), short)()

        memory = Memory()
        fit(two(4), memory, callbacks=(Saver(("on_train_batch_end",)),), max_steps=4)
        with pytest.raises(
            ValueError, match="begun again beside a longer one goes on exactly only in the same batches"
        ):
            fit(two(8), memory, list(memory.files)[-1], max_epochs=1)


class TestRefusals:
    """What a resume cannot be exact in is refused, with the difference."""

    def checkpoint(self, data: Any, steps: int = 2, **options: Any) -> tuple[Memory, str]:
        memory = Memory()
        fit(data, memory, callbacks=(Saver(("on_train_batch_end",)),), max_steps=steps, **options)
        return memory, list(memory.files)[-1]

    @pytest.mark.parametrize(
        ("before", "after", "difference"),
        [
            (own, lambda: own(24), r"train\.images: 20 -> 24"),
            (own, lambda: own(shuffle=False), r"train\.order: shuffled -> the dataset's"),
            (
                own,
                lambda: own(sampler=WeightedRandomSampler([1.0] * 20, 20)),
                r"shuffled -> WeightedRandomSampler of 20",
            ),
            (
                lambda: own(sampler=WeightedRandomSampler([1.0] * 20, 20)),
                lambda: own(sampler=WeightedRandomSampler([1.0] * 19 + [2.0], 20)),
                r"train\.order: WeightedRandomSampler of 20, \w+ -> WeightedRandomSampler of 20, \w+",
            ),
            (own, lambda: own(process=ForwardProcess(LinearBeta(), fields=(*FIELDS, "x_0"))), r"fields: .* -> .*x_0"),
            (own, lambda: own(transform=torch.nn.Flatten(2)), r"transform: None -> Flatten\("),
            (own, lambda: own(encoder=torch.nn.Conv2d(1, 2, 1)), r"encoder: None -> Conv2d of 4 parameters"),
            (own, lambda: own(device_transform=torch.clone), r"device_transform: None -> torch\.clone|clone"),
            (own, lambda: own(val_repeats=2), r"val_repeats: 1 -> 2"),
            (buckets, lambda: buckets(2), r"train\.order\.global batch: 4 -> 2"),
            (mixture, lambda: mixture(few=3, many=1), r"train\.weights: .* -> .*"),
            (wrapped, lambda: wrapped(lambda: DataLoader(images(21), 4, shuffle=True)), r"train\.images: 20 -> 21"),
            (wrapped, lambda: wrapped(lambda: DataLoader(images(), 4)), r"train\.order: shuffled -> the dataset's"),
        ],
    )
    def test_another_order_or_recipe(self, before, after, difference):
        memory, path = self.checkpoint(before())
        with pytest.raises(ValueError, match=rf"(?s)another recipe.*{difference}.*allow_changed_recipe=true"):
            fit(after(), memory, path)

    def test_what_a_dataset_says_of_itself(self):
        class Named(TensorDataset):
            def __init__(self, names: str) -> None:
                super().__init__(*images().tensors)
                self.names = names

            def recipe(self) -> dict[str, Any]:
                return {"files": self.names}

        def named(names: str) -> DiffusionDataModule:
            return DiffusionDataModule(Named(names), process=PROCESS, batch_size=4, seed=5)

        memory, path = self.checkpoint(named("abc"))
        rest, _ = fit(named("abc"), memory, path, max_epochs=1)
        assert len(rest.seen) == 3
        with pytest.raises(ValueError, match=r"train\.files: abc -> abd"):
            fit(named("abd"), memory, path)

    def test_samplers_of_any_kind(self):
        """torch takes any iterable; numbers that a sampler counts by are not what it is."""

        class Counts(Sampler[int]):
            epoch = calls = 0

            def __init__(self) -> None:
                self.groups = [[0, 1, 2], [3]]

            def set_epoch(self, epoch: int) -> None:
                self.epoch = epoch

            def __iter__(self) -> Iterator[int]:
                self.calls += 1
                return iter(range(self.epoch, 20))

            def __len__(self) -> int:
                return 20 - self.epoch

        for sampler in (range(20), list(range(20))):
            assert len(fit(own(sampler=sampler))[0].seen) == 15
        assert describe_sampler(range(12)) != describe_sampler(range(8, 20))
        counts = Counts()
        before = describe_sampler(counts)
        list(counts)
        assert describe_sampler(counts) == before

    @pytest.mark.slow
    def test_loaders_of_the_epoch(self):
        """A wrapped DataModule whose loaders depend on the epoch: exact within one, refused where another comes."""

        class Curriculum(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                assert self.trainer is not None
                return DataLoader(images(8 + 4 * self.trainer.current_epoch), 4, shuffle=True)

        def make(**options: Any) -> Any:
            return DiffusionDataModule.wrap(Curriculum(), PROCESS, seed=5, **options)

        memory, options = Memory(), {"reload_dataloaders_every_n_epochs": 1}
        whole, _ = fit(make(), memory, callbacks=(Saver(FEW),), **options)
        assert len(whole.seen) == 2 + 3 + 4
        refused = 0
        for path, done in memory.done.items():
            if done in (2, 5, 9) and path.endswith("_end"):  # the loader that comes next is another
                with pytest.raises(ValueError, match=r"(?s)train\.images: .*loaders of the epoch .*goes on exactly"):
                    fit(make(), memory, path, **options)
                rest, _ = fit(make(allow_changed_recipe=True), memory, path, **options)
                assert rest.seen == whole.seen[done:], path
                refused += 1
            else:
                rest, _ = fit(make(), memory, path, **options)
                assert rest.seen == whole.seen[done:], path
        assert 0 < refused < len(memory.done) / 2

    def test_in_order_false(self):
        with pytest.raises(ValueError, match=r"data\.in_order must be true: a resume goes on after .*, but got False"):
            own(num_workers=1, in_order=False)
        data = wrapped(lambda: DataLoader(images(), 4, num_workers=1, in_order=False))
        with pytest.raises(ValueError, match=r"Inner\.train_dataloader\(\)\.in_order must be true"):
            fit(data)

    def test_a_loader_that_begins_only_at_its_beginning(self):
        class Own(DataLoader[Any]):
            pass

        def foreign(**options: Any) -> Any:
            return wrapped(lambda: Own(images(), 4), **options)

        memory, path = self.checkpoint(foreign())
        with pytest.raises(ValueError, match=r"after 2 batches of an epoch, but a .*Own can only be begun at"):
            fit(foreign(), memory, path)
        memory, path = self.checkpoint(foreign(), 5)
        whole, _ = fit(foreign())
        rest, _ = fit(foreign(), memory, path)
        assert rest.seen == whole.seen[5:]

    @pytest.mark.slow
    def test_a_loader_with_a_state_of_its_own(self):
        class Stateful(DataLoader[Any]):
            """As torchdata's: goes on after the batches it has handed out."""

            done = start = 0

            def __iter__(self) -> Iterator[Any]:
                start, self.start = self.start, 0
                self.done = start
                for number, batch in enumerate(super().__iter__()):
                    if number >= start:
                        self.done += 1
                        yield batch

            def state_dict(self) -> dict[str, int]:
                return {"done": self.done % len(self)}

            def load_state_dict(self, state: dict[str, int]) -> None:
                self.start = state["done"]

        def make() -> Any:
            return wrapped(lambda: Stateful(images(), 4))

        memory = Memory()
        whole, trainer = fit(make(), memory, callbacks=(Saver(("on_train_batch_end", "on_train_epoch_end")),))
        assert not differences(make, memory, whole.seen, trainer.global_step)

    def test_a_stream_in_other_batches(self):
        def stream(batch_size: int, **options: Any) -> DiffusionDataModule:
            return DiffusionDataModule(Numbers(18), process=PROCESS, batch_size=batch_size, seed=5, **options)

        memory, path = self.checkpoint(stream(4))
        with pytest.raises(ValueError, match="of 8, and a stream goes on exactly only in the same batches"):
            fit(stream(8), memory, path)
        with pytest.raises(ValueError, match=r"train\.workers: 0 -> 2"):
            fit(stream(4, num_workers=2), memory, path)

    def test_a_checkpoint_of_another_datamodule(self):
        memory, path = self.checkpoint(wrapped())
        with pytest.raises(ValueError, match="does not say where its training was in its data"):
            fit(own(), memory, path)
        rest, _ = fit(own(allow_changed_recipe=True), memory, path, max_epochs=2)
        assert len(rest.seen) > 0

    def test_evaluation_of_a_checkpoint_is_free(self):
        """Its weights are wanted, not its training: other data and another schedule are right there."""
        memory, path = self.checkpoint(own())
        model, memory.trainer = Model(), pl.Trainer(accelerator="cpu", logger=False, plugins=[memory])
        memory.trainer.validate(model, own(24, seed=9), ckpt_path=path, verbose=False)

    def test_a_stream_cannot_be_overfit(self):
        with pytest.raises(ValueError, match=r"trainer\.overfit_batches cannot be used with data\.train, a stream"):
            fit(DiffusionDataModule(Numbers(18), process=PROCESS), overfit_batches=2)


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


def test_a_fit_begins_without_the_losses_of_another():
    process = ForwardProcess(LinearBeta(timesteps=3), Importance(history=1), fields=FIELDS, compile=False)
    data = own(process=process)

    class Learns(Model):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            process.times.update(batch.t, 1.0 + batch.t)
            return super().training_step(batch, batch_idx)

    first, _ = fit(data, model=Learns())
    again, _ = fit(data, model=Learns())
    assert again.seen == first.seen


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


@pytest.mark.slow
@pytest.mark.parametrize("make", [own, wrapped])
@pytest.mark.parametrize("persistent", [False, True])
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


def test_a_finished_run_that_is_given_again_counts_its_steps_as_before():
    """What is logged of it then, such as its validation, is of the last step and not of one before."""
    memory = Memory()
    fit(own(), memory, callbacks=(Saver(FEW),), max_steps=4)
    path = next(path for path, done in memory.done.items() if done == 4)
    _, trainer = fit(own(), memory, path, max_steps=4)
    assert trainer.global_step == trainer.fit_loop.epoch_loop._batches_that_stepped == 4


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
