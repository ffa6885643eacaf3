"""Coverage: how evenly runs of samples lie, that each sample's point is uniform, and what the points do not depend on.

False alarms: Kolmogorov-Smirnov distances of n points are held below 2.7 / sqrt(n), a chance of 9.3e-7. The points are
keyed: no test is random.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.stats import qmc

from diffaug.randomness.keys import Keys
from diffaug.schedules import EDM, LinearBeta
from diffaug.times import (
    Antithetic,
    ByIndex,
    Coverage,
    Independent,
    LogNormal,
    PerImage,
    Sobol,
    Stratified,
    Uniform,
)
from diffaug.times.coverage import golden, sobol

SEQUENCES = [Stratified(), Antithetic(), Sobol()]
ALL = [*SEQUENCES, PerImage(), ByIndex(), Independent()]
SIZES = [2, 3, 4, 5, 7, 8, 12, 16, 31, 32, 33, 64, 100, 128, 250, 256, 384, 512, 1000, 1024, 2047, 2048, 3000, 4096]
by_name = pytest.mark.parametrize("coverage", SEQUENCES, ids=lambda c: type(c).__name__)


def run(coverage: Coverage, start: int, size: int, *, epoch: int = 0, seed: int = 0) -> np.ndarray:
    """The points of consecutive samples of an epoch's order, in [0, 1), for images in an order of their own."""
    position = torch.arange(start, start + size)
    index = (position * 7919 + 13) % 60_000
    return coverage.points(Keys.pack(index, seed=seed, epoch=epoch), position).numpy() * 2.0**-53


def discrepancy(x: np.ndarray) -> float:
    """The most by which the share of points in an interval [0, x) is off."""
    x, i = np.sort(x), np.arange(len(x))
    return max((x - i / len(x)).max(), ((i + 1) / len(x) - x).max())


def gaps(x: np.ndarray) -> np.ndarray:
    """The distances between neighbours round the circle, of points in [0, 1)."""
    x = np.sort(x)
    return np.diff(np.r_[x, x[0] + 1])


STARTS = np.random.default_rng(1).integers(0, 2**34, 4)


@by_name
def test_any_run_is_evenly_covered(coverage: Coverage) -> None:
    for epoch, start in enumerate(STARTS.tolist()):
        x = run(coverage, start, 5000, epoch=epoch)
        for i, size in enumerate(SIZES):
            window = x[i * 37 : i * 37 + size]
            assert len(window) == size
            assert discrepancy(window) <= (1 + math.log2(size)) / size, (start, size)


def test_independent_draws_are_not_evenly_covered() -> None:
    sizes = [size for size in SIZES if size >= 256]
    off = [discrepancy(run(Independent(), 0, size)) > (1 + math.log2(size)) / size for size in sizes]
    assert all(off[-4:])
    assert not all(g < 1.9 for g in gaps(run(Independent(), 0, 64)) * 64)


@pytest.mark.parametrize("coverage", [Stratified(), Sobol()], ids=lambda c: type(c).__name__)
def test_every_stratum_gets_its_share(coverage: Coverage) -> None:
    for epoch, start in enumerate(STARTS.tolist()):
        x = run(coverage, start, 4600, epoch=epoch)
        for i, size in enumerate(SIZES):
            for k in range(1, 13):
                counts = np.bincount((x[i * 17 : i * 17 + size] * 2**k).astype(int), minlength=2**k)
                assert np.abs(counts - size / 2**k).max() < 2, (start, size, k)
        for k in range(1, 12):
            aligned = -start % 2**k
            counts = np.bincount((x[aligned : aligned + 2**k] * 2**k).astype(int), minlength=2**k)
            assert (counts == 1).all(), (start, k)


def test_the_steps_of_antithetic_leave_no_gap_and_no_crowd() -> None:
    starts = np.random.default_rng(2).integers(0, 5000, 4097)
    x = run(Antithetic(), 10**9, 10_000, epoch=3)
    for size in range(2, 4097, 7):
        steps = gaps(x[starts[size] : starts[size] + size]) * size
        assert 0.44 < steps.min() <= steps.max() < 1.9
        assert len(np.unique(steps.round(6))) <= 3  # three lengths at most (the three-distance theorem)


