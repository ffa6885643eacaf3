"""Samples of any dataset with their place: joined to batches, and whose random draws are whose."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shared import Items
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torchvision.datasets import MNIST, FakeData
from torchvision.transforms import v2

from diffaug.loader.batch import Place, collate
from diffaug.loader.dataset import Images
from diffaug.randomness.user_code import call_keyed, mix_key, seed_all

IMAGE = Image.new("RGB", (6, 4), (1, 2, 3))


def places(*indices: int, epoch: int = 0, view: int = 0) -> list[Place]:
    return [Place(index, view, position, epoch) for position, index in enumerate(indices)]


# Items, joined.


def test_collate():
    dataset = Images(Items(lambda i: (torch.full((1, 2, 2), i / 12), i, f"name {i}")), wanted=("item_2", "label"))
    batch = collate(dataset.__getitems__([Place(3, 1, 7, 5), Place(0, 2, 8, 5)]))
    assert torch.equal(batch.image, torch.tensor([3 / 12, 0])[:, None, None, None].expand(2, 1, 2, 2))
    assert torch.equal(batch.places[0].rows, torch.tensor([[3, 1, 7, 5, 0, -1, -1], [0, 2, 8, 5, 0, -1, -1]]))
    assert batch.extra["item_2"] == ["name 3", "name 0"]
    assert batch.extra["label"].tolist() == [3, 0]
    assert batch.places[0].first == Place(3, 1, 7, 5)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            torch.zeros(3, 5, 4),
            r"sample 4 is torch\.float32 of shape \(3, 4, 4\) and sample 9 is .*\(3, 5, 4\).*Resize",
        ),
        (torch.zeros(1, 4, 4), r"sample 9 is .*\(1, 4, 4\)\. Give them the same channels"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"sample 9 is torch\.uint8 .*Convert them to one dtype"),
    ],
)
def test_collate_refuses_what_differs(second: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        collate([(torch.zeros(3, 4, 4), Place(4, 0, 0, 0), {}), (second, Place(9, 0, 1, 0), {})])


def test_collate_names_the_part_that_cannot_be_joined():
    items = [(torch.zeros(2, 2), Place(i, 0, i, 0), {"caption": None}) for i in range(2)]
    with pytest.raises(ValueError, match=r"The parts 'caption' of a batch's items cannot be joined: .*process\.fields"):
        collate(items)


def test_a_field_the_dataset_lacks():
    with pytest.raises(
        ValueError, match=r"process\.fields asks for \['mask'\], but data\.train\[0\] holds beside .* label"
    ):
        Images(Items(lambda i: (IMAGE, i)), wanted=("mask",))[Place(0, 0, 0, 0)]
    for mistyped, meant in (("S", "s"), ("lable", "label"), ("X_T", "x_t")):
        with pytest.raises(ValueError, match=rf"label, and diffaug names no such field: did you mean {meant}\?$"):
            Images(Items(lambda i: (IMAGE, i)), wanted=(mistyped,))[Place(0, 0, 0, 0)]
    with pytest.raises(ValueError, match=r"and diffaug names no such field\.$"):
        Images(Items(lambda i: (IMAGE, i)), wanted=("qqqq",))[Place(0, 0, 0, 0)]


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.10 has no notes on exceptions")
def test_errors_of_the_users_own_code_name_the_sample():
    def fails(_: Any) -> Any:
        raise KeyError("of the user")

    for dataset, note in (
        (Images(Items(fails), name="data.val"), "in reading data.val[5]"),
        (Images(Items(lambda i: IMAGE), transform=fails), "in data.transform of data.train[5]"),
    ):
        with pytest.raises(KeyError, match="of the user") as caught:
            dataset[Place(5, 0, 0, 0)]
        assert caught.value.__notes__ == [note]


# Random draws.


def drawing(*sources: str) -> Callable[[Any], torch.Tensor]:
    """A transform that draws from the named global states, and from numpy's normals, which keep one in store."""
    draw = {
        "torch": lambda: torch.rand(()).item(),
        "numpy": lambda: np.random.rand(),
        "normal": lambda: np.tanh(np.random.randn()),
        "python": random.random,
    }
    return lambda image: torch.tensor([draw[source]() for source in sources]).expand(2, -1)


def state() -> str:
    return repr((torch.get_rng_state().sum(), torch.initial_seed(), np.random.get_state(), random.getstate()))


