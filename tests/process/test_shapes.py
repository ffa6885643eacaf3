"""Batches of several shapes: a schedule that follows their size, and one compiled pass for all of them."""

from typing import Any

import pytest
import torch

from diffaug import (
    Cosine,
    Discretised,
    ForwardProcess,
    InterpolatedShift,
    LinearBeta,
    LogitNormal,
    MinSNR,
    Offset,
    Pair,
    Rectified,
    Shifted,
    ZeroTerminalSNR,
)
from diffaug.commands.report import page
from diffaug.interop import to_diffusers
from diffaug.pytorch_lightning import Denoiser, LossByLevel
from diffaug.schedules import Schedule, ShiftedByTokens
from diffaug.targets import PAIR_FIELDS, THIRD_FIELDS

FIELDS = ("x_t", "epsilon", "t", "v", "log_snr", "alpha", "sigma", "weight", *PAIR_FIELDS)
SHAPES = [(16 + 8 * (k % 5), 16 + 8 * (k // 5)) for k in range(20)]


def images(height: int, width: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def process(schedule: Schedule, **options: Any) -> ForwardProcess:
    return ForwardProcess(schedule, **{"compile": False, **options})


AUTO = {
    "shifted": lambda image: Shifted(LinearBeta(), image=image, base_image=32),
    "straight": lambda image: Shifted(Rectified(), image=image, base_image=32),
    "interpolated": lambda image: InterpolatedShift(Cosine(), image, 32, 16),
    "wrapped": lambda image: Discretised(Shifted(Rectified(), image=image), 50),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_is_the_size_of_each_batch(name: str):
    auto = AUTO[name]("auto")
    for height, width, side in ((64, 64, 64), (32, 32, 32), (16, 64, 32), (64, 16, 32), (48, 56, 48**0.5 * 56**0.5)):
        there = auto.at_shape((3, 3, height, width))
        assert side_of(there) == pytest.approx(side)
        assert there.at_shape((3, 3, 8, 8)) is there
    assert auto.at_shape((3, 3, 64, 64)) == AUTO[name](64)
    assert repr(auto.at_shape((3, 3, 64, 64))) == repr(AUTO[name](64))


def side_of(schedule: Any) -> Any:
    return schedule.image if hasattr(schedule, "image") else schedule.base.image


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("stage", ["train", "val"])
@pytest.mark.parametrize("options", [{}, {"noise": Offset(), "pair": Pair()}, {"times": LogitNormal()}])
def test_a_batch_is_noised_as_by_the_schedule_of_its_size(name: str, stage: str, options: dict[str, Any]):
    fields = [field for field in FIELDS if field not in (THIRD_FIELDS if "pair" in options else PAIR_FIELDS)]
    auto, by_hand = (process(AUTO[name](image), fields=fields, weight=MinSNR(), **options) for image in ("auto", 64))
    x_0, index = images(64, 64), torch.arange(3)
    ours, theirs = (p(x_0, index, seed=3, stage=stage) for p in (auto, by_hand))
    for field in fields:
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    other = auto(images(16, 16), index, seed=3, stage=stage)
    assert not torch.equal(other.log_snr, theirs.log_snr)


@pytest.mark.parametrize("name", ["shifted", "straight"])
def test_whatever_is_asked_of_a_process_goes_by_the_size(name: str):
    auto, by_hand = (process(AUTO[name](image)) for image in ("auto", 64))
    x_0, index = images(64, 64), torch.arange(3)
    schedule = by_hand.schedule
    t, s = (schedule.from_unit(torch.full((3,), u, dtype=torch.float64)) for u in (0.7, 0.3))
    t, s = (t, s) if schedule.discrete else (t.float(), s.float())
    epsilon, x_s = torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64)
    asked = {
        "mix": lambda p: p.mix(x_0, t, epsilon),
        "step": lambda p: p.step(x_s, s, t, epsilon),
        "posterior": lambda p: p.posterior(p.scale(x_0), x_s, t, s)[0],
        "trajectory": lambda p: p.trajectory(x_0, torch.stack([s[0], t[0]]), index),
        "prior": lambda p: torch.tensor(p.prior_kl_bits_per_dim(x_0)),
    }
    for what, ask in asked.items():
        assert torch.equal(ask(auto), ask(by_hand)), what


def test_without_a_batch_the_base_is_shown():
    assert torch.equal(Shifted(LinearBeta(), image="auto").alpha_bars, Shifted(LinearBeta(), image=64).alpha_bars)
    t = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert torch.equal(
        InterpolatedShift(Cosine(1000), "auto", 256, 32).log_snr(torch.tensor([3])),
        InterpolatedShift(Cosine(1000), 256, 256, 32).log_snr(torch.tensor([3])),
    )
    assert torch.equal(Shifted(Rectified(), image="auto").log_snr(t), Rectified().log_snr(t))


def test_a_report_says_what_it_is_of():
    auto = page(process(Shifted(LinearBeta(), image="auto")))
    assert "schedule.image=auto is each batch's own; what follows is as without a batch (schedule.image=N for" in auto
    tokens = page(process(ZeroTerminalSNR(ShiftedByTokens(LinearBeta()))))
    assert "schedule.base.tokens=auto is each batch's own" in tokens
    assert "each batch's own" not in page(process(Shifted(LinearBeta(), image=64)))
    assert auto.splitlines()[2:] == page(process(Shifted(LinearBeta(), image=64))).splitlines()[1:]


def test_a_denoiser_goes_by_the_size_of_its_batch():
    class Told(torch.nn.Module):
        """A network that keeps what it is told of the noise level, and says that all is noise."""

        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            self.times = [*getattr(self, "times", []), time]
            return x

    told = {}
    for image in ("auto", 64):
        mixed = process(AUTO["shifted"](image), weight=MinSNR())
        network = Told()
        denoiser = Denoiser(network, mixed, time="log_snr")
        batch = mixed(images(64, 64), torch.arange(3), seed=1)
        drawn = denoiser.sample((2, 3, 64, 64), steps=4)
        told[image] = [*denoiser._compare(batch)[:2], drawn, *network.times]
        levels = LossByLevel(schedule=mixed.schedule)
        told[image].append(levels._levels(None, None, batch.t, batch))
    assert len(told[64]) == 9
    assert all(map(torch.equal, told["auto"], told[64]))


def test_what_auto_cannot_be():
    with pytest.raises(
        ValueError, match=r"^schedule\.factor must be .* not given either \(auto: each batch's own\), but"
    ):
        Shifted(LinearBeta())
    with pytest.raises(
        ValueError, match=r"^schedule\.image=auto takes the height and width of a batch, \(B, C, H, W\)"
    ):
        process(Shifted(LinearBeta(), image="auto"))(torch.zeros(2, 8), torch.arange(2))
    with pytest.raises(ValueError, match=r"is another schedule for every size of image, and diffusers' are of one"):
        to_diffusers(Shifted(Rectified(), image="auto"))
    with pytest.raises(ValueError, match=r"or set schedule\.tokens to a number"):
        to_diffusers(ShiftedByTokens(Rectified()))


@pytest.mark.slow
def test_twenty_shapes_are_compiled_and_none_falls_back():
    """Uniform timesteps, which have a compiled form of their own, and validation's; sizes that 4 divides, and not."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    schedule = Shifted(LinearBeta(), image="auto", base_image=16)
    compiled, eager = (ForwardProcess(schedule, compile=mode) for mode in (True, False))
    sizes = [*SHAPES, (17, 19), (23, 17), (31, 29)]
    for stage in ("train", "val"):
        for height, width in sizes:
            x_0 = images(height, width)
            ours, theirs = (p(x_0, torch.arange(3), seed=5, stage=stage) for p in (compiled, eager))
            assert torch.equal(ours.t, theirs.t)
            assert (ours.epsilon - theirs.epsilon).abs().max() <= 1e-6 * theirs.epsilon.abs().max()
            assert (ours.x_t - theirs.x_t).abs().max() <= 1e-6 * max(1.0, float(theirs.x_t.abs().max()))
    assert compiled._has_compiled
    assert not compiled._cannot_compile
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 4  # of 46: each form, for sizes that 4 divides and for others
