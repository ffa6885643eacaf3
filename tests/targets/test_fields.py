"""Fields, conversions and pairs: against closed forms worked out apart from the code, over every schedule YAML."""

import math

import mpmath
import pytest
import torch
from shared import MOSTLY_SLOW, schedule_of, times_inside

from diffaug import ForwardProcess
from diffaug.randomness.keys import Keys
from diffaug.schedules import Cosine, LinearBeta, Rectified, Schedule
from diffaug.targets import (
    IMAGE_FIELDS,
    INPUTS,
    NUMBER_FIELDS,
    TARGETS,
    Level,
    Pair,
    as_input,
    check_target,
    convert,
    convertible,
    mixes,
    recover,
)
from diffaug.times import StepEarlier, Uniform, UniformEarlier

mpmath.mp.dps = 40


def images(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, count, 3, generator=generator, dtype=torch.float64))


def closed_form(name: str, alpha: mpmath.mpf, sigma: mpmath.mpf, x_0: float, epsilon: float) -> mpmath.mpf:
    """Each field as its paper writes it, EDM's in its own variables: x = x_0 + s epsilon at the noise level s."""
    x_0, epsilon = mpmath.mpf(x_0), mpmath.mpf(epsilon)
    if name in ("F", "x_in"):
        s, data = sigma / alpha, mpmath.mpf(0.5)
        x = x_0 + s * epsilon
        c_skip, c_out = data**2 / (s**2 + data**2), s * data / mpmath.sqrt(s**2 + data**2)
        return (x_0 - c_skip * x) / c_out if name == "F" else x / mpmath.sqrt(s**2 + data**2)
    return {
        "x_t": alpha * x_0 + sigma * epsilon,
        "epsilon": epsilon,
        "x_0": x_0,
        "v": alpha * epsilon - sigma * x_0,
        "flow": epsilon - x_0,
        "score": -(alpha * x_0 + sigma * epsilon - alpha * x_0) / sigma**2,  # of N(alpha x_0, sigma^2) at x_t
    }[name]


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_fields_are_their_papers(name):
    schedule = schedule_of(name)
    x_0, epsilon = (x[:, 0] for x in images(41))
    t = times_inside(schedule)
    level = Level(schedule, t)
    for field in [*INPUTS, *TARGETS]:
        if field == "velocity":
            continue
        p, q = IMAGE_FIELDS[field](level)
        found = (p * x_0 + q * epsilon).tolist()
        for i, (alpha, sigma) in enumerate(zip(level.alpha.tolist(), level.sigma.tolist(), strict=True)):
            if alpha == 0 and field in ("F", "x_in"):
                continue  # EDM's own variables end there; test_f_where_all_signal_is_gone
            expected = closed_form(field, mpmath.mpf(alpha), mpmath.mpf(sigma), x_0[i].item(), epsilon[i].item())
            size = abs(p[i].item()) + abs(q[i].item())
            assert abs(found[i] - expected) <= 1e-14 * 4 * size, (field, t[i])


def test_f_where_all_signal_is_gone():
    """At alpha = 0: x_in = epsilon, F = x_0 / sigma_data, the limits of Karras's forms."""
    (p_f, q_f), (p_in, q_in) = mixes(Rectified(), ("F", "x_in"), torch.ones(1))[0].tolist()
    assert (p_f, q_f, p_in, q_in) == (2.0, 0.0, 0.0, 1.0)


def test_sigma_data_is_a_parameter():
    t = torch.tensor([400])
    alpha, sigma = LinearBeta().alpha_sigma(t, torch.float64)
    p, q = mixes(LinearBeta(), ("F",), t, sigma_data=0.25)[0, 0].double()
    root = (sigma**2 + alpha**2 / 16).sqrt()
    torch.testing.assert_close(torch.stack((p, q)), torch.cat((4 * sigma / root, -alpha / 4 / root)), rtol=1e-7, atol=0)


