"""Loss weights: known values, closed forms at high precision, and what they come to on the other targets' losses."""

import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from shared import names, part, schedule_of, times_inside

from diffaug import ForwardProcess
from diffaug.schedules import Cosine, Discretised, LinearBeta, Rectified, ZeroTerminalSNR
from diffaug.targets import (
    ELBO,
    IMAGE_FIELDS,
    P2,
    TARGETS,
    CosMap,
    Debiased,
    EDMWeight,
    FusedSNR,
    Level,
    MinSNR,
    SigmoidWeight,
    SoftMinSNR,
    TruncatedSNR,
    Unweighted,
)

NAMES = names("weight")
mp = mpmath.mp


def stated(name: str, alpha: mpmath.mpf, sigma: mpmath.mpf) -> tuple[str, mpmath.mpf]:
    """(target, weight) as the paper has it, in alpha and sigma; EDM's and soft-min-SNR's in s = sigma / alpha."""
    snr, s, data = (alpha / sigma) ** 2, sigma / alpha, mpmath.mpf(0.5)
    u = sigma / (alpha + sigma)
    return {
        "none": ("v", mpmath.mpf(1)),
        "min_snr": ("epsilon", min(1, 5 / snr)),
        "fused_snr": ("epsilon", min(1, 5 / snr)),  # of one time; of several, below
        "soft_min_snr": ("F", (s * data) ** 2 / (s**2 + data**2) ** 2),
        "p2": ("epsilon", 1 / (1 + snr)),
        "snr": ("epsilon", mpmath.mpf(1)),
        "truncated_snr": ("x_0", max(snr, 1)),
        "edm": ("x_0", (s**2 + data**2) / (s * data) ** 2),
        "sigmoid": ("x_0", mp.e**2 / (1 + mp.exp(2 - mp.log(snr)))),
        "sigma_sqrt": ("flow", mpmath.mpf(1)),
        "cosmap": ("flow", 2 / (mp.pi * (1 - 2 * u + 2 * u**2))),
        "debiased": ("epsilon", 1 / mp.sqrt(snr)),
    }[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "elbo"])
@pytest.mark.parametrize("which", ["linear", "rectified", "edm", "sigmoid_alpha_bar"])
def test_weights_are_their_papers(name, which):
    under = schedule_of(which)
    t = times_inside(under)
    target, _ = stated(name, mpmath.mpf(1), mpmath.mpf(1))
    found = part("weight", name).of(under, target, t).tolist()
    alphas, sigmas = (c.tolist() for c in under.alpha_sigma(t, torch.float64))
    for value, alpha, sigma in zip(found, alphas, sigmas, strict=True):
        expected = stated(name, mpmath.mpf(alpha), mpmath.mpf(sigma))[1]
        assert abs(value - expected) <= 1.2e-7 * expected


def test_elbo_in_continuous_time_is_half_the_slope_of_each_closed_form():
    u = np.linspace(0.001, 0.999, 200)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    b, beta = 0.1 * u + 19.9 * u**2 / 2, 0.1 + 19.9 * u
    expected = {
        "rectified": 1 / (u * (1 - u)),
        "linear_log_snr": np.full(200, 9.15),
        "ve": np.full(200, math.log(100 / 0.02)),
        "edm": 7 * (high - low) / (low + u * (high - low)),
        "trigonometric": np.pi / np.sin(np.pi * u),
        "vp_sde": beta / (2 * (1 - np.exp(-b))),  # g^2 / 2 on the score, -epsilon / sigma
    }
    for name, values in expected.items():
        schedule = schedule_of(name)
        found = part("weight", "elbo").of(schedule, "epsilon", schedule.from_unit(torch.from_numpy(u)))
        np.testing.assert_allclose(found.double(), values, rtol=1e-6, err_msg=name)
    t = torch.from_numpy(u)
    np.testing.assert_allclose(ELBO().of(Rectified(), "flow", t).double(), (1 - u) / u, rtol=1e-6)
    np.testing.assert_allclose(ELBO().of(schedule_of("vp_sde"), "score", t).double(), beta / 2, rtol=1e-6)


