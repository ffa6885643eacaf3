"""DiffusionDataModule: what a user's training_step receives, and what a user is told when something is wrong."""

import gc
import itertools
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from shared import Listener, Stream, fit, pictures, together, trainer
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from diffaug import Cosine, DiffusionDataModule, ForwardProcess, LinearBeta, NoisyBatch
from diffaug.datamodules.sources import spread_indices
from diffaug.process import compiler

PROCESS = ForwardProcess(LinearBeta())
STREAM = Stream([torch.zeros(1, 4, 4)] * 4)


def test_every_stage_gives_triples(same_random_state):
    data = DiffusionDataModule(*(pictures() for _ in range(4)), process=PROCESS, batch_size=4, seed=1)
    listener, run = Listener(), trainer(num_sanity_val_steps=0)
    run.fit(listener, data)
    run.test(listener, data, verbose=False)
    predicted = run.predict(listener, data)
    assert [len(batch) for batch in predicted] == [4, 4, 2]
    for stage, batches in listener.seen.items():
        assert [type(batch) for batch in batches] == [NoisyBatch] * 3, stage
        assert together(batches, "x_t").shape == (10, 3, 6, 6)
    # Each stage has noise of its own, for the same images.
    noise = [together(batches, "epsilon").mean() for batches in listener.seen.values()]
    assert len({float(n) for n in noise}) == 4


def test_a_datamodule_without_validation():
    seen = fit(DiffusionDataModule(pictures(), process=PROCESS))
    assert seen["val"] == []
    assert len(seen["train"]) == 1


def test_a_loader_of_a_subclass_is_its_own():
    class Halved(DiffusionDataModule):
        def train_dataloader(self) -> Any:
            return itertools.islice(super().train_dataloader(), 2)

        def val_dataloader(self) -> Any:
            return super().val_dataloader()

    data = Halved(pictures(), pictures(), process=PROCESS, batch_size=2)
    seen = fit(data)
    assert [len(batches) for batches in (seen["train"], seen["val"])] == [2, 2 + 5]  # two to see that all is sane


@pytest.mark.parametrize("kind", ["map", "stream", "wrapped", "wrapped stream"])
def test_it_ends_with_its_loader_when_nobody_holds_it(kind):
    # In a cycle it would live until Python looks for cycles, and persistent workers would end only ten seconds later.
    source = Stream([torch.zeros(1, 4, 4)] * 4) if "stream" in kind else pictures()
    data = DiffusionDataModule(source, process=PROCESS)
    if "wrapped" in kind:
        inner = pl.LightningDataModule.from_datasets(source)
        data = DiffusionDataModule.wrap(inner, process=PROCESS)
    gc.collect()
    gc.disable()
    try:
        data.setup("fit")
        loader = data.train_dataloader()
        next(iter(loader))
        held = [weakref.ref(data), weakref.ref(loader)]
        del data, loader
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def test_validation_alone_then_training():
    """`validate` runs in inference mode: what it leaves behind must not break a later fit."""
    data = DiffusionDataModule(pictures(), pictures(), process=ForwardProcess(Cosine(timesteps=33)))
    listener, run = Listener(), trainer()
    run.validate(listener, data, verbose=False)
    run.fit(listener, data)


def test_fields_and_labels():
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "label", "x_0", "index"))
    images, labels = pictures().tensors
    seen = fit(DiffusionDataModule(pictures(), process=process, batch_size=4))["train"]
    index = together(seen, "index")
    assert sorted(index.tolist()) == list(range(10))
    assert torch.equal(together(seen, "label"), labels[index])
    torch.testing.assert_close(together(seen, "x_0"), images[index] / 127.5 - 1, rtol=0, atol=1e-6)


def test_transforms_are_applied_where_they_say():
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "x_0", "index"))
    seen_types = []

    def on_device(batch: torch.Tensor) -> torch.Tensor:
        seen_types.append((batch.dtype, batch.ndim))
        return batch.flip(-1)

    images = pictures().tensors[0]
    data = DiffusionDataModule(
        pictures(),
        pictures(),
        process=process,
        transform=v2.RandomCrop(4),
        eval_transform=v2.CenterCrop(4),
        device_transform=on_device,
    )
    seen = fit(data, num_sanity_val_steps=0)
    assert seen_types == [(torch.uint8, 4)]
    index, x_0 = together(seen["val"], "index"), together(seen["val"], "x_0")
    torch.testing.assert_close(x_0, images[index][:, :, 1:5, 1:5] / 127.5 - 1, rtol=0, atol=1e-6)
    for i, x in zip(together(seen["train"], "index"), together(seen["train"], "x_0"), strict=True):
        crops = [images[i][:, a : a + 4, b : b + 4].flip(-1) / 127.5 - 1 for a in range(3) for b in range(3)]
        assert any(torch.allclose(x, crop, atol=1e-6) for crop in crops)