def test_f_has_unit_variance(schedule):
    """Karras et al. 2022, appendix B.6: for images of variance sigma_data^2, input and target have 1."""
    level = Level(schedule, times_inside(schedule))
    for name in ("F", "x_in"):
        p, q = IMAGE_FIELDS[name](level)
        torch.testing.assert_close(p.square() * 0.25 + q.square(), torch.ones_like(p), rtol=1e-14, atol=0)


def test_number_fields_at_known_values():
    t = torch.tensor([0, 499, 999])
    log_snr = LinearBeta().log_snr(t, torch.float64)
    alpha, sigma = LinearBeta().alpha_sigma(t, torch.float64)
    c_noise = NUMBER_FIELDS["c_noise"](LinearBeta(), t).double()
    torch.testing.assert_close(c_noise, (sigma / alpha).log() / 4, rtol=2e-7, atol=0)
    torch.testing.assert_close(c_noise, -log_snr / 8, rtol=2e-7, atol=0)


# --- velocity ---------------------------------------------------------------------------------------------------


def test_velocity_is_the_derivative(schedule):
    """alpha' and sigma' against differences of alpha and sigma, which know nothing of log_snr's derivative."""
    if schedule.discrete:
        alpha, sigma = schedule.alpha_sigma(torch.arange(schedule.timesteps), torch.float64)
        rates = Level(schedule, torch.arange(schedule.timesteps)).rates
        for found, table in zip(rates, (alpha, sigma), strict=True):
            torch.testing.assert_close(
                found[1:-1], (table[2:] - table[:-2]) * schedule.timesteps / 2, rtol=1e-9, atol=1e-9
            )
            ends = torch.stack((table[1] - table[0], table[-1] - table[-2])) * schedule.timesteps
            torch.testing.assert_close(found[[0, -1]], ends, rtol=1e-9, atol=1e-9)
        return
    unit, step = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), 1e-6
    assert 0.5 in unit.tolist()  # where formulas change their form
    rates = Level(schedule, schedule.from_unit(unit)).rates
    up, down = (schedule.alpha_sigma(schedule.from_unit(unit + d), torch.float64) for d in (step, -step))
    for found, a, b in zip(rates, up, down, strict=True):
        torch.testing.assert_close(found, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)


