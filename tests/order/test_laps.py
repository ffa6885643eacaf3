"""Buckets and mixtures: streams of laps, shared out over batches, steps and ranks without a state."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from diffaug import ForwardProcess, LinearBeta, Stratified, Uniform
from diffaug.loader.batch import Place
from diffaug.loader.training import EpochSampler
from diffaug.order.laps import Bucketed, Laps, Mixed, share_out, sum_floors
from diffaug.randomness.keys import Keys

RNG = np.random.default_rng(0)


def bucketed(sizes: list[int], batch: int, seed: int = 0) -> Bucketed:
    return Bucketed(RNG.permutation(np.repeat(np.arange(len(sizes)), sizes)), batch, seed=seed, fixed=False)


def mixed(sizes: list[int], batch: int, weights: dict[int, list[float]], **options) -> Mixed:
    return Mixed(sizes, batch, weights, **{"seed": 0, "fixed": False, **options})


def epoch_of(order: Laps, epoch: int, ranks: int = 1) -> list[list[Place]]:
    """The global batches of an epoch, as all ranks together hand them out; each rank's places one after the other."""
    batches: list[list[Place]] = [[] for _ in range(order.steps)]
    for rank in range(ranks):
        sampler = EpochSampler(order, rank=rank, ranks=ranks)
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler) == order.length // ranks
        size = order.batch // ranks
        for step in range(order.steps):
            batches[step] += own[step * size : (step + 1) * size]
    return batches


@pytest.mark.parametrize("step", [1, 2, 7, 100])
def test_counts_stay_within_one_of_their_due(step):
    """After any number of epochs, and they never fall: for weights alike and very different, many and few."""
    for weights in ([1], [1, 1, 1], [5, 3, 1], [1, 1000], [*range(1, 30)], [1] * 40 + [997], [7, 7, 1, 1, 1, 600]):
        counts, whole = [0] * len(weights), sum(weights)
        for epoch in range(1, 300):
            before, counts = counts, share_out(counts, weights, epoch * step)
            assert sum(counts) == epoch * step
            assert all(old <= new for old, new in zip(before, counts, strict=True))
            assert all(abs(n * whole - epoch * step * w) < whole for n, w in zip(counts, weights, strict=True)), (
                weights,
                epoch,
            )


@pytest.mark.parametrize("batch", [4, 24])
def test_every_sample_is_visited_evenly(batch):
    """Within a bucket visits differ by 1 at most after any number of epochs, and buckets follow their sizes."""
    sizes = [1, 3, batch - 1, batch, 10 * batch + 7]
    order = bucketed(sizes, batch)
    bucket_of = {int(index): part for part in range(5) for index in np.flatnonzero(order_of(order) == part)}
    visits: Counter[int] = Counter()
    for epoch in range(12):
        for places in epoch_of(order, epoch):
            assert len({bucket_of[place.index] for place in places}) == 1
            assert len(places) == batch
            visits.update(place.index for place in places)
        for part, size in enumerate(sizes):
            seen = [visits[index] for index in bucket_of if bucket_of[index] == part]
            assert max(seen) - min(seen) <= 1
            due = (epoch + 1) * order.length * size / sum(sizes)
            assert abs(sum(seen) - due) < batch


def order_of(order: Bucketed) -> np.ndarray:
    """The bucket of each sample."""
    out = np.empty(order.size, np.int64)
    out[order._members] = np.repeat(np.arange(len(order.sizes)), order.sizes)
    return out


