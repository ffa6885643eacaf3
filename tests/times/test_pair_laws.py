"""Laws of the times of a pair: each against a million numpy draws of its source, and what holds of all of them."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import special, stats
from shared import MOSTLY_SLOW, names, part, schedule_of

from diffaug import ForwardProcess
from diffaug.randomness.keys import Keys
from diffaug.schedules import EDM, LinearBeta, Rectified, Schedule, Truncated
from diffaug.targets import FIELDS, TARGETS, THIRD_FIELDS, Pair
from diffaug.times import (
    Antithetic,
    ConstantDecrement,
    DyadicStep,
    LogitNormal,
    LogNormal,
    Neighbours,
    PairPlaces,
    PairTimes,
    SigmaRatio,
    StepEarlier,
    Times,
    TwoDraws,
    Uniform,
    UniformEarlier,
)

COUNT = 10**6
KS = 2.7 * (2 / COUNT) ** 0.5  # of two samples: a false alarm of 1e-6
LAWS = {
    "uniform": UniformEarlier(),
    "step": StepEarlier(18),
    "two draws": TwoDraws(),
    "two draws, never equal": TwoDraws(equal=0),
    "ratio": SigmaRatio(),
    "ratio, late": SigmaRatio(stage=64),
    "neighbours": Neighbours(),
    "neighbours, near": Neighbours(2**16),
    "dyadic": DyadicStep(),
    "dyadic, fine": DyadicStep(20, 0.1),
    "two densities": TwoDraws(0.5, LogitNormal(-1.0)),
    "decrement": ConstantDecrement(),
    "decrement, coarse": ConstantDecrement(1, group=2),
    "ratio, rising": SigmaRatio(last_stage=8, samples=1000),
    "neighbours, doubling": Neighbours(11, 1281, 1000),
    "neighbours, square root": Neighbours(2, 151, 1000, "square_root"),
}


def drawn(law: PairTimes, schedule: Schedule, times: Times, seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    index = torch.arange(COUNT)
    keys = Keys.pack(index, seed=seed)
    t, s = law.draw(keys, schedule, times, times.draw(keys, schedule), PairPlaces(index, index))
    return t.double().numpy(), s.double().numpy()


def check_against(ours: tuple[np.ndarray, np.ndarray], oracle: tuple[np.ndarray, np.ndarray]) -> None:
    """Compare t, s and t - s by Kolmogorov and Smirnov's distance; rounded, as a float32 is not where a float64 is."""
    for a, b in ((ours[0], oracle[0]), (ours[1], oracle[1]), (ours[0] - ours[1], oracle[0] - oracle[1])):
        a, b = np.sort(a.round(6)), np.sort(b.round(6))
        at = np.concatenate([a, b])
        gap = np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")
        assert np.abs(gap).max() / COUNT < KS


def check_share(equal: np.ndarray, share: float) -> None:
    low, high = stats.binom.ppf([5e-7, 1 - 5e-7], len(equal), share)
    assert low <= equal.sum() <= high


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.minimum(-x, 700)))


@pytest.mark.slow
@pytest.mark.parametrize("equal", [0.0, 0.75, 1.0])
def test_two_draws_are_meanflow_s(equal: float) -> None:
    random = np.random.default_rng(1)
    t, s = drawn(TwoDraws(equal), Rectified(), LogitNormal(-0.4, 1.0))
    check_share(s == t, equal)
    draws = logistic(random.normal(-0.4, 1.0, (2, COUNT)))
    later = draws.max(0)
    check_against((t, s), (later, np.where(random.random(COUNT) < equal, later, draws.min(0))))


@pytest.mark.slow
def test_two_draws_of_a_discrete_schedule() -> None:
    random = np.random.default_rng(2)
    t, s = drawn(TwoDraws(0.25), LinearBeta(), Uniform())
    check_share(s == t, 0.25 + 0.75 / 1000)
    draws = random.integers(0, 1000, (2, COUNT))
    check_against((t, s), (draws.max(0), np.where(random.random(COUNT) < 0.25, draws.max(0), draws.min(0))))


@pytest.mark.slow
def test_two_draws_of_two_densities() -> None:
    random = np.random.default_rng(3)
    t, s = drawn(TwoDraws(0.5, LogNormal(-2.0, 0.5)), EDM(), LogNormal(-0.4, 1.0))
    check_share(s == t, 0.5)
    draws = np.exp([random.normal(-0.4, 1.0, COUNT), random.normal(-2.0, 0.5, COUNT)])
    check_against((t, s), (draws.max(0), np.where(random.random(COUNT) < 0.5, draws.max(0), draws.min(0))))


