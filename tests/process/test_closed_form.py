"""What takes t as given: the mix, a step, the posterior, a path, the prior.

Statistical limits have a false-alarm chance of at most 10^-6; the draws are keyed, so what passes once passes always.
"""

import math

import pytest
import torch
from scipy import stats
from shared import equal

from diffaug import Cosine, ForwardProcess, LinearBeta, NoisyBatch, Rectified, ScaledLinearBeta

IMAGES = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
INDEX = torch.arange(64) * 1000003 % 2**35
Z = stats.norm.isf(0.5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("schedule", [LinearBeta(), Cosine(), ScaledLinearBeta()])
def test_low_precision_images_keep_the_right_noise_at_every_t(dtype, schedule):
    """With alpha_bar cast to the image's dtype first, in bfloat16 the first ten timesteps get no noise at all."""
    t = torch.arange(schedule.timesteps)
    x_0 = torch.zeros(len(t), 1, dtype=dtype)
    ones = torch.ones(len(t), 1, dtype=dtype)
    sigma = ForwardProcess(schedule).mix(x_0, t, ones)[:, 0].double()
    torch.testing.assert_close(sigma, (1 - schedule.alpha_bars).sqrt(), rtol=2e-7, atol=0)
    cast = ForwardProcess(schedule, dtype=dtype).mix(x_0, t, ones)
    assert cast.dtype == dtype
    assert torch.equal(cast[:, 0], sigma.to(dtype))


def test_noised_is_diffusers_add_noise():
    diffusers = pytest.importorskip("diffusers")
    schedule, t = LinearBeta(), torch.arange(1000)
    g = torch.Generator().manual_seed(0)
    x_0, epsilon = (torch.randn(1000, 3, 4, 4, generator=g).clamp(-3, 3) for _ in range(2))
    x_0 = x_0 / 3
    ours = ForwardProcess(schedule).mix(x_0, t, epsilon)
    theirs = diffusers.DDPMScheduler()
    torch.testing.assert_close(ours, theirs.add_noise(x_0, epsilon, t), rtol=0, atol=2e-5)
    theirs.alphas_cumprod = schedule.alpha_bars
    exact = theirs.add_noise(x_0.double(), epsilon.double(), t)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)


def test_posterior_is_ddpm_s():
    """Ho, Jain and Abbeel 2020, equation 7; the known values are guided-diffusion's, in float64."""
    process = ForwardProcess(LinearBeta())
    t = torch.tensor([0, 1, 499, 999])
    one, zero = torch.ones(4, 1), torch.zeros(4, 1)
    of_x_0 = process.posterior(one, zero, t).mean[:, 0].tolist()
    of_x_t, variance = (c[:, 0].tolist() for c in process.posterior(zero, one, t))
    assert of_x_0 == pytest.approx([1, 0.5452914995102903, 0.0030700711142649766, of_x_0[3]], rel=2e-7)
    assert of_x_t == pytest.approx([0, 0.4547084989905303, 0.9941066702101666, of_x_t[3]], rel=2e-7)
    assert variance == pytest.approx([0, 5.4531876613021935e-05, variance[2], 0.01999998352656061], rel=2e-7)