def test_sobol_is_equally_spaced_and_stratified_lies_anywhere_in_its_stratum() -> None:
    for epoch in range(20):
        assert gaps(run(Sobol(), 64 * epoch, 64, epoch=epoch)) == pytest.approx(1 / 64, abs=1e-12)
    offsets = np.stack([run(Stratified(), 64 * epoch, 64, epoch=epoch) * 64 % 1 for epoch in range(300)])
    assert stats.kstest(offsets.ravel(), "uniform").statistic < 2.7 / math.sqrt(offsets.size)
    # Of one run they are independent: the mean of 64 has the variance of independent ones, give or take 5 sigma.
    spread = offsets.mean(1).var() * 64 * 12
    assert abs(spread - 1) < 5 * math.sqrt(2 / 300)
    assert abs(np.corrcoef(offsets[:, :-1].ravel(), offsets[:, 1:].ravel())[0, 1]) < 5 / math.sqrt(offsets.size)


def test_sobol_agrees_with_scipys() -> None:
    n = torch.arange(4096)
    theirs = qmc.Sobol(2, scramble=False).random(4096)[:, 1]
    ours = [int(f"{d:064b}"[::-1], 2) * 2.0**-64 for d in sobol(n ^ n >> 1).tolist()]  # theirs in Gray code's order
    assert ours == theirs.tolist()
    key = Keys.pack(n)
    shift = Sobol().points(key, torch.zeros_like(n))
    mine = Sobol().points(key, n ^ n >> 1) ^ shift
    assert mine.tolist() == [int(x * 2**53) for x in theirs]


@by_name
def test_wide_indices_leave_the_cover_of_a_run_as_it_is(coverage: Coverage) -> None:
    """What is of the epoch is drawn without the index, whose highest bits are in the generator's key."""
    position = torch.arange(64)
    keys = (Keys.pack(index, seed=5, epoch=3) for index in (position, position * 0x123456_789ABCDE + 2**62))
    near, far = (coverage.points(key, position) >> 24 for key in keys)  # below them each sample is anywhere
    assert torch.equal(near, far)


def test_golden_is_integer_arithmetic() -> None:
    n, step = [0, 1, 2, 1000, 2**40, 2**53 - 1], 0x9E3779B97F4A7C15
    offset = 0x0123456789ABCDEF
    expected = [((i * step + offset) % 2**64) >> 11 for i in n]
    assert golden(torch.tensor(n), offset).tolist() == expected


@pytest.mark.parametrize("coverage", ALL, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("index", "position", "epoch", "view"), [(0, 0, 0, 0), (5, 1, 1, 0), (77, 12345, 9, 3)])
def test_each_samples_point_is_uniform(coverage: Coverage, index: int, position: int, epoch: int, view: int) -> None:
    many = 20_000
    key = Keys.pack(torch.full((many,), index), epoch=epoch, view=view)
    place = torch.full((many,), position)
    over_seeds = coverage.points(Keys(torch.cat((torch.arange(many)[None], key.rows[1:]))), place)
    assert over_seeds.dtype == torch.int64
    assert 0 <= over_seeds.min() <= over_seeds.max() < 2**53
    samples = [over_seeds]
    if not isinstance(coverage, PerImage):  # there the epochs are what is covered
        samples.append(
            coverage.points(Keys.pack(torch.full((many,), index), epoch=torch.arange(many), view=view), place)
        )
    for points in samples:
        assert stats.kstest(points.numpy() * 2.0**-53, "uniform").statistic < 2.7 / math.sqrt(many)
        last_bits = np.bincount(points.numpy() & 15, minlength=16)
        assert stats.chisquare(last_bits).pvalue > 1e-6