def test_velocity_in_closed_form():
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    one = torch.ones_like(t)
    for found, expected in zip(Level(Rectified(), t).rates, (-one, one), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    found = torch.stack(Level(schedule_of("trigonometric"), t).rates)
    angle = t * math.pi / 2
    torch.testing.assert_close(found, torch.stack((-angle.sin(), angle.cos())) * math.pi / 2, rtol=1e-10, atol=1e-11)
    edm = schedule_of("edm")
    sigma = torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    torch.testing.assert_close(Level(edm, sigma).rates[1], 7 * sigma ** (6 / 7) * (high - low), rtol=1e-10, atol=0)


def test_velocity_needs_two_steps():
    with pytest.raises(ValueError, match=r"schedule\.timesteps=1 has no two steps"):
        mixes(LinearBeta(timesteps=1), ("velocity",), torch.zeros(1, dtype=torch.int64))


def test_velocity_inside_inference_mode():
    with torch.inference_mode():
        inside = mixes(schedule_of("vp_sde"), ("velocity",), torch.tensor([0.3]))
    torch.testing.assert_close(inside, mixes(schedule_of("vp_sde"), ("velocity",), torch.tensor([0.3])))


# --- conversions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MOSTLY_SLOW)
def test_every_pair_of_fields_converts(name):
    """target' = convert(source -> target) for every pair, at every time where x_t and source determine it."""
    schedule, (x_0, epsilon) = schedule_of(name), images(41, seed=1)
    t = times_inside(schedule)
    level = Level(schedule, t)
    mix = {name: tuple(c[:, None] for c in IMAGE_FIELDS[name](level)) for name in IMAGE_FIELDS}
    values = {name: p * x_0 + q * epsilon for name, (p, q) in mix.items()}
    alpha, sigma = mix["x_t"]
    for source in TARGETS:
        p, q = mix[source]
        determinant = (alpha * q - sigma * p).abs()[:, 0]
        for target in IMAGE_FIELDS:
            able = convertible(schedule, source, target, t)
            if source == target or target in INPUTS:
                assert able.all()
            assert able[determinant > 1e-6].all(), (source, target)
            found = convert(schedule, source, target, values[source][able], values["x_t"][able], t[able])
            size = sum(c.abs() for c in mix[target])[able] * 4
            # what a rounding of the source or of x_t grows to, at most
            growth = sum(c.abs() for m in (mix["x_t"], mix[source]) for c in m)[:, 0] / determinant
            limit = 4e-15 * (1 + growth.nan_to_num(posinf=0.0) * (alpha + sigma + p.abs() + q.abs())[:, 0])
            error = (found - values[target][able]).abs() / size
            assert (error <= limit[able, None]).all(), (source, target, error.max())


@pytest.mark.parametrize("source", ["v", "flow", "F", "velocity"])
def test_nothing_divides_by_alpha_or_sigma_where_another_route_exists(source):
    """At both ends of the straight path, one of alpha and sigma being 0: x_0 and epsilon come back to the last bits."""
    x_0, epsilon = images(2, seed=2)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    p, q = (c[:, None] for c in IMAGE_FIELDS[source](Level(Rectified(), t)))
    x_t = torch.stack((x_0[0], epsilon[1]))
    found = recover(Rectified(), source, p * x_0 + q * epsilon, x_t, t)
    torch.testing.assert_close(torch.stack(found), torch.stack((x_0, epsilon)), rtol=1e-13, atol=1e-13)


def test_known_inverses():
    """Salimans and Ho 2022: x_0 = alpha x_t - sigma v. Liu et al. 2023: x_0 = x_t - t flow. Karras et al. 2022: D."""
    x_0, epsilon = images(3, seed=3)
    t = torch.tensor([10, 500, 990])
    alpha, sigma = (c[:, None] for c in Cosine().alpha_sigma(t, torch.float64))
    x_t, v = alpha * x_0 + sigma * epsilon, alpha * epsilon - sigma * x_0
    found = recover(Cosine(), "v", v, x_t, t)
    torch.testing.assert_close(found, (alpha * x_t - sigma * v, sigma * x_t + alpha * v), rtol=1e-12, atol=1e-12)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None]
    x_t, flow = (1 - u) * x_0 + u * epsilon, epsilon - x_0
    found = recover(Rectified(), "flow", flow, x_t, u[:, 0])
    torch.testing.assert_close(found, (x_t - u * flow, x_t + (1 - u) * flow), rtol=1e-12, atol=1e-12)
    s = torch.tensor([0.02, 1.0, 50.0], dtype=torch.float64)[:, None]
    x_t, network = x_0 + s * epsilon, torch.sin(7 * x_0)
    denoised = 0.25 / (s**2 + 0.25) * x_t + s * 0.5 / (s**2 + 0.25).sqrt() * network
    found = convert(schedule_of("edm"), "F", "x_0", network, x_t, s[:, 0])
    torch.testing.assert_close(found, denoised, rtol=1e-12, atol=1e-12)


def test_what_a_network_is_given_follows_from_x_t_alone(schedule):
    x_0, epsilon = images(41, seed=4)
    t = times_inside(schedule)
    level = Level(schedule, t)
    x_t, x_in = (
        sum(c[:, None] * x for c, x in zip(IMAGE_FIELDS[name](level), (x_0, epsilon), strict=True)) for name in INPUTS
    )
    torch.testing.assert_close(as_input(schedule, "x_in", x_t, t), x_in, rtol=1e-12, atol=1e-15)
    assert as_input(schedule, "x_t", x_t, t) is x_t


