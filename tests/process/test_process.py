"""The forward process: its law, its arithmetic, and that a draw belongs to the image.

Statistical limits have a false-alarm chance of at most 10^-6; the draws are keyed, so what passes once passes always.
"""

import math
import pickle
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from shared import has_compiler

from diffaug import (
    Cosine,
    ForwardProcess,
    LinearBeta,
    NoisyBatch,
    Pair,
    Rectified,
    ScaledLinearBeta,
)
from diffaug.process import compiler, kernel
from diffaug.randomness.keys import Keys
from diffaug.targets import mixes
from diffaug.times import Cubic, Uniform

Z = stats.norm.isf(0.5e-6)
IMAGES = torch.arange(64 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(64, 3, 8, 8)
INDEX = torch.arange(64) * 1000003 % 2**35


def equal(a: NoisyBatch, b: NoisyBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows(batch: NoisyBatch, which: object) -> NoisyBatch:
    return NoisyBatch(*(field[which] for field in batch))


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
            assert equal(process(images[part], INDEX[part], seed=2**40 + 7, epoch=3), rows(whole, part)), (size, start)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert equal(process(images[order], INDEX[order], seed=2**40 + 7, epoch=3), rows(whole, order))


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


def broken_compiler(function: object, device_type: str) -> object:
    def call(*args: object) -> None:
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler today")

    return call


def test_a_failed_compile_is_one_warning_and_the_eager_path(monkeypatch):
    monkeypatch.setattr(compiler, "_compiled", broken_compiler)
    process, other = ForwardProcess(LinearBeta(), compile=True), ForwardProcess(LinearBeta(), compile=True)
    with pytest.warns(UserWarning, match=r"torch\.compile failed .*no compiler today.*process\.compile=false"):
        batch = process(IMAGES, INDEX)
    assert equal(batch, ForwardProcess(LinearBeta(), compile=False)(IMAGES, INDEX))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process(IMAGES, INDEX)
    with pytest.warns(UserWarning, match=r"torch\.compile failed"):  # each process speaks for itself
        assert other.can_compile(IMAGES) is False
    assert other.compiles(torch.device("cpu"), 10**6) is False


def counted(tried: list[tuple[str, int]], fails: str = "") -> object:
    """A compiler whose functions note the form of the pass and the size of the batch, and of which one fails."""

    def compiled(function: Callable[..., object], device_type: str) -> object:
        def call(x: torch.Tensor, *args: object) -> list[torch.Tensor]:
            assert x.is_contiguous()
            form = "times and fields" if "times" in function.__name__ else "fields"
            tried.append((form, len(x)))
            if form == fails:
                raise torch._dynamo.exc.InternalTorchDynamoError("no compiler today")
            return [x[:, 0], x, x] if "times" in form else [x, x]

        return call

    return compiled


TIMES, FIELDS = "times and fields", "fields"
SMALL = [(FIELDS, 1), (FIELDS, 2)]


@pytest.mark.parametrize(
    ("times", "batches", "expected"),
    [
        (Uniform(), {"train": {5, 64}}, [(TIMES, 1), (TIMES, 2), (TIMES, 5), (TIMES, 64)]),
        (
            Uniform(),
            {"train": {3}, "val": {7}},
            [(TIMES, 1), (TIMES, 2), (TIMES, 3), (FIELDS, 1), (FIELDS, 2), (FIELDS, 7)],
        ),
        (Cubic(), {"train": {3}, "val": {7}}, [*SMALL, (FIELDS, 3), (FIELDS, 7)]),
        (Uniform(), {"test": ()}, SMALL),
    ],
)
def test_every_form_and_size_that_is_to_come_is_tried(times, batches, expected, monkeypatch):
    tried: list[tuple[str, int]] = []
    monkeypatch.setattr(compiler, "_compiled", counted(tried))
    assert ForwardProcess(LinearBeta(), times, compile=True).can_compile(IMAGES, batches=batches)
    assert tried == expected


def test_where_one_form_does_not_compile_none_is_used(monkeypatch):
    """Nothing was handed out yet: the run begins eagerly, and does not end."""
    monkeypatch.setattr(compiler, "_compiled", counted([], fails=FIELDS))
    process = ForwardProcess(LinearBeta(), compile=True)
    with pytest.warns(UserWarning, match=r"torch\.compile failed .*no compiler today"):
        assert process.can_compile(IMAGES, batches={"train": (), "val": ()}) is False
    assert process.compiles(torch.device("cpu"), 10**6) is False


def test_a_compile_that_fails_after_others_worked_ends_the_run(monkeypatch):
    """One rank must not go on alone with other bits."""
    monkeypatch.setattr(compiler, "_compiled", counted([]))
    process = ForwardProcess(LinearBeta(), compile=True)
    assert process.can_compile(IMAGES)
    monkeypatch.setattr(compiler, "_compiled", broken_compiler)
    with pytest.raises(RuntimeError, match=r"no compiler today.*batch of \(3, 3, 8, 8\).*process\.compile=false"):
        process(IMAGES[:3], INDEX[:3])


def test_auto_compiles_by_device_and_sample_size_alone():
    process = ForwardProcess(LinearBeta())
    cpu = torch.device("cpu")
    assert process.compiles(cpu, 511) is False
    assert process.compiles(cpu, 512) is compiler.compiler_for("cpu")
    assert process.compiles(torch.device("meta"), 10**6) is False


@pytest.mark.parametrize(
    ("names", "found"),
    [("no-such", False), (sys.executable, True), (["no-such", sys.executable], True), ((None,), False)],
)
def test_a_compiler_is_named_alone_or_among_others(names, found):
    from torch._inductor import config

    with config.patch({"cpp.cxx": names}):
        assert compiler.compiler_for.__wrapped__("cpu") is found


@pytest.mark.parametrize("law", ["same", "chain"])
def test_pairs_do_not_move_the_triple(law):
    plain = ForwardProcess(LinearBeta(), compile=False)(IMAGES, INDEX)
    process = ForwardProcess(LinearBeta(), fields=("x_t", "epsilon", "t", "s"), pair=Pair(noise=law), compile=False)
    assert equal(process(IMAGES, INDEX)[:3], plain)


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
