"""The pass over a batch: coefficients over parts of a sample, a second noise, and one compiled form for all of them."""

import itertools
import re
from collections.abc import Sequence

import pytest
import torch
from shared import has_compiler

from diffaug import ForwardProcess, InputPerturbation, LinearBeta, Pair, Rectified
from diffaug.noise import gaussian
from diffaug.process import compiler, kernel
from diffaug.process.coefficients import coefficients
from diffaug.randomness.keys import Keys, Purpose
from diffaug.targets import mixes

ONE, TWO = (Purpose.EPSILON,), (Purpose.EPSILON, Purpose.PAIR)
PARTS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [  # a sample's shape, and how its parts lie
    ((3, 5, 7), (1, 1, 1)),
    ((3, 4, 8, 8), (1, 4, 1, 1)),  # frames
    ((3, 4, 8, 8), (1, 2, 1, 1)),  # of two frames each
    ((4, 3, 8, 8), (4, 1, 1, 1)),  # the frames first
    ((3, 3, 16, 16), (1, 3, 1, 1)),  # lanes of Philox that end within a frame
    ((3, 5, 7, 3), (1, 5, 1, 1)),  # a size that 4 does not divide
    ((4, 16, 16), (1, 8, 8)),  # patches
    ((40, 24), (40, 1)),  # tokens
    ((16, 64), (8, 1)),
]


def batch(shape: Sequence[int], count: int = 3) -> tuple[torch.Tensor, Keys]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return x, Keys.pack(torch.arange(count) * 1000003, seed=2**40)


def some_mix(count: int, fields: int, noises: int, planes: Sequence[int]) -> torch.Tensor:
    return torch.rand(count, fields, 1 + noises, *planes, generator=torch.Generator().manual_seed(1)) * 2 - 1


