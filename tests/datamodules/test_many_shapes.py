"""Buckets and mixtures through the DataModule: batches of one shape, draws of visits, evaluation, refusals."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from shared import Items, Shapes
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from diffaug import Bucketed, Buckets, DiffusionDataModule, ForwardProcess, LinearBeta, Mixture, Stratified, Uniform
from diffaug.loader.evaluation import BucketBatches, EvaluationSampler

FIELDS = ("x_t", "epsilon", "t", "x_0", "index", "view", "dataset")
PROCESS = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)


def grey(value: int, count: int) -> TensorDataset:
    return TensorDataset(torch.full((count, 1, 2, 2), value, dtype=torch.uint8))


def mixture(**options: Any) -> Mixture:
    return Mixture({"dark": grey(0, 5), "light": lambda: grey(255, 20)}, **options)


def module(train: Any, **options: Any) -> DiffusionDataModule:
    return DiffusionDataModule(train, process=PROCESS, **{"batch_size": 4, "seed": 3, **options})


def visits(data: DiffusionDataModule, epochs: int) -> dict[tuple[int, ...], tuple[torch.Tensor, ...]]:
    """x_t, epsilon and t of each visit, by (dataset, index, lap, view)."""
    data.setup("fit")
    loader, found = data.train_dataloader(), {}
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            noised, rows = data.noise(batch), batch.places[0].rows.repeat_interleave(data.views, 0)
            for row in range(len(rows)):
                key = *rows[row, [4, 0, 3]].tolist(), int(noised.view[row])
                assert key not in found
                found[key] = tuple(getattr(noised, name)[row] for name in FIELDS[:3])
    return found


@pytest.mark.parametrize("make", [Shapes, lambda: mixture(weights={"dark": 1, "light": 2})])
def test_the_draw_of_a_visit_does_not_depend_on_the_batch(make):
    whole = visits(module(make()), 4)
    for options, epochs in (({"batch_size": 3}, 4), ({"batch_size": 10, "num_workers": 1}, 2)):
        other = visits(module(make(), **options), epochs)
        common = whole.keys() & other.keys()
        assert len(common) > 0.8 * len(other) > 20
        assert all(torch.equal(a, b) for key in common for a, b in zip(whole[key], other[key], strict=True))
    assert len({epsilon.numpy().tobytes() for _, epsilon, _ in whole.values()}) == len(whole)


def test_views_of_a_visit_are_draws_of_their_own():
    found = visits(module(Shapes(), views=3), 2)
    assert {key[3] for key in found} == {0, 1, 2}
    assert len({epsilon.numpy().tobytes() for _, epsilon, _ in found.values()}) == len(found)


def test_batches_are_of_one_shape_and_hold_their_images():
    data = module(Shapes(40))
    data.setup("fit")
    shapes = Counter()
    for batch in data.train_dataloader():
        x_0, index = data.noise(batch)[3:5]
        shapes[tuple(x_0.shape[2:])] += 1
        assert len(x_0) == 4
        assert torch.allclose(x_0[:, 0, 0, 0], index / 127.5 - 1)
    assert set(shapes) == set(Shapes.bucket_shapes)
    assert sum(shapes.values()) == 10
    assert data.clean_images("train", 3).shape[0] == 3


def test_a_mixture_says_which_set_a_sample_is_of():
    data = module(mixture(weights={"dark": 1, "light": 3}))
    data.setup("fit")
    for batch in data.train_dataloader():
        noised = data.noise(batch)
        assert noised.dataset.sum() == 3
        assert torch.equal(noised.x_0[:, 0, 0, 0], noised.dataset * 2.0 - 1)
        assert noised.index[noised.dataset == 0].max() < 5


def test_sets_of_a_mixture_keep_their_draws_apart():
    """Two sets of the same images: no noise is shared. And one that is added last leaves the others' alone."""
    two = visits(module(Mixture({"a": grey(0, 8), "b": grey(0, 8)})), 3)
    assert len({epsilon.numpy().tobytes() for _, epsilon, _ in two.values()}) == len(two)
    three = visits(module(Mixture({"a": grey(0, 8), "b": grey(0, 8), "c": grey(0, 80)})), 3)
    common = two.keys() & three.keys()
    assert len(common) > 20
    assert all(torch.equal(a, b) for key in common for a, b in zip(two[key], three[key], strict=True))


def test_a_mixture_without_weights_visits_all_samples_alike():
    seen = Counter(key[:2] for key in visits(module(mixture()), 8))
    assert len(seen) == 25
    assert max(seen.values()) - min(seen.values()) <= 2  # 1 within a set; shares are exact to one sample a batch


def test_the_samples_of_an_epoch():
    data = module(mixture(samples=100))
    data.setup("fit")
    assert len(data.train_dataloader()) == 25


def test_transforms_draw_for_each_set():
    noise = Items(lambda _: torch.rand(1, 2, 2), 6)
    data = module(Mixture({"a": noise, "b": noise}), batch_size=12)
    data.setup("fit")
    first, again = (next(iter(data.train_dataloader())).image for _ in range(2))
    assert torch.equal(first, again)
    assert len(torch.unique(first.flatten(1), dim=0)) == 12