@by_name
def test_no_rank_is_tied_to_a_part_of_the_times(coverage: Coverage) -> None:
    x = run(coverage, 0, 8 * 1024, epoch=2)
    for ranks in (2, 4, 8) if isinstance(coverage, Sobol) else (2, 3, 4, 6, 8):  # Sobol on 3: see its docstring
        for rank in range(ranks):
            assert discrepancy(x[rank::ranks][:1024]) < 0.05, (ranks, rank)


@by_name
def test_what_the_points_depend_on(coverage: Coverage) -> None:
    first = run(coverage, 0, 256)
    assert np.array_equal(first, run(coverage, 0, 256))
    for other in (run(coverage, 0, 256, epoch=1), run(coverage, 0, 256, seed=1), run(coverage, 0, 256, seed=2**32)):
        assert not (first == other).any()
    assert len(np.unique(run(coverage, 1000, 512))) == 512
    if isinstance(coverage, Stratified):  # each run has its strata in an order of its own
        orders = {tuple((run(coverage, 8 * i, 8) * 8).astype(int)) for i in range(200)}
        assert len(orders) > 50
    with pytest.raises(ValueError, match=rf"{type(coverage).__name__} .*position=None: pass position="):
        coverage.points(Keys.pack(torch.arange(4)), None)
    # Only Stratified places a sample within its stratum of 2^-29 by its own key; the rest is of the position.
    position = torch.arange(256)
    others = coverage.points(Keys.pack(position + 999), position).numpy() * 2.0**-53
    assert np.abs(others - coverage.points(Keys.pack(position), position).numpy() * 2.0**-53).max() < 2.0**-29


def test_each_images_times_are_spread_over_the_epochs() -> None:
    epochs = torch.arange(40, 140)
    for image in (0, 1, 2**33 + 5):
        key = Keys.pack(torch.full_like(epochs, image), epoch=epochs)
        x = PerImage().points(key, None).numpy() * 2.0**-53
        for size in range(2, 101):
            for start in (0, (100 - size) // 2, 100 - size):
                steps = gaps(x[start : start + size]) * size
                assert 0.44 < steps.min() <= steps.max() < 1.9
    # Views of one epoch lie apart as well.
    views = torch.arange(8)
    x = PerImage().points(Keys.pack(torch.full_like(views, 3), epoch=2, view=views), None).numpy() * 2.0**-53
    assert gaps(x).min() * 8 > 0.3
    # Between images nothing is tied.
    x = PerImage().points(Keys.pack(torch.arange(20_000), epoch=6), None).numpy() * 2.0**-53
    assert stats.kstest(x, "uniform").statistic < 2.7 / math.sqrt(20_000)
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < 5 / math.sqrt(20_000)
    assert gaps(x[:64]).max() * 64 > 1.9


def test_any_prefix_of_a_dataset_is_evenly_covered_by_index() -> None:
    for size in SIZES:
        x = ByIndex().points(Keys.pack(torch.arange(size), stage="val"), None).numpy() * 2.0**-53
        steps = gaps(x) * size
        assert 0.44 < steps.min() <= steps.max() < 1.9
    assert torch.equal(
        ByIndex().points(Keys.pack(torch.arange(9), stage="val", epoch=4), None),
        ByIndex().points(Keys.pack(torch.arange(9), stage="val"), None),
    )


@by_name
def test_a_density_is_covered_through_its_quantiles(coverage: Coverage, device: torch.device) -> None:
    position = torch.arange(4096, 4096 + 64, device=device)
    key = Keys.pack(position % 50, seed=3)
    sigma = LogNormal(coverage=coverage).draw(key, EDM(), position).double().cpu().numpy()
    counts = np.bincount((stats.lognorm(1.2, scale=math.exp(-1.2)).cdf(sigma) * 8).astype(int), minlength=8)
    assert np.abs(counts - 8).max() <= (2 if isinstance(coverage, Antithetic) else 0)
    t = Uniform(coverage=coverage).draw(key, LinearBeta(timesteps=8), position).cpu().numpy()
    assert np.abs(np.bincount(t, minlength=8) - 8).max() <= (2 if isinstance(coverage, Antithetic) else 0)
