"""Densities of t: each by its empirical CDF against a closed form of its paper's, and the laws that all keep.

False alarms: a Kolmogorov-Smirnov distance of n draws exceeds 2.7 / sqrt(n) with a chance of 9.3e-7 (Dvoretzky,
Kiefer, Wolfowitz, Massart: 2 exp(-2 * 2.7^2)), also where the law is discrete. The draws are keyed: no test is random.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from scipy import stats
from shared import composed, names, part

import diffaug.times as T
from diffaug import ForwardProcess
from diffaug.randomness.keys import Keys
from diffaug.schedules import EDM, VE, LinearBeta, Rectified, Schedule, ZeroTerminalSNR
from diffaug.times import Importance, Independent, LevelTimes, Times

DRAWS = 100_000
KS = 2.7 / math.sqrt(DRAWS)
NAMES = names("times")
EXTREMES = [2.0**-54, 1e-15, 1e-9, 1e-4, 1 - 1e-4, 1 - 1e-9, 1 - 2.0**-52, 1 - 2.0**-53]
Q = torch.cat([torch.tensor(EXTREMES, dtype=torch.float64), torch.linspace(1e-3, 1 - 1e-3, 999).double()]).sort().values


def configured(name: str) -> Times:
    """What a YAML file says; anew, as importance learns."""
    return replace(part("times", name))


def made(*overrides: str) -> Times:
    """What the command line makes of it."""
    return instantiate(composed(*overrides, config="train").times)


def mode_cdf(s: float) -> Callable[[np.ndarray], np.ndarray]:
    q = np.linspace(0, 1, 1_000_001)
    f = 1 - q - s * (np.cos(np.pi * q / 2) ** 2 - 1 + q)  # the paper's: it falls
    return lambda u: 1 - np.interp(u, f[::-1], q[::-1])


def cut(cdf: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    a, b = cdf(np.array(low)), cdf(np.array(high))
    return lambda x: np.clip((cdf(x) - a) / (b - a), 0, 1)


def steps(edges: list[float], shares: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda u: np.interp(u, edges, np.cumsum([0, *shares]))


def split(mode: float, low: float, high: float) -> Callable[[np.ndarray], np.ndarray]:
    def cdf(sigma: np.ndarray) -> np.ndarray:
        x = np.log(sigma) - mode
        return np.where(x < 0, 2 * low * stats.norm.cdf(x / low), low - high + 2 * high * stats.norm.cdf(x / high)) / (
            low + high
        )

    return cdf


def plateau(mean: float, std: float) -> Callable[[np.ndarray], np.ndarray]:
    """The density itself, on a grid, with its mode looked for there."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = np.exp(-(((np.log(u / (1 - u)) - mean) / std) ** 2) / 2) / (u * (1 - u))
    density[density.argmax() :] = density.max()
    return lambda x: np.interp(x, u + 0.25e-6, density.cumsum() / density.sum())


