"""The forward process: its arithmetic, and that a draw belongs to the image.

Statistical limits have a false-alarm chance of at most 10^-6; the draws are keyed, so what passes once passes always.
"""

import math
import pickle

import pytest
import torch
from scipy import stats
from shared import equal, has_compiler

from diffaug import ForwardProcess, LinearBeta, NoisyBatch, Pair, Rectified
from diffaug.process import kernel
from diffaug.randomness.keys import Keys
from diffaug.targets import mixes

IMAGES = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
INDEX = torch.arange(64) * 1000003 % 2**35


@pytest.mark.parametrize(("schedule", "dtype"), [(LinearBeta(), torch.int64), (Rectified(), torch.float32)])
def test_triple(schedule, dtype):
    batch = ForwardProcess(schedule)(IMAGES, INDEX)
    x_t, epsilon, t = batch
    assert isinstance(batch, NoisyBatch)
    assert x_t.shape == epsilon.shape == IMAGES.shape
    assert (x_t.dtype, epsilon.dtype, t.dtype) == (torch.float32, torch.float32, dtype)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in schedule.alpha_sigma(t, torch.float64))
    expected = alpha * (IMAGES.double() / 127.5 - 1) + sigma * epsilon.double()
    torch.testing.assert_close(x_t.double(), expected, rtol=0, atol=5e-7)


COMPILED = [has_compiler, pytest.mark.slow]


