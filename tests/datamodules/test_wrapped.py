"""Another LightningDataModule, wrapped: its hooks, loaders and state; and what its samples' noise is keyed by."""

import logging
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from shared import Items, Listener, Stream, assert_alike, levels, seen, together, trainer
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.datamodules.base import NoisingBase
from diffaug.datamodules.nested_batches import map_parts

FIELDS = ("x_t", "epsilon", "t", "x_0", "index", "view", "label")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS)


def pictures(count: int = 10) -> TensorDataset:
    """Images that say which they are."""
    values = torch.arange(count, dtype=torch.uint8)
    return TensorDataset(values.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), torch.arange(count))


class Inner(pl.LightningDataModule):
    """Says what is asked of it, in order."""

    def __init__(self, batch_size: int = 4, **loaders: Any) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size", logger=False)
        self.heard: list[Any] = []
        self.num_classes = 10
        self.state = 0
        self.loaders = loaders

    def prepare_data(self) -> None:
        self.heard.append("prepare_data")

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        self.heard.append(f"setup {getattr(stage, 'value', stage)} of {self.trainer.world_size}")

    def train_dataloader(self) -> Any:
        self.heard.append("train_dataloader")
        make = self.loaders.get("train")
        return make() if make else DataLoader(pictures(), batch_size=self.hparams.batch_size, shuffle=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.heard.append(f"before {type(batch).__name__}")
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.heard.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.heard.append("after")
        return batch

    def teardown(self, stage: str) -> None:
        self.heard.append("teardown")

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["state"]


class WithValidation(Inner):
    def val_dataloader(self) -> Any:
        make = self.loaders.get("val")
        return make() if make else DataLoader(pictures(), batch_size=4)


def fit(inner: pl.LightningDataModule, max_epochs: int = 1, process: ForwardProcess = PROCESS, **options: Any) -> Any:
    return seen(DiffusionDataModule.wrap(inner, process, **{"seed": 3, **options}), max_epochs)


def noise_of(batches: list[Any]) -> dict[tuple[int, int], tuple[torch.Tensor, int]]:
    return {
        (int(i), int(v)): (e, int(t))
        for b in batches
        for i, v, e, t in zip(b.index, b.view, b.epsilon, b.t, strict=True)
    }


def same_noise(a: list[Any], b: list[Any]) -> bool:
    one, other = noise_of(a), noise_of(b)
    return one.keys() == other.keys() and all(
        torch.equal(one[k][0], other[k][0]) and one[k][1] == other[k][1] for k in one
    )


def test_hooks_are_called_in_order_and_the_inner_sees_the_trainer(same_random_state):
    inner = Inner(batch_size=5)
    fit(inner)
    batch = ["before list", "transfer", "after"]
    assert inner.heard == ["prepare_data", "setup fit of 1", "train_dataloader", *batch, *batch, "teardown"]


def test_wrapped_and_owned_data_get_the_same_noise_and_order():
    """A wrapped loader is worth a dataset handed over: the same epoch, the same samples, the same draws."""
    wrapped = fit(WithValidation(), 2)
    owned = seen(DiffusionDataModule(pictures(), pictures(), process=PROCESS, batch_size=4, seed=3))
    for stage in ("train", "val"):
        assert_alike(wrapped[stage], owned[stage])


def test_noise_depends_on_neither_batch_size_nor_workers():
    a = fit(Inner(batch_size=10))["train"]
    b = fit(Inner(train=lambda: DataLoader(pictures(), 3, shuffle=True, num_workers=2)))["train"]
    assert same_noise(a, b)
    assert sorted(together(b, "label").tolist()) == list(range(10))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(pictures(), 3, shuffle=True),
        lambda: DataLoader(pictures(), 3, shuffle=True, num_workers=2, persistent_workers=True),
        lambda: DataLoader(pictures(), 3, sampler=WeightedRandomSampler([1.0] * 10, 30)),
        lambda: DataLoader(pictures(), batch_sampler=BatchSampler(RandomSampler(range(10)), 3, True)),
        lambda: DataLoader(pictures(), 3, sampler=DistributedSampler(range(10), 1, 0)),
        lambda: DataLoader(pictures(), 3, collate_fn=lambda items: default_collate([(x, y) for x, y in items])),
    ],
    ids=["shuffled", "workers", "weighted", "batch_sampler", "distributed", "collate"],
)
def test_loaders_that_can_be_made_again(loader, caplog):
    """Each image keeps its label and its index, and no two noised copies are alike, over two epochs."""
    with caplog.at_level(logging.INFO, "diffaug"):
        batches = fit(Inner(train=loader), 2)["train"]
    assert "Inner.train_dataloader(): noise keyed by sample index" in caplog.text
    index = together(batches, "index")
    assert torch.equal(together(batches, "label"), index)
    assert torch.equal(levels(batches), index)
    noise = together(batches, "epsilon").flatten(1)
    assert len(torch.unique(noise, dim=0)) == len(noise)
    assert {len(b.t) for b in batches} <= {1, 3}
    rest = len(index) - 3 * sum(len(b.t) == 3 for b in batches)
    assert rest == (0 if len(index) in (18, 60) else 2)


