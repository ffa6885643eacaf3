"""What several tests share: the YAML files through Hydra, a module that keeps its batches, small pictures."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from diffaug import (
    EDM,
    DiffusionDataModule,
    ForwardProcess,
    LinearBeta,
    LogitNormal,
    Mode,
    Pair,
    Parts,
    Rectified,
    Stratified,
    Uniform,
)
from diffaug.commands.encode import encode
from diffaug.process.compiler import compiler_for
from diffaug.pytorch_lightning import Encoding
from diffaug.schedules import Schedule
from diffaug.targets import FIELDS, PAIR_FIELDS, TARGETS, THIRD_FIELDS
from diffaug.times import Fixed, Grid, TwoDraws

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
HERE = ROOT / "tests"


def names(group: str) -> list[str]:
    """The choices of a config group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


SCHEDULES = names("schedule")
has_compiler = pytest.mark.skipif(not compiler_for("cpu"), reason="needs a C++ compiler for torch.compile")
QUICK = ("linear", "zero_terminal_snr", "edm", "rectified")
MOSTLY_SLOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES]
"""Every schedule, of which few are quick: for laws that take long, and of which one schedule tells most of another."""


def composed(*overrides: str, config: str | None = None) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, overrides=list(overrides))


@functools.cache
def group(name: str) -> Any:
    """Every choice of a config group, by its name, in one composition: Hydra takes a tenth of a second for each."""
    return composed(*(f"+{name}@{choice}={choice}" for choice in names(name)))


@functools.cache
def schedule_of(name: str) -> Schedule:
    return instantiate(group("schedule")[name])


def times(schedule: Schedule, points: int = 4001) -> torch.Tensor:
    """Every t of a discrete schedule; of a continuous one many, in float32, with the smallest and both ends."""
    if schedule.discrete:
        return torch.arange(schedule.timesteps)
    low, high = schedule.range
    inside = schedule.from_unit(torch.linspace(0, 1, points, dtype=torch.float64)).float()
    tiny = torch.tensor([1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e-6, 1e-3]) + low
    near_one = high - torch.tensor([2**-24, 2**-23, 1e-6, 1e-3]) if high <= 1 else torch.tensor([1e3, 1e10, 1e38])
    every = torch.cat([torch.tensor([low, high]), inside, tiny, near_one]).float()
    return every.unique().clamp(torch.tensor(low).float(), torch.tensor(high).float())


def times_inside(schedule: Schedule, count: int = 41) -> torch.Tensor:
    """From end to end where discrete; the interior of continuous time."""
    ends = 0.0 if schedule.discrete else 1e-4
    return schedule.from_unit(torch.linspace(ends, 1 - ends, count, dtype=torch.float64))


class Items(Dataset[Any]):
    """Whatever a function makes of an index."""

    def __init__(self, make: Callable[[int], Any], size: int = 12) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Stream(IterableDataset[Any]):
    """Items that can only be gone through."""

    def __init__(self, items: Any = ()) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.items)


class Shapes(Dataset[Any]):
    """Images of three shapes, and so in three buckets; each pixel is its image's number."""

    bucket_shapes = [(2, 2), (4, 2), (2, 6)]

    def __init__(self, count: int = 21) -> None:
        self.bucket_of = np.arange(count) * 5 % 7 // 3

    def __len__(self) -> int:
        return len(self.bucket_of)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, *self.bucket_shapes[self.bucket_of[index]]), index, dtype=torch.uint8)


class Rank(DiffusionDataModule):
    """A DataModule that stands for one rank of several."""

    def __init__(self, *args: Any, rank: int = 0, ranks: int = 1, **options: Any) -> None:
        super().__init__(*args, **{"seed": 3, **options})
        self._place = {"rank": rank, "ranks": ranks}

    def _ranks(self) -> dict[str, Any]:
        return self._place