def test_the_impossible_is_refused():
    last = torch.tensor([999])
    zero = schedule_of("zero_terminal_snr")
    assert not convertible(zero, "epsilon", "x_0", last)
    assert convertible(zero, "epsilon", "score", last)
    with pytest.raises(ValueError, match=r"x_0 cannot be had from epsilon at t in \[999\].*Predict v, flow"):
        convert(zero, "epsilon", "x_0", torch.zeros(1, 2), torch.zeros(1, 2), last)
    with pytest.raises(ValueError, match=r"epsilon cannot be had from x_0 at t in \[0\.0\]"):
        convert(Rectified(), "x_0", "epsilon", torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1))
    for target in ("epsilon", "score"):
        with pytest.raises(ValueError, match=rf"model\.target={target} cannot be trained with ZeroTerminalSNR"):
            check_target(zero, target)
        check_target(LinearBeta(), target)
        check_target(Rectified(), target)
    for target in set(TARGETS) - {"epsilon", "score"}:
        check_target(zero, target)
    with pytest.raises(ValueError, match=r"source must be one of 'epsilon'.*but got 'x_t'"):
        convert(LinearBeta(), "x_t", "x_0", torch.zeros(1, 2), torch.zeros(1, 2), last)


@pytest.mark.parametrize("under", [LinearBeta(timesteps=15_500), LinearBeta(timesteps=20_000)], ids=["small", "tiny"])
def test_what_is_possible_is_decided_after_the_cast(under):
    """An alpha that float64 can divide by and float32 cannot is as bad as 0."""
    t = torch.arange(under.timesteps)
    assert under.alpha_sigma(t, torch.float64)[0].min() > 0
    x = torch.full((under.timesteps, 2), 1e4)
    able = convertible(under, "epsilon", "x_0", t)
    assert 14_000 < int(able.sum()) < under.timesteps
    assert convertible(under, "epsilon", "x_0", t, dtype=torch.float64).all()
    assert convert(under, "epsilon", "x_0", -x[able], x[able], t[able]).isfinite().all()
    assert convert(under, "epsilon", "x_0", x.double(), x.double(), t).isfinite().all()
    last = t[-1:]
    with pytest.raises(ValueError, match=r"x_0 cannot be had from epsilon at t in \[\d+\].*too small for float32"):
        convert(under, "epsilon", "x_0", x[:1], x[:1], last)
    with pytest.raises(ValueError, match=r"model\.target=epsilon cannot be trained.*alpha is \d\.?\d*e-\d+ at t = \d+"):
        check_target(under, "epsilon")
    for target in ("v", "x_0", "F"):
        check_target(under, target)
        assert convertible(under, target, "x_0", t).all()


def test_conversions_keep_to_float32_or_wider():
    t = torch.tensor([5, 7])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.ones(2, 1, 4, 4, dtype=dtype)
        found = convert(LinearBeta(), "v", "x_0", x, x, t)
        assert found.dtype == expected
        assert found.shape == x.shape


# --- pairs ------------------------------------------------------------------------------------------------------


def drawn_pair(schedule: Schedule, count: int = 20_000):
    key = Keys.pack(torch.arange(count), seed=11)
    unit = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = schedule.from_unit(unit)
    t = t if schedule.discrete else t.float()
    return key, *UniformEarlier().draw(key, schedule, Uniform(), t)


def test_second_times(schedule):
    """s < t, and uniform over the earlier times: Kolmogorov's limit of 2.7 / sqrt(n) has a false alarm of 1e-6."""
    _, t, s = drawn_pair(schedule)
    assert s.dtype == t.dtype
    assert bool((s < t).all())
    if schedule.discrete:
        assert int(s.min()) == -1
        share = (s + 1).double() / (t + 1)  # uniform over {0, ..., t} / (t + 1)
        late = t >= 0.3 * schedule.timesteps
        assert abs(share[late].mean() - (t[late] / (2.0 * (t[late] + 1))).mean()) < 5 / (12 * late.sum()) ** 0.5
    else:
        assert bool((s >= schedule.range[0]).all())
        share = schedule.to_unit(s, torch.float64) / schedule.to_unit(t, torch.float64)
        order = share.sort().values
        gap = (order - (torch.arange(len(order)) + 0.5) / len(order)).abs().max()
        assert gap < 2.7 / len(order) ** 0.5