ORDERS = {
    "buckets": lambda batch: Bucketed(np.arange(310) % 7 // 3, batch, seed=5, fixed=False),
    "mixture": lambda batch: mixed([5, 90, 200], batch, {0: [3, 1, 0.3]}, seed=5),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_visit_has_its_lap_in_its_key(kind):
    """The n-th visit of a sample is keyed by n, in the order of the batches' numbers; no two visits share a key."""
    order = ORDERS[kind](24)
    keys = Counter()
    for epoch in range(6):
        keys.update((p.dataset, p.index, p.epoch, p.view) for places in epoch_of(order, epoch) for p in places)
    assert max(keys.values()) == 1
    laps = {(dataset, index): set() for dataset, index, _, _ in keys}
    for dataset, index, lap, view in keys:
        assert view == 0
        laps[dataset, index].add(lap)
    assert all(seen == set(range(len(seen))) for seen in laps.values())


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("kind", ORDERS)
def test_ranks_share_each_global_batch(kind, ranks):
    order = ORDERS[kind](24)
    for epoch in (0, 5):
        for one, shared in zip(epoch_of(order, epoch), epoch_of(order, epoch, ranks), strict=True):
            assert sorted(one, key=lambda place: place.position) == sorted(shared, key=lambda place: place.position)


@pytest.mark.parametrize("kind", ORDERS)
def test_an_order_is_the_same_whichever_places_are_asked_for(kind):
    """And in whatever order epochs are gone through: a resume asks for a late one at once."""
    late = ORDERS[kind](24).of_epoch(1000, 0, 0)
    order = ORDERS[kind](24)
    whole = order.of_epoch(1000, 0, 0)(np.arange(order.length))
    for places in (np.array([77]), np.array([300, 5, 24]), np.arange(100, 200)):
        for asked, known in zip(vars(late(places)).values(), vars(whole).values(), strict=True):
            assert np.array_equal(asked, known if isinstance(known, int) else known[places])
    assert (
        order.of_epoch(3, 0, 0)(np.arange(9)).index.tolist()
        == ORDERS[kind](24).of_epoch(3, 0, 0)(np.arange(9)).index.tolist()
    )


def test_sums_of_floors():
    for count, divisor, factor, offset in RNG.integers(0, 60, (500, 4)).tolist():
        divisor += 1
        assert sum_floors(count, divisor, factor, offset) == sum((factor * i + offset) // divisor for i in range(count))


@pytest.mark.parametrize("batch", [1, 4, 24])
def test_shares_of_a_mixture_are_exact_to_one_sample(batch):
    """In every global batch, over a change of the weights; a set of weight 0 has none."""
    weights = {0: [3.0, 1.0, 0.0, 0.7], 4: [1.0, 1.0, 1.0, 1.0], 7: [0.0, 0.0, 1e-3, 1.0]}
    order = mixed([5, 90, 40, 200], batch, weights)
    visits: Counter[tuple[int, int]] = Counter()
    handed_out = 0
    for epoch in range(10):
        now = weights[max(begin for begin in weights if begin <= epoch)]
        for places in epoch_of(order, epoch):
            counts = Counter(place.dataset for place in places)
            for number, weight in enumerate(now):
                due = batch * weight / sum(now)
                assert abs(counts[number] - due) < 1
                assert weight or not counts[number]
            visits.update((place.dataset, place.index) for place in places)
        handed_out += order.steps
        seen = [[visits[number, index] for index in range(size)] for number, size in enumerate(order.sizes)]
        assert [sum(each) for each in seen] == order.samples_before(handed_out).tolist()
        assert all(max(each) - min(each) <= 1 for each in seen)


def test_a_mixture_drifts_from_its_shares_by_no_more_than_a_few_samples():
    """The shift of batch g is the golden-ratio sequence: over any number of batches a share is off by ln of it."""
    weights = [3.0, 1.0, 0.3, 0.0101]
    order = mixed([10] * 4, 24, {0: weights})
    due = 24 * np.array(weights) / sum(weights)
    for batches in (1, 10, 999, 10**5, 10**9):
        assert np.abs(order.samples_before(batches) - batches * due).max() < 2 + math.log(batches + 1)


def test_batches_of_a_bucket_are_spread_as_in_a_random_order():
    """Of 2,000 steps of two equal buckets. The chance that a random order has a run of 32 is below 2,000 x 2^-31, which
    is 1e-6; and neighbours agree half the time."""
    order = bucketed([8_000, 8_000], 8)
    bucket_of = order_of(order)
    steps = np.array([bucket_of[places[0].index] for places in epoch_of(order, 3)])
    assert len(steps) == 2_000
    ends = np.flatnonzero(np.diff(steps)) + 1
    assert np.diff([0, *ends, len(steps)]).max() < 32
    agree = int((steps[1:] == steps[:-1]).sum())
    assert stats.binomtest(agree, len(steps) - 1).pvalue > 1e-6


@pytest.mark.parametrize("kind", ORDERS)
def test_stratified_times_cover_a_global_batch_and_do_not_know_its_part(kind):
    """Times that are spread over the order are spread though laps differ within a batch."""
    process = ForwardProcess(LinearBeta(), times=Uniform(coverage=Stratified()), fields=("t",))
    order = ORDERS[kind](16)
    places = [place for epoch in range(8) for batch in epoch_of(order, epoch) for place in batch]
    t = times(process, places)
    assert all(np.bincount(batch // 125).tolist() == [2] * 8 for batch in t.reshape(-1, 16))
    part = np.array([place.dataset for place in places])
    if isinstance(order, Bucketed):
        part = order_of(order)[[place.index for place in places]]
    assert stats.ks_2samp(t[part == 0], t[part == 1]).pvalue > 1e-6
    assert stats.ks_2samp(t[part == 1], t[part == 2]).pvalue > 1e-6


def times(process: ForwardProcess, places: list[Place]) -> np.ndarray:
    import torch

    rows = torch.tensor([[*place] for place in places])
    key = Keys.pack(rows[:, 0], view=rows[:, 1], epoch=rows[:, 3], dataset=rows[:, 4], order=rows[:, 5])
    (t,) = process.draw(torch.zeros(len(places), 1, 2, 2), key, position=rows[:, 2])
    return t.numpy()


def test_a_fixed_order_repeats_its_first_epoch():
    """As Lightning's overfit_batches wants: the same samples, each time with other noise."""
    order = Bucketed(np.array([0, 0, 0, 1]), 4, seed=0, fixed=True)
    first, later = epoch_of(order, 0), epoch_of(order, 9)
    assert [[p.index for p in places] for places in first] == [[p.index for p in places] for places in later]
    assert len({(p.index, p.view, p.epoch) for places in (*first, *later) for p in places}) == 8


def test_laps_beyond_the_width_of_an_epoch_go_on_as_views():
    """One image, of which a batch of 24 takes 24 laps: 2^20 laps are over after 43,691 batches."""
    order = Bucketed(np.array([0]), 24, seed=0, fixed=False)
    seen = {(p.view, p.epoch) for epoch in (43_690, 43_691) for places in epoch_of(order, epoch) for p in places}
    assert len(seen) == 48
    assert {view for view, _ in seen} == {0, 1}