def test_views_share_an_image_and_have_their_own_noise():
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "x_0", "view", "label"))
    (batch,) = fit(DiffusionDataModule(pictures(), process=process, views=3))["train"]
    assert len(batch.t) == 30
    assert torch.equal(batch.x_0[0::3], batch.x_0[2::3])
    assert torch.equal(batch.label, batch.label[::3].repeat_interleave(3))
    assert len(torch.unique(batch.epsilon.flatten(1), dim=0)) == 30


def test_val_repeats_are_spread_over_the_times():
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "index", "view"))
    data = DiffusionDataModule(pictures(), pictures(4), process=process, val_repeats=8)
    batches = fit(data, num_sanity_val_steps=0)["val"]
    t, index = together(batches, "t"), together(batches, "index")
    for i in range(4):
        own = torch.sort(t[index == i]).values
        assert len(own) == 8
        assert own.diff().max() < 2.7 * 1000 / 8


def test_the_seed_is_seed_everything_s(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "77")
    data = DiffusionDataModule(pictures(), process=PROCESS)
    data.setup("fit")
    assert data.seed == 77
    monkeypatch.delenv("PL_GLOBAL_SEED")
    data = DiffusionDataModule(pictures(), process=PROCESS)
    data.setup("fit")
    assert data.seed == 0
    assert "PL_GLOBAL_SEED" not in os.environ