@pytest.mark.parametrize(
    ("schedule", "s", "t"), [(LinearBeta(), 300, 700), (Cosine(), 0, 999), (Rectified(), 0.25, 0.75)]
)
def test_posterior_is_bayes(schedule, s, t):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): completed squares in float64."""
    process = ForwardProcess(schedule)
    s, t = torch.tensor([s]), torch.tensor([t])
    (a_s, v_s), (a_t, v_t) = (
        (a.item(), b.item() ** 2) for a, b in (schedule.alpha_sigma(u, torch.float64) for u in (s, t))
    )
    r = a_t / a_s
    v = v_t - r**2 * v_s
    precision = 1 / v_s + r**2 / v
    x_0, x_t = 0.3, -1.2
    mean = (a_s * x_0 / v_s + r * x_t / v) / precision
    got = process.posterior(torch.tensor([[x_0]]), torch.tensor([[x_t]]), t, s)
    assert got.mean.item() == pytest.approx(mean, rel=1e-5)
    assert got.variance.item() == pytest.approx(1 / precision, rel=1e-5)


def test_a_step_is_the_seed_text_s():
    """x_t = sqrt(alphas[t]) x_{t-1} + sqrt(1 - alphas[t]) epsilon, for every t from the clean image on."""
    for schedule in (LinearBeta(), Cosine(), ScaledLinearBeta()):
        process, t = ForwardProcess(schedule), torch.arange(1000)
        zero, one = torch.zeros(1000, 1), torch.ones(1000, 1)
        torch.testing.assert_close(
            process.step(one, t - 1, t, zero)[:, 0].double(), schedule.alphas.sqrt(), rtol=2e-7, atol=0
        )
        torch.testing.assert_close(
            process.step(zero, t - 1, t, one)[:, 0].double(), schedule.betas.sqrt(), rtol=2e-7, atol=0
        )


@pytest.mark.slow
def test_the_chain_has_the_law_of_the_closed_form():
    """The seed text's first claim: a thousand small steps have the mean, the variance and the correlations between
    times of the closed form."""
    schedule, n, x_0 = LinearBeta(), 40000, 0.7
    x, kept, checks = torch.full((n,), x_0, dtype=torch.float64), {}, (9, 99, 249, 499, 999)
    generator = torch.Generator().manual_seed(0)
    alphas = schedule.alphas
    for t in range(1000):
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        x = alphas[t].sqrt() * x + (1 - alphas[t]).sqrt() * noise
        if t in checks:
            kept[t] = x
    process = ForwardProcess(schedule)
    images = torch.full((n, 1), x_0)
    path = process.trajectory(images, torch.tensor(checks), torch.arange(n), seed=1)[:, :, 0].double()
    bars = schedule.alpha_bars
    for i, t in enumerate(checks):
        variance = (1 - bars[t]).item()
        for sample in (kept[t], path[:, i]):
            assert abs(sample.mean() - bars[t].sqrt() * x_0) < Z * math.sqrt(variance / n)
            assert abs(sample.var() / variance - 1) < Z * math.sqrt(2 / n)
            assert stats.kstest((sample - bars[t].sqrt() * x_0) / math.sqrt(variance), "norm").pvalue > 1e-6
        for j, s in enumerate(checks[:i]):
            # Corr(x_s, x_t) = sqrt(SNR-ratio): sqrt(bar_t / bar_s) sigma_s / sigma_t.
            expected = (bars[t] / bars[s] * (1 - bars[s]) / (1 - bars[t])).sqrt().item()
            for a, b in ((kept[s], kept[t]), (path[:, j], path[:, i])):
                seen = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
                assert abs(math.atanh(seen) - math.atanh(expected)) < Z / math.sqrt(n - 3), (s, t)


def test_x_T_is_nearly_standard_normal():
    """The seed text's second claim: alpha_bar ends at 4.04e-5, and x_T is N(0, I) to 2.9e-5 bits at the worst pixel."""
    schedule = LinearBeta()
    assert schedule.alpha_bars[-1].item() == pytest.approx(4.035829765375676e-05, rel=1e-12)
    kl = {
        name: ForwardProcess(s).prior_kl_bits_per_dim(torch.ones(1, 1))
        for name, s in [("linear", schedule), ("cosine", Cosine())]
    }
    assert kl["linear"] == pytest.approx(2.911294542030792e-05, rel=1e-9)
    assert kl["cosine"] == pytest.approx(1.7519849882545084e-09, rel=1e-9)
    assert ForwardProcess(Rectified()).prior_kl_bits_per_dim(torch.ones(1, 1)) == 0
    n = 10**6
    x_T = ForwardProcess(schedule).mix(
        torch.ones(n, 1), torch.full((n,), 999), ForwardProcess(schedule)(torch.zeros(n, 1), torch.arange(n)).epsilon
    )
    assert abs(x_T.double().mean() - schedule.alpha_bars[-1].sqrt()) < Z / 1000
    assert abs(x_T.double().var() - 1) < Z * math.sqrt(2 / n) + 5e-5


def test_prior_kl_on_the_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images = torch.from_numpy(datasets.load_digits().images)[:, None] / 8 - 1
    assert ForwardProcess(LinearBeta()).prior_kl_bits_per_dim(images) == pytest.approx(2.09e-5, rel=3e-3)


def test_trajectory_is_keyed_and_joint():
    process, times = ForwardProcess(LinearBeta()), torch.tensor([10, 500, 999])
    path = process.trajectory(IMAGES, times, INDEX, seed=4)
    assert path.shape == (64, 3, *IMAGES.shape[1:])
    assert torch.equal(process.trajectory(IMAGES[5:7], times, INDEX[5:7], seed=4), path[5:7])
    continuous = ForwardProcess(Rectified()).trajectory(IMAGES, torch.tensor([0.1, 1.0]), INDEX)
    assert torch.isfinite(continuous).all()


def test_a_gradient_to_x_0_goes_through_mix():
    """What `forward` draws are data, and it says so; the same triple by `mix` has the gradient, alpha(t)."""
    x_0, process = (IMAGES / 127.5 - 1).requires_grad_(), ForwardProcess(LinearBeta(), compile=False)
    x_t, epsilon, t = process(x_0.detach(), INDEX)
    again = process.mix(x_0, t, epsilon)
    assert torch.equal(again.detach(), x_t)
    again.sum().backward()
    alpha, _ = process.schedule.alpha_sigma(t)
    torch.testing.assert_close(x_0.grad, alpha.view(-1, 1, 1, 1).expand_as(x_0))
    with torch.no_grad():
        assert equal(process(x_0, INDEX), NoisyBatch(x_t, epsilon, t))
