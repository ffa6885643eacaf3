"""Kinds of noise: their laws, that a sample's noise is its own, and what is refused.

Statistical limits have a false-alarm chance of at most 10^-6; the draws are keyed, so what passes once passes always.
"""

import math

import pytest
import torch
from hydra.utils import instantiate
from scipy import stats
from shared import composed, names, part

from diffaug import ForwardProcess, LinearBeta, Pair, Rectified
from diffaug.noise import Immiscible, InputPerturbation, Offset, Pyramid, StudentT, gaussian
from diffaug.noise.kinds import sum_samples
from diffaug.randomness.keys import Keys, Purpose

NAMES = names("noise")
Z = stats.norm.isf(0.5e-6)
COUNT = 2048
SHAPE = (2, 8, 8)


def some(count: int = COUNT, shape: tuple[int, ...] = SHAPE, seed: int = 5) -> tuple[Keys, torch.Tensor]:
    images = torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Keys.pack(torch.arange(count) * 7919 % 2**33, seed=2**50 + seed, epoch=3), images


def mean_is(x: torch.Tensor, expected: float, deviation: float) -> None:
    """The mean of independent numbers of a known standard deviation."""
    assert abs(x.double().mean().item() - expected) < Z * deviation / math.sqrt(len(x))


# --- every kind -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_key_alone_decides(name):
    kind = part("noise", name)
    key, x_0 = some(8)
    whole = kind.draw(key, x_0)
    assert torch.equal(kind.draw(key, x_0), whole)
    assert kind.standard_normal == (name == "gaussian")
    assert (kind.perturbation > 0) == (name == "input_perturbation")
    for other in (Keys.pack(torch.arange(8) + 1), Keys.pack(torch.arange(8) * 7919, seed=1), some(8, seed=6)[0]):
        assert (kind.draw(other, x_0) == whole).double().mean() < 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name != "immiscible"])
def test_mean_and_variance_of_an_element(name):
    """Element (0, 0, 0) of 2048 samples: mean 0 and the variance that the kind states."""
    kind = part("noise", name)
    x = kind.draw(*some())[:, 0, 0, 0].double()
    variance = {"offset": 1.01, "pyramid": None}.get(name, 1.0)
    if variance is None:
        return  # its variance depends on the pixel: test_pyramid_is_its_levels
    kurtosis = 3 + (6 / (10 - 4) if name == "student_t" else 0)
    mean_is(x, 0, math.sqrt(variance))
    mean_is(x.square(), variance, variance * math.sqrt(kurtosis - 1))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 243])
def test_sums(count):
    x = torch.randn(7, count, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sum_samples(x), x.double().sum(1).float(), rtol=0, atol=1e-6 * count)
    assert sum_samples(torch.ones(3, count)).tolist() == [count] * 3


# --- offset -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_offset_covariance(strength, normalize):
    """Within a channel strength^2, across channels 0; divided by 1 + strength^2 where normalised."""
    x = Offset(strength, normalize=normalize).draw(*some()).double()
    scale = 1 + strength**2 if normalize else 1.0
    variance, within = (1 + strength**2) / scale, strength**2 / scale
    same, across = x[:, 0, 0, 0] * x[:, 0, 5, 3], x[:, 0, 0, 0] * x[:, 1, 0, 0]
    mean_is(x[:, 1, 2, 2].square(), variance, variance * math.sqrt(2))
    mean_is(same, within, math.sqrt(variance**2 + within**2))
    mean_is(across, 0, variance)


def test_offset_is_a_shift_of_each_channel():
    key, x_0 = some(16)
    shift = (Offset(0.1).draw(key, x_0) - gaussian(key, SHAPE)).double()
    expected = 0.1 * gaussian(key, (2,), Purpose.OFFSET).double()
    torch.testing.assert_close(shift, expected[:, :, None, None].expand(16, *SHAPE), rtol=0, atol=1e-6)


# --- Student-t --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nu", [3, 10])
def test_student_t_is_one(nu):
    """An element times sqrt(nu / (nu - 2)) is Student-t, by Kolmogorov and Smirnov; its chi2 is chi-squared."""
    key, x_0 = some()
    x = StudentT(nu).draw(key, x_0).double()
    element = x[:, 1, 3, 4] * math.sqrt(nu / (nu - 2))
    assert stats.kstest(element.numpy(), stats.t(nu).cdf).pvalue > 1e-6
    chi_square = (nu - 2) * (gaussian(key, SHAPE).double() / x)[:, 0, 0, 0].square()
    assert stats.kstest(chi_square.numpy(), stats.chi2(nu).cdf).pvalue > 1e-6


def test_student_t_is_one_scale_a_sample():
    key, x_0 = some(16)
    ratio = StudentT().draw(key, x_0) / gaussian(key, SHAPE)
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio), rtol=1e-5, atol=0)
    assert ratio[:, 0, 0, 0].unique().numel() == 16