def test_uint8_crosses_the_bus_and_float_images_are_not_rounded_on_the_way():
    images = torch.rand(4, 1, 4, 4) * 2 - 1
    process = ForwardProcess(LinearBeta(), fields=("x_0", "epsilon", "t"), dtype=torch.float32)
    data = DiffusionDataModule(TensorDataset(images), process=process, shuffle=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    moved = pl.plugins.HalfPrecision("bf16-true").convert_input(batch)
    assert moved.image.dtype == torch.float32
    uint8 = DiffusionDataModule(pictures(), process=process)
    uint8.setup("fit")
    assert next(iter(uint8.train_dataloader())).image.dtype == torch.uint8


def test_a_function_makes_the_dataset_on_setup_and_not_before():
    made = []

    def source() -> TensorDataset:
        made.append(1)
        return pictures()

    data = DiffusionDataModule(source, process=PROCESS)
    assert made == []
    fit(data)
    assert made == [1, 1]  # prepare_data on rank 0, then setup


def test_a_collision_with_the_model_s_hook_is_lightning_s_own_warning():
    class Both(Listener):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            raise AssertionError

    with pytest.warns(UserWarning, match="on_after_batch_transfer"):
        trainer().fit(Both(), DiffusionDataModule(pictures(), process=PROCESS))


def test_no_warnings_in_a_plain_run():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*number of training batches.*")
        warnings.filterwarnings("ignore", message="GPU available but not used.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        fit(DiffusionDataModule(pictures(), pictures(), process=PROCESS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": "linear"}, r"process must be a ForwardProcess, but got 'linear'"),
        ({"batch_size": 0}, r"data\.batch_size must be a whole number >= 1, but got 0"),
        ({"batch_size": "8"}, r"data\.batch_size must be .* but got '8' \(str\)"),
        ({"views": 0}, r"data\.views must be"),
        ({"seed": -3}, r"data\.seed must be"),
        ({"num_workers": -1}, r"data\.num_workers must be"),
        ({"prefetch_factor": 0, "num_workers": 1}, r"data\.prefetch_factor must be a whole number >= 1, but got 0"),
        (
            {"prefetch_factor": 2},
            r"data\.prefetch_factor=2 is of .*data\.num_workers=0 makes none: set that to 1 or more",
        ),
        ({"persistent_workers": True}, r"data\.persistent_workers=True is of .*data\.num_workers=0"),
        ({"multiprocessing_context": "spawn"}, r"data\.multiprocessing_context='spawn' is of .*num_workers=0"),
        ({"multiprocessing_context": "foo", "num_workers": 1}, r"data\.multiprocessing_context must be one of"),
        ({"timeout": -1}, r"data\.timeout must be a number >= 0, but got -1"),
        ({"worker_init_fn": 3}, r"data\.worker_init_fn must be a function of the worker's number, but got 3"),
        ({"transform": "flip"}, r"data\.transform must be a function .* but got 'flip' \(str\)"),
        ({"eval_transform": {"size": 3}}, r"data\.eval_transform must be a function"),
        ({"image_shape": "3,8,8"}, r"data\.image_shape must be a list of whole numbers, .* but got '3,8,8'"),
        ({"image_shape": 8}, r"data\.image_shape must be a list of whole numbers, .* but got 8"),
        ({"image_shape": [3, 0, 8]}, r"each of data\.image_shape must be a whole number >= 1, but got 0"),
        ({"batchsize": 3}, r"no options \['batchsize'\].*num_workers"),
    ],
)
def test_bad_options_are_refused_before_any_data_is_read(options, message):
    def never() -> TensorDataset:
        raise AssertionError("read")

    with pytest.raises(ValueError, match=message):
        DiffusionDataModule(never, **{"process": PROCESS, **options})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"train": "photos"},
            r"data\.train must be a dataset, .* got the path 'photos'.*data=image_folder data\.root=ph",
        ),
        ({"train": Path("photos")}, r"the path 'photos'\. .*ImageFolder\('photos', image_size=64\)"),
        ({"val": "photos"}, r"data\.val must be a dataset"),
        ({"train": ["a.png", "b.png"]}, r"data\.train must be a dataset, .* the path 'a\.png'"),
        ({"test": [pictures(4), "photos"]}, r"data\.test must be a dataset"),
        ({"train": [pictures(4), pictures(4)]}, r"data\.train must be one dataset; join several"),
    ],
)
def test_what_is_no_dataset_is_refused_when_it_is_given(stages, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDataModule(**stages, process=PROCESS)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            TensorDataset(torch.zeros(0, 1, 4, 4)),
            {},
            r"data\.train must hold at least one image, but TensorDataset has length 0",
        ),
        ([(1, 2)], {}, r"data\.train\[0\] holds no image: item_0 \(int\), label \(int\)"),
        ([{"a": np.zeros((4, 4)), "b": np.zeros((4, 4))}], {}, r"holds 2 images: a .*data\.image_key says which"),
        (
            [torch.rand(1, 4, 4) * 255],
            {},
            r"spans \[.*\], outside process\.value_range=\[-1, 1\]\. Set process\.value_range",
        ),
        ([torch.full((1, 4, 4), float("nan"))], {}, r"holds values that are nan or infinite: 16 of 16"),
        (
            [torch.zeros(1, 4, 4)],
            {"image_shape": [3, 4, 4]},
            r"data\.image_shape says \[3, 4, 4\], but data\.train\[0\] has shape \[1, 4, 4\]",
        ),
        (iter([torch.zeros(1, 4, 4)]), {}, r"data\.train must be a map-style dataset"),
        ([torch.zeros(1, 4, 4)], {"image_key": "picture"}, r"data\.image_key='picture' is not in data\.train\[0\]"),
    ],
)
def test_bad_data_are_refused_before_training(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        fit(DiffusionDataModule(dataset, process=PROCESS, **options))


class Read(list):
    """A dataset that says which of its items were read."""

    def __init__(self, images):
        super().__init__(images)
        self.read = set()

    def __getitem__(self, index):
        self.read.add(index)
        return super().__getitem__(index)


def test_images_in_the_unit_range_are_seen_behind_a_dark_first_one(caplog):
    images = torch.rand(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:5] = 0
    dataset = Read(images)
    DiffusionDataModule(dataset, process=PROCESS).setup("fit")
    assert "data.train, of which 32 images were looked at, has no value below 0, though" in caplog.text
    assert "set process.value_range=[0,1]" in caplog.text
    assert {0, 999} < dataset.read
    assert len(dataset.read) == 32


def test_a_condition_in_the_unit_range_is_seen_too(caplog):
    image = torch.rand(6, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    items = [{"image": 2 * target - 1, "edges": edges} for target, edges in image]
    roles: Any = {"image": "target", "edges": "condition"}
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "edges"))
    DiffusionDataModule(items, process=process, images=roles).setup("fit")
    assert "edges of data.train, of which 6 images were looked at, has no value below 0, though" in caplog.text
    assert "set data.images.edges={role: condition, value_range: [0, 1]}" in caplog.text

    class Inner(pl.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(items, batch_size=3)

    caplog.clear()
    fit(DiffusionDataModule.wrap(Inner(), process=process, images=roles))
    assert caplog.text.count("edges of the batch of Inner.train_dataloader() has no value below 0") == 1
    caplog.clear()
    roles["edges"] = {"role": "condition", "value_range": [0, 1]}
    DiffusionDataModule(items, process=process, images=roles).setup("fit")
    fit(DiffusionDataModule.wrap(Inner(), process=process, images=roles))
    assert "value_range" not in caplog.text


@pytest.mark.parametrize(
    ("images", "process", "most"),
    [
        (torch.rand(1000, 1, 4, 4) * 2 - 1, PROCESS, 1),  # the first says it
        (torch.zeros(1000, 1, 4, 4), PROCESS, 32),
        (torch.rand(1000, 1, 4, 4), ForwardProcess(LinearBeta(), value_range=(0, 1)), 1),
        (torch.rand(1000, 1, 4, 4), ForwardProcess(LinearBeta(), value_range=None), 1),
        (torch.full((1000, 1, 4, 4), 200, dtype=torch.uint8), PROCESS, 1),
    ],
)
def test_few_images_are_looked_at(images, process, most, caplog):
    dataset = Read(images)
    DiffusionDataModule(dataset, process=process).setup("fit")
    assert "value_range" not in caplog.text
    assert len(dataset.read) == most


def test_cached_latents():
    latents = TensorDataset(1.3 * torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"outside process\.value_range.*For latents set process\.value_range=null"):
        DiffusionDataModule(latents, process=PROCESS).setup("fit")
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "x_0", "index"), value_range=None)
    data = DiffusionDataModule(latents, process=process, batch_size=16)
    (batch,) = fit(data)["train"]
    assert torch.equal(batch.x_0, latents.tensors[0][batch.index])
    assert data.recipe()["value_range"] is None
    with pytest.raises(ValueError, match=r"value_range=null says that the dataset yields latents, but data\.encoder"):
        DiffusionDataModule(latents, process=process, encoder=lambda x: x)


