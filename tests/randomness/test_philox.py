"""The keyed generator: published words, the layout of the counter, and its statistics.

Statistical limits are set so that each test fails by chance at most once in 10^6 runs of a perfect generator; as the
draws are keyed, a test that passes once passes always.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from diffaug.noise import gaussian
from diffaug.randomness.keys import PURPOSE_BITS, STAGES, Keys, Purpose
from diffaug.randomness.philox import box_muller, indices, lanes, normals, philox, points, uniforms, words

FALSE_ALARM = 1e-6
Z = stats.norm.isf(FALSE_ALARM / 2)  # about 4.9


def each(*numbers: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([number]) for number in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """Salmon et al. 2011, the known answers published with Random123."""
    assert " ".join(f"{int(word):08x}" for word in philox(each(*counter), each(*key))) == expected


def test_layout_of_the_counter():
    """Changing the layout changes every user's run; this test is what stands in the way."""
    seed, index, view, epoch, dataset, block = 0x0123456789ABCDEF, 0xA7_89ABCDEF, 0x54321, 0xFEDCB, 0x2A5, 77
    key = Keys.pack(torch.tensor([index]), seed=seed, stage="train", epoch=epoch, view=view, dataset=dataset)
    counter = each(block, 0x89ABCDEF, 0xA7 | 0x54321 << 8 | Purpose.EPSILON << 28, 0xFEDCB | 0 << 20 | 0x2A5 << 22)
    expected = philox(counter, each(0x89ABCDEF, 0x01234567))
    assert [w.item() for w in words(key, Purpose.EPSILON, torch.tensor([block]))] == [w.item() for w in expected]
    assert key.sample.item() == index
    assert key.view.item() == view
    # An index beyond 2^40 moves the key's high half.
    wide = 0x5ABCDE << 40 | index
    key = Keys.pack(torch.tensor([wide, index]), seed=seed, epoch=epoch, view=view, dataset=dataset)
    expected = philox(counter, each(0x89ABCDEF, 0x01234567 ^ 0x5ABCDE))
    assert [w[0].item() for w in words(key, Purpose.EPSILON, torch.tensor([block]))] == [w.item() for w in expected]
    assert key.sample.tolist() == [wide, index]
    # What samples share is of no index; what is of an image is of no view and no epoch.
    none = Keys.pack(torch.tensor([0, 0]), seed=seed, epoch=epoch, dataset=dataset)
    assert torch.equal(key.shared(key.domain).rows, none.rows)
    assert torch.equal(key.of_image().rows[:5], Keys.pack(key.sample, seed=seed, dataset=dataset).rows[:5])
    key = Keys.pack(torch.tensor([index]), seed=seed, epoch=epoch, view=view, dataset=dataset)
    # A purpose beyond 15 has its two high bits above the block's thirty.
    purpose = 0b10_0101
    counter = each(block | 0b10 << 30, 0x89ABCDEF, 0xA7 | 0x54321 << 8 | 0b0101 << 28, 0xFEDCB | 0x2A5 << 22)
    expected = philox(counter, each(0x89ABCDEF, 0x01234567))
    assert [w.item() for w in words(key, purpose, torch.tensor([block]))] == [w.item() for w in expected]
    assert max(Purpose) < 2**PURPOSE_BITS


def test_points_of_the_host_are_those_of_the_words():
    """On the host Philox is written once more, in numpy."""
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 - 1, 2**40, 2**63 - 1])
    key = Keys.pack(index, seed=2**64 - 5, epoch=2**20 - index.shape[0] + torch.arange(7), view=2**20 - 1, dataset=1023)
    for purpose in range(2**PURPOSE_BITS):
        w_0, w_1, _, _ = words(key, purpose, torch.zeros(1, dtype=torch.int64))
        assert torch.equal(points(key, purpose), (w_0[:, 0] << 21) + (w_1[:, 0] >> 11))
    assert points(Keys.pack(index[:0]), Purpose.TIME).shape == (0,)