def test_elbo_in_t_steps_is_ddpms_bound():
    """beta^2 / (2 var alpha (1 - alpha_bar)) on epsilon, var the posterior's: Ho et al. 2020, equation 12."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    var = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])
    expected = 1000 * beta[1:] ** 2 / (2 * var * (1 - beta[1:]) * (1 - bar[1:]))
    found = ELBO().of(LinearBeta(), "epsilon", torch.arange(1000)).double().numpy()
    np.testing.assert_allclose(found[1:], expected, rtol=1e-6)
    assert found[0] == 500
    # In more and more steps it is the continuous one.
    many = ELBO().of(Discretised(schedule_of("linear_log_snr"), 10**6), "epsilon", torch.tensor([10, 999_999]))
    np.testing.assert_allclose(many.double(), 9.15, rtol=2e-5)


def test_elbo_of_the_step_without_signal():
    """T/2 SNR(T - 2) on x_0, and so on v and flow, where x_t is all noise; infinite on epsilon: refused."""
    zero = schedule_of("zero_terminal_snr")
    last = torch.tensor([999])
    expected = 500 * zero.log_snr(torch.tensor([998]), torch.float64).exp().item()
    for target in ("x_0", "v", "flow"):
        assert ELBO().of(zero, target, last).item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"weight=ELBO\(\) on the loss of epsilon is infinite at t = 999"):
        ELBO().check(zero, "epsilon")


def test_min_snr_at_known_values():
    t = torch.tensor([0, 100, 250, 999])
    epsilon = MinSNR().of(LinearBeta(), "epsilon", t).double()
    expected = torch.tensor([0.000500050005000445, 0.5857085078424549, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(epsilon, expected, rtol=6e-8, atol=0)
    v = MinSNR().of(LinearBeta(), "v", t[1:3]).double()
    expected = torch.tensor([0.5242920455123173, 0.5214230306185276], dtype=torch.float64)
    torch.testing.assert_close(v, expected, rtol=6e-8, atol=0)


def test_identities():
    t = torch.arange(1000)
    linear = LinearBeta()
    torch.testing.assert_close(P2().of(linear, "epsilon", t).double(), 1 - linear.alpha_bars, rtol=2e-7, atol=0)
    one = torch.ones(1000)
    close = {"rtol": 2e-7, "atol": 0}
    torch.testing.assert_close(EDMWeight().of(linear, "F", t), one, **close)
    torch.testing.assert_close(part("weight", "snr").of(linear, "epsilon", t), one, **close)
    torch.testing.assert_close(part("weight", "sigma_sqrt").of(Rectified(), "flow", (t + 0.5) / 1000), one, **close)
    assert torch.equal(Unweighted().of(linear, "x_0", t), one)
    snr = linear.log_snr(t, torch.float64).exp()
    torch.testing.assert_close(MinSNR().of(linear, "x_0", t).double(), snr.clamp_max(5), **close)
    soft = SoftMinSNR(gamma=3).of(linear, "epsilon", t).double()
    torch.testing.assert_close(soft, 3 / (snr + 3), rtol=2e-7, atol=0)


def test_weights_on_v_follow_from_their_definition():
    """Not the forms that trainers have for v: 1 / (SNR + 1) or (SNR + 1)^-1/2, and (k + 1 + SNR)^-gamma."""
    t = torch.arange(1000)
    snr = LinearBeta().log_snr(t, torch.float64).exp()
    close = {"rtol": 2e-7, "atol": 0}
    torch.testing.assert_close(Debiased().of(LinearBeta(), "v", t).double(), snr.sqrt() / (snr + 1), **close)
    p2 = P2(k=2.0, gamma=0.5).of(LinearBeta(), "v", t).double()
    torch.testing.assert_close(p2, (2 + snr).rsqrt() * snr / (snr + 1), **close)


def test_edm_takes_the_process_s_sigma_data():
    sigma = torch.tensor([0.1, 2.0], dtype=torch.float64)
    found = EDMWeight().of(schedule_of("edm"), "x_0", sigma, sigma_data=0.25).double()
    torch.testing.assert_close(found, (sigma**2 + 0.0625) / (sigma * 0.25) ** 2, rtol=1e-7, atol=0)
    torch.testing.assert_close(EDMWeight().of(schedule_of("edm"), "F", sigma, sigma_data=0.25), torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_one_weight_is_one_loss_whatever_the_target(schedule, name):
    """The same wrong x_0, seen as an error of every target: weight times squared error is one number.

    The errors are made by mixing a wrong x_0 and the epsilon that x_t then implies, not by the ratio of the losses.
    """
    t = times_inside(schedule)
    level = Level(schedule, t)
    inner = (level.alpha > 0) & (level.sigma > 0)
    level = Level(schedule, t[inner])
    wrong = torch.randn(int(inner.sum()), 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    epsilon = -(level.alpha / level.sigma)[:, None] * wrong  # so that alpha wrong + sigma epsilon = 0: x_t stays
    losses = {}
    for target in TARGETS:
        p, q = (c[:, None] for c in IMAGE_FIELDS[target](level))
        squared = (p * wrong + q * epsilon).square().mean(1)
        losses[target] = part("weight", name).of(schedule, target, t[inner]).double() * squared
    for target, loss in losses.items():
        torch.testing.assert_close(loss, losses["x_0"], rtol=1e-6, atol=0, msg=lambda m, x=target: f"{x}: {m}")


def test_no_nan_anywhere(schedule):
    """At the ends, with SNR 0 or infinite, too; and inf only there."""
    t = schedule.from_unit(torch.linspace(0, 1, 201, dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(t, torch.float64)
    for name, target in itertools.product(NAMES, TARGETS):
        weight = part("weight", name).of(schedule, target, t)
        assert not weight.isnan().any(), (name, target)
        assert (weight >= 0).all(), (name, target)
        assert weight[(alpha > 0) & (sigma > 0)].isfinite().all(), (name, target)


def test_limits_where_snr_is_0_or_infinite():
    """min(SNR, gamma) / SNR is 0/0 at SNR 0; its limit is 1. The straight path reaches both ends.

    Of min-SNR and its kin the weight at SNR 0 is 1 on every target, not the limit.
    """
    ends = torch.tensor([0.0, 1.0])
    expected = {
        (MinSNR(), "epsilon"): [0, 1],
        (MinSNR(), "x_0"): [5, 1],
        (MinSNR(), "v"): [0, 1],
        (Debiased(), "epsilon"): [0, float("inf")],
        (TruncatedSNR(), "v"): [1, 1],
        (EDMWeight(), "F"): [1, 1],
        (EDMWeight(), "v"): [1, 4],
        (CosMap(), "flow"): [2 / torch.pi, 2 / torch.pi],
        (SigmoidWeight(), "epsilon"): [0, 1],
        (SigmoidWeight(), "v"): [0, 0],
        (SoftMinSNR(), "x_0"): [4, 1],
        (P2(), "v"): [0, 0],
    }
    for (weight, target), values in expected.items():
        found = weight.of(Rectified(), target, ends)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float32), rtol=2e-7, atol=0)
    zero = schedule_of("zero_terminal_snr")
    last = torch.tensor([999])
    assert MinSNR().of(zero, "epsilon", last).item() == 1


@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr", "snr"])
def test_the_step_without_signal_is_learned_as_the_min_snr_authors_have_it(name):
    """Their code sets the weight to 1 where SNR is 0, whatever is predicted; every other step keeps its own."""
    zero, t = schedule_of("zero_terminal_snr"), torch.arange(1000)
    for target in ("v", "x_0", "flow", "F"):
        weights = part("weight", name).of(zero, target, t)
        assert weights[999] == 1
        assert 0 < weights[998] < 1e-6
    snr = zero.log_snr(t[:999], torch.float64).exp()
    expected = snr.clamp_max(5) / (snr + 1)
    torch.testing.assert_close(MinSNR().of(zero, "v", t[:999]).double(), expected, rtol=2e-7, atol=0)


@pytest.mark.parametrize("weight", [P2(), SigmoidWeight(), Debiased()], ids=repr)
def test_a_weight_that_leaves_the_last_step_unlearned_is_warned_of_once(weight, caplog):
    zero = ZeroTerminalSNR(Cosine(timesteps=200 + len(repr(weight))))  # not one that another test has warned of
    last = zero.timesteps - 1
    for _ in range(2):
        ForwardProcess(zero, weight=weight, target="v")
    (record,) = (r for r in caplog.records if r.name == "diffaug")
    assert f"weight={weight!r} on the loss of v is 0 at t = {last} of {zero!r}, where SNR is 0" in record.getMessage()
    assert "Set weight to min_snr, soft_min_snr or snr" in record.getMessage()


def test_other_weights_are_not_warned_of(caplog):
    zero = schedule_of("zero_terminal_snr")
    for name in NAMES:
        if name not in ("p2", "sigmoid", "debiased"):
            part("weight", name).check(zero, "v")
        part("weight", name).check(Cosine(), "v")
        part("weight", name).check(Rectified(), "v")
    P2().check(zero, "epsilon")
    assert not caplog.records


def test_an_infinite_weight_is_refused():
    zero = schedule_of("zero_terminal_snr")
    message = (
        r"weight=Debiased\(\) on the loss of epsilon is infinite at t = 999 of ZeroTerminalSNR.*SNR is 0\..*min_snr"
    )
    with pytest.raises(ValueError, match=message):
        Debiased().check(zero, "epsilon")
    with pytest.raises(ValueError, match=r"weight=SigmaSqrt\(\) on the loss of epsilon is infinite"):
        part("weight", "sigma_sqrt").check(zero, "epsilon")
    for weight, target in ((Debiased(), "v"), (MinSNR(), "epsilon"), (EDMWeight(), "v")):
        weight.check(zero, target)
    Debiased().check(Cosine(), "epsilon")
    Debiased().check(Rectified(), "epsilon")


def test_bad_targets_are_refused():
    with pytest.raises(ValueError, match=r"target must be one of 'epsilon', 'x_0'.*but got 'x_in'"):
        MinSNR().of(LinearBeta(), "x_in", torch.tensor([1]))


def fused(snr: np.ndarray, gamma: float, decay: float, target: str) -> np.ndarray:
    """Diffusion Forcing's weights of frames, (B, F), as its code has them."""
    s, c = snr / gamma, np.minimum(snr, gamma) / gamma
    known, before = np.zeros(len(snr)), np.zeros_like(snr)
    for f in range(snr.shape[1]):
        before[:, f] = known
        known = c[:, f] if f == 0 else decay * known + (1 - decay) * c[:, f]
    fused_s, fused_c = 1 - (1 - decay * before) * (1 - s), 1 - (1 - decay * before) * (1 - c)
    return {
        "epsilon": fused_c / fused_s,
        "x_0": gamma * fused_c,
        "v": gamma * fused_c / (gamma * fused_s + 1),
    }[target]