class OwnLoader(DataLoader[Any]):
    pass


class Pairs:
    """A custom batch_sampler."""

    def __len__(self) -> int:
        return 5

    def __iter__(self):
        return iter([[2 * i, 2 * i + 1] for i in range(5)])


@pytest.mark.parametrize(
    ("loader", "why"),
    [
        (lambda: OwnLoader(pictures(), 2), "the loader is a test_wrapped.OwnLoader"),
        (lambda: DataLoader(pictures(), batch_sampler=Pairs()), "a batch_sampler of its own, Pairs"),
        (lambda: DataLoader(pictures(), batch_size=None, sampler=BatchSampler(range(10), 2, False)), "batch_size=None"),
        (lambda: [tuple(t[i : i + 2] for t in pictures().tensors) for i in range(0, 10, 2)], "the loader is a"),
        (lambda: DataLoader(Stream(pictures()), 2), "as it is a stream"),
    ],
    ids=["class", "batch_sampler", "whole_batches", "foreign", "stream"],
)
def test_loaders_that_cannot_be_are_keyed_by_place_and_the_log_says_so(loader, why, caplog):
    make = (lambda: Foreign(loader())) if isinstance(loader(), list) else loader

    def batches() -> list[Any]:
        return fit(Inner(train=make), 2)["train"]

    with caplog.at_level(logging.WARNING, "diffaug"):
        first = batches()
    assert why in caplog.text
    assert "Inner.train_dataloader(): noise keyed by rank" in caplog.text
    noise = together(first, "epsilon").flatten(1)
    assert len(noise) == len(torch.unique(noise, dim=0)) == 20
    assert torch.equal(noise, together(batches(), "epsilon").flatten(1))


class Foreign:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_ranks_do_not_share_noise_where_keys_are_places(monkeypatch):
    noise = []
    for rank in range(3):
        monkeypatch.setattr(NoisingBase, "_ranks", lambda self, rank=rank: {"rank": rank, "ranks": 3})
        noise.append(together(fit(Inner(train=lambda: OwnLoader(pictures(), 2)))["train"], "epsilon"))
    assert len(torch.unique(torch.cat(noise).flatten(1), dim=0)) == 30


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        ({"a": [0, 0]}, r"\{'a': \[\*, \*\]\}"),
        ({"a": 0, "b": 0}, r"\{'a': \*, 'b': \*\}"),
        ([0, 0], r"\[\*, \*\]"),
        (0, r"\*"),
    ],
)
def test_sub_batches_must_stay_apart(batch, shape):
    loaders = {"a": [DataLoader(pictures(), 2)] * 2, "b": DataLoader(pictures(), 2)}
    wanted = r"nested as its loaders are, \{'a': \[\*, \*\], 'b': \*\}, but it is "
    with pytest.raises(ValueError, match=f"{wanted}{shape}: the wrapped"):
        map_parts(str, loaders, batch)