SOURCES = [("torch",), ("numpy",), ("normal",), ("python",), ("torch", "numpy", "python", "normal"), ()]


@pytest.mark.parametrize("sources", SOURCES[:-1], ids="+".join)
def test_draws_belong_to_the_sample_alone(sources: tuple[str, ...]):
    def images() -> Images:
        return Images(Items(lambda i: IMAGE), transform=drawing(*sources), domain=(7, 0, 0))

    def seen(dataset: Images, wanted: list[Place]) -> dict[int, list[float]]:
        return {place.index: image[0].tolist() for image, place, _ in dataset.__getitems__(wanted)}

    whole = seen(images(), places(*range(12)))
    assert len({tuple(values) for values in whole.values()}) == 12
    random.seed(1)
    torch.manual_seed(1)
    assert seen(images(), places(4, 2, 9)) == {index: whole[index] for index in (4, 2, 9)}
    one_by_one = images()
    for index in (5, 11, 5):
        assert seen(one_by_one, places(index)) == {index: whole[index]}
    for other in (places(4, epoch=1), places(4, view=1)):
        assert seen(images(), other)[4] != whole[4]
    other = Images(Items(lambda i: IMAGE), transform=drawing(*sources), domain=(8, 0, 0))
    assert seen(other, places(4))[4] != whole[4]


@pytest.mark.parametrize("sources", SOURCES, ids="+".join)
@pytest.mark.parametrize("stored", [False, True], ids=["", "with a normal in store"])
def test_the_global_states_are_left_as_they_were(sources: tuple[str, ...], stored: bool):
    np.random.seed(3)
    if stored:
        np.random.randn()
    dataset = Images(Items(lambda i: IMAGE if i < 6 else 1 / 0), transform=drawing(*sources) if sources else None)
    before = state()
    for _ in range(2):
        dataset.__getitems__(places(1, 2, 3))
        assert state() == before
        with pytest.raises(ZeroDivisionError):
            dataset.__getitems__(places(4, 5, 6))
        assert state() == before


def test_user_code_runs_once_an_item():
    read: list[int] = []
    dataset = Images(Items(lambda i: read.append(i) or IMAGE), transform=drawing("torch"))
    dataset.__getitems__(places(0, 1, 2))
    assert read == [0, 1, 2]


@pytest.mark.parametrize("workers", [1, 2])
def test_flips_are_the_same_for_any_number_of_workers(workers: int):
    data = TensorDataset(torch.arange(40 * 16, dtype=torch.float32).reshape(40, 1, 4, 4) / 640, torch.arange(40))
    flips = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomCrop(3)])
    dataset = Images(data, transform=flips)
    loaders = (
        DataLoader(dataset, sampler=places(*range(40)), batch_size=size, num_workers=n, collate_fn=collate)
        for size, n in ((40, 0), (7, workers))
    )
    one, other = (torch.cat([batch.image for batch in loader]) for loader in loaders)
    assert torch.equal(one, other)
    assert not torch.equal(one, data.tensors[0][:, :, :3, :3])


def test_mixed_chains_and_does_not_collide():
    assert mix_key(1, 2, 3) == mix_key(3, state=mix_key(1, 2))
    assert len({mix_key(a, b) for a in range(100) for b in range(100)}) == 10000
    assert mix_key(0) == 0xE220A8397B1DCDAF  # splitmix64's first output from seed 0


def test_keyed_calls_equal_seeding_everything():
    draw = drawing("numpy", "torch", "python")
    seen = call_keyed(draw, range(3), [mix_key(i) for i in range(3)])
    for i, values in enumerate(seen):
        seed_all(i)
        assert torch.equal(values, draw(None))


# Real datasets.


