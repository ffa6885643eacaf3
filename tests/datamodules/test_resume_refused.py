"""What a resume cannot be exact in, other batches that do not fit and other recipes, is refused with the difference."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from resumable import FEW, Memory, Model, Saver, differences, fit
from small_data import FIELDS, PROCESS, buckets, images, mixture, own, side_by_side, stream, wrapped
from torch.utils.data import DataLoader, Sampler, TensorDataset, WeightedRandomSampler

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.order.epoch import describe_sampler

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet_lightning")]


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
    @pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (2, 12), (6, 4), (4, 4), (8, 24)])
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
        memory, path = self.checkpoint(stream())
        with pytest.raises(ValueError, match="of 8, and a stream goes on exactly only in the same batches"):
            fit(stream(batch_size=8), memory, path)
        with pytest.raises(ValueError, match=r"train\.workers: 0 -> 2"):
            fit(stream(num_workers=2), memory, path)

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
            fit(stream(), overfit_batches=2)