def test_a_hook_may_make_a_tuple_of_a_list_of_sub_batches():
    assert map_parts(str, [DataLoader(pictures(), 2)] * 2, (1, 2)) == ["1", "2"]


def test_a_batch_larger_than_a_row_of_keys():
    noise = together(fit(Inner(train=lambda: OwnLoader(pictures(250), 250)))["train"], "epsilon")
    more = fit(Inner(train=lambda: OwnLoader(torch.utils.data.ConcatDataset([pictures(250)] * 3), 600)))["train"]
    assert torch.equal(more[0].epsilon[:250], noise)
    assert len(torch.unique(together(more, "epsilon").flatten(1), dim=0)) == 750


def test_several_loaders_have_noise_of_their_own():
    inner = Inner(train=lambda: {"a": DataLoader(pictures(), 4), "b": [DataLoader(pictures(), 2)]})

    class Nested(Listener):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen["train"].append(batch)
            return super().training_step(batch["a"], batch_idx)

    model = Nested()
    trainer(max_epochs=2).fit(model, DiffusionDataModule.wrap(inner, PROCESS))
    batches = model.seen["train"][::2]
    a = [batch["a"] for batch in batches]
    b = [batch["b"][0] for batch in batches]
    assert len(batches) == 10  # the longer's length; the shorter begins again, with new noise
    assert [len(x.t) for x in a[:5]] == [4, 4, 2, 4, 4]
    noise = torch.cat([together(a, "epsilon"), together(b, "epsilon")]).flatten(1)
    assert len(noise) == len(torch.unique(noise, dim=0)) == 2 * (18 + 10)
    assert torch.equal(together(a, "label"), together(a, "index"))
    assert torch.equal(together(b, "label"), together(b, "index"))


def test_validation_loaders_one_after_another_and_together():
    def loaders() -> list[Any]:
        return [DataLoader(pictures(), 4), DataLoader(pictures(), 5)]

    apart = fit(WithValidation(val=loaders))["val"]
    assert [len(b.t) for b in apart] == [4, 4, 2, 5, 5]
    assert len(torch.unique(together(apart, "epsilon").flatten(1), dim=0)) == 20
    combined = fit(WithValidation(val=lambda: CombinedLoader(loaders(), "max_size")))["val"]
    assert [[part and len(part.t) for part in batch] for batch in combined] == [[4, 5], [4, 5], [2, None]]
    assert same_noise([b[0] for b in combined], apart[:3])
    assert same_noise([b[1] for b in combined if b[1]], apart[3:])


