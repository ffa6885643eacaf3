"""Streams whose samples say who they are: the same draws for the same sample, whoever reads it and when."""

import io
import random
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import shared
import torch
from PIL import Image
from shared import Stream
from torch.utils.data import IterableDataset, TensorDataset, get_worker_info

from diffaug import ForwardProcess, LinearBeta
from diffaug.loader import stream as stream_module
from diffaug.loader.stream import hash_key

COUNT, SHARDS = 48, 6
PROCESS = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "x_0", "index", "label"))
Draws = dict[int, tuple[Any, ...]]


def brighten(image: Any) -> torch.Tensor:
    """A transform that draws from all three random states that a user's may."""
    value = image if isinstance(image, torch.Tensor) else torch.tensor([[[image.getpixel((0, 0))]]], dtype=torch.uint8)
    return value + random.randint(0, 100) + torch.randint(0, 100, (1,), dtype=torch.uint8)


Rank = partial(shared.Rank, process=PROCESS, batch_size=4, transform=brighten)


class Named(IterableDataset[Any]):
    """Samples in shards, which are shared out over ranks and workers; read through a buffer that shuffles them."""

    def __init__(self, rank: int = 0, ranks: int = 1, *, shards: Any = None, buffer: int = 1, seed: int = 0) -> None:
        self.rank, self.ranks, self.buffer, self.seed = rank, ranks, buffer, seed
        self.shards = list(range(SHARDS)) if shards is None else shards

    def item(self, number: int) -> Any:
        image = torch.full((1, 1, 1), number, dtype=torch.uint8)
        return {"image": image, "label": number, "__key__": f"sample-{number}"}

    def __iter__(self):
        worker = get_worker_info()
        part, parts = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = self.shards[self.rank :: self.ranks][part::parts]
        numbers = [shard + SHARDS * i for shard in mine for i in range(COUNT // SHARDS)]
        waiting: list[int] = []
        own = random.Random(self.seed)
        for number in [*numbers, *[None] * self.buffer]:
            if number is not None:
                waiting.append(number)
            if waiting and (len(waiting) > self.buffer or number is None):
                yield self.item(waiting.pop(own.randrange(len(waiting))))


def draws(make: Callable[..., Any], ranks: int = 1, *, epoch: int = 0, done: int = 0, **options: Any) -> Draws:
    """What each sample of an epoch was given, by its number: its draws, its index and its image after the transform."""
    found: Draws = {}
    for rank in range(ranks):
        data = Rank(make(rank, ranks), rank=rank, ranks=ranks, **{"key": "__key__", **options})
        data.setup("fit")
        loader = data.train_dataloader()
        loader.load_state_dict({"epoch": epoch, "batches": done})
        for batch in loader:
            b = data.noise(batch)
            rows = zip(b.label, b.t, b.epsilon.flatten(1), b.x_0.flatten(1), b.index, strict=True)
            for label, t, epsilon, x_0, index in rows:
                assert int(label) not in found
                found[int(label)] = int(t), tuple(epsilon.tolist()), tuple(x_0.tolist()), int(index)
    return found


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one worker": ({}, {"num_workers": 1}),
    "two workers": ({}, {"num_workers": 2}),
    "two ranks": ({}, {"ranks": 2}),
    "two ranks, two workers": ({}, {"ranks": 2, "num_workers": 2}),
    "a buffer": ({"buffer": 7, "seed": 1}, {}),
    "another buffer": ({"buffer": 20, "seed": 2}, {"ranks": 2}),
    "another order of shards": ({"shards": [3, 0, 5, 1, 4, 2]}, {"num_workers": 2}),
    "another batch": ({}, {"batch_size": 5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_sample_has_its_draws_whoever_reads_it(change, same_random_state):
    dataset, options = change
    once = draws(Named)
    assert len(once) == COUNT == len({one[0:2] for one in once.values()}) == len({one[3] for one in once.values()})
    assert once[5][3] == hash_key("sample-5")
    assert draws(lambda *place: Named(*place, **dataset), **options) == once


def test_without_a_key_draws_are_of_the_place():
    """What the tests above would find, were the key not heeded."""
    once, twice = (draws(Named, key=None, num_workers=workers) for workers in (0, 2))
    assert once.keys() == twice.keys()
    assert sum(once[number] == twice[number] for number in once) < COUNT / 2


@pytest.mark.slow
def test_a_restart_goes_on_with_the_same_draws():
    once = draws(Named, epoch=2)
    rest = draws(Named, epoch=2, done=5)
    assert len(rest) == COUNT - 5 * 4
    assert rest == {number: once[number] for number in rest}
    assert draws(lambda *place: Named(*place, buffer=9), epoch=2) == once
    assert all(draws(Named, epoch=3)[number][:2] != once[number][:2] for number in once)


def test_validation_goes_by_the_key_too():
    def evaluated(workers: int) -> Any:
        data = Rank(None, Named(), key="__key__", num_workers=workers, eval_transform=brighten)
        data.setup("validate")
        batches = [data.noise(batch, stage="val") for batch in data.val_dataloader()]
        rows = [zip(b.label.tolist(), b.t.tolist(), b.x_0.flatten().tolist(), strict=True) for b in batches]
        return sorted(row for one in rows for row in one)

    assert evaluated(0) == evaluated(2)


class Tuples(Named):
    """Images with a number, and bytes for a key."""

    def item(self, number: int) -> Any:
        return torch.full((1, 1, 1), number, dtype=torch.uint8), number, str(number).encode()


class Counted(Named):
    """Numbers for keys, of numpy's."""

    def item(self, number: int) -> Any:
        import numpy as np

        return {"image": torch.full((1, 1, 1), number, dtype=torch.uint8), "label": number, "id": np.int64(number - 9)}


@pytest.mark.parametrize(("made", "key"), [(Tuples, 2), (Tuples, "item_2"), (Counted, "id")])
def test_keys_by_place_bytes_and_numbers(made, key):
    once = draws(made, key=key)
    assert len({one[3] for one in once.values()}) == COUNT
    assert draws(made, 2, key=key, num_workers=2) == once


def test_hashes_are_spread_and_kept():
    """BLAKE2b, 8 bytes, little-endian, without the lowest bit: changing it changes every user's run."""
    known = [705271316562965202, 4410727507812524023, 389430377700070743, 6030964643878359419, 3032292063650762948]
    assert [hash_key(key) for key in ("a", b"a", 1, -1, "1")] == known
    hashes = torch.tensor([hash_key(f"{number:09}") for number in range(20_000)])
    assert len(hashes.unique()) == 20_000
    assert hashes.min() >= 0
    for bit in range(63):
        assert abs((hashes >> bit & 1).double().mean() - 0.5) < 5 / 2 / 20_000**0.5


def keyed(key: Callable[[int], Any]) -> Stream:
    """Samples with such keys; without any where that is None."""
    dark = torch.zeros(1, 1, 1, dtype=torch.uint8)
    items = [{"image": dark, "label": number, "__key__": key(number)} for number in range(COUNT)]
    return Stream([{name: part for name, part in item.items() if part is not None} for item in items])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            lambda number: f"sample-{number % 40}",
            r"data\.key='__key__' must tell the samples of data\.train apart, but two of one epoch have the key 's",
        ),
        (
            lambda _: None,
            r"data\.key='__key__' is not in sample 0 of the stream data\.train, which holds image .*, label",
        ),
        (
            lambda number: [number],
            r"data\.key='__key__' must name a part .* text, bytes or a whole number, but that of sample 0 is list",
        ),
        (lambda _: True, r"data\.key='__key__' must name a part .* but that of sample 0 is bool"),
    ],
)
def test_what_is_no_key(key, message, workers):
    with pytest.raises(ValueError, match=message):
        draws(lambda *_: keyed(key), num_workers=workers)


def test_only_the_last_keys_are_remembered(monkeypatch):
    """So that a stream without an end needs no memory without an end."""

    twice = Stream([*keyed(str)] * 2)
    with pytest.raises(ValueError, match="must tell the samples"):
        draws(lambda *_: twice)
    monkeypatch.setattr(stream_module, "_REMEMBERED", COUNT - 1)
    with pytest.raises(AssertionError):  # of this file: a sample came twice
        draws(lambda *_: twice)


def test_a_key_is_refused_where_there_is_an_index(caplog):
    images = TensorDataset(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    with pytest.raises(ValueError, match=r"data\.key='id' is for streams, but data\.train \(TensorDataset\) has"):
        Rank(images, key="id").setup("fit")
    with pytest.raises(ValueError, match=r"data\.key must be the name of a part of an item.*, but got 1\.5"):
        Rank(Named(), key=1.5)
    with caplog.at_level("INFO", "diffaug"):
        Rank(Named()).setup("fit")
        assert caplog.text.count("data.train is a stream, its noise keyed by rank, worker and count; data.key") == 1
        caplog.clear()
        Rank(Named(), Named(), key="__key__").setup("fit")
    assert "is a stream" not in caplog.text


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """WebDataset's files: shards of images, their numbers and keys."""
    root = tmp_path_factory.mktemp("tars")
    for shard in range(SHARDS):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in range(shard, COUNT, SHARDS):
                image = io.BytesIO()
                Image.new("L", (1, 1), number).save(image, "png")
                for name, content in ((f"{number:04}.png", image.getvalue()), (f"{number:04}.cls", b"%d" % number)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return [str(path) for path in sorted(Path(root).glob("*.tar"))]


@pytest.mark.parametrize(
    ("buffer", "shuffled", "options"),
    [
        (0, False, {"num_workers": 2}),
        (0, False, {"ranks": 2}),
        (9, False, {}),
        (9, True, {"ranks": 2, "num_workers": 2}),
    ],
)
def test_webdatasets(tars, buffer, shuffled, options, monkeypatch):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed (pip install diffaug[streams])")

    def make(rank: int, ranks: int, buffer: int = 0, shuffled: bool = False) -> Any:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        urls = tars[::-1] if shuffled else tars
        made = wds.WebDataset(urls, shardshuffle=3 if shuffled else False, nodesplitter=wds.split_by_node)
        return made.shuffle(buffer).decode("pil").rename(label="cls", image="png", keep=True).map(keep)

    once = draws(make)
    assert once[7][3] == hash_key("0007")
    assert len(once) == COUNT
    assert draws(lambda rank, ranks: make(rank, ranks, buffer, shuffled), **options) == once


def keep(item: dict[str, Any]) -> dict[str, Any]:
    return {name: item[name] for name in ("image", "label", "__key__")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("buffer", "shards", "options"),
    [
        (0, 4, {"num_workers": 2}),
        (0, 4, {"ranks": 2}),
        (9, 4, {}),
        (5, 2, {"ranks": 2, "num_workers": 2}),
    ],
)
@pytest.mark.parametrize("key", ["name", "label"])
def test_hugging_face_streams(buffer, shards, options, key):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("L", (1, 1), number) for number in range(COUNT)]
    columns = {"image": images, "label": list(range(COUNT)), "name": [f"{number:04}" for number in range(COUNT)]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64"), "name": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(columns, features=features)

    def make(rank: int, ranks: int, buffer: int = 0, shards: int = 4) -> Any:
        made = table.to_iterable_dataset(num_shards=shards)
        made = made.shuffle(seed=1, buffer_size=buffer) if buffer else made
        return pytest.importorskip("datasets.distributed").split_dataset_by_node(made, rank, ranks)

    once = draws(make, key=key)
    assert len(once) == COUNT
    assert draws(lambda rank, ranks: make(rank, ranks, buffer, shards), key=key, **options) == once