class Many(Items):
    """A dataset that fetches many items at once, as Hugging Face's do."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__(make)
        self.asked: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked.append(indices)
        return [self.make(index) for index in indices]


def test_many_items_are_fetched_at_once():
    inner = Many(lambda i: torch.full((1, 1), i / 12))
    dataset = Images(Subset(inner, [5, 3, 1]))
    assert [image.item() for image, _, _ in dataset.__getitems__(places(2, 0))] == pytest.approx([1 / 12, 5 / 12])
    assert inner.asked == [[1, 5]]


def test_a_dataset_that_draws_is_fetched_one_by_one():
    def noisy(i: int) -> torch.Tensor:
        return torch.rand(2, 2)

    inner = Many(noisy)
    dataset = Images(inner)
    whole = dataset.__getitems__(places(0, 1, 2))
    assert torch.equal(dataset.__getitems__(places(2, 0))[0][0], whole[2][0])
    assert torch.equal(Images(Items(noisy))[Place(2, 0, 0, 0)][0], whole[2][0])
    assert len(inner.asked) == 1


def test_torch_datasets():
    tensors = TensorDataset(torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2), torch.arange(6))
    both = ConcatDataset([Subset(tensors, [5, 4]), tensors])
    batch = collate(Images(both, wanted=("label",)).__getitems__(places(0, 2, 7)))
    assert batch.extra["label"].tolist() == [5, 0, 5]
    assert torch.equal(batch.image, tensors.tensors[0][[5, 0, 5]])


def test_torchvision_dataset():
    fake = FakeData(4, (3, 8, 8))
    batch = collate(Images(fake, wanted=("label",)).__getitems__(places(3, 1)))
    assert torch.equal(batch.image[1], v2.functional.pil_to_tensor(fake[1][0]))
    assert batch.extra["label"].tolist() == [fake[3][1], fake[1][1]]


def hugging_face() -> Any:
    library = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    pictures = [Image.new("RGB", (6, 4), (i, 0, 0)) for i in range(5)]
    features = library.Features({"image": library.Image(), "kind": library.Value("int64")})
    return library.Dataset.from_dict({"image": pictures, "kind": list(range(5))}, features=features)


def test_hugging_face_images():
    data = hugging_face()
    dataset = Images(data, wanted=("kind",))
    assert dataset._in_batches
    batch = collate(dataset.__getitems__(places(4, 1)))
    assert batch.image.shape == (2, 3, 4, 6)
    assert batch.image[:, 0, 0, 0].tolist() == [4, 1] == batch.extra["kind"].tolist()
    as_torch = collate(Images(data.with_format("torch"), wanted=("kind",)).__getitems__(places(4, 1)))
    assert torch.equal(as_torch.image, batch.image)
    assert torch.equal(as_torch.extra["kind"], batch.extra["kind"])


def test_hugging_face_random_transform_is_keyed():
    def crop(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        drawn = [torch.randint(0, 256, (1, 4, 4), dtype=torch.uint8) for _ in batch["image"]]
        return {**batch, "image": drawn}

    data = hugging_face().with_transform(crop)
    whole = Images(data).__getitems__(places(0, 1, 2, 3, 4))
    part = Images(data).__getitems__(places(3, 2))
    assert torch.equal(part[0][0], whole[3][0])
    assert torch.equal(part[1][0], whole[2][0])
    assert not torch.equal(part[0][0], part[1][0])


def test_hugging_face_broken_image_names_the_sample():
    library = pytest.importorskip("datasets", reason="needs Hugging Face datasets: pip install datasets")
    rows = {"image": [{"bytes": b"no image", "path": None}] * 3}
    data = library.Dataset.from_dict(rows, features=library.Features({"image": library.Image()}))
    with pytest.raises(Exception, match="cannot identify image") as caught:
        Images(data, name="data.val").__getitems__(places(2, 1))
    assert "in reading data.val[2]" in getattr(caught.value, "__notes__", ["in reading data.val[2]"])


class Drawing(TensorDataset):
    """Derived from what draws nothing, and draws."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return (super().__getitem__(index)[0] + torch.randint(99, ()).to(torch.uint8),)


def test_only_what_may_draw_is_seeded(monkeypatch):
    """To seed the random states costs more than to hand on a small image: of known datasets it is spared."""
    seeded = []
    monkeypatch.setattr(
        "diffaug.loader.dataset.call_keyed", lambda f, items, _: [seeded.append(1) or f(i) for i in items]
    )
    places, images = [Place(0, 0, 0, 0)], torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    for dataset, transform, draws in (
        (TensorDataset(images), None, False),
        (Subset(TensorDataset(images), [3, 2]), None, False),
        (TensorDataset(images), torch.clone, True),
        (Drawing(images), None, True),
        ([(image,) for image in images], None, True),
    ):
        seeded.clear()
        Images(dataset, transform=transform).__getitems__(places)
        assert bool(seeded) == draws, dataset
    late = Images(MNIST.__new__(MNIST))
    late.dataset.transform = late.dataset.target_transform = None
    assert not late.may_draw()
    late.dataset.transform = v2.RandomCrop(20)
    assert late.may_draw(), "a transform that was set after the loader was made"
