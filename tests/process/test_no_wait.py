"""No recipe makes the host wait for an accelerator, or gives it more than a few operations beside the pass.

Every call is made once before, as a table may cross to the device once; what comes after is looked at. See `watched`.
"""

import contextlib
from typing import Any

import pytest
import torch
from shared import QUICK as QUICK_SCHEDULES
from shared import recipes

watched = pytest.importorskip("watched", reason="needs torch's private names where they were", exc_type=ImportError)

from diffaug import ForwardProcess, LinearBeta, Rectified, ZeroTerminalSNR  # noqa: E402
from diffaug.targets import as_input, convert, convertible  # noqa: E402
from diffaug.times import Importance  # noqa: E402

MOST = 20
"""So many operations beside the pass, at most."""
MORE = {"times: LinearBeta, importance": (64, "it draws from the losses, which are on the device, and weighs by them")}
"""Recipes that are allowed more, and why."""
WAITS = {"prior_kl": "one number of the whole data set, asked for on the host"}
"""Helpers that wait, and why."""


def check(process: ForwardProcess, most: int = MOST) -> None:
    index = torch.arange(4)
    with watched.watched() as watch:
        x = watched.on_device(4, 3, 16, 16, dtype=torch.uint8)
        process(x, index, position=index, handed=index)
        for stage in ("train", "val"):
            watch.clear()
            batch = process(x, index, stage=stage, epoch=index, view=index, position=index, handed=index)
            assert all(value.device == watched.DEVICE for value in batch)
            assert watch.waits == []
            assert watch.operations <= most, stage


def test_the_watch_sees_what_waits():
    def of(call: Any) -> list[str]:
        watch.clear()
        with contextlib.suppress(watched.Waited, RuntimeError):
            call()
        return [what for what, _ in watch.waits]

    with watched.watched() as watch:
        x = watched.on_device(3)
        assert of(lambda: x.sum().item()) == ["_local_scalar_dense.default, which reads the device"]
        assert of(lambda: x[x > 0])[0] == "index.Tensor, whose size is in the device's values"
        assert of(lambda: torch.tensor([1.0], device=watched.DEVICE)) == ["a copy from the host that waits"]
        assert of(lambda: torch.ones(3).to(watched.DEVICE)) == ["a copy from the host that waits"]
        assert of(lambda: x.cpu()) == ["a copy to the host"]
        assert of(lambda: x + torch.ones(3)) == ["add.Tensor of tensors of the host and of the device"]
        assert of(lambda: torch.ones(3).to(watched.DEVICE, non_blocking=True)) == []
        assert watch.operations == 1
        (x + 1).view(1, 3)
        assert watch.operations == 2


QUICK = {f"schedule: {name}" for name in QUICK_SCHEDULES}
QUICK |= {"two times of schedule: rectified", "coverage: LinearBeta, stratified", "times: LinearBeta, importance"}
QUICK |= {"noise: EDM, pyramid", "weight: Rectified, elbo", "pair: Rectified, imm, same", "part_law: EDM, context"}
RECIPES = {f"{kind}: {name}": make for kind, some in recipes().items() for name, make in some.items()}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_every_recipe(name):
    process = RECIPES[name](True)
    if process is None:
        pytest.skip("the two do not go together")
    check(process, MORE.get(name, (MOST, ""))[0])


def test_the_pass_itself():
    index = torch.arange(4)
    with watched.watched(run_pass=True) as watch:
        for schedule, side in ((LinearBeta(), 16), (Rectified(), 5)):
            x = watched.on_device(4, 3, side, side, dtype=torch.uint8)
            process = ForwardProcess(schedule, compile=True)
            process(x, index)
            watch.clear()
            process(x, index)
            assert watch.waits == []
            assert watch.largest_float64 == 0


def test_a_generator_and_keys_on_the_device():
    process, generator = ForwardProcess(LinearBeta()), torch.Generator().manual_seed(1)
    with watched.watched() as watch:
        x = watched.on_device(4, 3, 16, 16)
        for index in ({"generator": generator}, {"index": watched.on_device(4, dtype=torch.int64)}):
            for _ in range(2):
                watch.clear()
                process(x, **index)
            assert watch.waits == []


@pytest.mark.parametrize(
    "schedule", [LinearBeta(), Rectified(), ZeroTerminalSNR(LinearBeta())], ids=lambda s: type(s).__name__
)
def test_helpers(schedule):
    process = ForwardProcess(schedule)
    learner = Importance()
    with watched.watched() as watch:
        x, index = watched.on_device(4, 3, 16, 16), torch.arange(4)
        t = watched.on_device(4, dtype=torch.int64 if schedule.discrete else torch.float32)
        times = torch.arange(1, 4) if schedule.discrete else torch.tensor([0.2, 0.5, 0.9])
        calls = {
            "convert": lambda: convert(schedule, "v", "x_0", x, x, t),
            "convertible": lambda: convertible(schedule, "v", "x_0", t),
            "as_input": lambda: as_input(schedule, "x_in", x, t),
            "mix": lambda: process.mix(x, t, x),
            "step": lambda: process.step(x, t, t, x),
            "posterior": lambda: process.posterior(x, x, t, t),
            "trajectory": lambda: process.trajectory(x, times, index),
            "prior_kl": lambda: process.prior_kl_bits_per_dim(x),
        }
        if schedule.discrete:
            ForwardProcess(schedule, learner)(x, index)
            calls["importance"] = lambda: learner.update(t, watched.on_device(4))
        for name, call in calls.items():
            with contextlib.suppress(watched.Waited):
                call()
                watch.clear()
                call()
            assert bool(watch.waits) == (name in WAITS), (name, watch.waits)