def test_layout_of_a_sample():
    """Element e of n comes from block e mod ceil(n / 4), as its number e div ceil(n / 4): cos, sin, cos, sin."""
    key = Keys.pack(torch.tensor([5]), seed=9)
    block = torch.arange(lanes(10))
    w = [word[0].numpy().astype(np.float64) for word in words(key, Purpose.EPSILON, block)]
    first = np.sqrt(-2 * np.log((w[0] + 1) / 2**32)), (w[1] - 2**31) * 2 * np.pi / 2**32
    second = np.sqrt(-2 * np.log((w[2] + 1) / 2**32)), (w[3] - 2**31) * 2 * np.pi / 2**32
    expected = np.concatenate([r * f(a) for r, a in (first, second) for f in (np.cos, np.sin)])[:10]
    np.testing.assert_allclose(gaussian(key, (10,))[0].numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_cosines_and_sines(compiled):
    """On a fine grid of angles and around each of their quarters, at the largest radius, 6.66, and at the smallest."""
    quarters = torch.arange(5)[:, None] * 2**30 + torch.arange(-1000, 1001)
    word = torch.cat([torch.arange(0, 2**32, 2**12 - 1), quarters.flatten().clamp(0, 2**32 - 1)])
    function = torch.compile(box_muller) if compiled else box_muller
    cosine, sine = (z.double() / math.sqrt(64 * math.log(2)) for z in function(torch.zeros_like(word), word))
    angle = (word.double() - 2**31) * (math.pi / 2**31)
    assert (cosine - angle.cos()).abs().max() < 2.5e-7
    assert (sine - angle.sin()).abs().max() < 3e-7
    assert all((z == 0).all() for z in box_muller(torch.full_like(word, 2**32 - 1), word))


def test_no_two_draws_share_a_counter():
    """Every combination of values that differ in one part only gives other words: no part is dropped or overlaps."""
    seen: list[torch.Tensor] = []
    indices, datasets, views = (0, 1, 2**31, 2**32, 2**39), (0, 1, 2**9), (0, 1, 255, 2**12, 2**19)
    for seed, stage in itertools.product((0, 1, 2**32, 2**63), STAGES):
        epochs = (0, 1, 2**19) if stage == "train" else (0,)
        parts = torch.cartesian_prod(*map(torch.tensor, (indices, datasets, views, epochs))).T
        index, dataset, view, epoch = parts
        keys = Keys.pack(index, seed=seed, stage=stage, dataset=dataset, epoch=epoch, view=view)
        purposes = (Purpose.TIME, Purpose.EPSILON, Purpose.COVERAGE, 16, 2**PURPOSE_BITS - 1)
        seen += [torch.stack(words(keys, purpose, torch.tensor([0, 1])), -1).flatten(0, 1) for purpose in purposes]
    draws = torch.cat(seen)
    assert len(draws.unique(dim=0)) == len(draws) == 4 * 5 * 3 * 5 * (3 + 3) * 5 * 2


def test_no_two_indices_of_a_seed_share_their_draws():
    """Each bit of an index tells, alone and with the others: so do two hashes that agree in the counter's 40 bits."""
    bits = torch.tensor([1 << bit for bit in range(63)])
    index = torch.cat([torch.tensor([0]), bits, 2**63 - 1 - bits, bits[1:] | bits[:-1], bits + 12345]).unique()
    for seed in (0, 2**64 - 1):
        drawn = points(Keys.pack(index, seed=seed), Purpose.TIME)
        assert len(drawn.unique()) == len(index)
        one = torch.cat([points(Keys.pack(index[i : i + 1], seed=seed), Purpose.TIME) for i in range(len(index))])
        assert torch.equal(drawn, one)


def test_only_training_sees_the_epoch():
    index = torch.arange(4)
    for stage in STAGES:
        a, b = (points(Keys.pack(index, stage=stage, epoch=epoch), Purpose.TIME) for epoch in (0, 3))
        assert torch.equal(a, b) == (stage != "train")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 2**64}, r"seed must be a whole number in \[0, 18446744073709551615\], but got 18446744073709551616"),
        ({"seed": -1}, r"seed must be .* but got -1"),
        ({"seed": 1.5}, r"seed must be .* but got 1\.5 \(float\)"),
        ({"epoch": 2**20}, r"epoch must be .* but got 1048576"),
        ({"view": 2**20}, r"view must be"),
        ({"dataset": 1024}, r"dataset must be"),
        ({"stage": "fit"}, r"stage must be one of 'train', 'val', 'test', 'predict', but got 'fit'"),
        ({"index": torch.tensor([5, -1])}, r"index must lie in \[0, 2\^63\), but its values span \[-1, 5\]"),
        ({"index": torch.tensor([1.0])}, r"index must be an int64 tensor of shape \(B,\)"),
    ],
)
def test_values_beyond_their_width_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Keys.pack(**{"index": torch.tensor([0]), **values})