@pytest.mark.parametrize("coverage", [Uniform(coverage=Stratified()), Uniform()])
def test_both_train_under_a_trainer(coverage, tmp_path):
    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), Counter()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.seen[tuple(batch.x_t.shape)] += 1
            return (self.weight * batch.x_t).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen["val", tuple(batch.x_t.shape)] += 1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    process = ForwardProcess(LinearBeta(), coverage, compile=False)
    for train in (Shapes(), mixture()):
        model = Model()
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DiffusionDataModule(train, Shapes(10), process=process, batch_size=4))
        assert sum(n for shape, n in model.seen.items() if shape[0] != "val") == 2 * -(-len(train) // 4)
        assert {shape[2:] for shape in model.seen if shape[0] != "val"} <= {*Shapes.bucket_shapes}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("repeats", [1, 2])
def test_evaluation_goes_through_buckets_once(ranks, repeats):
    data = Shapes(41)
    shares = [
        list(
            BucketBatches(EvaluationSampler(41, rank=rank, ranks=ranks, repeats=repeats), 4, "data.val", data.bucket_of)
        )
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert all(len({data.bucket_of[place.index] for place in batch}) == 1 and 1 <= len(batch) <= 4 for batch in batches)
    places = sorted((place.index, place.view) for batch in batches for place in batch)
    assert places == [(index, view) for index in range(41) for view in range(repeats)]
    assert sorted(place.position for batch in batches for place in batch) == list(range(41 * repeats))


def test_an_image_has_the_noise_in_evaluation_that_it_has_without_buckets():
    process = ForwardProcess(LinearBeta(), fields=FIELDS, compile=False)
    data = DiffusionDataModule(val=Shapes(9), process=process, batch_size=4, seed=1)
    data.setup("validate")
    for batch in data.val_dataloader():
        noised = data.noise(batch, stage="val")
        alone = process(noised.x_0, noised.index, seed=1, stage="val")
        assert torch.equal(noised.epsilon, alone.epsilon)
        assert torch.equal(noised.t, alone.t)


REFUSED = [
    (lambda: Mixture({}), r"Mixture's sets must be datasets by name, .* but got \{\}"),
    (lambda: Mixture([1, 2]), r"Mixture's sets must be datasets by name"),
    (
        lambda: mixture(weights={"dark": 0, "light": 0}),
        r"Mixture's weights must be not all 0: no set",
    ),
    (lambda: mixture(weights={"dark": -1, "light": 2}), r"Mixture's weight of 'dark' must be .*0, but got -1"),
    (lambda: mixture(weights={"dark": 1}), r"Mixture's weights must be a weight for each of \['dark', 'light'\]"),
    (lambda: mixture(weights={5: {"dark": 1, "light": 1}}), r"Mixture's weights must be weights from epoch 0 on too"),
    (lambda: mixture(weights={}), r"Mixture's weights must be a weight for each"),
    (lambda: mixture(samples=0), r"Mixture's samples must be a whole number >= 1, but got 0"),
    (lambda: Mixture({"a": Shapes()}).build(), r"set 'a' of the Mixture must be a dataset of one shape"),
    (lambda: Mixture({"a": grey(0, 0)}).build(), r"set 'a' of the Mixture must be a dataset of one sample at least"),
    (lambda: Mixture({"a": mixture()}).build(), r"set 'a' of the Mixture must be a map-style dataset"),
    (
        lambda: module(mixture(), shuffle=False),
        r"data\.train, a Mixture, has .* leave out data\.shuffle=f",
    ),
    (
        lambda: module(Shapes(), sampler=[0, 1]),
        r"data\.train, a Shapes, has batches .* leave out data\.sampler",
    ),
    (lambda: module(None, val=mixture()), r"data\.val must be one dataset, or a list of the sets"),
    (lambda: module(None, predict=Shapes()), r"data\.predict has buckets, which are not for prediction"),
]


def begin(make: Any) -> None:
    data = make()
    data.setup(None)
    for stage in data.stages:
        getattr(data, f"{stage}_dataloader")()


@pytest.mark.parametrize(("make", "text"), REFUSED)
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        begin(make)


def table(count: int = 12) -> Bucketed:
    images = [torch.full((1, *((4, 8), (8, 4))[i % 2]), i, dtype=torch.uint8) for i in range(count)]
    return Bucketed(images, [tuple(image.shape[1:]) for image in images], Buckets(shapes=[[4, 8], [8, 4]]))


def test_a_split_keeps_its_buckets():
    """As random_split makes it: a subset's indices are the dataset's, its buckets those of the samples it has."""
    train, val = random_split(table(), [8, 4], torch.Generator().manual_seed(0))
    data = DiffusionDataModule(
        Subset(train, [1, 3, 4, 6]),
        val,
        process=ForwardProcess(LinearBeta(), fields=("x_0",), compile=False),
        batch_size=2,
    )
    data.setup("fit")
    expected = sorted(train.indices[i] for i in (1, 3, 4, 6))
    seen = sorted(round((float(x) + 1) * 127.5) for b in data.train_dataloader() for x in data.noise(b).x_0[:, 0, 0, 0])
    assert set(seen) <= set(expected)
    assert len(seen) == 4
    seen = [
        round((float(x) + 1) * 127.5) for b in data.val_dataloader() for x in data.noise(b, stage="val").x_0[:, 0, 0, 0]
    ]
    assert sorted(seen) == sorted(val.indices)


def test_what_has_batches_of_its_own_is_not_wrapped():
    class Inner(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(table(), 2)

    data = DiffusionDataModule.wrap(Inner(), PROCESS)
    data.setup("fit")
    with pytest.raises(
        ValueError, match=r"goes through a Bucketed, .* give it to DiffusionDataModule\(train=...\) instead"
    ):
        data.train_dataloader()
    with pytest.raises(
        ValueError, match=r"data\.train must be a dataset that knows its buckets: give Shapes a method only"
    ):
        module(Subset(Shapes(), [0, 1])).setup("fit")


def test_too_few_images_for_the_ranks():
    sampler = EvaluationSampler(3, rank=0, ranks=4)
    with pytest.raises(ValueError, match=r"data\.val has 3 images in 2 buckets, which 4 processes cannot share out"):
        BucketBatches(sampler, 4, "data.val", np.array([0, 1, 1]))
