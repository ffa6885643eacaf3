"""The bits of a dozen recipes, recorded: a change of structure must not change what anybody trains on.

``PYTHONPATH=tests python tests/process/test_bits.py`` records them anew: right only where draws are meant to change.
Times must agree exactly; images to 1e-6, as the sines and logarithms of two machines may differ in the last bit.
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, noise, schedules, targets, times
from diffaug.targets import Pair

FILE = Path(__file__).with_suffix(".json")
IMAGES = (torch.arange(8 * 3 * 16 * 16, device="cpu") * 37 % 251).to(torch.uint8).view(8, 3, 16, 16)
FLOATS = IMAGES.double().div(125).sub(1).float()
INDEX = torch.tensor([5, 0, 3, 2**33 + 7, 1, 4, 2, 9], device="cpu")
KEY = {"seed": 2**40 + 11, "epoch": 3, "view": 2, "dataset": 1}


def called(schedule: Any, *parts: Any, images: torch.Tensor = IMAGES, stage: str = "train", **options: Any) -> Any:
    position = torch.arange(8, device="cpu") + 24
    process = ForwardProcess(schedule, *parts, **options)
    return process(images, INDEX, stage=stage, position=position, **KEY)


def owned(**options: Any) -> Any:
    data = DiffusionDataModule(
        train=TensorDataset(IMAGES, torch.arange(8, device="cpu")),
        process=ForwardProcess(schedules.Cosine(), fields=("x_t", "epsilon", "t", "label"), compile=False),
        seed=7,
        batch_size=3,
        **options,
    )
    data.setup("fit")
    return [data.noise(batch) for batch in data.train_dataloader()]


class Inner(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(FLOATS, torch.arange(8, device="cpu")), batch_size=3, shuffle=True)


class Flow(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(FLOATS)


def wrapped() -> Any:
    process = ForwardProcess(schedules.LinearBeta(), fields=("x_t", "epsilon", "t", "label"), compile=False)
    data = DiffusionDataModule.wrap(Inner(), process, seed=7, views=2)
    data.setup("fit")
    return [data.noise(batch) for batch in data.train_dataloader()]


def stream() -> Any:
    process = ForwardProcess(schedules.Rectified(), times.LogitNormal(), compile=False)
    data = DiffusionDataModule(train=Flow(), process=process, seed=7, batch_size=3)
    data.setup("fit")
    return [data.noise(batch) for batch in data.train_dataloader()]


RECIPES: dict[str, Callable[[], Any]] = {
    "ddpm, eager": lambda: called(schedules.LinearBeta(), compile=False),
    "ddpm, compiled": lambda: called(schedules.LinearBeta(), compile=True),
    "every target": lambda: called(
        schedules.Cosine(),
        fields=("x_t", "epsilon", "x_0", "v", "velocity", "F", "x_in", "alpha", "sigma", "log_snr", "t"),
        images=FLOATS,
        compile=False,
    ),
    "rectified, logit-normal, compiled": lambda: called(schedules.Rectified(), times.LogitNormal(), compile=True),
    "rectified, validation": lambda: called(schedules.Rectified(), times.LogitNormal(), stage="val", compile=False),
    "edm, weighted": lambda: called(
        schedules.EDM(),
        times.LogNormal(),
        weight=targets.EDMWeight(),
        target="F",
        fields=("x_in", "F", "t", "weight"),
        images=FLOATS,
        compile=False,
    ),
    "sobol": lambda: called(schedules.LinearBeta(), times.Uniform(coverage=times.Sobol()), compile=False),
    "antithetic, odd size": lambda: called(
        schedules.Trigonometric(), times.Uniform(coverage=times.Antithetic()), images=IMAGES[..., :15], compile=True
    ),
    "pyramid": lambda: called(schedules.LinearBeta(), times.Uniform(), noise.Pyramid()),
    "offset": lambda: called(schedules.ScaledLinearBeta(), times.Uniform(), noise.Offset()),
    "pair": lambda: called(
        schedules.LinearBeta(),
        pair=Pair(noise="chain"),
        fields=("x_t", "epsilon", "t", "x_s", "s"),
        images=FLOATS,
        compile=False,
    ),
    "owned, views, label dropout": lambda: owned(
        views=2, label_dropout=0.5, null_label=10, transform=lambda x: x if torch.rand(()) < 0.5 else x.flip(-1)
    ),
    "wrapped": wrapped,
    "stream": stream,
}


def tensors(made: Any) -> dict[str, torch.Tensor]:
    """The tensors of a batch, or of several one after another, by field."""
    batches: Iterable[Any] = made if isinstance(made, list) else [made]
    by_field = [batch._asdict() for batch in batches]
    return {name: torch.cat([fields[name] for fields in by_field]) for name in by_field[0]}


def summary(recipe: str) -> dict[str, list[float]]:
    """All numbers of a sample each; of images, whose numbers are many, seven spread over each sample, and its mean."""
    out = {}
    for name, value in tensors(RECIPES[recipe]()).items():
        flat = value.double().flatten(1) if value.ndim > 1 else value.double()[:, None]
        some = flat[:, torch.linspace(0, flat.shape[1] - 1, min(7, flat.shape[1]), device="cpu").long()]
        out[name] = torch.cat([some, flat.mean(1, keepdim=True)], 1).flatten().tolist()
    return out


SLOW = ("ddpm, compiled", "rectified, logit-normal, compiled", "antithetic, odd size")  # a compiled form each


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
)
def test_the_bits_are_those_recorded(recipe):
    recorded, now = json.loads(FILE.read_text())[recipe], summary(recipe)
    assert list(now) == list(recorded)
    for name, values in now.items():
        slack = 0 if name in ("t", "s", "label") else 1e-6
        np.testing.assert_allclose(values, recorded[name], rtol=slack, atol=2 * slack, err_msg=name)


if __name__ == "__main__":
    import hashlib

    record = {recipe: summary(recipe) for recipe in RECIPES}
    if "--hash" in sys.argv:
        for recipe in RECIPES:
            whole = b"".join(value.contiguous().numpy().tobytes() for value in tensors(RECIPES[recipe]()).values())
            print(hashlib.sha256(whole).hexdigest()[:16], recipe)
    else:
        FILE.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n")
