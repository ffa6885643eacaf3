"""Every schedule against sources that know nothing of this code.

Published and recorded values; the papers' formulas, written as the papers write them, at 50 digits over the whole
range of t; and diffusers' schedulers. The formulas stand here without the rearrangements by which the classes keep
their digits: at so many digits none are needed.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mpmath import mp, mpf
from shared import SCHEDULES, schedule_of, times

from diffaug import ForwardProcess
from diffaug.schedules import (
    EDM,
    VPSDE,
    Cosine,
    Discretised,
    InterpolatedShift,
    Inverse,
    Laplace,
    LinearBeta,
    LinearLogSNR,
    OptimalTransport,
    Polynomial,
    Rectified,
    Respaced,
    ScaledLinearBeta,
    Schedule,
    Shifted,
    ShiftedByTokens,
    SigmoidAlphaBar,
    SigmoidBeta,
    SubVPSDE,
    Tabulated,
    Trigonometric,
    Truncated,
    ZeroTerminalSNR,
)

T = 1000
SMALLEST = float(torch.finfo(torch.float32).tiny)


DIGITS = 120  # 50 are wanted; 1 - alpha_bar alone takes 45 of them where t is the smallest float32


@pytest.fixture(autouse=True)
def many_digits():
    with mp.workdps(DIGITS):
        yield


# 1. Recorded values.

AT = (0, 10, 100, 249, 499, 500, 749, 900, 998, 999)
ALPHA_BARS = {
    LinearBeta(): """0.9999 0.997806572507846 0.8951415908975365 0.5240853738253606 0.07858724288177824
        0.07779665836502389 0.0033505504389367744 0.0002702445195582643 4.118193638138445e-05 4.035829765375676e-05""",
    Cosine(): """0.999958715775178 0.9992789037733427 0.9715756818078386 0.847012161326905 0.4938435904406382
        0.49228517244880304 0.14427210238573596 0.023616108794393863 2.4287669070348544e-06 2.4287669070348567e-09""",
    SigmoidAlphaBar(): """0.999699720800251 0.996605733865994 0.960000476253141 0.850853547929667 0.5 0.49834281788207
        0.149146452070333 0.0389885700569115 0.000300279199749186 3.00279199749186e-07""",
    ScaledLinearBeta(): """0.99915 0.990431309114286 0.89422347758656 0.675432413725125 0.277669650456468
        0.276332683822975 0.0566234915982698 0.0141511419696725 0.00471669889987575 0.00466009851307724""",
    SigmoidBeta(): """0.999850794799183 0.998326190142306 0.98049172580904 0.903744665400934 0.301931056602195
        0.298887627846759 0.00573219888611749 0.000290468927317189 4.04896200055599e-05 3.96818199053321e-05""",
}


@pytest.mark.parametrize("schedule", ALPHA_BARS, ids=lambda s: type(s).__name__)
def test_recorded_alpha_bars(schedule):
    recorded = torch.tensor([float(x) for x in ALPHA_BARS[schedule].split()], dtype=torch.float64)
    t = torch.tensor(AT)
    # Values recorded to 15 digits carry half a unit of the last.
    torch.testing.assert_close(schedule.alpha_bars[t], recorded, rtol=2e-15 * 500, atol=0)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha.double(), recorded.sqrt(), rtol=2e-7, atol=0)
    torch.testing.assert_close(sigma.double(), (1 - recorded).sqrt(), rtol=2e-7, atol=0)


def test_recorded_sums_and_crossings():
    linear, cosine = LinearBeta(), Cosine()
    assert linear.betas.sum().item() == pytest.approx(10.05, rel=1e-12)
    assert linear.alpha_bars.sum().item() == pytest.approx(275.51323339680613, rel=1e-12)
    assert cosine.betas.sum().item() == pytest.approx(12.441496417056296, rel=1e-12)
    assert cosine.alpha_bars.sum().item() == pytest.approx(495.5775125824862, rel=1e-12)
    for schedule, crossing, first, last in ((linear, 259, 9.21024, -10.11767), (cosine, 496, 10.09499, -19.83588)):
        log_snr = schedule.log_snr(torch.arange(T))
        assert (log_snr < 0).nonzero()[0].item() == crossing
        assert crossing - 1 < schedule.t_of_log_snr(torch.zeros(1)).item() <= crossing
        assert log_snr[[0, -1]].tolist() == pytest.approx([first, last], abs=6e-6)
    assert (linear.alpha_bars < 1e-4).sum() == 46
    assert (cosine.betas == 0.999).sum() == 1


def test_the_seed_text_in_numpy():
    alpha_bars = np.cumprod(1.0 - np.linspace(1e-4, 0.02, T))
    np.testing.assert_allclose(LinearBeta().alpha_bars.numpy(), alpha_bars, rtol=1e-13)
    assert LinearBeta().alpha_bars[-1].item() == pytest.approx(4.035829765375676e-05, rel=1e-12)


def test_rescaled_ends():
    assert LinearBeta(100, rescale=True).alpha_bars[-1].item() == pytest.approx(2.04e-05, abs=5e-8)
    assert LinearBeta(100).alpha_bars[-1].item() == pytest.approx(0.3636, abs=5e-5)
    assert LinearBeta(1000, rescale=True).alpha_bars.equal(LinearBeta().alpha_bars)
    assert LinearBeta(100, rescale=True).betas[[0, -1]].tolist() == pytest.approx([1e-3, 0.2], rel=1e-14)


def test_recorded_zero_terminal_snr():
    schedule = ZeroTerminalSNR(LinearBeta())
    recorded = {250: 0.5188605367916812, 499: 0.07602875054711478, 998: 4.213262465088073e-09, 0: 0.9999}
    for t, value in recorded.items():
        assert schedule.alpha_bars[t].item() == pytest.approx(value, rel=1e-12 if t != 998 else 1e-11)
    assert schedule.alpha_bars[999] == 0
    assert schedule.betas[999] == 1
    assert schedule.betas[998].item() == pytest.approx(0.7522672311504701, rel=1e-11)
    assert schedule.alpha_bars.sum().item() == pytest.approx(274.05808437370405, rel=1e-12)
    t = torch.tensor([999])
    assert schedule.log_snr(t).item() == -math.inf
    assert [c.item() for c in schedule.alpha_sigma(t)] == [0.0, 1.0]


def test_beyond_an_infinite_log_snr_the_nearest_step_is_the_finite_one_beside_it():
    values = torch.tensor([1e6, -1e6, -math.inf], dtype=torch.float64)
    assert ZeroTerminalSNR(LinearBeta()).t_of_log_snr(values).tolist() == [0, 998, 999]


def test_recorded_sigmas():
    sigma = torch.exp(-ScaledLinearBeta().log_snr(torch.tensor([0, 499, 999]), torch.float64) / 2)
    assert sigma.tolist() == pytest.approx([0.029167158151720367, 1.612886194303876, 14.614641229333639], rel=1e-12)
    karras = EDM().from_unit(torch.arange(9, -1, -1, dtype=torch.float64) / 9)
    assert karras[:4].tolist() == pytest.approx(
        [80, 42.41518931851267, 21.10867673619376, 9.723201355260132], rel=1e-12
    )
    assert karras[-1].item() == pytest.approx(0.002, rel=1e-12)
    sigma = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
    t = LinearBeta().t_of_log_snr(-2 * sigma.log())
    assert t.tolist() == pytest.approx([258.09301969495516, 565.354043177532, 768.2537274153202], rel=1e-10)


# 2. The papers' formulas at 50 digits: alpha_bars of a discrete schedule, (alpha, sigma) at t of a continuous one.


def products(betas: list) -> list:
    bars, bar = [], mpf(1)
    for beta in betas:
        bar *= 1 - beta
        bars.append(bar)
    return bars


def spaced(first: float, last: float, count: int) -> list:
    first, last = mpf(first), mpf(last)
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def clipped(alpha_bar: Callable, largest: float | None = 0.999, steps: int = T) -> list:
    """alpha_bars of betas 1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), clipped."""
    bars = [alpha_bar(mpf(t) / steps) for t in range(steps + 1)]
    betas = [1 - after / before for before, after in itertools.pairwise(bars)]
    return products([beta if largest is None else min(max(beta, mpf(0)), mpf(largest)) for beta in betas])


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def laplace(u):
    if u in (0, 1):
        return mpf(1 - u)
    return sigmoid(-mpf(0.5) * mp.sign(mpf(1) / 2 - u) * mp.log(1 - 2 * abs(mpf(1) / 2 - u)))


def sigmoid_alpha_bar(u):
    g = [sigmoid(-3 + 6 * mpf(x)) for x in (0, u, 1)]
    return (g[2] - g[1]) / (g[2] - g[0])


def cosine(u, s=0.008):
    s = mpf(s)
    return mp.cos((u + s) / (1 + s) * mp.pi / 2) ** 2


def vp_sde(u):
    return mp.exp(-(u**2 * (mpf(20.0) - mpf(0.1)) / 2 + u * mpf(0.1)))


def zero_terminal(bars: list) -> list:
    r = [mp.sqrt(bar) for bar in bars]
    return [((x - r[-1]) * r[0] / (r[0] - r[-1])) ** 2 for x in r]


def of_snr(snr):
    return snr / (1 + snr)


def interpolated(bars: list, image: int, start: int, end: int) -> list:
    out = []
    for t, bar in enumerate(bars):
        u = mpf(t + 1) / len(bars)
        shift = (1 - u) * 2 * mp.log(mpf(start) / image) + u * 2 * mp.log(mpf(end) / image)
        out.append(of_snr(bar / (1 - bar) * mp.exp(shift)))
    return out


@functools.cache
def exact_table(name: str) -> list | None:
    with mp.workdps(DIGITS):
        linear = products(spaced(1e-4, 0.02, T))
        return {
            "linear": lambda: linear,
            "scaled_linear": lambda: products([x**2 for x in spaced(mp.sqrt(mpf(0.00085)), mp.sqrt(mpf(0.012)), T)]),
            "sigmoid_beta": lambda: products(
                [sigmoid(x) * (mpf(0.02) - mpf(1e-4)) + mpf(1e-4) for x in spaced(-6, 6, T)]
            ),
            "cosine": lambda: clipped(cosine),
            "sigmoid_alpha_bar": lambda: clipped(sigmoid_alpha_bar),
            "laplace": lambda: clipped(laplace),
            "inverse": lambda: products([mpf(1) / (T - t) for t in range(T)]),
            "tabulated": lambda: products([mpf(x) for x in (1e-4, 0.001, 0.01, 0.05, 0.2, 0.5)]),
            "zero_terminal_snr": lambda: zero_terminal(linear),
            "shifted": lambda: linear,  # image 64, base_image 64
            "interpolated_shift": lambda: interpolated(clipped(cosine), 512, 256, 32),
            "respaced": lambda: linear[19::20],
            "truncated": lambda: linear[:200],
            "discretised": lambda: [vp_sde(mpf(t + 1) / T) for t in range(T)],
        }.get(name, lambda: None)()


def rotated(angle):
    return mp.cos(angle), mp.sin(angle)


def preserving(alpha_bar):
    return mp.sqrt(alpha_bar), mp.sqrt(1 - alpha_bar)


EXACT = {
    "vp_sde": lambda u: preserving(vp_sde(u)),
    "linear_log_snr": lambda u: preserving(linear_log_snr(u)),
    "ve": lambda u: (mpf(1), mpf(0.02) * (mpf(100) / mpf(0.02)) ** u),
    "edm": lambda t: (mpf(1), t),
    "rectified": lambda u: (1 - u, u),
    "sd3": lambda u: (1 - 3 * u / (1 + 2 * u), 3 * u / (1 + 2 * u)),
    "trigonometric": lambda u: rotated(mp.pi / 2 * u) if u < 1 else (mpf(0), mpf(1)),
    "simple_diffusion": lambda t: rotated(mp.pi / 2 * t),
    "polynomial": lambda u: ((1 - u) ** 2, 1 - (1 - u) ** 2),
    "linear_alpha": lambda u: (1 - u, mp.sqrt(1 - (1 - u) ** 2)),
    "sub_vp_sde": lambda u: (mp.sqrt(vp_sde(u)), 1 - vp_sde(u)),
    "optimal_transport": lambda u: (1 - u, 1 - (1 - mpf(1e-5)) * (1 - u)),
    "shifted_by_tokens": lambda u: (1 - u, u),  # without a batch
}


def exact(name: str, t: torch.Tensor) -> list | None:
    bars = exact_table(name)
    if bars is not None:
        assert len(bars) == len(t)
        return [preserving(bar) for bar in bars]
    return [EXACT[name](mpf(x)) for x in t.tolist()] if name in EXACT else None


# A schedule of one's own needs no entry here; those that diffaug brings have one.
KNOWN = [name for name in SCHEDULES if exact_table(name) is not None or name in EXACT]


def check(schedule: Schedule, t: torch.Tensor, wanted: list) -> None:
    alpha, sigma = schedule.alpha_sigma(t)
    log_snr = schedule.log_snr(t)
    for place, (exact_alpha, exact_sigma) in enumerate(wanted):
        for got, exact_value in ((alpha[place].item(), exact_alpha), (sigma[place].item(), exact_sigma)):
            if exact_value == 0:
                assert got == 0
            elif exact_value >= SMALLEST:
                assert abs(got / exact_value - 1) < 2e-7, (schedule, t[place], got, exact_value)
            else:
                assert 0 <= got <= SMALLEST
        if exact_alpha > 0 and exact_sigma > 0:
            assert abs(log_snr[place].item() - 2 * mp.log(exact_alpha / exact_sigma)) < 1e-5
        else:
            assert log_snr[place].item() == (-math.inf if exact_alpha == 0 else math.inf)


@pytest.mark.parametrize("name", KNOWN)
def test_against_the_formula_at_50_digits(name):
    schedule = schedule_of(name)
    t = times(schedule, points=201)
    check(schedule, t, exact(name, t))
    if schedule.discrete:
        bars = exact_table(name)
        for got, bar in zip(schedule.alpha_bars.tolist(), bars, strict=True):
            assert got == bar == 0 or abs(got / bar - 1) < 1e-12, (got, bar)
        previous = [mpf(1), *bars[:-1]]
        betas = [1 - bar / before for bar, before in zip(bars, previous, strict=True)]
        assert max(abs(got / beta - 1) for got, beta in zip(schedule.betas.tolist(), betas, strict=True)) < 1e-9


def test_all_that_diffaug_brings_is_checked():
    brought = """cosine discretised edm interpolated_shift inverse laplace linear linear_log_snr rectified respaced
        scaled_linear sd3 shifted sigmoid_alpha_bar sigmoid_beta simple_diffusion tabulated trigonometric truncated ve
        vp_sde zero_terminal_snr polynomial linear_alpha sub_vp_sde optimal_transport shifted_by_tokens"""
    assert set(brought.split()) <= set(KNOWN)


def shifted(bars: list, factor: float) -> list:
    return [of_snr(bar / (1 - bar) / factor**2) for bar in bars]


def linear_log_snr(u):
    return sigmoid(mpf(13.3) - (mpf(13.3) + 5) * u)


def inverse(steps: int) -> list:
    return [1 - mpf(t + 1) / steps for t in range(steps)]


OTHER_TABLES = {
    Cosine(4000): lambda: clipped(cosine, steps=4000),
    Cosine(50, s=0.0, max_beta=0.5): lambda: clipped(lambda u: cosine(u, 0), 0.5, 50),
    Inverse(3): lambda: inverse(3),
    Laplace(7): lambda: clipped(laplace, steps=7),
    LinearBeta(21, rescale=True): lambda: products(spaced(1e-4 * 1000 / 21, 0.02 * (1000 / 21), 21)),
    LinearBeta(1): lambda: [1 - mpf(1e-4)],
    ZeroTerminalSNR(Cosine()): lambda: zero_terminal(clipped(cosine)),
    ZeroTerminalSNR(Inverse()): lambda: inverse(T),
    ZeroTerminalSNR(Tabulated((1e-13, 1e-13, 0.5))): lambda: zero_terminal(
        products([mpf(1e-13), mpf(1e-13), mpf(0.5)])
    ),
    Shifted(Cosine(100), image=256): lambda: shifted(clipped(cosine, steps=100), 4),
    Shifted(Inverse(100), factor=0.5): lambda: shifted(inverse(100), 0.5),
    Discretised(LinearLogSNR(), timesteps=10): lambda: [linear_log_snr(mpf(t + 1) / 10) for t in range(10)],
    Truncated(Inverse(), 990, 999): lambda: inverse(T)[990:],
    Tabulated((0.9, 1e-30, 0.0), "alpha_bars"): lambda: [mpf(0.9), mpf(1e-30), mpf(0)],
}


def shifted_cosine(u):
    return preserving(of_snr(mp.cot(mp.pi / 2 * u) ** 2 / 64) if 0 < u < 1 else 1 - u)


def interpolated_flow(u):
    log_factor = (1 - u) * mp.log(128 / mpf(32)) + u * mp.log(128 / mpf(256))
    noise = u * mp.exp(log_factor)  # sigma / alpha is u / (1 - u) times the factor
    return (1 - u) / (1 - u + noise), noise / (1 - u + noise)


OTHER_CONTINUOUS = {
    VPSDE(beta_min=0.0, beta_max=500.0): lambda u: preserving(mp.exp(-250 * u**2)),
    Shifted(Trigonometric(), image=512): shifted_cosine,
    Shifted(EDM(), factor=2.0): lambda t: (mpf(1), 2 * t),
    Truncated(EDM(), 0.01, 10.0): lambda t: (mpf(1), t),
    InterpolatedShift(Rectified(), 128, 32, 256): interpolated_flow,
    Polynomial(0.5): lambda u: (mp.sqrt(1 - u), 1 - mp.sqrt(1 - u)),
    OptimalTransport(0.1): lambda u: (1 - u, mpf(0.1) + (1 - mpf(0.1)) * u),
    SubVPSDE(0.2, 60.2): lambda u: (mp.exp(-mpf(0.1) * u - 15 * u**2), 1 - mp.exp(-mpf(0.2) * u - 30 * u**2)),
    ShiftedByTokens(Rectified(), tokens=4096): lambda u: (
        (1 - u) / (1 - u + u * mp.exp(mpf(1.15))),
        u * mp.exp(mpf(1.15)) / (1 - u + u * mp.exp(mpf(1.15))),
    ),
}


@pytest.mark.parametrize("schedule", [*OTHER_TABLES, *OTHER_CONTINUOUS], ids=lambda s: repr(s)[:40])
def test_other_settings_at_50_digits(schedule):
    t = times(schedule, points=101)
    if schedule.discrete:
        wanted = [preserving(bar) for bar in OTHER_TABLES[schedule]()]
    else:
        t = t[t <= 1e38]  # where twice t is a float32 too
        wanted = [OTHER_CONTINUOUS[schedule](mpf(x)) for x in t.tolist()]
    check(schedule, t, wanted)


# 3. Directions and grids.


def test_a_shift_by_tokens_is_flux_s():
    """mu of diffusers' calculate_shift, linear through (256, 0.5) and (4096, 1.15); a batch's own by its patches."""
    t = torch.linspace(0.01, 0.99, 99)
    for tokens, shape in (
        (256, (2, 16, 32, 32)),
        (4096, (2, 16, 128, 128)),
        (1024, (2, 4, 64, 64)),
        (8192, (1, 4, 256, 128)),
    ):
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        schedule = ShiftedByTokens(Rectified()).at_shape(shape)
        assert schedule is ShiftedByTokens(Rectified()).at_shape(shape)
        factor = math.exp(mu)
        torch.testing.assert_close(schedule.alpha_sigma(t)[1], factor * t / (1 + (factor - 1) * t))
    process = ForwardProcess(ShiftedByTokens(Rectified()), fields=("sigma", "t"))
    sigma, t = process(torch.zeros(4, 4, 64, 64), torch.arange(4))
    torch.testing.assert_close(sigma, ShiftedByTokens(Rectified(), tokens=1024).alpha_sigma(t)[1])
    for shape in ((4, 7), (4, 8, 3, 16, 16)):  # of a clip, which of the axes holds frames?
        said = rf"schedule\.tokens=auto counts .* shape {re.escape(str(shape))}: set schedule\.tokens=N"
        with pytest.raises(ValueError, match=said):
            process(torch.zeros(shape), torch.arange(4))
    process = ForwardProcess(ShiftedByTokens(Rectified(), tokens=512), fields=("sigma", "t"))
    assert process(torch.zeros(4, 8, 3, 16, 16), torch.arange(4)).sigma.isfinite().all()
    with pytest.raises(ValueError, match=r"schedule\.tokens must be a finite number >= 1, or auto, .* but got 0"):
        ShiftedByTokens(Rectified(), tokens=0)


def test_a_factor_is_taken_before_a_size():
    t = torch.arange(T)
    assert Shifted(Cosine(), image=128).log_snr(t).equal(Shifted(Cosine(), factor=2.0, image=7).log_snr(t))


def test_the_interpolated_shift_gives_time_back_to_fine_details():
    """The share of unit time with SNR above 1 at 512 pixels: under the constant shift, by default, and as printed."""
    base, zero = Trigonometric(), torch.zeros((), dtype=torch.float64)
    default = InterpolatedShift(base, 512)
    assert default == InterpolatedShift(base, 512, base_image_least_noise=256, base_image_most_noise=32)
    as_printed = InterpolatedShift(base, 512, base_image_least_noise=32, base_image_most_noise=256)
    shares = [s.t_of_log_snr(zero).item() for s in (Shifted(base, image=512, base_image=64), default, as_printed)]
    assert shares == pytest.approx([0.079, 0.202, 0.043], abs=5e-4)


def test_simple_diffusion_is_a_truncated_cosine():
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = schedule_of("simple_diffusion")
    log_snr = schedule.log_snr(schedule.from_unit(u), torch.float64)
    ends = [math.atan(math.exp(-15 / 2)), math.atan(math.exp(15 / 2))]
    wanted = -2 * torch.log(torch.tan(ends[0] + u * (ends[1] - ends[0])))
    torch.testing.assert_close(log_snr, wanted, rtol=0, atol=1e-9)


def test_a_truncated_edm_has_the_grid_of_its_own_ends():
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    cut, own = Truncated(EDM(), 0.01, 10.0), EDM(sigma_min=0.01, sigma_max=10.0)
    torch.testing.assert_close(cut.from_unit(u), own.from_unit(u), rtol=1e-12, atol=0)
    assert cut.range == (0.01, 10.0)


@pytest.mark.parametrize("total", [1000, 999, 37])
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 25, 36])
def test_spacings_as_numpy_and_guided_diffusion_make_them(total, steps):
    base = LinearBeta(total)
    kept = {s: Respaced(base, steps, s).kept.numpy() for s in ("linspace", "leading", "trailing")}
    np.testing.assert_array_equal(kept["linspace"], np.linspace(0, total - 1, steps).round())
    np.testing.assert_array_equal(kept["leading"], np.arange(steps) * (total // steps))
    np.testing.assert_array_equal(kept["trailing"], np.arange(total, 0, -total / steps).round()[::-1][-steps:] - 1)
    for spacing, t in kept.items():
        respaced = Respaced(base, steps, spacing)
        assert respaced.timesteps == steps
        torch.testing.assert_close(respaced.alpha_bars, base.alpha_bars[torch.from_numpy(t)], rtol=1e-12, atol=0)


def test_a_step_halfway_between_two_is_rounded_exactly():
    """A stride that is added up in floating point misses the half: guided-diffusion keeps 499 here."""
    at, added = 0.0, []
    for _ in range(999):
        added.append(round(at))
        at += 999 / 998
    kept = Respaced(LinearBeta(), 999, "linspace").kept.tolist()
    assert kept == np.linspace(0, 999, 999).round().tolist()
    differing = [(a, b) for a, b in zip(added, kept, strict=True) if a != b]
    assert differing == [(499, 500)]


def test_sections_of_a_respacing():
    # The example of guided-diffusion's documentation: 10, 15 and 20 steps of the three parts of 300.
    kept = Respaced(LinearBeta(300), (10, 15, 20), "linspace").kept
    parts = [start + np.linspace(0, 99, count).round() for start, count in ((0, 10), (100, 15), (200, 20))]
    np.testing.assert_array_equal(kept.numpy(), np.concatenate(parts))
    uneven = Respaced(LinearBeta(11), [1, 4, 3], "linspace")  # parts of 4, 4 and 3
    assert uneven.kept.tolist() == [0, 4, 5, 6, 7, 8, 9, 10]
    assert uneven.timesteps == 8
    with pytest.raises(ValueError, match=r"schedule\.steps must be a whole number in \[1, 3\], but got 4"):
        Respaced(LinearBeta(11), [1, 4, 4])


# 4. diffusers, whose tables are float32.


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def test_laplace_is_the_square_of_what_diffusers_has(diffusers):
    # It returns sqrt(snr / (1 + snr)) where alpha_bar = snr / (1 + snr) is meant: half the noise at the middle.
    theirs = diffusers.DDPMScheduler(beta_schedule="laplace").alphas_cumprod.double()
    assert theirs[499].item() == pytest.approx(0.7075, abs=5e-4)
    assert Laplace().alpha_bars[499].item() == pytest.approx(0.5, rel=1e-12)
    # Theirs divides by alpha_bar(0) = 0.9999...: the same but for that.
    torch.testing.assert_close(theirs[:-1] ** 2, Laplace().alpha_bars[:-1], rtol=3e-3, atol=0)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_spacings_as_diffusers_has_them(diffusers, spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert Respaced(LinearBeta(), steps, spacing).kept.flip(0).tolist() == scheduler.timesteps.tolist()