def test_only_the_loaders_that_the_inner_has_are_offered():
    def lacks(inner: pl.LightningDataModule) -> set[str]:
        data = DiffusionDataModule.wrap(inner, PROCESS)
        names = [f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")]
        return {name for name in names if not is_overridden(name, data)}

    assert lacks(Inner()) == {"val_dataloader", "test_dataloader", "predict_dataloader"}
    assert lacks(WithValidation()) == {"test_dataloader", "predict_dataloader"}
    assert fit(Inner())["val"] == []
    from_datasets = pl.LightningDataModule.from_datasets(pictures(), val_dataset=pictures(), batch_size=4)
    assert lacks(from_datasets) == {"test_dataloader", "predict_dataloader"}
    batches = fit(from_datasets)
    assert sorted(together(batches["train"], "index").tolist()) == together(batches["val"], "index").tolist()


def test_test_and_predict():
    class All(WithValidation):
        def test_dataloader(self) -> Any:
            return DataLoader(pictures(), 4)

        def predict_dataloader(self) -> Any:
            return DataLoader(pictures(), 4)

    data, listener, run = DiffusionDataModule.wrap(All(), PROCESS), Listener(), trainer()
    run.validate(listener, data, verbose=False)
    run.fit(listener, data)
    run.test(listener, data, verbose=False)
    assert [len(batch) for batch in run.predict(listener, data)] == [4, 4, 2]
    noise = [together(listener.seen[stage], "epsilon").flatten(1) for stage in ("val", "train", "test", "predict")]
    assert len(torch.unique(noise[0], dim=0)) == 10  # seen twice
    assert len(torch.unique(torch.cat(noise), dim=0)) == 40


def test_the_inner_s_device_transforms_come_before_the_noise_and_are_keyed(same_random_state):
    class Flips(Inner):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            image, label = batch
            return image + torch.randint(100, (len(image), 1, 1, 1), dtype=torch.uint8), label

    a, b = (levels(fit(Flips(), 2)["train"]) for _ in range(2))
    assert torch.equal(a, b)
    assert len(set(a.tolist())) > 10
    assert not torch.equal(a[:10].sort().values, a[10:].sort().values)


def test_attributes_hparams_and_state_are_the_inner_s(tmp_path):
    inner = Inner(batch_size=5)
    data = DiffusionDataModule.wrap(inner, PROCESS, seed=1)
    assert (data.num_classes, data.hparams.batch_size, data.inner) == (10, 5, inner)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        data.nothing_like_it  # noqa: B018
    inner.state = 7
    run = trainer()
    run.fit(Listener(), data)
    assert run.datamodule is data
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = Inner(batch_size=5)
    trainer(max_epochs=2).fit(
        Listener(), DiffusionDataModule.wrap(again, PROCESS, seed=1), ckpt_path=tmp_path / "a.ckpt"
    )
    assert again.state == 7
    with pytest.raises(ValueError, match=r"seed: 1 -> 2"):
        trainer(max_epochs=2).fit(
            Listener(), DiffusionDataModule.wrap(Inner(), PROCESS, seed=2), ckpt_path=tmp_path / "a.ckpt"
        )


def test_hparams_do_not_clash_with_the_model_s(tmp_path):
    class Model(Listener):
        def __init__(self, batch_size: int) -> None:
            super().__init__()
            self.save_hyperparameters()

    logger = pl.loggers.CSVLogger(tmp_path)
    trainer(logger=logger).fit(Model(batch_size=7), DiffusionDataModule.wrap(Inner(batch_size=5), PROCESS))
    assert "batch_size: 7" in (tmp_path / "lightning_logs" / "version_0" / "hparams.yaml").read_text()


def test_it_survives_pickle():
    data = DiffusionDataModule.wrap(WithValidation(), PROCESS, seed=1)
    again = pickle.loads(pickle.dumps(data))
    assert again.num_classes == 10
    listener = Listener()
    trainer().fit(listener, again)
    assert len(listener.seen["train"]) == 3


def test_dict_batches_and_their_key():
    def item(i: int) -> dict[str, Any]:
        return {"image": torch.full((1, 4, 4), i / 10), "mask": torch.zeros(1, 4, 4), "label": i}

    inner = Inner(train=lambda: DataLoader(Items(item, 10), 4))
    with pytest.raises(ValueError, match=r"the batch of Inner\.train_dataloader\(\) holds 2 images.*data\.image_key"):
        fit(inner)
    batches = fit(inner, image_key="image")["train"]
    assert torch.equal(together(batches, "label"), together(batches, "index"))


def test_views_and_label_dropout():
    batches = fit(Inner(), views=2, label_dropout=1.0, null_label=10)["train"]
    assert together(batches, "label").tolist() == [10] * 20
    assert len(torch.unique(together(batches, "epsilon").flatten(1), dim=0)) == 20


def test_a_hook_that_drops_samples_is_refused():
    class Drops(Inner):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [part[1:] for part in batch]

    with pytest.raises(ValueError, match=r"has 3 images of 4 samples: .* Drops must keep one image a sample"):
        fit(Drops())


@pytest.mark.parametrize("inner", [None, "data", DiffusionDataModule(pictures(), process=PROCESS)])
def test_what_cannot_be_wrapped(inner):
    with pytest.raises(ValueError, match=r"data\.inner must be a"):
        DiffusionDataModule.wrap(inner, PROCESS)


def test_floats_outside_the_range_are_refused_at_the_first_batch():
    class Bright(Inner):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0].float(), batch[1]]

    with pytest.raises(ValueError, match=r"spans \[\d, \d\], outside process\.value_range=\[-1, 1\]"):
        fit(Bright())


