"""Sources that are iterable and have items by index, litdata's and MosaicML's, and the order of what lies in shards.

Statistical limits are set for one false alarm in 10^6; the draws are keyed, so that no test is random.
"""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shared
import torch
from scipy import stats
from shared import Items, Listener, SizedStream, Stream, fit, levels, together, trainer
from torch.utils.data import DataLoader, IterableDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Mixture
from diffaug.datasets.indexed import Indexed, index_dataset, is_stream
from diffaug.loader.training import EpochSampler
from diffaug.order.epoch import Sharded

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


Alike = partial(Items, make_item, N)
"""A map-style dataset of the same items."""
Rank = partial(shared.Rank, process=PROCESS, batch_size=20)


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
    class Unmeasured(Stream):
        def __getitem__(self, index: int) -> int:
            return index

    assert is_stream(Unmeasured())
    assert not is_stream(Both())
    assert not is_stream([1, 2])
    stream = SizedStream([1])  # of torch's own __getitem__, which only says that there is none
    assert is_stream(stream)
    found = index_dataset(Both(), "data.train")
    assert isinstance(found, Indexed)
    assert found.shard_sizes == Both().shard_sizes
    assert len(found) == N
    assert index_dataset(stream, "data.train") is stream


def test_streams_of_the_libraries_are_streams():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"label": list(range(4))})
    assert not is_stream(table)
    assert index_dataset(table, "data.train") is table
    assert is_stream(table.to_iterable_dataset())


def test_wids_is_map_style(tmp_path, monkeypatch):
    wids = pytest.importorskip("wids", reason="wids is not installed (webdataset before 1.0 has it)")
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    shards = []
    for shard in range(4):
        path = tmp_path / f"{shard}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(shard * 25, shard * 25 + 25):
                add(tar, f"{number:03}.npy", np.full((2, 2), number, np.uint8))
        shards.append({"url": str(path), "nsamples": 25})
    dataset = wids.ShardListDataset(shards, cache_dir=str(tmp_path / "cache"), keep=True)
    assert not is_stream(dataset)
    assert index_dataset(dataset, "data.train") is dataset
    data = DiffusionDataModule(dataset, process=ForwardProcess(LinearBeta(), fields=("x_0", "index")), image_key=".npy")
    data.setup("fit")
    noised = [data.noise(batch) for batch in data.train_dataloader()]
    assert sorted(together(noised, "index").tolist()) == [*range(100)]
    assert torch.equal(levels(noised), together(noised, "index"))


def add(tar: tarfile.TarFile, name: str, array: np.ndarray[Any, Any]) -> None:
    content = io.BytesIO()
    np.save(content, array)
    info = tarfile.TarInfo(name)
    info.size = len(content.getvalue())
    tar.addfile(info, io.BytesIO(content.getvalue()))


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


@pytest.mark.slow
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
    seen = fit(Rank(make_set(), make_set(), batch_size=200), max_epochs=2, num_sanity_val_steps=0)
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
    seen = together(fit(Rank(mixture, batch_size=200), max_epochs=2)["train"], "index")
    assert sorted(seen.tolist()) == sorted([*range(N)] * 2)


def test_a_mixture_opens_each_shard_of_a_set_once_a_lap(tmp_path):
    """The rows of a batch are shuffled, so where one window follows another both are open."""
    log = tmp_path / "log"

    def run(window: int | None, done: int = 0, ranks: int = 1) -> list[Any]:
        sets = {"sharded": Both(log, held=8), "whole": Alike()}
        mixture = Mixture(sets, {"sharded": 1, "whole": 1})
        return sequence(mixture, ranks, done, shard_window=window)

    whole = run(4)
    opened = log.read_text().split("\n")[:-1]
    assert len(opened) <= 34 + 4 + 1  # a lap, the next one's first window, and the look at the first item
    assert run(4, done=5, ranks=2) == whole[5:]
    log.write_text("")
    assert run(None) != whole
    assert len(log.read_text().split("\n")) > 300


def test_a_stream_in_a_mixture_is_refused():
    with pytest.raises(ValueError, match="set 'one' of the Mixture must be a map-style dataset"):
        Rank(Mixture({"one": SizedStream([1])})).setup("fit")