UNIT = {
    "uniform": (T.Uniform(), lambda u: u),
    "logit_normal": (T.LogitNormal(), lambda u: stats.norm.cdf(np.log(u / (1 - u)))),
    "logit_normal moved": (T.LogitNormal(-0.5, 2.0), lambda u: stats.norm.cdf((np.log(u / (1 - u)) + 0.5) / 2)),
    "plateau_logit_normal": (T.PlateauLogitNormal(), plateau(0, 1)),
    "plateau, moved": (T.PlateauLogitNormal(-0.8, 0.6), plateau(-0.8, 0.6)),
    "plateau, flat mode": (T.PlateauLogitNormal(0.3, math.sqrt(2)), plateau(0.3, math.sqrt(2))),
    "mixture": (T.MixedTimes(), lambda u: 0.9 * stats.norm.cdf(np.log(u / (1 - u))) + 0.1 * u),
    "mixture of three": (
        T.MixedTimes(T.Cubic(), T.MixedTimes(T.Biased(0.0, 0.25, 2.0), T.Beta(2.5, 1.5), 0.25), 0.4),
        lambda u: (
            0.4 * (1 - np.cbrt(1 - u)) + 0.15 * steps([0, 0.25, 1], [0.4, 0.6])(u) + 0.45 * stats.beta(2.5, 1.5).cdf(u)
        ),
    ),
    "mode": (T.Mode(), mode_cdf(1.29)),
    "mode of the ends": (T.Mode(-0.9), mode_cdf(-0.9)),
    "cubic": (T.Cubic(), lambda u: 1 - np.cbrt(1 - u)),
    "beta": (T.Beta(), stats.beta(0.8, 1).cdf),
    "beta of two sides": (T.Beta(2.5, 1.5), stats.beta(2.5, 1.5).cdf),
    "beta of the ends": (T.Beta(0.3, 0.6), stats.beta(0.3, 0.6).cdf),
    "earlier": (T.Biased(0.0, 0.25, 2.0), steps([0, 0.25, 1], [0.4, 0.6])),
    "later": (T.Biased(0.75, 1.0, 2.0), steps([0, 0.75, 1], [0.6, 0.4])),
    "range": (T.Biased(0.25, 0.75, 2.0), steps([0, 0.25, 0.75, 1], [1 / 6, 2 / 3, 1 / 6])),
    "less of a range": (T.Biased(0.2, 0.6, 0.5), steps([0, 0.2, 0.6, 1], [0.25, 0.25, 0.5])),
    "stepwise": (T.Stepwise(), lambda u: u),
    "stepwise, parts": (T.Stepwise((1, 0, 4, 3)), steps([0, 0.25, 0.5, 0.75, 1], [0.125, 0, 0.5, 0.375])),
}  # name: a density, and its CDF over unit time
LEVELS = {
    "log_normal": (T.LogNormal(), stats.lognorm(1.2, scale=math.exp(-1.2)).cdf),
    "log_normal_edm2": (T.LogNormal(-0.4, 1.0), stats.lognorm(1.0, scale=math.exp(-0.4)).cdf),
    "log_normal, cut": (
        T.LogNormal(-1.1, 2.0, sigma_min=0.002, sigma_max=80.0),
        cut(stats.lognorm(2.0, scale=math.exp(-1.1)).cdf, 0.002, 80),
    ),
    "split_log_normal": (T.SplitLogNormal(), split(-1.2, 1.2, 1.2)),
    "split_log_normal, unlike": (T.SplitLogNormal(-0.5, 0.4, 1.6), split(-0.5, 0.4, 1.6)),
    "log_uniform": (T.LogUniform(), stats.loguniform(0.002, 80).cdf),
    "log_logistic": (T.LogLogistic(), stats.fisk(2, scale=0.5).cdf),
    "log_logistic, cut": (
        T.LogLogistic(0.7, 1.5, sigma_min=0.1, sigma_max=3.0),
        cut(stats.fisk(1 / 1.5, scale=0.7).cdf, 0.1, 3),
    ),
    "v_diffusion": (T.VDiffusion(), cut(stats.halfcauchy(scale=0.5).cdf, 1e-3, 1e3)),
    "v_diffusion, uncut": (T.VDiffusion(0.0, None), stats.halfcauchy(scale=0.5).cdf),
    "v_diffusion, cut": (T.VDiffusion(0.05, 20.0, 1.0), cut(stats.halfcauchy(scale=1).cdf, 0.05, 20)),
    "cosmap": (T.VDiffusion(0.0, None, 1.0), lambda sigma: 2 / np.pi * np.arctan(sigma)),
    "log_snr_normal": (T.LogNormal(3.0, 1.0), lambda sigma: stats.norm(-6, 2).sf(-2 * np.log(sigma))),
    "mixture of levels": (
        T.MixedTimes(T.LogNormal(), T.LogUniform(), 0.7),
        lambda sigma: (
            0.7 * stats.lognorm(1.2, scale=math.exp(-1.2)).cdf(sigma) + 0.3 * stats.loguniform(0.002, 80).cdf(sigma)
        ),
    ),
    "laplace": (T.LaplaceLogSNR(), lambda sigma: stats.laplace(0, 0.5).sf(-2 * np.log(sigma))),
    "laplace, moved": (T.LaplaceLogSNR(-1.0, 2.0), lambda sigma: stats.laplace(-1, 2).sf(-2 * np.log(sigma))),
}  # name: a density, and its CDF over sigma / alpha