def test_it_can_be_made_in_yaml():
    from hydra.utils import instantiate

    data = instantiate(
        {
            "_target_": "diffaug.DiffusionDataModule.wrap",
            "inner": {"_target_": "test_wrapped.Inner", "batch_size": 3},
            "process": {"_target_": "diffaug.ForwardProcess", "schedule": {"_target_": "diffaug.LinearBeta"}},
        }
    )
    assert data.hparams.batch_size == 3


def test_clean_images_for_pictures():
    data = DiffusionDataModule.wrap(Inner(), PROCESS)
    images = data.clean_images("train", 4)
    assert images[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    stream = Inner(train=lambda: DataLoader(Stream(pictures()), 2))
    assert DiffusionDataModule.wrap(stream, PROCESS).clean_images("train", 4) is None
    owned = DiffusionDataModule(pictures(), process=PROCESS)
    owned.setup("fit")
    assert torch.equal(owned.clean_images("train", 4), images)


class Tuned(Listener):
    validation_step = None  # Lightning's Tuner wants a val_dataloader where there is one


class Sized(pl.LightningDataModule):
    """Its loader's batch size is an attribute, or only a hyperparameter."""

    def __init__(self, batch_size: int, attribute: bool) -> None:
        super().__init__()
        self.save_hyperparameters("batch_size", logger=False)
        if attribute:
            self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(pictures(40), batch_size=getattr(self, "batch_size", self.hparams.batch_size), shuffle=True)


@pytest.mark.slow
@pytest.mark.parametrize("attribute", [True, False])
def test_the_tuner_tries_the_sizes_that_it_reports(attribute, tmp_path):
    inner, listener = Sized(2, attribute), Tuned()
    data = DiffusionDataModule.wrap(inner, PROCESS)
    tuner = Tuner(trainer(max_epochs=1, num_sanity_val_steps=0, default_root_dir=tmp_path))
    found = tuner.scale_batch_size(listener, datamodule=data, init_val=2, max_trials=3, steps_per_trial=1)
    assert found == 8
    assert {len(batch.t) for batch in listener.seen["train"]} == {2, 4, 8}
    assert (inner.batch_size if attribute else inner.hparams.batch_size) == 8
    assert next(iter(data.train_dataloader())).places[0].rows.shape[0] == 8


def test_the_tuner_is_told_that_there_is_no_batch_size(tmp_path):
    class Without(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(pictures(), batch_size=2)

    tuner = Tuner(trainer(default_root_dir=tmp_path))
    with pytest.raises(MisconfigurationException, match="batch_size not found in"):
        tuner.scale_batch_size(Tuned(), datamodule=DiffusionDataModule.wrap(Without(), PROCESS))


def test_what_is_set_is_whose_it_is():
    inner = Inner()
    inner.views = 7
    data = DiffusionDataModule.wrap(inner, PROCESS, views=2)
    data.num_classes, data.views, data.mine = 5, 3, 1
    assert (inner.num_classes, data.num_classes) == (5, 5)
    assert (inner.views, data.views) == (7, 3)
    assert not hasattr(inner, "mine")
    again = pickle.loads(pickle.dumps(data))
    again.num_classes = 6
    assert again.inner.num_classes == 6


def test_options_of_the_inner_one_are_refused():
    with pytest.raises(
        ValueError, match=r"no options \['batch_size', 'shuffle'\]: .* are Inner's own.* takes seed, .*views"
    ):
        DiffusionDataModule.wrap(Inner(), PROCESS, batch_size=8, shuffle=False, views=2)