@pytest.mark.parametrize(
    ("shape", "compile"),
    [
        *(((1, 5, 7), False), ((2, 9), False)),
        *(pytest.param(shape, True, marks=COMPILED) for shape in ((3, 8, 8), (1, 5, 7))),
    ],
)
def test_a_draw_does_not_depend_on_its_batch(compile, shape):
    """Batch sizes 1, 7, 32 and all at once, a short last batch, any order: the same bits."""
    images = torch.randint(0, 256, (64, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    process = ForwardProcess(LinearBeta(), compile=compile)
    whole = process(images, INDEX, seed=2**40 + 7, epoch=3)
    for size in (1, 7, 32):
        for start in range(0, 64, size):
            part = slice(start, start + size)
            some = process(images[part], INDEX[part], seed=2**40 + 7, epoch=3)
            assert equal(some, [field[part] for field in whole]), (size, start)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    again = process(images[order], INDEX[order], seed=2**40 + 7, epoch=3)
    assert equal(again, [field[order] for field in whole])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
def test_a_draw_does_not_depend_on_memory_layout_or_grad_mode(compile):
    process = ForwardProcess(LinearBeta(), compile=compile)
    whole = process(IMAGES, INDEX)
    assert equal(process(IMAGES.to(memory_format=torch.channels_last), INDEX), whole)
    with torch.inference_mode():
        inside = process(IMAGES, INDEX)
    assert equal(inside, whole)
    assert not inside.x_t.is_inference()


@pytest.mark.slow
@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_and_compiled_agree(dtype):
    fields = ("x_t", "epsilon", "t", "v", "x_0")
    eager, compiled = (ForwardProcess(LinearBeta(), compile=c, fields=fields, dtype=dtype) for c in (False, True))
    a, b = eager(IMAGES, INDEX), compiled(IMAGES, INDEX)
    assert torch.equal(a.t, b.t)
    for x, y in zip(a, b, strict=True):
        limit = 1e-6 if dtype == torch.float32 else 2**-8
        assert (x.double() - y.double()).abs().max() <= limit * x.double().abs().max()


@pytest.mark.slow
@has_compiler
def test_the_joint_call_draws_what_the_general_one_draws():
    """Uniform times are drawn within the compiled pass; any other times before it. Both make the same bits."""
    process = ForwardProcess(LinearBeta(), compile=True)
    together = process(IMAGES, INDEX)
    mix = mixes(process.schedule, ("x_t", "epsilon"), together.t, 1 / 255)
    apart = kernel.draw_and_mix(IMAGES.flatten(1), Keys.pack(INDEX), mix, 255.0, torch.float32, compiled=True)
    for field, found in zip(apart, (together.x_t, together.epsilon), strict=True):
        assert torch.equal(field.view(IMAGES.shape), found)


def test_pieces_are_the_whole(monkeypatch):
    """The eager path in pieces of any size, of some samples or of part of one, is the one definition."""
    process = ForwardProcess(LinearBeta(), compile=False)
    whole = process(IMAGES[:5], INDEX[:5])
    for piece in (1, 5, 48, 100):
        monkeypatch.setattr(kernel, "_PIECE", piece)
        assert equal(process(IMAGES[:5], INDEX[:5]), whole)


def test_no_two_samples_share_noise():
    process = ForwardProcess(LinearBeta())
    epsilon = torch.cat([process(IMAGES, INDEX, epoch=e, view=v).epsilon.flatten(1) for e in (0, 1) for v in (0, 1)])
    correlation = torch.corrcoef(epsilon)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < stats.norm.isf(1e-6 / 256**2) / math.sqrt(epsilon.shape[1])


def test_global_random_states_are_neither_read_nor_moved(same_random_state):
    process = ForwardProcess(LinearBeta())
    first = process(IMAGES, INDEX)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert equal(process(IMAGES, INDEX), first)
    process(IMAGES, generator=torch.Generator().manual_seed(3))
    process.trajectory(IMAGES, torch.tensor([5, 10]), INDEX)


def test_generator_gives_a_seed():
    process = ForwardProcess(LinearBeta())
    a, b, c = (process(IMAGES, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert equal(a, b)
    assert not torch.equal(a.epsilon, c.epsilon)
    g = torch.Generator().manual_seed(1)
    assert not torch.equal(process(IMAGES, generator=g).epsilon, process(IMAGES, generator=g).epsilon)


def test_evaluation_does_not_see_the_epoch_and_covers_the_times():
    process = ForwardProcess(LinearBeta())
    for stage in ("val", "test", "predict"):
        assert equal(process(IMAGES, INDEX, stage=stage, epoch=0), process(IMAGES, INDEX, stage=stage, epoch=9))
    index = torch.arange(20000)
    t = process(torch.zeros(20000, 1, 1, dtype=torch.uint8), index, stage="val").t
    for prefix in (10, 100, 1000, 20000):
        seen = torch.sort(t[:prefix]).values
        even = (torch.arange(prefix) + 0.5) * 1000 / prefix
        # The discrepancy of the golden-ratio sequence is at most about 2 ln(n) / n; independent draws have 1/sqrt(n).
        assert (seen - even).abs().max() < 1000 * (2 * math.log(prefix) + 2) / prefix + 1
    other = process(torch.zeros(100, 1, 1, dtype=torch.uint8), index[:100], stage="val", dataset=1).t
    assert not torch.equal(other, t[:100])


def test_float_images_are_mapped_from_their_range():
    for low, high in ((-1.0, 1.0), (0.0, 1.0), (0.0, 16.0), (-3.0, 5.0)):
        images = IMAGES.float() / 255 * (high - low) + low
        process = ForwardProcess(LinearBeta(), value_range=(low, high), fields=("x_0", "t"))
        torch.testing.assert_close(process(images, INDEX).x_0, IMAGES.float() / 127.5 - 1, rtol=0, atol=1e-6)
    assert ForwardProcess(LinearBeta()).scale(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[-1, 1]]


def test_fields():
    fields = (
        "x_0",
        "label",
        "log_snr",
        "alpha",
        "sigma",
        "unit",
        "t_embed",
        "t",
        "v",
        "flow",
        "score",
        "x_t",
        "epsilon",
        "index",
        "view",
    )
    schedule = LinearBeta(timesteps=10)
    label = torch.arange(64)
    batch = ForwardProcess(schedule, fields=fields)(IMAGES, INDEX, view=3, extra={"label": label, "other": label})
    assert batch._fields == fields
    t = batch.t
    assert batch.label is label
    assert torch.equal(batch.index, INDEX)
    assert (batch.view == 3).all()
    a, s = (c.view(-1, 1, 1, 1) for c in (batch.alpha, batch.sigma))
    for got, expected in [
        (batch.v, a * batch.epsilon - s * batch.x_0),
        (batch.flow, batch.epsilon - batch.x_0),
        (batch.score, -batch.epsilon / s),
        (batch.x_t, a * batch.x_0 + s * batch.epsilon),
    ]:
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(batch.unit, (t + 0.5) / 10)
    torch.testing.assert_close(batch.t_embed, t * 100.0)
    torch.testing.assert_close(batch.log_snr, schedule.log_snr(t))
    again = pickle.loads(pickle.dumps(batch))
    assert again._fields == fields
    assert torch.equal(again.x_t, batch.x_t)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=COMPILED)])
def test_latents_are_noised_as_they_are(compile):
    latents = 1.3 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fields = ("x_t", "epsilon", "t", "x_0")
    process = ForwardProcess(LinearBeta(), value_range=None, fields=fields, compile=compile)
    x_t, epsilon, t, x_0 = process(latents, INDEX)
    assert torch.equal(x_0, latents)
    assert torch.equal(process.scale(latents), latents)
    torch.testing.assert_close(process.mix(latents, t, epsilon), x_t, rtol=0, atol=1e-5)
    white = torch.full((64, 4, 8, 8), 255, dtype=torch.uint8)  # a byte says its own range
    assert (process(white, INDEX).x_0 == 1).all()


@pytest.mark.parametrize("law", ["same", "chain"])
def test_pairs_do_not_move_the_triple(law):
    plain = ForwardProcess(LinearBeta(), compile=False)(IMAGES, INDEX)
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "s"), pair=Pair(noise=law), compile=False)
    assert equal(process(IMAGES, INDEX)[:3], plain)