def test_a_training_set_without_a_whole_batch_is_said():
    data = DiffusionDataModule(pictures(6), process=PROCESS, batch_size=8, drop_last=True)
    with pytest.raises(ValueError, match=r"data\.drop_last=true leaves no batch.*6 images.*data\.batch_size=8"):
        fit(data)


def test_the_backend_is_tried_settled_and_kept(caplog, monkeypatch):
    """All ranks compile or none: a rank whose compile fails takes its own process to the eager path before training."""
    big = DiffusionDataModule(pictures(4, 3, 32), process=ForwardProcess(LinearBeta(), compile=False))
    fit(big)
    assert big.backend == "cpu, eager"
    monkeypatch.setattr(ForwardProcess, "compiles", lambda *_: True)
    monkeypatch.setattr(ForwardProcess, "can_compile", lambda *_: False)
    broken = DiffusionDataModule(pictures(4, 3, 32), process=ForwardProcess(LinearBeta(), compile=True))
    broken.setup("fit")
    assert broken.backend == "cpu, eager"
    assert broken.process.compile_mode is True, "the process is the user's"
    called: list[Any] = []
    monkeypatch.setattr(compiler, "call_compiled", lambda *given: called.append(given))
    broken.noise(next(iter(broken.train_dataloader())))
    assert not called, "this rank could compile, another could not"
    with caplog.at_level("WARNING", logger="diffaug"):
        broken.load_state_dict({**big.state_dict(), "backend": "cuda, compiled"})
    assert "was on cuda, compiled and goes on on cpu, eager" in caplog.text