def enlarged(mix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    for dim, (size, plane) in enumerate(zip(shape, mix.shape[3:], strict=True), 3):
        mix = mix.repeat_interleave(size // plane, dim)
    return mix


@pytest.mark.parametrize("purposes", [ONE, TWO], ids=["epsilon", "two noises"])
@pytest.mark.parametrize(("shape", "planes"), PARTS)
def test_every_element_has_the_coefficients_of_its_part(shape, planes, purposes, monkeypatch):
    (x, keys), mix = batch(shape), some_mix(3, 2, len(purposes), planes)
    noises = [gaussian(keys, shape, purpose) for purpose in purposes]
    p, *others = enlarged(mix, shape).unbind(2)
    expected = p * (2.0 * x[:, None] - 255.0)
    for q, noise in zip(others, noises, strict=True):
        expected = expected + q * noise[:, None]
    options = {"centre": 255.0, "dtype": torch.float32}
    for piece in (500, 2**17):
        monkeypatch.setattr(kernel, "_PIECE", piece)
        made = kernel.draw_and_mix(x, keys, mix, **options, compiled=False, purposes=purposes)
        assert torch.equal(torch.stack(made, 1), expected)
    assert torch.equal(torch.stack(kernel.mix_given(x, noises, mix, **options), 1), expected)
    # What is compiled, run as it is: it is the one definition whatever the layout.
    monkeypatch.setattr(compiler, "call_compiled", lambda function, *given: function(*given))
    made = kernel.draw_and_mix(x, keys, mix, **options, compiled=True, purposes=purposes)
    assert torch.equal(torch.stack(made, 1), expected)


@pytest.mark.parametrize(("shape", "planes"), PARTS)
def test_parts_that_are_all_alike_are_one(shape, planes):
    (x, keys), mix = batch(shape), some_mix(3, 2, 1, ())
    alike = mix.view(3, 2, 2, *(1,) * len(planes)).expand(3, 2, 2, *planes)
    of_one, of_parts = (
        kernel.draw_and_mix(x, keys, some, 255.0, torch.float32, compiled=False) for some in (mix, alike)
    )
    assert all(map(torch.equal, of_one, of_parts))


@pytest.mark.parametrize("noise", ["same", "chain"])
def test_coefficients_of_parts_are_those_of_each(noise):
    """t of shape (B, F), laid along the frames of (B, C, F, H, W): each as if it were a sample of its own."""
    process = ForwardProcess(Rectified(), pair=Pair(noise=noise), fields=("x_t", "v", "x_s"))
    t = torch.tensor([[0.2, 0.9, 0.5], [0.7, 0.7, 0.1]])
    names, schedule, s = ("x_t", "v", "x_s"), process.schedule, t * 0.5
    of_parts = coefficients(process, schedule, names, t, {"x_s": s}, 0.5, (1, 3, 1, 1))
    of_each = coefficients(process, schedule, names, t.flatten(), {"x_s": s.flatten()}, 0.5)
    assert of_parts.shape == (2, 3, 2 if noise == "same" else 3, 1, 3, 1, 1)
    assert torch.equal(of_parts[:, :, :, 0, :, 0, 0].permute(0, 3, 1, 2).flatten(0, 1), of_each)
    assert torch.equal(of_each[:, :2, :2], mixes(schedule, ("x_t", "v"), t.flatten(), 0.5))


PAIRS = {
    "same": {"pair": Pair()},
    "chain": {"pair": Pair(noise="chain")},
    "perturbed": {"pair": Pair(), "noise": InputPerturbation(0.5)},
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_earlier_state_is_what_its_times_say(name, monkeypatch):
    """By the coefficients in float64 and the noises by their purposes; and eagerly what the compiled form does."""
    fields = ("x_s", "x_t", "epsilon", "t", "s", "x_in")
    (x, keys), process = batch((3, 16, 16)), ForwardProcess(LinearBeta(), fields=fields, **PAIRS[name])
    made = process.draw(x, keys, eager=True)
    x_0, xi = x.double() / 127.5 - 1, {"perturbed": Purpose.PERTURBATION}.get(name, Purpose.PAIR)
    noise, xi = (gaussian(keys, x.shape[1:], purpose).double() for purpose in (Purpose.EPSILON, xi))
    assert torch.equal(made.epsilon.double(), noise)
    bars = torch.cat([torch.ones(1, dtype=torch.float64), process.schedule.alpha_bars])  # that of s = -1 first
    bar_s, bar_t = (bars[time + 1].view(-1, 1, 1, 1) for time in (made.s, made.t))
    if name == "perturbed":
        noise = noise + 0.5 * xi
    x_t = bar_t.sqrt() * x_0 + (1 - bar_t).sqrt() * noise
    torch.testing.assert_close(made.x_t.double(), x_t, rtol=0, atol=2e-6)
    if name == "chain":
        # x_s given x_t and x_0: q(x_s | x_t, x_0), by the ratio of the bars.
        share = (bar_t / bar_s * (1 - bar_s) / (1 - bar_t)).sqrt()
        noise = share * noise + (1 - share**2).clamp_min(0).sqrt() * xi
    torch.testing.assert_close(made.x_s.double(), bar_s.sqrt() * x_0 + (1 - bar_s).sqrt() * noise, rtol=0, atol=2e-6)
    monkeypatch.setattr(compiler, "call_compiled", lambda function, *given: function(*given))
    again = ForwardProcess(LinearBeta(), fields=fields, compile=True, **PAIRS[name])
    assert all(map(torch.equal, again.draw(x, keys), made))
    assert again._has_compiled


@pytest.mark.slow
@has_compiler
@pytest.mark.parametrize("name", PAIRS)
def test_eager_and_compiled_pairs_agree(name):
    x, keys = batch((3, 16, 16), 5)
    fields = ("x_t", "epsilon", "t", "x_s", "s", "same", "interval")
    eager, compiled = (
        ForwardProcess(LinearBeta(), fields=fields, compile=mode, **PAIRS[name]) for mode in (False, True)
    )
    for images in (x, x[..., :15, :15], x[:1]):
        a, b = (process.draw(images, keys.part(slice(len(images)))) for process in (eager, compiled))
        for field, one, other in zip(fields, a, b, strict=True):
            if one.ndim == 1:
                assert torch.equal(one, other), field
            else:
                assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp_min(1), field
    assert compiled._has_compiled
    assert not compiled._cannot_compile
    plain = ForwardProcess(LinearBeta(), compile=True, noise=PAIRS[name].get("noise", eager.noise))
    assert all(map(torch.equal, plain.draw(x, keys), compiled.draw(x, keys)))


@pytest.mark.slow
@has_compiler
def test_compiled_parts_are_few_graphs_and_one_loop():
    """Frames and tokens of many shapes; parts all alike have the bits of a sample's one time."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    dynamo.reset()
    counters.clear()

    def draw(x: torch.Tensor, keys: Keys, mix: torch.Tensor, compiled: bool = True) -> list[torch.Tensor]:
        return kernel.draw_and_mix(x, keys, mix, 255.0, torch.float32, compiled=compiled)

    for frames, side in itertools.product((8, 12, 20), (16, 24, 32, 40)):
        for shape, planes in (((3, frames, side, side), (1, frames, 1, 1)), ((frames, 3, side), (1, 3, side // 2))):
            x, keys = batch(shape, 5)
            mix, same = some_mix(5, 2, 1, planes), some_mix(5, 2, 1, ())
            for ours, theirs in zip(draw(x, keys, mix), draw(x, keys, mix, compiled=False), strict=True):
                assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
            alike = same.view(5, 2, 2, *(1,) * len(planes)).expand(5, 2, 2, *planes)
            assert all(map(torch.equal, draw(x, keys, alike), draw(x, keys, same)))
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8  # of 24 shapes: one time, in rows, and each element its own
    x, keys = batch((3, 4, 48, 48))
    dynamo.reset()
    _, (code,) = run_and_get_code(draw, x, keys, some_mix(3, 2, 1, (1, 4, 1, 1)))
    assert len(re.findall(r"for ?\(int64_t x0=", code)) == 1, "Philox's words are written to memory between two loops"