def test_student_t_elements_are_uncorrelated_but_large_together():
    x = StudentT().draw(*some()).double()
    a, b = x[:, 0, 0, 0], x[:, 1, 7, 7]
    joint = 8 / 6  # E[a^2 b^2] = (nu - 2)^2 E[chi2^-2] = (nu - 2) / (nu - 4)
    mean_is(a * b, 0, math.sqrt(joint))
    fourth = 9 * 8**3 / (6 * 4 * 2)  # E[(a b)^4] = 9 (nu - 2)^4 E[chi2^-4], E[chi2^-4] = 1 / (8 6 4 2)
    mean_is((a * b).square(), joint, math.sqrt(fourth - joint**2))


# --- pyramid ----------------------------------------------------------------------------------------------------


def interpolated(x, size):
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    return torch.nn.functional.interpolate(x, size=size, mode=mode, align_corners=False)


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 9, 20), (1, 33), (1, 4, 12, 7)])
def test_pyramid_is_its_levels(shape):
    """Each sample by itself, from the numbers it is made of, by torch's own interpolation; and divided by the root of
    the mean variance of its elements, from the matrices that enlarge its levels."""
    kind, (key, x_0) = Pyramid(0.8), some(20, shape)
    found = kind.draw(key, x_0).double()
    channels, *full = shape
    sizes = kind.sizes(key, full)
    assert sizes[:, 0].tolist() == [full] * 20
    for i in range(20):
        own = key.part(slice(i, i + 1))
        total = math.sqrt(2) * gaussian(own, shape).double()
        variance, first, most = 2.0, 128, full
        for level in range(1, 10):
            most = [max(1, side // 2**level) for side in most]
            coarse = gaussian(own, (channels, *most), Purpose.PYRAMID, first)
            first += -(-math.prod((channels, *most)) // 4) * 4
            size = sizes[i, level].tolist()
            assert all(a <= b for a, b in zip(size, most, strict=True))
            corner = coarse[(slice(None), slice(None), *map(slice, size))].double()
            total = total + 0.8**level * interpolated(corner, full)
            cells = math.prod(size)
            basis = interpolated(torch.eye(cells, dtype=torch.float64).view(cells, 1, *size), full)
            variance += 0.8 ** (2 * level) * basis.square().sum(0).mean().item()
            if min(size) == 1:
                break
        torch.testing.assert_close(found[i], total[0] / math.sqrt(variance), rtol=0, atol=1e-5)


def test_pyramid_shrinks_as_its_source_does():
    """Each side is the one before, over r^i, r uniform in [2, 4)."""
    sizes = Pyramid(levels=4).sizes(some()[0], [4096, 64]).double()
    assert sizes.shape == (COUNT, 4, 2)
    r = 4096 / sizes[:, 1, 0]
    assert stats.kstest(r.numpy(), stats.uniform(2, 2).cdf).pvalue > 1e-6
    r_2 = (sizes[:, 1, 0] / (sizes[:, 2, 0] + 0.5)).sqrt()  # of whole numbers, so to some hundredths
    assert stats.kstest(r_2.numpy(), stats.uniform(2, 2).cdf).statistic < 0.05
    assert abs(torch.corrcoef(torch.stack([r, r_2]))[0, 1]) < Z / math.sqrt(COUNT)
    assert torch.equal(sizes[:, 1, 1], (64 / r).floor())  # one r for all sides, but for its last digits
    assert sizes.min() == 1


def of_the_source(generator, shape, discount):
    """A batch as Whitaker's code makes it: one r a level for all, divided by the batch's own standard deviation."""
    total, (h, w) = torch.randn(shape, generator=generator), shape[2:]
    for i in range(10):
        r = 2 + 2 * torch.rand((), generator=generator).item()
        h, w = max(1, int(h / r**i)), max(1, int(w / r**i))
        coarse = torch.randn(*shape[:2], h, w, generator=generator)
        total = total + discount**i * interpolated(coarse, shape[2:])
        if min(h, w) == 1:
            break
    return total / total.std()


def test_pyramid_has_the_power_of_its_source():
    """At each wave number, over batches of the source's own procedure: the mean square of some Fourier coefficients."""
    generator, side = torch.Generator().manual_seed(7), 16
    theirs = torch.cat([of_the_source(generator, (16, 1, side, side), 0.9) for _ in range(500)])
    ours = Pyramid().draw(*some(8000, (1, side, side)))
    powers = [torch.fft.fft2(x.double())[:, 0].abs().square() / side**2 for x in (theirs, ours)]
    for wave in ((0, 0), (0, 1), (1, 1), (2, 0), (3, 5), (8, 8)):
        a, b = (power[:, wave[0], wave[1]] for power in powers)
        a = a.view(500, 16).mean(1)  # samples of one batch share their sizes
        off = math.sqrt(a.var() / 500 + b.var() / 8000)
        assert abs(a.mean() - b.mean()) < Z * off, wave
    assert powers[1][:, 0, 0].mean() > 20  # of white noise it is 1
    assert ours.var().item() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("shape", [(2, 16), (1, 4, 8, 4), (3, 2, 9)])
def test_pyramid_of_other_shapes(shape):
    x = Pyramid(levels=2).draw(*some(5, shape))
    assert x.shape == (5, *shape)
    assert x.isfinite().all()
    key, x_0 = some(5, shape)
    torch.testing.assert_close(Pyramid(levels=1).draw(key, x_0), gaussian(key, shape), rtol=1e-6, atol=0)


# --- immiscible -------------------------------------------------------------------------------------------------


def test_immiscible_takes_the_nearest_of_its_candidates():
    key, x_0 = some(200)
    found = Immiscible(5).draw(key, x_0)
    candidates = torch.stack([gaussian(key, SHAPE, Purpose.CANDIDATES, i * 128) for i in range(5)])
    distance = (x_0 - candidates).double().square().flatten(2).sum(2)
    chosen = distance.argmin(0)
    assert torch.equal(found, candidates[chosen, torch.arange(200)])
    counts = torch.bincount(chosen, minlength=5)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6  # no candidate is preferred
    repeated = candidates.numel() - len(candidates.unique())  # by chance some 100 of 128,000 float32 numbers
    assert repeated < 1000, "candidates share counters: each takes 32 blocks of 4 numbers"


def test_immiscible_looks_at_the_image():
    key, x_0 = some(64)
    near, far = Immiscible(16).draw(key, x_0), Immiscible(16).draw(key, -x_0)
    assert (near != far).flatten(1).any(1).double().mean() > 0.5
    assert (x_0 - near).square().mean() < (x_0 - far).square().mean()


def test_immiscible_noise_has_less_variance_than_1_as_it_says():
    for side, count, variance in ((8, 4000, 0.92), (32, 500, 0.98)):
        epsilon = Immiscible(4).draw(*some(count, (3, side, side))).double()
        assert epsilon.var().item() == pytest.approx(variance, abs=0.005)
        assert f"{variance:.2f} at 3 x {side} x {side}" in " ".join(Immiscible.__doc__.split())


# --- input perturbation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["gaussian", "offset", "student_t", "immiscible"])
def test_input_perturbation(base):
    """epsilon is the base's own; what is mixed in has strength^2 more variance, independent of epsilon."""
    kind = InputPerturbation(0.5, part("noise", base))
    key, x_0 = some(1024)
    epsilon = kind.draw(key, x_0)
    assert torch.equal(epsilon, part("noise", base).draw(key, x_0))
    process = ForwardProcess(LinearBeta(), noise=kind, fields=("x_t", "epsilon", "v", "sigma", "alpha"), compile=False)
    x_t, told, v, sigma, alpha = process.draw(x_0, key)
    assert torch.equal(told, epsilon)
    sigma, alpha = (c.view(-1, 1, 1, 1) for c in (sigma, alpha))
    torch.testing.assert_close(v, alpha * epsilon - sigma * x_0, rtol=0, atol=2e-6)
    xi = ((x_t - alpha * x_0) / sigma - epsilon).double()[:, 0, 2, 2]
    mean_is(xi, 0, 0.5)
    mean_is(xi.square(), 0.25, 0.25 * math.sqrt(2))
    mean_is(xi * epsilon[:, 0, 2, 2].double(), 0, 0.5 * 1.2)


@pytest.mark.parametrize("base", ["gaussian", "offset"])
def test_an_earlier_state_is_perturbed_alike(base):
    """Whether epsilon is drawn within the pass or not."""
    config = composed("noise=input_perturbation", f"noise@noise.base={base}", config="train")
    kind = instantiate(config.noise)
    assert kind == InputPerturbation(base=part("noise", base))
    fields = ("x_t", "x_in", "epsilon", "x_s", "s", "t")
    process = ForwardProcess(Rectified(), noise=kind, fields=fields, pair=Pair(), compile=False)
    key, x_0 = some(12)
    whole = process.draw(x_0, key)
    s, t = (time.view(-1, 1, 1, 1) for time in (whole.s, whole.t))
    mixed = [(state - (1 - u) * x_0) / u for state, u in ((whole.x_s, s), (whole.x_t, t))]
    torch.testing.assert_close(mixed[0], mixed[1], rtol=1e-3, atol=1e-3)
    assert (mixed[0] - whole.epsilon).abs().mean() > 0.05


# --- refusals ---------------------------------------------------------------------------------------------------


def test_noise_without_a_variance_and_noise_perturbed_twice_are_refused():
    for nu in (2, -1.5):
        with pytest.raises(
            ValueError, match=rf"noise\.nu must be a whole number > 2: .* no finite variance, but got {nu} "
        ):
            StudentT(nu)
    with pytest.raises(ValueError, match=r"perturbing twice.*Set one noise\.strength"):
        InputPerturbation(base=InputPerturbation())


def test_samples_without_channels_or_sides_are_refused():
    key, x_0 = some(2, (9,))
    with pytest.raises(ValueError, match=r"shifts each channel as a whole.*\(9,\) have none.*Use noise=gaussian"):
        Offset().draw(key, x_0)
    for shape in ((9,), (3, 1, 8), (1, 2, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"coarser resolutions.*do not have.*Use noise=gaussian"):
            Pyramid().draw(*some(2, shape))