def test_every_size_of_batch_that_is_to_come_is_tried(monkeypatch):
    asked = []

    def noted(process, images, dtype, batches):
        asked.append((tuple(images.shape), batches))
        return True

    monkeypatch.setattr(ForwardProcess, "compiles", lambda *_: True)
    monkeypatch.setattr(ForwardProcess, "can_compile", noted)
    process = ForwardProcess(LinearBeta())
    options: dict[str, Any] = {"process": process, "batch_size": 4, "views": 2}
    DiffusionDataModule(pictures(11, 1, 4), pictures(5, 1, 4), val_repeats=3, **options).setup("fit")
    DiffusionDataModule(pictures(11, 1, 4), drop_last=True, **options).setup("fit")
    DiffusionDataModule(test=pictures(8, 1, 4), **options).setup("test")
    DiffusionDataModule(STREAM, image_shape=(1, 4, 4), **options).setup("fit")
    DiffusionDataModule.wrap(pl.LightningDataModule.from_datasets(pictures(4, 1, 4)), process).setup("fit")
    assert asked == [
        ((1, 1, 4, 4), {"train": {8, 6}, "val": {4, 3}}),
        ((1, 1, 4, 4), {"train": {8}}),
        ((1, 1, 4, 4), {"test": {4}}),
        ((1, 1, 4, 4), {"train": {8}}),
        ((1, 3, 32, 32), {"train": set()}),
    ]


@pytest.mark.parametrize("kind", ["wrapped", "stream", "encoder"])
@pytest.mark.parametrize("works", [True, False])
def test_the_backend_is_settled_before_the_size_of_what_is_noised_is_known(kind, works, monkeypatch):
    """Wrapped DataModules, streams and encoders too: at setup, and not at a first batch that not every rank has."""
    monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: True)
    monkeypatch.setattr(ForwardProcess, "can_compile", lambda *_: works)
    process = ForwardProcess(LinearBeta())
    if kind == "wrapped":
        inner = pl.LightningDataModule.from_datasets(pictures(4, 1, 4))
        data: Any = DiffusionDataModule.wrap(inner, process=process)
    elif kind == "stream":
        data = DiffusionDataModule(STREAM, process=process)
    else:
        data = DiffusionDataModule(pictures(4, 1, 4), process=process, encoder=lambda x: x.tile(1, 4, 8, 8))
    data.setup("fit")
    assert data.backend == ("cpu, compiled where a sample has 512 elements or more" if works else "cpu, eager")
    assert process.compile_mode == "auto", "the process is the user's"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"val_times": "grid", "val_repeats": 4}, [125, 375, 625, 875]),
        ({"val_times": "fixed", "val_at": 0.3}, [300]),
    ],
)
def test_val_times(options, expected):
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "index"))
    data = DiffusionDataModule(pictures(), pictures(6), process=process, **options)
    batches = fit(data, num_sanity_val_steps=0)["val"]
    t, index = together(batches, "t"), together(batches, "index")
    assert all(sorted(t[index == i].tolist()) == expected for i in range(6))
    with pytest.raises(ValueError, match=r"data\.val_times must be one of 'even', 'grid', 'fixed', but got 'odd'"):
        DiffusionDataModule(pictures(), process=process, val_times="odd")


def test_the_items_that_are_looked_at_are_spread_over_the_dataset():
    assert spread_indices(10, 4) == [0, 3, 6, 9]
    assert spread_indices(3, 8) == [0, 1, 2]
    assert spread_indices(7, 1) == [0]
    assert spread_indices(2**25 + 4, 3) == [0, 2**24 + 1, 2**25 + 3]  # beyond float32's whole numbers


def test_loaders_before_setup_say_so():
    data = DiffusionDataModule(pictures(), pictures(), process=PROCESS)
    for loader, stage in ((data.train_dataloader, "train"), (data.val_dataloader, "val")):
        with pytest.raises(RuntimeError, match=rf"data\.{stage} is not made yet: call data\.setup\('fit'\) first"):
            loader()


def test_a_raw_batch_says_how_it_is_noised():
    data = DiffusionDataModule(pictures(), process=PROCESS)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    for use in (lambda: [*batch], lambda: batch[0], lambda: exec("x_t, epsilon, t = batch", {"batch": batch})):
        with pytest.raises(TypeError, match=r"images before the noise.*x_t, epsilon, t = data\.noise\(batch\)"):
            use()
    x_t, _, _ = data.noise(batch)
    assert x_t.shape == batch.image.shape