def test_second_times_by_steps():
    t = torch.tensor([0, 30, 55, 56, 999])
    for steps, expected in ((18, [-1, -1, -1, 0, 943]), (1000, [-1, 29, 54, 55, 998])):
        later, s = StepEarlier(steps).draw(Keys.pack(torch.arange(5)), LinearBeta(), Uniform(), t)
        assert later is t
        assert s.tolist() == expected
    u = torch.tensor([0.05, 0.5, 1.0])
    _, found = StepEarlier(10).draw(Keys.pack(torch.arange(3)), Rectified(), Uniform(), u)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.4, 0.9]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("law", ["same", "chain"])
def test_the_joint_law(schedule, law):
    """Variances and covariance of (x_s, x_t) given x_0 = 0, and the mean of x_s, from the laws in closed form.

    Chain: x_t = (alpha_t / alpha_s) x_s + fresh noise, so cov = alpha_t / alpha_s sigma_s^2. Same: sigma_s sigma_t.
    """
    pair = Pair(noise=law)
    _, t, s = drawn_pair(schedule, 64)
    mix, fresh = pair.mix(schedule, t, s)
    p, q, r = mix[:, 0, 0].double(), mix[:, 0, 1].double(), fresh.double()
    clean = s < 0
    alpha_t, sigma_t = schedule.alpha_sigma(t, torch.float64)
    alpha_s, sigma_s = schedule.alpha_sigma(s.clamp_min(0) if schedule.discrete else s, torch.float64)
    alpha_s, sigma_s = torch.where(clean, 1.0, alpha_s), torch.where(clean, 0.0, sigma_s)
    torch.testing.assert_close(p, alpha_s, rtol=2e-7, atol=0)
    torch.testing.assert_close(q.square() + r.square(), sigma_s.square(), rtol=5e-7, atol=0)
    expected = sigma_s * sigma_t if law == "same" else alpha_t / alpha_s * sigma_s.square()
    torch.testing.assert_close(q * sigma_t, expected, rtol=2e-6, atol=1e-12)
    assert (r == 0).all() if law == "same" else (r > 0)[sigma_s > 0].all()


@pytest.mark.parametrize("law", ["same", "chain"])
@pytest.mark.parametrize("under", [LinearBeta(), Rectified()], ids=["discrete", "continuous"])
def test_drawn_pairs_have_the_joint_law(law, under):
    """Images of 0: correlation of x_s and x_t within a false alarm of 1e-6, and x_t as it would be without the pair."""
    x_0, index = torch.zeros(4000, 1, 4, 4), torch.arange(4000)
    process = ForwardProcess(under, fields=("x_t", "t", "x_s", "s"), pair=Pair(noise=law), compile=False)
    x_t, t, x_s, s = process(x_0, index, seed=3)
    alone = ForwardProcess(under, compile=False)(x_0, index, seed=3)
    assert torch.equal(x_t, alone.x_t)
    assert torch.equal(t, alone.t)
    assert (x_s[s < 0] == 0).all()  # clean
    noisy = s > 0
    alpha_t, sigma_t = under.alpha_sigma(t[noisy], torch.float64)
    alpha_s, sigma_s = under.alpha_sigma(s[noisy], torch.float64)
    a = x_s[noisy].double().flatten(1) / sigma_s[:, None]
    b = x_t[noisy].double().flatten(1) / sigma_t[:, None]
    ratio = alpha_t * sigma_s / (alpha_s * sigma_t) if law == "chain" else torch.ones_like(sigma_s)
    off = (a * b - ratio[:, None]) / (1 + ratio[:, None].square()).sqrt()
    assert abs(off.mean().item()) < 4.9 / off.numel() ** 0.5
    assert abs((a.square() - 1).mean().item()) < 4.9 * (2 / a.numel()) ** 0.5
