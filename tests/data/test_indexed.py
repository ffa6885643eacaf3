"""Sources that are iterable and have items by index: litdata's and MosaicML's, asked for by index; and their shards."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared import fit, together
from torch.utils.data import DataLoader, IterableDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Mixture
from diffaug.data.indexed import Indexed, index_dataset, is_stream

N = 1000
PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "index", "label"))


def make_item(index: int) -> dict[str, Any]:
    return {"image": torch.full((1, 2, 2), index % 256, dtype=torch.uint8), "label": index}


class Both(IterableDataset[Any]):
    """A dataset that could be iterated, and has its items by index: shards of 30, ``held`` of them open at a time.

    Every opening of a shard, in any process, is a line of the file ``log``.
    """

    def __init__(self, log: Path | None = None, held: int = 4) -> None:
        self.log, self.held, self.open = log, held, OrderedDict[int, int]()
        self.shard_sizes = [30] * (N // 30) + [N % 30]

    def __iter__(self) -> Any:
        raise AssertionError("it is iterated")

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, int) or not 0 <= index < N:
            raise IndexError(index)
        shard = index // 30
        if shard not in self.open and self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{os.getpid()} {shard}\n")
        self.open[shard] = 0
        self.open.move_to_end(shard)
        if len(self.open) > self.held:
            self.open.popitem(last=False)
        return make_item(index)


@pytest.fixture(scope="module")
def litdata_set(tmp_path_factory: pytest.TempPathFactory) -> Any:
    litdata = pytest.importorskip("litdata", reason="litdata is not installed (pip install diffaug[streams])")
    root = tmp_path_factory.mktemp("litdata")
    cache = litdata.streaming.Cache(str(root), chunk_size=30)
    for index in range(N):
        cache[index] = make_item(index)
    cache.done()
    cache.merge()
    return lambda **options: litdata.StreamingDataset(str(root), **options)


@pytest.fixture(scope="module")
def mosaic_set(tmp_path_factory: pytest.TempPathFactory) -> Any:
    streaming = pytest.importorskip("streaming", reason="mosaicml-streaming is not installed (diffaug[streams])")
    root = tmp_path_factory.mktemp("mosaic")
    columns = {"image": "ndarray:uint8", "label": "int"}
    with streaming.MDSWriter(out=str(root), columns=columns, size_limit=1500) as writer:
        for index in range(N):
            writer.write({**make_item(index), "image": make_item(index)["image"].numpy()})

    def make(**options: Any) -> Any:
        return streaming.StreamingDataset(local=str(root), **{"batch_size": 1, "shuffle": False, **options})

    return make


@pytest.fixture(params=["own", "litdata", "mosaic"])
def make_set(request: pytest.FixtureRequest) -> Any:
    return Both if request.param == "own" else request.getfixturevalue(f"{request.param}_set")


class Rank(DiffusionDataModule):
    """A DataModule that stands for one rank of several."""

    def __init__(self, *args: Any, rank: int = 0, ranks: int = 1, **options: Any) -> None:
        super().__init__(*args, process=PROCESS, seed=3, **{"batch_size": 20, **options})
        self._place = {"rank": rank, "ranks": ranks}

    def _ranks(self) -> dict[str, Any]:
        return self._place


def loader_of(dataset: Any, **options: Any) -> Any:
    data = Rank(dataset, **options)
    data.setup("fit")
    return data, data.train_dataloader()


def sequence(dataset: Any, ranks: int = 1, done: int = 0, global_batch: int = 60, **options: Any) -> list[Any]:
    """The rest of an epoch after so many global batches, on these ranks: (index, t, label) sorted within each."""
    batches: list[list[Any]] = []
    for rank in range(ranks):
        data, loader = loader_of(dataset, rank=rank, ranks=ranks, batch_size=global_batch // ranks, **options)
        loader.load_state_dict({"epoch": 2, "batches": done})
        for number, batch in enumerate(loader):
            if number == len(batches):
                batches.append([])
            noised = data.noise(batch)
            rows = zip(noised.index, noised.t, noised.label, noised.epsilon.flatten(1), strict=True)
            batches[number] += [(int(i), int(t), int(label), tuple(e.tolist())) for i, t, label, e in rows]
    return [sorted(batch) for batch in batches]


def test_which_datasets_are_streams():
    class Stated(IterableDataset[Any]):
        """Of torch's own __getitem__, which only says that there is none."""

        def __iter__(self):
            yield 1

        def __len__(self):
            return 1

    class Unmeasured(IterableDataset[Any]):
        def __iter__(self):
            yield 1

        def __getitem__(self, index: int) -> int:
            return index

    assert is_stream(Unmeasured())
    assert not is_stream(Both())
    assert not is_stream([1, 2])
    assert is_stream(Stated())
    found = index_dataset(Both(), "data.train")
    assert isinstance(found, Indexed)
    assert found.shard_sizes == Both().shard_sizes
    assert len(found) == N
    stream = Stated()
    assert index_dataset(stream, "data.train") is stream