@pytest.mark.slow
def test_uniform_earlier_and_a_step() -> None:
    random = np.random.default_rng(4)
    u = random.random(COUNT)
    check_against(drawn(UniformEarlier(), Rectified(), Uniform()), (u, u * random.random(COUNT)))
    t = random.integers(0, 1000, COUNT)
    check_against(drawn(UniformEarlier(), LinearBeta(), Uniform()), (t, random.integers(-1, t)))
    check_against(drawn(StepEarlier(18), Rectified(), Uniform()), (u, np.maximum(u - 1 / 18, 0)))


@pytest.mark.slow
@pytest.mark.parametrize(("q", "stage"), [(2.0, 1), (2.0, 5), (4.0, 3)])
def test_sigma_ratio_is_ect_s(q: float, stage: int) -> None:
    random = np.random.default_rng(6)
    t = np.exp(random.normal(-1.1, 2.0, COUNT))
    r = np.maximum(t * (1 - (1 + 8 * logistic(-t)) / q**stage), 0)
    check_against(drawn(SigmaRatio(q, stage=stage), EDM(), LogNormal(-1.1, 2.0)), (t, r))


def test_sigma_ratio_is_of_sigma_on_any_schedule() -> None:
    t, s = SigmaRatio(stage=6).draw(
        Keys.pack(torch.arange(3)), Rectified(), Uniform(), torch.tensor([0.1, 0.5, 0.9]), PairPlaces()
    )
    sigma = (t / (1 - t)).double()
    ratio = 1 - (1 + 8 * torch.sigmoid(-sigma)) / 64
    torch.testing.assert_close((s / (1 - s)).double(), sigma * ratio, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("equal", [0.0, 0.75])
def test_dyadic_steps_are_shortcut_models_s(equal: float) -> None:
    random = np.random.default_rng(9)
    t, s = drawn(DyadicStep(7, equal), Rectified(), Uniform())
    assert abs((s == t).sum() - equal * COUNT) < 2
    plain, k = random.random(COUNT) < equal, random.integers(0, 7, COUNT)
    count = 2 ** np.where(plain, 7, k)
    theirs = random.integers(0, count) / count  # 0 is noise
    check_against((t, s), (1 - theirs, np.where(plain, 1 - theirs, 1 - theirs - 1 / count)))
    step = (t - s)[s < t]
    assert (np.log2(step) % 1 == 0).all()
    assert (t[s < t] / step % 1 == 0).all()
    assert (t * 128 % 1 == 0).all()


def karras(points: int) -> np.ndarray:
    """Karras et al. 2022, equation 5, rising; as float32 holds it, so that points compare as what they are."""
    return (np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), points) ** 7).astype(np.float32).astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("points", [2, 18, 1281])
def test_neighbours_are_consistency_training_s(points: int) -> None:
    lower = np.random.default_rng(7).integers(0, points - 1, COUNT)
    check_against(drawn(Neighbours(points), EDM(), Uniform()), (karras(points)[lower + 1], karras(points)[lower]))


def test_neighbours_are_improved_consistency_training_s() -> None:
    sigma, times = karras(21), LogNormal(-1.1, 2.0, sigma_min=0.002, sigma_max=80.0)
    share = np.diff(special.erf((np.log(sigma) + 1.1) / (2**0.5 * 2.0)))
    lower = np.random.default_rng(8).choice(20, COUNT, p=share / share.sum())
    check_against(drawn(Neighbours(21), EDM(), times), (sigma[lower + 1], sigma[lower]))


@pytest.mark.slow
@pytest.mark.parametrize("halvings", [3, 12, 15])
def test_a_constant_decrement_is_inductive_moment_matching_s(halvings: int):
    random, law = np.random.default_rng(10), ConstantDecrement(halvings, group=1)
    schedule = Truncated(Rectified(), high=0.994)
    t, s = drawn(law, schedule, Uniform())
    r = law.between(schedule, *(torch.tensor(x, dtype=torch.float32) for x in (t, s))).double().numpy()
    theirs = random.random(COUNT) * 0.994
    later = theirs * random.random(COUNT)
    eta = theirs / (1 - theirs) - 160 / 2**halvings
    between = np.maximum(later, np.where(eta > 0, eta / (1 + eta), 0))
    check_against((t, s), (theirs, later))
    check_against((t, r), (theirs, between))
    check_against((r, s), (between, later))