def test_every_configured_density_has_its_closed_form_here() -> None:
    known = {name: times for name, (times, _) in (UNIT | LEVELS).items() if name in NAMES}
    assert sorted([*known, "importance"]) == NAMES  # importance: test_importance.py
    for name, times in known.items():
        assert configured(name) == times


@functools.cache
def points(seed: int) -> torch.Tensor:
    return Independent().points(Keys.pack(torch.arange(DRAWS), seed=seed), None)


def test_a_draw_is_the_quantile_of_its_point() -> None:
    key = Keys.pack(torch.arange(DRAWS), seed=11)
    assert torch.equal(T.Mode().draw(key, LinearBeta()), T.Mode().of_points(points(11), LinearBeta()))
    q = (points(11).double() + 0.5) * 2.0**-53
    assert torch.equal(T.Mode().of_points(points(11), Rectified()), T.Mode().quantile(q, Rectified()).float())


def distance(draws: np.ndarray, at: np.ndarray, cdf: np.ndarray) -> float:
    """The greatest difference of the draws' empirical CDF and the law's, at and just before some points."""
    draws = np.sort(draws)
    return max(
        np.abs(np.searchsorted(draws, at, side) / len(draws) - cdf).max()
        for side in (("left", "right") if len(at) == len(draws) else ("right",))
    )


