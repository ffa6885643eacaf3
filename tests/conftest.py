"""What the tests share: the device they run on, and the check that no call moves a global random state."""

import which_lightning as which_lightning  # before anything imports either package

# isort: split
import functools
import gc
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import server
import torch
from lightning_fabric.utilities import registry
from shared import HERE, SCHEDULES, schedule_of

from diffaug.process import kernel
from diffaug.randomness.keys import Keys
from diffaug.schedules import Schedule

registry.entry_points = functools.cache(registry.entry_points)  # what every Trainer looks for again, in 20 ms
EAGER = [HERE / room for room in ("images", "order", "datasets", "loader", "on_device", "datamodules", "encoding")]
"""The folders whose tests compile nothing but where they are marked so: they are about what comes and what is drawn."""
assert all(folder.is_dir() for folder in EAGER)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="the device that the device tests run on: cpu or cuda")
    parser.addoption("--fresh", action="store_true", help="start each job as a fresh process: see tests/jobs/server.py")


def pytest_configure(config: pytest.Config) -> None:
    server.FRESH |= config.getoption("--fresh")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda" and torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and --device cuda")
    for item in items:
        if item.get_closest_marker("gpu"):  # not a folder of that name on the way to the tests
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # torch, Hydra and the tests stay: to look through them again and again took a tenth of the time


@pytest.fixture(autouse=True)
def _environment_of_its_own() -> Iterator[None]:
    """Put the environment back: Lightning writes the port of the ranks and the seed into it, which later jobs took."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(autouse=True)
def _eager(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw as where there is no compiler: to compile takes seconds, and the compiled pass is of tests/process."""
    if request.path.parent in EAGER and not request.node.get_closest_marker("compiled"):
        monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: False)


@pytest.fixture
def quiet_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning_fabric"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


@pytest.fixture(scope="module")
def draws_once() -> Iterator[None]:
    """Draw what is drawn again from memory, by every bit that the pass is given: for runs that are gone on with.

    These draw again and again what the whole run drew. That a draw is of its key alone: tests/process, of every recipe.
    """
    real, drawn = kernel._pieces, {}

    def pieces(x: torch.Tensor, keys: Keys, mix: torch.Tensor, *how: Any) -> list[torch.Tensor]:
        tensors = [(part.shape, part.dtype, part.contiguous().numpy().tobytes()) for part in (x, keys.rows, mix)]
        if (given := (*tensors, *how)) not in drawn:
            drawn[given] = real(x, keys, mix, *how)
        return [field.clone() for field in drawn[given]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_pieces", pieces)
        yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def same_random_state() -> Iterator[None]:
    """Fail a test after which torch's, numpy's or Python's global random state is not what it was."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert random.getstate() == python_state


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """The schedule of every YAML file."""
    return schedule_of(request.param)