def test_streams_of_the_libraries_are_streams():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"label": list(range(4))})
    assert not is_stream(table)
    assert index_dataset(table, "data.train") is table
    assert is_stream(table.to_iterable_dataset())


def test_webdataset_is_a_stream():
    webdataset = pytest.importorskip("webdataset")
    assert is_stream(webdataset.WebDataset("none.tar", shardshuffle=False))
    assert is_stream(webdataset.WebDataset("none.tar", shardshuffle=False).with_length(5, silent=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_index_once_on_any_ranks(make_set, ranks):
    dataset = make_set()
    batches = sequence(dataset, ranks)
    indices = [index for batch in batches for index, *_ in batch]
    assert set(indices) == set(range(N))
    assert len(indices) == -(-N // ranks) * ranks  # on 3 ranks two come again, as new views
    assert all(index == label for batch in batches for index, _, label, _ in batch)
    alone = sequence(dataset)
    assert batches[:-1] == alone[:-1]
    assert set(batches[-1]) >= set(alone[-1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resumed_on_other_ranks(make_set, ranks, workers):
    dataset = make_set()
    if workers:
        dataset[0]  # the parent's reader is open: a worker must not use it
    rest = sequence(dataset, ranks, done=10, num_workers=workers)
    assert rest[:-1] == sequence(dataset)[10:-1]


def test_rank_and_world_size_of_the_environment_do_not_matter(make_set, monkeypatch):
    alone = sequence(make_set())
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("torch.distributed.is_available", lambda: False)  # MosaicML's would wait for the others
    dataset = make_set()
    assert len(Indexed(dataset)) == N
    assert sequence(dataset) == alone


def test_under_a_trainer(make_set):
    seen = fit(Rank(make_set(), make_set()), max_epochs=2, num_sanity_val_steps=0)
    assert sorted(together(seen["train"], "index").tolist()) == sorted([*range(N)] * 2)
    assert together(seen["val"], "index").tolist() == [*range(N)] * 2
    labels = together(seen["train"], "label")
    assert torch.equal(labels, together(seen["train"], "index"))
    assert labels[:N].tolist() != labels[N:].tolist()


@pytest.mark.slow
def test_started_workers_can_read(make_set):
    options = {"num_workers": 1, "multiprocessing_context": "spawn", "transform": None}
    dataset = make_set()
    dataset[0]
    data, loader = loader_of(dataset, **options)
    assert data.noise(next(iter(loader))).t.shape == (20,)


def test_in_a_mixture(make_set):
    mixture = Mixture({"one": make_set(), "other": make_set()}, samples=N)
    seen = together(fit(Rank(mixture), max_epochs=2)["train"], "index")
    assert sorted(seen.tolist()) == sorted([*range(N)] * 2)


def test_a_stream_in_a_mixture_is_refused():
    class Sized(IterableDataset[Any]):
        def __iter__(self):
            yield 1

        def __len__(self):
            return 1

    with pytest.raises(ValueError, match="set 'one' of the Mixture must be a map-style dataset"):
        Rank(Mixture({"one": Sized()})).setup("fit")


def test_a_part_of_litdata_keeps_its_indices(litdata_set):
    whole, part = litdata_set(), Indexed(litdata_set(subsample=0.5))
    assert len(part) == sum(part.shard_sizes or ()) == N // 2
    assert [part[index]["label"] for index in range(N // 2)] == [whole[index]["label"] for index in range(N // 2)]


def test_weighted_streams_are_refused(mosaic_set):
    with pytest.raises(ValueError, match=r"data\.train is a StreamingDataset whose streams would give \[500\] of thei"):
        Rank(mosaic_set(epoch_size=500)).setup("fit")


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_of_another_module_is_indexed(litdata_set, shuffle):
    import pytorch_lightning as pl

    class Theirs(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(litdata_set(shuffle=shuffle), batch_size=50)

    data: Any = DiffusionDataModule.wrap(Theirs(), process=PROCESS, seed=1, image_key="image")
    index = together(fit(data)["train"], "index").tolist()
    assert sorted(index) == [*range(N)]
    assert (index == [*range(N)]) is not shuffle


def test_items_of_a_batch_come_in_the_order_asked_for():
    dataset = Indexed(Both())
    asked = [5, 999, 5, 40, 0]
    assert [item["label"] for item in dataset.__getitems__(asked)] == asked
    assert np.array_equal(dataset[7]["image"], make_item(7)["image"])