@pytest.mark.parametrize("target", ["epsilon", "x_0", "v"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_fused_snr_is_diffusion_forcings(target, decay):
    for schedule in (LinearBeta(), Cosine()):
        t = torch.arange(600).view(50, 12) * 37 % 1000
        snr = (schedule.alpha_bars / (1 - schedule.alpha_bars))[t].numpy()
        made = FusedSNR(gamma=5.0, decay=decay).of(schedule, target, t)
        np.testing.assert_allclose(made.numpy(), fused(snr, 5.0, decay, target), rtol=1e-6)
    images = made[:, :, None].expand(-1, -1, 3)  # along the first axis of the parts, whatever the others are
    assert torch.equal(FusedSNR(5.0, decay).of(schedule, target, t[:, :, None].expand(-1, -1, 3)), images)


def test_fused_snr_at_the_ends():
    """A clean frame tells all of the next, a frame without signal nothing; one without any is as min-SNR has it."""
    zero, fuse = ZeroTerminalSNR(LinearBeta()), FusedSNR(5.0, decay=0.5)
    t = torch.tensor([[999, 999, 3], [-1, 999, 999], [0, 999, 999]])
    weight = fuse.of(zero, "v", t)
    assert weight.isfinite().all()
    assert weight[0, :2].tolist() == [1.0, 1.0]  # no signal, nor before
    c = 5 * 0.5  # decay times what is known: gamma C' = gamma S'
    np.testing.assert_allclose(weight[1:, 1], c / (c + 1), rtol=1e-5)
    assert torch.equal(fuse.of(zero, "v", t[:, :1])[0], MinSNR().of(zero, "v", t[0, :1]))
    with pytest.raises(ValueError, match=r"weight=fused_snr is of an SNR that is no t's, and velocity .* use flow"):
        fuse.of(Rectified(), "velocity", torch.rand(2, 3))
    flow = fuse.of(Rectified(), "flow", torch.rand(2, 3))
    assert (flow.isfinite() & (flow > 0)).all()