@pytest.mark.parametrize(("times", "cdf"), UNIT.values(), ids=UNIT)
def test_draws_over_unit_time_follow_their_law(times: Times, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    u = times.of_points(points(11), Rectified()).double().numpy()
    assert distance(u, np.sort(u), cdf(np.sort(u))) < KS
    t = times.of_points(points(11), LinearBeta(timesteps=200)).numpy()
    assert distance(t, np.arange(200), np.append(cdf(np.arange(1, 200) / 200), 1.0)) < KS


@pytest.mark.parametrize(("times", "cdf"), LEVELS.values(), ids=LEVELS)
def test_draws_over_noise_levels_follow_their_law(times: Times, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    sigma = np.sort(times.of_points(points(12), EDM()).double().numpy())  # t is sigma itself
    assert distance(sigma, sigma, cdf(sigma)) < KS
    u = np.sort(times.of_points(points(12), Rectified()).double().numpy())
    assert distance(u, u, cdf(u / (1 - u))) < KS
    schedule = LinearBeta(timesteps=200)
    log_snr = schedule.log_snr(torch.arange(200), torch.float64).numpy()
    halfway = np.exp(-(log_snr[1:] + log_snr[:-1]) / 4)
    assert distance(times.of_points(points(12), schedule).numpy(), np.arange(200), np.append(cdf(halfway), 1.0)) < KS


def test_a_wrong_law_is_found() -> None:
    times, cdf = T.LogitNormal(0.02), UNIT["logit_normal"][1]
    u = np.sort(times.of_points(points(11), Rectified()).double().numpy())
    assert distance(u, u, cdf(u)) > KS


def test_known_values() -> None:
    def at(times: Times, schedule: Schedule, *q: float) -> list[float]:
        return times.quantile(torch.tensor(q, dtype=torch.float64), schedule).tolist()

    # The sampler of SD3 at its own q = 0.01; t grows toward noise, so that is our 0.99.
    assert at(T.Mode(), Rectified(), 0.99) == pytest.approx([0.9774182685641031], rel=1e-12)
    # The value known from the field is of -1.2 in float32: exp(-1.2f); ours is of -1.2.
    assert at(T.LogNormal(), EDM(), 0.5) == pytest.approx([0.3011941975501432], rel=1e-7)
    assert at(T.LogNormal(), EDM(), 0.5) == pytest.approx([math.exp(-1.2)], rel=1e-12)
    # 50-digit values (mpmath) in both tails.
    assert at(T.LogNormal(), EDM(), 1e-10, 1 - 1e-10) == pytest.approx(
        [0.00014575126072091583, 622.416251089319], rel=1e-6
    )
    assert at(T.Beta(), Rectified(), 1e-6, 0.3) == pytest.approx([1e-6**1.25, 0.3**1.25], rel=1e-9)
    assert at(T.VDiffusion(0.0, None), EDM(), 1e-9, 0.75) == pytest.approx(
        [0.5 * math.pi / 2 * 1e-9, 1.2071067811865475]
    )
    q = np.array([1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
    assert at(configured("cosmap"), Rectified(), *q) == pytest.approx(1 - 1 / (np.tan(np.pi * q / 2) + 1), rel=1e-7)
    # By symmetry its mode is 1/2, where its density is sqrt(8 / pi): half of the draws' mass, and that times 1/2.
    total = 0.5 + math.sqrt(8 / math.pi) / 2
    assert at(T.PlateauLogitNormal(), Rectified(), 0.5 / total, 1 - 0.25 * math.sqrt(8 / math.pi) / total) == (
        pytest.approx([0.5, 0.75], rel=1e-12)
    )
    assert at(T.Cubic(), LinearBeta(), 0.1001, 0.89) == [271, 998]
    assert at(T.Stepwise((0, 0, 1, 1)), LinearBeta(timesteps=4), 1e-12, 0.4999, 0.5001, 1 - 1e-12) == [2, 2, 3, 3]


def test_a_mixture_is_the_inverse_cdf_of_the_sum() -> None:
    """Exact on steps; within 1e-6 between the points of its table, in the tails too."""
    times = T.MixedTimes(T.Stepwise((0, 0, 1, 1)), T.Stepwise((1, 2, 1, 0)), 0.5)
    q = torch.tensor([0.124, 0.126, 0.374, 0.376, 0.749, 0.751, 1 - 2.0**-53], dtype=torch.float64)
    assert times.quantile(q, LinearBeta(timesteps=4)).tolist() == [0, 1, 1, 2, 2, 3, 3]
    cdf = UNIT["mixture"][1]
    q = np.array([1e-12, 1e-7, 1e-3, 0.3, 0.77, 1 - 1e-3, 1 - 1e-7])
    u = T.MixedTimes().quantile(torch.from_numpy(q), Rectified()).numpy()
    assert cdf(u) == pytest.approx(q, rel=1e-2, abs=1e-13)
    assert cdf(u[2:6]) == pytest.approx(q[2:6], abs=1e-6)
    assert (1 - cdf(u[6])) == pytest.approx(1e-7, rel=1e-2)
    assert made(
        "times=mixture", "times@times.first=log_normal", "times@times.second=mixture", "times@times.second.first=cubic"
    ) == T.MixedTimes(T.LogNormal(), T.MixedTimes(T.Cubic()))


def test_a_mixture_refuses_what_its_parts_refuse() -> None:
    with pytest.raises(ValueError, match=r"T = 1000 timesteps.* got 3"):
        T.MixedTimes(T.Cubic(), T.Stepwise((1, 2, 3))).check(LinearBeta())
    with pytest.raises(ValueError, match="every draw would fall on one end"):
        T.MixedTimes(T.LogNormal(mean=-20)).check(LinearBeta())


def test_a_positive_mean_leans_to_noise_as_in_the_paper() -> None:
    """diffusers' scripts for SD3, which index timesteps that fall, have the median of the other sign."""
    half = torch.tensor([0.5], dtype=torch.float64)
    for mean, median in ((1.0, 0.731), (-1.0, 0.269)):
        u = T.LogitNormal(mean).quantile(half, Rectified())
        assert u.item() == Rectified().alpha_sigma(u, torch.float64)[1].item() == pytest.approx(median, abs=5e-4)


def test_v_diffusion_ends_where_k_diffusion_ends_it() -> None:
    q = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)
    assert T.VDiffusion().quantile(q, EDM()).tolist() == pytest.approx([1e-3, 1e3], rel=1e-9)
    uncut = T.VDiffusion(0.0, None).quantile(torch.tensor([1 - 1 / 200_000], dtype=torch.float64), EDM())
    assert uncut.item() == pytest.approx(65_504, rel=0.03)  # float16's greatest number


SCHEDULES = [LinearBeta(), ZeroTerminalSNR(LinearBeta()), Rectified(), EDM(), VE()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_laws(name: str, schedule: Schedule, device: torch.device) -> None:
    times = configured(name)
    if isinstance(times, Importance) and not schedule.discrete:
        with pytest.raises(ValueError, match="Importance keeps losses for each timestep"):
            times.quantile(Q, schedule)
        return
    low, high = schedule.range
    t = times.quantile(Q.to(device).reshape(1, -1), schedule)
    assert t.shape == (1, len(Q))
    assert t.device.type == device.type
    assert t.dtype == (torch.int64 if schedule.discrete else torch.float64)
    assert bool((t.diff() >= 0).all())
    assert bool(((t >= low) & (t <= high)).all())
    assert bool((t[0, 0] < t[0, -1]).all())
    # The middle of the range, and the points at its very ends.
    ends = torch.tensor([0, 1, 2**52, 2**53 - 2, 2**53 - 1], device=device)
    t = times.of_points(ends, schedule)
    assert t.dtype == (torch.int64 if schedule.discrete else torch.float32)
    if schedule.discrete:
        assert bool(((t >= 0) & (t < schedule.timesteps)).all())
    else:
        assert bool(((t.double() > low) & (t.double() < high)).all())
        assert bool(schedule.log_snr(t).isfinite().all())
        exact = times.quantile((ends.double() + 0.5) * 2.0**-53, schedule)
        assert torch.allclose(t[1:4].double(), exact[1:4], rtol=1.2e-7, atol=1.2e-38)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "coverage"), list(zip(NAMES, itertools.cycle(names("coverage")), strict=False)))
def test_any_coverage_goes_with_any_density_on_the_command_line(name: str, coverage: str) -> None:
    times = made(f"times={name}", f"coverage@times.coverage={coverage}")
    assert type(times.coverage).__name__.lower() == coverage.replace("_", "")
    assert times == replace(configured(name), coverage=times.coverage)
    assert (times == configured(name)) == (coverage == "independent")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.MixedTimes(second=T.Importance()), r"times\.second must be a density that does not learn, .*Import"),
        (lambda: T.Stepwise((0, 0)), r"times\.weights must be of a sum > 0, but got '2 that sum to 0'"),
        (lambda: T.Stepwise(3), r"times\.weights must be a list of numbers, or a file of them, but got 3 \(int\)"),
        (lambda: T.LogLogistic(sigma_min=1e9), r"times\.sigma_min and times\.sigma_max must leave .* lies a share of "),
    ],
)
def test_what_is_no_density_is_refused(make: Callable[[], Times], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_density_that_misses_the_schedule_is_refused_with_the_reason() -> None:
    for times in (
        T.LogUniform(500.0, 900.0),
        T.LogUniform(1e-5, 1e-4),
        T.LogNormal(mean=-20),
        T.LaplaceLogSNR(mean=40),
    ):
        with pytest.raises(ValueError, match="every draw would fall on one end"):
            times.check(LinearBeta())
        times.check(Rectified())  # has every noise level
    LevelTimes.check(T.LogUniform(50.0, 900.0), LinearBeta())  # some of it is there
    with pytest.raises(ValueError, match=r"T = 1000 timesteps.* got 3"):
        T.Stepwise((1, 2, 3)).check(LinearBeta())
    T.Stepwise((1, 2, 3)).check(Rectified())


NEVER = [name for name in LEVELS if name in NAMES] + ["logit_normal"]


@pytest.mark.parametrize("name", NAMES)
def test_a_last_step_without_signal_that_is_not_drawn_is_warned_of_once(name: str, caplog) -> None:
    schedule = ZeroTerminalSNR(LinearBeta(timesteps=500 + 2 * NAMES.index(name)))  # warned of in no other test
    times, last = configured(name), schedule.timesteps - 1
    for _ in range(2):
        ForwardProcess(schedule, times, target="v")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (name in NEVER)
    many = torch.linspace(0, 2**53 - 1, 100_001, dtype=torch.float64).long()[1:-1]
    assert (int(times.of_points(many, schedule).max()) < last) == (name in NEVER)
    for message in said:
        assert message.startswith(f"times={times!r} hardly ever draws t = {last} of {schedule!r}, where no signal")
        assert f"less than once in {1000 * schedule.timesteps} draws, and else no t above " in message
        assert message.endswith("such as times=uniform, or sample from an earlier t.")


def test_other_schedules_are_not_warned_of(caplog) -> None:
    for schedule in (LinearBeta(), Rectified(), EDM(), VE()):
        for name in NAMES:
            if name != "importance" or schedule.discrete:
                configured(name).check(schedule)
    T.Stepwise((1, 1)).check(ZeroTerminalSNR(LinearBeta(900)))
    assert not caplog.records
    T.Stepwise((1, 1, 0)).check(ZeroTerminalSNR(LinearBeta(900)))
    assert "no t above 599" in caplog.text


def test_stepwise_weights_come_from_files(tmp_path) -> None:
    values = [0.5, 0.25, 0.0, 4.0]
    np.save(tmp_path / "w.npy", values)
    np.savez(tmp_path / "w.npz", values)
    np.savez(tmp_path / "two.npz", values, values)
    np.savetxt(tmp_path / "w.csv", values, delimiter=",")
    (tmp_path / "row.csv").write_text("0.5, 0.25, 0, 4\n")
    (tmp_path / "words.csv").write_text("a,b\n")
    for file in ("w.npy", "w.npz", "w.csv", "row.csv"):
        assert T.Stepwise(str(tmp_path / file)) == T.Stepwise(tuple(values))
    assert made("times=stepwise", f"times.weights={tmp_path / 'w.npy'}") == T.Stepwise(tuple(values))
    assert made("times=stepwise", "times.weights=[1,2,1,0]") == T.Stepwise((1, 2, 1, 0))
    for file, has in {"two.npz": "arr_0, arr_1", "words.csv": "a, b"}.items():
        with pytest.raises(ValueError, match=rf"times\.weights must be a file with one row of numbers; it has {has}"):
            T.Stepwise(str(tmp_path / file))


def test_weights_never_draw_a_timestep_of_weight_0() -> None:
    weights = tuple(float(i % 3 == 1) for i in range(999))
    t = T.Stepwise(weights).of_points(torch.linspace(0, 2**53 - 1, 30_001, dtype=torch.float64).long(), LinearBeta(999))
    assert bool((t % 3 == 1).all())
    assert len(t.unique()) == 333


def test_histogram_is_the_share_of_draws_by_log_snr() -> None:
    edges = torch.tensor([-math.inf, -2.0, -1.0, 0.0, 0.7, 3.0])
    share = T.LaplaceLogSNR(0.2, 0.8).histogram(Rectified(), edges).numpy()
    expected = np.diff(stats.laplace(0.2, 0.8).cdf(edges.double().numpy()))
    assert share == pytest.approx(expected, abs=2 / 2**16)
    # Discrete: exact counts. The first two thirds of the steps against the last.
    schedule = LinearBeta(timesteps=3)
    a, b, c = schedule.log_snr(torch.arange(3), torch.float64)
    shares = T.Uniform().histogram(schedule, torch.stack([c, b, a + 1]), resolution=3000)
    assert shares.tolist() == pytest.approx([1 / 3, 2 / 3])
    # What lies beyond the schedule falls on its end: EDM's grid below the least noise of the linear schedule.
    least = schedule.log_snr(torch.tensor(0), torch.float64)
    on_end = T.LogUniform().histogram(schedule, torch.stack([least - 1e-9, least + 1]))
    sigma = math.exp(-(a + b).item() / 4)
    assert on_end.item() == pytest.approx(math.log(sigma / 0.002) / math.log(80 / 0.002), abs=2 / 2**16)
    with pytest.raises(ValueError, match="edges must be log-SNRs that rise"):
        T.Uniform().histogram(schedule, torch.tensor([1.0, 0.0]))


def test_uniform_discrete_times_are_integer_arithmetic() -> None:
    at = torch.tensor([0, 1, 2**52, 2**53 - 1, 1234567890123456, 9007199254740])
    for timesteps in (1, 3, 1000, 10**6):
        expected = [point * timesteps >> 53 for point in at.tolist()]
        assert T.Uniform().of_points(at, LinearBeta(timesteps)).tolist() == expected
