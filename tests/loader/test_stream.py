"""Streams: torch's and Hugging Face's iterable datasets, whose samples are keyed by their place."""

import random
from typing import Any

import pytest
import shared
import torch
from PIL import Image
from shared import fit, levels, together
from torch.utils.data import IterableDataset, get_worker_info

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.loader.dataset import Keyed
from diffaug.loader.stream import Stream

PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "x_0", "index", "view", "label"))


class Numbers(IterableDataset[Any]):
    """Images that say which they are, shared out among the workers; each draws a number of its own."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for i in range(first, self.count, step):
            yield torch.full((1, 4, 4), i, dtype=torch.uint8), random.random()


class Sized(Numbers):
    def __len__(self) -> int:
        return self.count


def batches(dataset: Any = None, epochs: int = 2, **options: Any) -> list[Any]:
    data = DiffusionDataModule(
        dataset or Numbers(), process=PROCESS, seed=4, **{"batch_size": 4, "persistent_workers": False, **options}
    )
    return fit(data, max_epochs=epochs)["train"]


def rows(batches: list[Any], name: str) -> dict[tuple[int, int], torch.Tensor]:
    """A field of every sample, by epoch and index."""
    count = len(batches) // 2
    return {
        (epoch, int(i)): value
        for epoch in (0, 1)
        for b in batches[epoch * count : (epoch + 1) * count]
        for i, value in zip(b.index, getattr(b, name), strict=True)
    }


@pytest.mark.parametrize(
    ("dataset", "workers"),
    [
        (Numbers(), {}),
        (Sized(), {}),  # a length makes Lightning fetch otherwise
        (Numbers(), {"num_workers": 2}),
        (Numbers(), {"num_workers": 2, "persistent_workers": True}),
    ],
)
def test_every_sample_has_its_own_noise_and_repeats(dataset, workers, same_random_state):
    first, again = batches(dataset, **workers), batches(dataset, **{**workers, "batch_size": 3})
    noise = together(first, "epsilon").flatten(1)
    assert len(noise) == len(torch.unique(noise, dim=0)) == 24
    for name in ("epsilon", "t", "x_0", "label"):
        a, b = rows(first, name), rows(again, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    drawn = together(first, "label")
    assert len(set(drawn.tolist())) == 24  # what the dataset draws is keyed by place and epoch too
    index = together(first, "index")[:12]
    assert sorted(index.tolist()) == list(range(12))
    assert torch.equal(levels(first)[:12], index)


def test_places_of_ranks_and_workers_never_meet():
    places = []
    for rank in range(3):
        stream = Stream(Keyed(shared.Stream(range(5))), rank=rank, ranks=3)
        loader = torch.utils.data.DataLoader(stream, None, num_workers=2, generator=torch.Generator())
        places += [place for _, place in loader]
    assert len({place.index for place in places}) == 30
    assert {place.index for place in places} == set(range(30))


def test_validation_keeps_its_noise_and_its_draws():
    data = DiffusionDataModule(Numbers(), Numbers(), process=PROCESS, seed=4, batch_size=4)
    seen = fit(data, max_epochs=2, num_sanity_val_steps=0)["val"]
    for name in ("epsilon", "label", "t"):
        assert torch.equal(together(seen[:3], name), together(seen[3:], name))
    assert not torch.equal(together(seen[:3], "epsilon"), together(batches()[:3], "epsilon"))
    t = together(seen[:3], "t").sort().values
    assert t.diff().max() < 2.7 * 1000 / 12  # evenly covered


def test_a_stream_without_a_trainer_goes_on_with_new_views():
    data = DiffusionDataModule(Numbers(), process=PROCESS, seed=4, batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    noise = torch.cat([data.noise(batch).epsilon for _ in range(2) for batch in loader]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == 24


@pytest.mark.slow
def test_hugging_face_streams():
    datasets = pytest.importorskip("datasets")
    columns = {"image": [Image.new("L", (4, 4), i) for i in range(12)], "label": list(range(12))}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict(columns, features=features)
    stream = table.to_iterable_dataset(num_shards=2).shuffle(seed=0, buffer_size=4)
    for workers in (0, 2):
        first, again = batches(stream, num_workers=workers), batches(stream, num_workers=workers, batch_size=5)
        for name in ("epsilon", "t", "label"):
            a, b = rows(first, name), rows(again, name)
            assert all(torch.equal(a[key], b[key]) for key in a)
        labels = together(first, "label")
        assert sorted(labels[:12].tolist()) == sorted(labels[12:].tolist()) == list(range(12))
        assert labels[:12].tolist() != labels[12:].tolist()  # the stream is told the epoch, and reshuffles
        assert torch.equal(levels(first), labels)


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.10 has no notes on exceptions")
def test_an_error_names_the_sample():
    class Breaks(IterableDataset[Any]):
        def __iter__(self):
            yield torch.zeros(1, 4, 4), 0
            raise OSError("lost")

    with pytest.raises(OSError, match="lost") as error:
        batches(Breaks())
    assert error.value.__notes__ == ["in reading sample 1 of the stream data.train"]


def test_bad_items_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"data\.train\[0\] spans \[7, 7\], outside process\.value_range"):
        batches(shared.Stream([(torch.full((1, 4, 4), 7.0), 0)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": Numbers(), "sampler": range(3)},
            r"data\.train is a stream \(Numbers\).*data\.sampler cannot be set",
        ),
        ({"val": Numbers(), "val_repeats": 2}, r"data\.val is a stream \(Numbers\).*data\.val_repeats cannot be set"),
    ],
)
def test_what_a_stream_cannot_have(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDataModule(process=PROCESS, **options).setup("fit")