def test_forked_workers_fetch_compressed_chunks_themselves(tmp_path):
    """A thread of litdata's fetches them. A worker has its parent's reader, but no thread: it would wait for ever."""
    litdata = pytest.importorskip("litdata", reason="litdata is not installed (pip install diffaug[streams])")
    pytest.importorskip("zstd", reason="zstd is not installed")
    root = tmp_path / "set"
    cache = litdata.streaming.Cache(str(root), chunk_size=30, compression="zstd", compression_level="chunk")
    for index in range(200):
        cache[index] = make_item(index)
    cache.done()
    cache.merge()
    dataset = litdata.StreamingDataset(str(root), cache_dir=str(tmp_path / "cache"))
    _, loader = loader_of(dataset, num_workers=2, timeout=60, shard_window=2)  # a look at the first item, here
    assert dataset.cache._reader._prepare_thread is not None
    assert sorted(int(index) for batch in loader for index in batch.places[0].rows[:, 0]) == [*range(200)]


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


SIZES = [[5], [0, 3, 0, 4], [30] * 33 + [10], [7, 1, 64, 2, 65, 1, 1, 3, 200, 9]]


def live(shards: np.ndarray[Any, Any]) -> int:
    """The most shards that are between their first and their last sample at one place of an order."""
    ends = [(np.flatnonzero(shards == shard)[[0, -1]]) for shard in np.unique(shards)]
    return max(sum(first <= place <= last for first, last in ends) for place in range(len(shards)))


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_a_sharded_order_has_every_index_once_and_few_shards_open(sizes, window):
    total = sum(sizes)
    order = Sharded(sizes, window, seed=3)
    for epoch, lap in ((0, 0), (0, 1), (5, 0)):
        visits = order.of_epoch(epoch, lap, total)
        index = visits(np.arange(total)).index
        assert sorted(index.tolist()) == list(range(total))
        assert live(np.repeat(np.arange(len(sizes)), sizes)[index]) <= window
        some = np.arange(total)[::-3]
        assert np.array_equal(visits(some).index, index[some])  # place by place
    if total > 10:
        first, lap, epoch = (
            order.of_epoch(e, n, total)(np.arange(total)).index.tolist() for e, n in ((0, 0), (0, 1), (5, 0))
        )
        assert first != lap != epoch != first
    shares = [[*EpochSampler(order, rank=rank, ranks=3)] for rank in range(3)]
    together = [place for places in zip(*shares, strict=True) for place in places]
    assert [place.index for place in together][:total] == order.of_epoch(0, 0, total)(np.arange(total)).index.tolist()
    assert len(set(together)) == -(-total // 3) * 3


@pytest.mark.slow
def test_a_window_is_shuffled_as_one_and_shards_come_in_any_order():
    """Three shards of two, two open at a time: 3 pairs come first, in 24 orders; the last has 2. All alike."""
    seen = Counter(
        tuple(Sharded([2, 2, 2], 2, seed=seed).of_epoch(0, 0, 6)(np.arange(6)).index.tolist()) for seed in range(1440)
    )
    assert len(seen) == 3 * 24 * 2
    statistic = sum((count - 10) ** 2 / 10 for count in seen.values())
    assert statistic < stats.chi2.isf(1e-6, 3 * 24 * 2 - 1)


def test_within_a_window_neighbours_are_strangers():
    """Eight shards of 1,000 open at a time: a sample's shard says nothing of the next one's, nor its place in it."""
    index = Sharded([1000] * 64, 8, seed=1).of_epoch(0, 0, 64_000)(np.arange(64_000)).index
    shard, within = np.divmod(index, 1000)
    same = (shard[1:] == shard[:-1]).mean()
    expected = 999 / 7999
    assert abs(same - expected) < 5 * (expected / 64_000) ** 0.5
    assert abs(np.corrcoef(within[1:], within[:-1])[0, 1]) < 5 / 64_000**0.5
    for window in index.reshape(8, 8000):
        assert abs(np.corrcoef(np.arange(8000), window.argsort())[0, 1]) < 5 / 8000**0.5


def test_a_billion_samples_in_shards_need_few_numbers():
    order = Sharded([10_000] * 100_000, 8, seed=1)
    visits = order.of_epoch(3, 0, order.length)
    assert len(set(visits(np.arange(10**9 - 100_000, 10**9)).index // 10_000)) <= 16


@pytest.mark.parametrize(
    ("window", "ranks", "workers"), [(4, 1, 0), (4, 1, 2), (4, 2, 2), (1, 1, 0), (1, 1, 2), (None, 1, 0)]
)
def test_each_process_opens_each_shard_once(window, ranks, workers, tmp_path):
    """Not so where the set is shuffled as a whole: then nearly every sample opens one."""
    for rank in range(ranks):
        log = tmp_path / str(rank)
        dataset = Both(log, held=window or 4)
        _, loader = loader_of(dataset, rank=rank, ranks=ranks, num_workers=workers, shard_window=window)
        log.write_text("")  # the look at the first item
        assert len(list(loader)) == N // ranks // 20
        opened = Counter(log.read_text().split("\n")[:-1])
        assert len({line.split()[0] for line in opened}) == max(workers, 1)
        if window is None:
            assert opened.total() > N / ranks / 2
        else:
            assert opened.total() <= 34 * max(workers, 1)
            assert set(opened.values()) == {1}


def test_litdata_opens_few_chunks_a_batch(litdata_set, monkeypatch):
    """It keeps one chunk open: a batch is read chunk after chunk, so it opens as many as lie in it."""
    loaders = pytest.importorskip("litdata.streaming.item_loader")
    dataset, opened = litdata_set(), []
    _, loader = loader_of(dataset, batch_size=50, shard_window=4)
    load = loaders.PyTreeLoader.load_item_from_chunk
    monkeypatch.setattr(
        loaders.PyTreeLoader,
        "load_item_from_chunk",
        lambda self, i, chunk, *rest: (opened.append(chunk), load(self, i, chunk, *rest))[1],
    )
    assert len(list(loader)) == 20
    assert len(opened) == N
    runs = 1 + sum(a != b for a, b in itertools.pairwise(opened))
    assert runs <= 34 + 20 * 4  # of 1,000 samples


def test_mosaic_fetches_each_shard_once_and_keeps_few(mosaic_set, tmp_path, monkeypatch):
    """Shards that lie far away, and a cache that holds seven of the forty."""
    streaming = pytest.importorskip("streaming")
    remote = mosaic_set().streams[0].local
    fetched = []
    prepare = streaming.Stream.prepare_shard
    monkeypatch.setattr(
        streaming.Stream, "prepare_shard", lambda self, shard: (fetched.append(shard), prepare(self, shard))[1]
    )
    counts = {}
    for window in (3, None):
        fetched.clear()
        far = streaming.StreamingDataset(
            remote=remote, local=str(tmp_path / str(window)), batch_size=1, shuffle=False, cache_limit=20_000
        )
        _, loader = loader_of(far, shard_window=window)
        assert len(list(loader)) == N // 20
        counts[window] = len(fetched)
    shards = len(Indexed(mosaic_set()).shard_sizes or ())
    assert shards <= counts[3] <= shards + 1  # one more: the look at the first item
    assert counts[None] > 5 * shards


def test_a_resume_with_another_window_or_other_shards_is_refused(tmp_path):
    path, run = tmp_path / "last.ckpt", trainer(max_steps=3)
    run.fit(Listener(), Rank(Both(), batch_size=100))
    run.save_checkpoint(path)

    def go_on(dataset: Any, **options: Any) -> list[Any]:
        listener = Listener()
        trainer().fit(listener, Rank(dataset, batch_size=100, **options), ckpt_path=path)
        return listener.seen["train"]

    with pytest.raises(ValueError, match=r"train\.order: shuffled, 8 of 34 shards at a time, \w+ -> shuffled, 4 of 34"):
        go_on(Both(), shard_window=4)
    with pytest.raises(ValueError, match=r"train\.order: shuffled, 8 of 34 .* -> shuffled\n"):
        go_on(Both(), shard_window=None)
    other = Both()
    other.shard_sizes = [31, 29, *other.shard_sizes[2:]]
    with pytest.raises(ValueError, match=r"train\.order: shuffled, 8 of 34 .* -> shuffled, 8 of 34"):
        go_on(other)
    whole = fit(Rank(Both(), batch_size=100))["train"]
    assert torch.equal(together(go_on(Both()), "epsilon"), together(whole[3:], "epsilon"))


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (None, {"shard_window": 0}, r"data\.shard_window must be a whole number .* but got 0"),
        (None, {"shard_window": 1.5}, r"data\.shard_window must be a whole number"),
        ([500, 499], {}, r"the sum of the shard_sizes of data\.train must be its length, 1000; .*null, but got 999"),
        ([1001, -1], {}, r"each of the shard_sizes of data\.train must be a whole number .* but got -1"),
        (["many"], {}, r"each of the shard_sizes of data\.train must be a whole number"),
    ],
)
def test_what_shards_cannot_be(sizes, options, message):
    dataset = Both()
    dataset.shard_sizes = sizes or dataset.shard_sizes
    with pytest.raises(ValueError, match=message):
        loader_of(dataset, **options)


def test_a_map_style_dataset_may_say_its_shards():
    mapped = Alike()
    mapped.shard_sizes = Both().shard_sizes
    own, wanted = (list(loader_of(dataset)[1].sampler) for dataset in (mapped, Both()))
    assert own == wanted