class Listener(pl.LightningModule):
    """Keeps every batch it is given, by stage."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x_t, epsilon = batch[:2]
        self.seen["train"].append(batch)
        return (self.weight * x_t.float() - epsilon.float()).square().mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen["predict"].append(batch)
        return batch.t

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", **{"max_epochs": 1, **quiet, **options})


def save_picture(path: Path, seed: int, size: tuple[int, int] = (20, 17), mode: str = "RGB") -> None:
    """Save a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def pictures(count: int = 10, channels: int = 3, size: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return TensorDataset(images, torch.arange(count))


def fit(data: DiffusionDataModule, **options: Any) -> dict[str, list[Any]]:
    listener = Listener()
    trainer(**options).fit(listener, data)
    return listener.seen


def seen(data: DiffusionDataModule, epochs: int = 2) -> dict[str, list[Any]]:
    return fit(data, max_epochs=epochs, num_sanity_val_steps=0)


def write(data: DiffusionDataModule, out: Path, **options: Any) -> Path:
    """Write a store."""
    encode(data, str(out), trainer(), Encoding, **options)
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def together(batches: list[Any], name: str) -> torch.Tensor:
    return torch.cat([getattr(batch, name) for batch in batches])


def assert_alike(batches: list[Any], others: list[Any]) -> None:
    """Every field of every batch, to the bit."""
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(batch, other, strict=True))


def levels(batches: list[Any]) -> torch.Tensor:
    """The first pixel of each image, in [0, 255]."""
    return ((together(batches, "x_0")[:, 0, 0, 0] + 1) * 127.5).round().long()


@functools.cache
def part(kind: str, name: str) -> Any:
    """A choice of a config group; coverages of evaluation, which have no file, by the names of their classes."""
    if name in ("Grid", "Fixed"):
        return {"Grid": Grid(3), "Fixed": Fixed(0.3)}[name]
    return instantiate(group(kind)[name])


def recipe(schedule: Any, density: str = "uniform", **options: Any) -> ForwardProcess | None:
    """A process, or None where diffaug refuses the combination."""
    times = part("times", density)
    times.clear()  # Importance's losses are those of one schedule's timesteps
    try:
        return ForwardProcess(schedule, times, **options)
    except ValueError:
        return None


Make = Callable[[bool], ForwardProcess | None]
TWO = tuple(name for name in PAIR_FIELDS if name not in THIRD_FIELDS)


@functools.cache
def recipes() -> dict[str, dict[str, Make]]:
    """A maker of each process, compiled or not, by what is chosen, and by the choice's name."""
    made: dict[str, dict[str, Any]] = {}

    def add(kind: str, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        made.setdefault(kind, {})[name] = lambda compile: function(*args, **options, compile=compile)

    every = tuple(name for name in FIELDS if name not in PAIR_FIELDS and name != "score")
    two_draws = Pair(TwoDraws(second=LogitNormal()), "chain")
    for name in SCHEDULES:
        schedule = schedule_of(name)
        add("schedule", name, recipe, schedule, fields=every, weight=part("weight", "min_snr"), target="v")
        times = Mode(coverage=Stratified())
        add("two times of schedule", name, ForwardProcess, schedule, times, fields=("x_t", "t", *TWO), pair=two_draws)
    for schedule in (LinearBeta(), Rectified(), EDM()):
        of = type(schedule).__name__
        for name in names("times"):
            add("times", f"{of}, {name}", recipe, schedule, name, fields=("x_t", "epsilon", "t", "importance_weight"))
        for name in (*names("coverage"), "Grid", "Fixed"):
            add("coverage", f"{of}, {name}", ForwardProcess, schedule, Uniform(coverage=part("coverage", name)))
        for name in names("noise"):
            add("noise", f"{of}, {name}", recipe, schedule, noise=part("noise", name))
        for name in TARGETS:
            add("target", f"{of}, {name}", recipe, schedule, fields=("x_t", name, "t"))
        for name in names("weight"):
            options = {"fields": ("x_t", "v", "t", "weight"), "weight": part("weight", name), "target": "v"}
            add("weight", f"{of}, {name}", recipe, schedule, **options)
        for name in names("part_law"):
            parts = Parts([-2, -1], 4, law=part("part_law", name))
            add("part_law", f"{of}, {name}", recipe, schedule, parts=parts, fields=("x_t", "t", "alpha", "part_mask"))
        for name, noise in itertools.product(set(names("pair")) - {"none"}, ("same", "chain")):
            pair = replace(part("pair", name), noise=noise)
            fields = ("x_t", "t", *(PAIR_FIELDS if pair.times.third else TWO))
            add("pair", f"{of}, {name}, {noise}", recipe, schedule, fields=fields, pair=pair)
    return made


def equal(a: Any, b: Any) -> bool:
    """Whether two batches are the same bits."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
