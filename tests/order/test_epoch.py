"""The order of an epoch, how ranks share it, and the loader that resumes inside it."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import BatchSampler, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.loader.batch import Place, collate
from diffaug.loader.dataset import Images
from diffaug.loader.evaluation import EvaluationBatches, EvaluationSampler
from diffaug.loader.training import EpochLoader, EpochSampler
from diffaug.order.epoch import Order, Sampled, Shuffled, Unshuffled, count_occurrences
from diffaug.order.permutation import order_keys, permute
from diffaug.randomness.keys import Keys, Purpose
from diffaug.randomness.philox import words


def order(size: int, epoch: int = 0, seed: int = 0) -> list[int]:
    return permute(np.arange(size), size, order_keys(seed, epoch)).tolist()


def keys_of_laps(count: int) -> np.ndarray:
    """The round keys of so many laps of an epoch, made at once."""
    w_0, w_1, _, _ = words(Keys.pack(torch.arange(count), seed=1), Purpose.ORDER, torch.arange(8))
    round_keys = ((w_0 << 32) | w_1).numpy().view(np.uint64)
    assert np.array_equal(round_keys[7], order_keys(1, 0, lap=7))
    return round_keys


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10, 63, 64, 65, 100, 1797, 65536, 65537])
def test_an_order_is_a_permutation(size):
    assert sorted(order(size)) == list(range(size))


@pytest.mark.parametrize(("size", "places"), [(1000, [999, 0, 500]), (64, [63, 0, 31, 0]), (64, [])])
def test_an_order_is_the_same_whichever_places_are_asked_for(size, places):
    whole = order(size)
    assert permute(np.array(places, np.int64), size, order_keys(0, 0)).tolist() == [whole[place] for place in places]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_a_small_order_is_any_permutation_alike(size):
    """By chi-square over all of them; the false-alarm chance of all five together is 1e-6."""
    places = np.arange(size)
    seen = Counter(tuple(permute(places, size, key).tolist()) for key in keys_of_laps(30_000))
    assert set(seen) <= set(itertools.permutations(range(size)))
    counts = [seen[order] for order in itertools.permutations(range(size))]
    assert stats.chisquare(counts).pvalue > 1e-6 / 5


@pytest.mark.parametrize(
    ("size", "first"),
    [
        (6, [3, 2, 1, 0, 4, 5]),
        (64, [26, 7, 10, 46, 15, 52, 31, 63]),
        (65, [37, 44, 2, 20, 48, 14, 56, 32]),
        (100, [37, 94, 2, 20, 48, 86, 56, 32]),
        (1000, [281, 697, 123, 512, 990, 869, 686, 801]),
        (65536, [56924, 54409, 8952, 21309, 33962, 9309, 30642, 19506]),
        (10**9, [788209744, 911635910, 636561984, 125699711, 716675924, 47671882, 824718274, 821707312]),
    ],
)
def test_an_order_stays_what_it_is(size, first):
    """A change of these numbers changes the run of everyone who goes on from a checkpoint."""
    places = np.arange(len(first))
    assert permute(places, size, order_keys(5, 3)).tolist() == first


def test_orders_are_as_good_as_random():
    """Each place gets each index equally often, two places are independent, and epochs and seeds differ."""
    size, block = 250, 50
    places = np.array([0, 1, 2, 127, 249])
    orders = np.array([permute(places, size, key) for key in keys_of_laps(4000)])
    for column in orders.T:
        assert stats.chisquare(np.bincount(column, minlength=size)).pvalue > 1e-6 / len(places)
    blocks = size // block
    pairs = np.bincount(orders[:, 0] // block * blocks + orders[:, 1] // block, minlength=blocks**2)
    alike = np.full((blocks, blocks), block**2) - block * np.eye(blocks)
    assert stats.chisquare(pairs, len(orders) * alike.ravel() / alike.sum()).pvalue > 1e-6
    assert order(100, epoch=1) != order(100, epoch=2)
    assert order(100, seed=1) != order(100, seed=2) != order(100, seed=2 + 2**32)


def test_a_billion_places_need_no_memory():
    size = 10**9
    some = permute(np.arange(size - 1000, size), size, order_keys(0, 0))
    assert len(set(some.tolist())) == 1000
    assert some.max() < size


def of_hundred(shuffle: bool) -> Order:
    return Shuffled(100, seed=5) if shuffle else Unshuffled(100)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_one_order(ranks, shuffle):
    whole = list(EpochSampler(of_hundred(shuffle)))
    shares = [list(EpochSampler(of_hundred(shuffle), rank=r, ranks=ranks)) for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    together = sorted((p for share in shares for p in share), key=lambda p: p.position)
    assert together[:100] == whole
    # DDP's padding repeats the first samples of the order, as new views.
    assert [(p.index, p.view) for p in together[100:]] == [(whole[i].index, 1) for i in range(len(together) - 100)]
    assert len({(p.index, p.view) for p in together}) == len(together)


@pytest.mark.slow
def test_a_thousand_ranks_make_the_order_of_one():
    whole = list(EpochSampler(Shuffled(5000, seed=1)))
    shares = [p for r in range(1024) for p in EpochSampler(Shuffled(5000, seed=1), rank=r, ranks=1024)]
    assert sorted(shares, key=lambda p: p.position)[:5000] == whole


def test_more_ranks_than_samples():
    shares = [list(EpochSampler(Shuffled(3), rank=r, ranks=8)) for r in range(8)]
    assert all(len(share) == 1 for share in shares)
    assert len({(p.index, p.view) for (p,) in shares}) == 8


def test_occurrences():
    values = np.array([3, 1, 3, 3, 1, 0])
    assert count_occurrences(values).tolist() == [0, 0, 1, 2, 1, 0]
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, 1000)
    seen: Counter[int] = Counter()
    expected = []
    for value in values.tolist():
        expected.append(seen[value])
        seen[value] += 1
    assert count_occurrences(values).tolist() == expected


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0, 1.0, 8.0], 30),
        RandomSampler(range(3), replacement=True, num_samples=30),
        RandomSampler(range(3), replacement=True, num_samples=30, generator=torch.Generator()),
    ],
)
def test_samplers_that_repeat_get_new_views(sampler, same_random_state):
    def places(epoch: int, rank: int = 0, ranks: int = 1) -> list[Place]:
        ours = EpochSampler(Sampled(sampler, 3), rank=rank, ranks=ranks)
        ours.set_epoch(epoch)
        return list(ours)

    first = places(0)
    assert len({(p.index, p.view) for p in first}) == 30
    assert len({p.index for p in first}) == 3
    assert places(0) == first
    assert [p.index for p in places(1)] != [p.index for p in first]
    shared = sorted(places(0, 0, 2) + places(0, 1, 2), key=lambda p: p.position)
    assert shared == first


def test_a_sampler_that_lies_about_its_length():
    class Liar:
        def __len__(self) -> int:
            return 5

        def __iter__(self):
            return iter([0, 1])

    with pytest.raises(ValueError, match=r"data\.sampler says its length is 5, but it yielded 2"):
        list(EpochSampler(Sampled(Liar(), 3)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_counts_each_sample_once(ranks):
    shares = [list(EvaluationSampler(7, rank=r, ranks=ranks, repeats=2)) for r in range(ranks)]
    together = sorted((p for share in shares for p in share), key=lambda p: p.position)
    assert [(p.index, p.view) for p in together] == [(i, v) for i in range(7) for v in (0, 1)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [len(share) for share in shares] == [
        len(EvaluationSampler(7, rank=r, ranks=ranks, repeats=2)) for r in range(ranks)
    ]


def loader(
    ranks: int = 1, rank: int = 0, batch_size: int = 4, drop_last: bool = False, num_workers: int = 0
) -> EpochLoader:
    images = Images(TensorDataset(torch.zeros(30, 1, 2, 2)))
    sampler = EpochSampler(Shuffled(30, seed=3), rank=rank, ranks=ranks)
    return EpochLoader(
        images,
        sampler=sampler,
        batch_size=batch_size,
        collate_fn=collate,
        drop_last=drop_last,
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def epochs(a: EpochLoader, first: int, count: int) -> list[list[list[int]]]:
    out = []
    for epoch in range(first, first + count):
        a.sampler.set_epoch(epoch)
        out.append([batch.places[0].rows.tolist() for batch in a])
    return out


@pytest.mark.parametrize(
    ("drop_last", "done", "num_workers"),
    [*itertools.product([False, True], [0, 1, 3, 7, 8], [0]), (False, 8, 2), (True, 1, 2)],
)
def test_a_loader_goes_on_where_its_state_says(drop_last, done, num_workers, same_random_state):
    a = loader(drop_last=drop_last, num_workers=num_workers)
    batches = [batch for epoch in epochs(loader(drop_last=drop_last), 0, 3) for batch in epoch]
    per_epoch = len(a)
    done = min(done, per_epoch)
    a.sampler.set_epoch(0)
    running = iter(a)
    for _ in range(done):
        next(running)
    state = a.state_dict()
    del running
    b = loader(drop_last=drop_last, num_workers=num_workers)
    b.load_state_dict(state)
    assert b.state_dict() == state
    b.sampler.set_epoch(1 if done == per_epoch else 0)
    rest = [batch.places[0].rows.tolist() for batch in b]
    expected = batches[done:per_epoch] if done < per_epoch else batches[per_epoch : 2 * per_epoch]
    assert rest == expected
    following = 2 if done == per_epoch else 1
    assert epochs(b, following, 1)[0] == batches[following * per_epoch : (following + 1) * per_epoch]


def test_a_state_serves_another_number_of_ranks():
    """Two ranks of 2 go on for one of 4: the same global batches."""
    one = loader(batch_size=4)
    whole = [sorted(batch) for batch in epochs(one, 0, 1)[0]]
    halves = [loader(ranks=2, rank=r, batch_size=2) for r in range(2)]
    states = []
    for half in halves:
        half.sampler.set_epoch(0)
        running = iter(half)
        for _ in range(3):
            next(running)
        states.append(half.state_dict())
    assert states[0] == states[1] == {"epoch": 0, "batches": 3}
    again = loader(batch_size=4)
    again.load_state_dict(states[0])
    assert [sorted(batch.places[0].rows.tolist()) for batch in again] == whole[3:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [2, 3, 4, 100])
def test_evaluation_has_equally_many_batches_on_all_ranks(ranks, batch_size):
    """Of any number of samples: each comes once, no batch is empty or too large, and one rank's are torch's own."""
    for size in range(ranks, 40):
        shares = [EvaluationBatches(EvaluationSampler(size, rank=r, ranks=ranks), batch_size) for r in range(ranks)]
        batches = [list(share) for share in shares]
        assert len({len(share) for share in batches}) == 1
        assert [len(share) for share in shares] == [len(share) for share in batches]
        assert all(1 <= len(batch) <= batch_size for share in batches for batch in share)
        assert sorted(p.index for share in batches for batch in share for p in batch) == list(range(size))
        if ranks == 1:
            assert [len(batch) for batch in batches[0]] == [
                len(b) for b in BatchSampler(range(size), batch_size, False)
            ]


def test_what_ranks_cannot_share_out():
    with pytest.raises(ValueError, match=r"data\.val has 3 images for 4 processes: each must have .*data\.val_share"):
        EvaluationBatches(EvaluationSampler(3, rank=3, ranks=4), 2, "data.val")
    text = r"data\.val has 5 images, which 2 processes cannot share out in equal numbers of batches of one.*batch_size"
    for rank in range(2):
        with pytest.raises(ValueError, match=text):
            EvaluationBatches(EvaluationSampler(5, rank=rank, ranks=2), 1, "data.val")
    assert len(EvaluationBatches(EvaluationSampler(6, rank=1, ranks=2), 1)) == 3


class Watched(Dataset[torch.Tensor]):
    """Items that say how many guards each of torch's calls goes through where they are read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, 2, 2), torch._C._len_torch_function_stack(), dtype=torch.uint8)


def test_workers_read_without_a_guard():
    """Forked within one, their every call of torch's would go through it: images of 30 us took 60 more."""
    data = DiffusionDataModule(
        train=Watched(), process=ForwardProcess(LinearBeta(), fields=("x_0",)), batch_size=4, num_workers=1
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    (x_0,) = data.noise(batch)
    assert (x_0 == -1).all()