def allowed(law: PairTimes, schedule: Schedule) -> bool:
    try:
        law.check(schedule, Uniform())
    except ValueError:
        return False
    return True


def test_the_configs_are_the_classes_defaults() -> None:
    """Which are thus the laws that all of these tests go through."""
    for pair in (part("pair", name) for name in names("pair") if name != "none"):
        assert pair == Pair(type(pair.times)())


@pytest.mark.parametrize("noise", ["same", "chain"])
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_no_law_makes_what_is_not_finite(name: str, law: PairTimes, noise: str) -> None:
    """Also at both ends of the schedule, given as t: least noise, full noise. What is refused is of continuous time."""
    schedule = schedule_of(name).at_shape((3, 1, 8, 8))
    if not allowed(law, schedule):
        assert law.continuous
        assert schedule.discrete
        return
    pair, index = Pair(law, noise), torch.arange(2000)
    if law.third and noise == "chain":
        return
    fields = [name for name in FIELDS if name not in TARGETS or name in ("epsilon", "v", "x_0")]
    fields = [name for name in fields if law.third or name not in THIRD_FIELDS]
    process = ForwardProcess(schedule, fields=fields, pair=pair, compile=False)
    for stage in ("train", "val"):
        batch: Any = process(torch.ones(2000, 1, 2, 2), index, position=index, handed=index, seed=1, stage=stage)
        for field in fields:
            assert getattr(batch, field).isfinite().all(), field
        check_times(schedule, batch.t, batch.s, batch.interval, batch.same)
        if law.third:
            assert ((batch.s <= batch.r) & (batch.r < batch.t)).all()
    key = Keys.pack(torch.arange(200))
    low, high = schedule.range
    for end in (low, min(high, 1e30)):
        t = torch.full((200,), end, dtype=torch.int64 if schedule.discrete else torch.float32)
        number = torch.arange(200)
        t, s = law.draw(key, schedule, Uniform(), t, PairPlaces(number, number))
        assert law.weight(schedule, t, s, 0.5).isfinite().all()
        mix, fresh = pair.mix(schedule, t, s)
        assert mix.isfinite().all()
        assert fresh.isfinite().all()
        assert ((s <= t) & (s >= (-1 if schedule.discrete else low))).all()
        assert (fresh[s == t] == 0).all()


def check_times(
    schedule: Schedule, t: torch.Tensor, s: torch.Tensor, interval: torch.Tensor, same: torch.Tensor
) -> None:
    low, high = schedule.range
    assert t.dtype == s.dtype == (torch.int64 if schedule.discrete else torch.float32)
    assert (interval.dtype, same.dtype) == (torch.float32, torch.bool)
    assert ((t >= low) & (t <= high) & (s >= (-1 if schedule.discrete else low))).all()
    assert torch.equal(same, s == t)
    assert ((interval > 0) == (s < t)).all()
    assert (interval[same] == 0).all()
    if schedule.discrete:
        torch.testing.assert_close(interval, (t - s) / schedule.timesteps)
    else:
        span = schedule.to_unit(t, torch.float64) - schedule.to_unit(s, torch.float64)
        torch.testing.assert_close(interval, span.float(), rtol=1e-6, atol=1e-37)


def test_one_state_where_the_times_are_one() -> None:
    for noise in ("same", "chain"):
        for schedule in (LinearBeta(), Rectified(), EDM()):
            process = ForwardProcess(schedule, fields=("x_t", "x_s"), pair=Pair(TwoDraws(1), noise))
            x_t, x_s = process(torch.randn(50, 1, 4, 4), torch.arange(50))
            torch.testing.assert_close(x_s, x_t, rtol=1e-6, atol=1e-6)


def test_the_times_do_not_depend_on_the_fields() -> None:
    x_0, index = torch.randn(50, 1, 4, 4), torch.arange(50)
    batches: list[Any] = [
        ForwardProcess(LinearBeta(), fields=fields, pair=Pair(TwoDraws()))(x_0, index)
        for fields in (("x_t", "t", "interval"), ("x_t", "t", "s", "x_s"), ("x_t", "t", "same"))
    ]
    assert all(torch.equal(batch.t, batches[0].t) and torch.equal(batch.x_t, batches[0].x_t) for batch in batches)
    assert not torch.equal(batches[0].t, ForwardProcess(LinearBeta())(x_0, index).t)


def test_a_second_density_that_covers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pair\.times\.second must be a density that covers independently and learns"):
        TwoDraws(second=Uniform(coverage=Antithetic()))