def test_indices_are_exact():
    point = torch.tensor([0, 1, 2**53 - 1, 2**52, 123456789012345])
    for count in (1, 2, 10, 1000, 2**31 - 1):
        assert indices(point, count).tolist() == [p * count >> 53 for p in point.tolist()]


def test_uniforms_keep_the_open_interval():
    ends = uniforms(torch.tensor([0, 2**53 - 1]))
    assert 0 < ends[0] < 1e-15
    assert ends[1] < 1
    assert torch.isfinite(torch.log(ends) + torch.log1p(-ends)).all()


def normal(count: int = 1000, elements: int = 4000, **key: object) -> torch.Tensor:
    return gaussian(Keys.pack(torch.arange(count), **key), (elements,)).double()


def test_moments():
    """The mean of n draws of z^k has variance (E z^2k - (E z^k)^2) / n."""
    x = normal()
    n = x.numel()
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(x.pow(power).mean().item() - mean) < Z * math.sqrt(variance / n), power


def test_tails():
    x = normal(4000, 4000).abs()
    for limit in (3.0, 4.0, 4.5, 5.0):
        expected = x.numel() * 2 * stats.norm.sf(limit)
        seen = int((x > limit).sum())
        low, high = stats.poisson.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], expected)
        assert low <= seen <= high, (limit, seen, expected)
    assert x.max() < math.sqrt(64 * math.log(2)) + 1e-6


def test_kolmogorov_smirnov():
    assert stats.kstest(normal(1000, 1000).flatten().numpy(), "norm").pvalue > FALSE_ALARM
    u = uniforms(points(Keys.pack(torch.arange(10**6)), Purpose.TIME))
    assert stats.kstest(u.numpy(), "uniform").pvalue > FALSE_ALARM


def test_discrete_times_are_uniform():
    t = indices(points(Keys.pack(torch.arange(10**6)), Purpose.TIME), 1000)
    assert stats.chisquare(torch.bincount(t, minlength=1000).numpy()).pvalue > FALSE_ALARM


def test_neighbouring_keys_are_uncorrelated():
    """A generator that used only the low 32 bits of a seed would fail at 2^32, where the two would be equal."""
    index = torch.arange(500)

    def draw(shift: int = 0, purpose: int = Purpose.EPSILON, **key: object) -> torch.Tensor:
        return gaussian(Keys.pack(index + shift, **key), (2000,), purpose).double()

    x = draw()
    pairs = {
        "next sample": (x, draw(1)),
        "next high word of the index": (x, draw(2**32)),
        "next epoch": (x, draw(epoch=1)),
        "next view": (x, draw(view=1)),
        "other dataset": (x, draw(dataset=1)),
        "other stage": (x, draw(stage="val")),
        "other purpose": (x, draw(purpose=Purpose.TRAJECTORY)),
        **{f"seed + 2^{bit}": (x, draw(seed=2**bit)) for bit in (0, 1, 31, 32, 33, 63)},
        "next pixel": (x[:, :-1], x[:, 1:]),
        "the two of a pair": (x[:, :500], x[:, 500:1000]),
        "squares of a pair": (x[:, :500].square() - 1, x[:, 500:1000].square() - 1),
        "lanes of a block": (x[:, :500], x[:, 1000:1500]),
    }
    for name, (a, b) in pairs.items():
        correlation = (a * b).mean() / (a.std() * b.std())
        assert abs(correlation) < Z / math.sqrt(a.numel()), name
        assert not torch.equal(a, b), name


def test_a_key_of_a_batch_is_a_batch_of_keys():
    index = torch.tensor([3, 2**35 + 1, 77])
    together = Keys.pack(index, seed=5, epoch=torch.tensor([0, 1, 2]), view=torch.tensor([2, 0, 1]))
    for i in range(3):
        alone = Keys.pack(index[i : i + 1], seed=5, epoch=i, view=(2, 0, 1)[i])
        part = together.part(slice(i, i + 1))
        assert torch.equal(part.rows, alone.rows)
        block = torch.arange(5)
        assert all(
            torch.equal(a[i : i + 1], b)
            for a, b in zip(normals(together, 1, block), normals(part, 1, block), strict=True)
        )
