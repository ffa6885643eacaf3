"""torch's defaults: neither its default dtype nor its default device changes a bit of a batch.

"meta" stands for any device that is not the CPU: a tensor made there where one of the CPU is wanted has no numbers.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from shared import SCHEDULES, Stream, group, names
from torch.utils.data import DataLoader, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.on_device.labels import LabelDropout
from diffaug.randomness.keys import Keys
from diffaug.schedules import Rectified
from diffaug.targets import IMAGE_FIELDS, NUMBER_FIELDS, mixes
from diffaug.times import Importance, Stratified, Uniform


def forget() -> None:
    """Empty every cache of tables."""
    for name in [name for name in sys.modules if name.startswith("diffaug.") and name != "diffaug.process.compiler"]:
        for value in vars(sys.modules[name]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


@contextmanager
def default(name: str) -> Iterator[None]:
    """A default dtype, a default device, or both, with nothing left in a cache from before."""
    forget()
    before = torch.get_default_dtype()
    torch.set_default_device("meta" if "meta" in name else None)
    torch.set_default_dtype(before if name == "meta" else getattr(torch, name.split()[0]))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
        forget()


def assert_same(name: str, made: Callable[[], dict[str, Any]]) -> None:
    wanted = made()
    with default(name):
        got = made()
    assert list(got) == list(wanted)
    for key, value in wanted.items():
        same = torch.equal(got[key].cpu(), value) if isinstance(value, torch.Tensor) else got[key] == value
        assert same, key
        assert getattr(got[key], "dtype", None) == getattr(value, "dtype", None), key


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["bfloat16", "meta"])
def harder(request: pytest.FixtureRequest) -> str:
    """Defaults under which more goes wrong than under float64."""
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("file", SCHEDULES)
def test_a_schedule_s_numbers(harder, file):
    unit = torch.linspace(0, 1, 11, dtype=torch.float64)
    level = torch.linspace(-9, 9, 11, dtype=torch.float64)

    def made() -> dict[str, Any]:
        schedule = instantiate(group("schedule")[file])
        t = schedule.from_unit(unit)
        t = t if schedule.discrete else t.float()
        out = {"repr": repr(schedule), "t": t, "t_of_log_snr": schedule.t_of_log_snr(level)}
        out |= {"ends": torch.stack(schedule.ends), "mixes": mixes(schedule, tuple(IMAGE_FIELDS), t)}
        out |= {f"number {field}": of(schedule, t) for field, of in NUMBER_FIELDS.items()}
        if schedule.discrete and repr(schedule.scaling) == "variance preserving":
            out |= {"betas": schedule.betas, "alphas": schedule.alphas, "alpha_bars": schedule.alpha_bars}
        if hasattr(schedule, "kept") and schedule.discrete:
            out["kept"] = schedule.kept
        return out

    assert_same(harder, made)


@pytest.mark.slow
@pytest.mark.parametrize("file", names("times"))
@pytest.mark.parametrize("schedule", [LinearBeta(), Rectified()], ids=["discrete", "continuous"])
def test_drawn_times(harder, file, schedule):
    index, edges = torch.arange(64), torch.tensor([-5.0, 0.0, 5.0])
    options = {"stepwise": {"weights": [1.0] * 10}}.get(file, {})

    def made() -> dict[str, Any]:
        times = instantiate(group("times")[file], **options)
        try:
            times.check(schedule)
        except ValueError as error:
            return {"refused": str(error)}
        t = times.draw(Keys.pack(index), schedule, index)
        weight = times.importance_weight(t, schedule)
        return {"t": t, "weight": weight, "histogram": times.histogram(schedule, edges, 1000)}

    assert_same(harder, made)


@pytest.mark.parametrize("file", names("noise"))
def test_a_process_with_each_noise(harder, file):
    x_0, index = torch.rand(8, 3, 8, 8), torch.arange(8)
    fields = ("x_t", "epsilon", "t", "weight", "importance_weight", "t_embed", "c_noise", "unit", "index", "view")

    def made() -> dict[str, Any]:
        process = ForwardProcess(LinearBeta(10), noise=instantiate(group("noise")[file]), fields=fields, compile=False)
        out = process(x_0, index)._asdict() | {"one": process.mix(x_0, index, x_0)}
        out["drawn"] = process(x_0, generator=torch.Generator().manual_seed(1)).x_t
        out["path"] = process.trajectory(x_0, index[1:3], index)
        mean, variance = process.posterior(x_0, x_0, index + 1)
        return out | {"mean": mean, "variance": variance, "kl": process.prior_kl_bits_per_dim(x_0)}

    assert_same(harder, made)


INDEX = torch.arange(16)
IMAGES = TensorDataset(torch.randint(0, 256, (21, 1, 8, 8), dtype=torch.uint8), torch.arange(21))


class Inner(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(IMAGES, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(IMAGES, batch_size=4)


def owned(process: ForwardProcess, **options: Any) -> DiffusionDataModule:
    labels = {"label_dropout": 0.5, "null_label": 30}
    return DiffusionDataModule(IMAGES, IMAGES, process=process, batch_size=4, views=2, **labels, **options)


MODULES = {
    "owned": owned,
    "with workers": lambda process: owned(process, num_workers=1),
    "stream": lambda process: DiffusionDataModule(Stream(IMAGES), Stream(IMAGES), process=process, batch_size=4),
    "wrapped": lambda process: DiffusionDataModule.wrap(Inner(), process),
}


def epochs(kind: str, *, compiled: bool) -> dict[str, Any]:
    """Every field of every batch of two epochs, as a LightningDataModule hands them out."""
    fields = ("x_t", "epsilon", "t", "v", "weight", "log_snr", "t_embed", "index", "view", "label")
    times = Uniform(coverage=Stratified())
    data = MODULES[kind](ForwardProcess(LinearBeta(), times, fields=fields, compile=compiled))
    data.prepare_data()
    data.setup("fit")
    out: dict[str, Any] = {"backend": data.backend}
    for stage, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        for epoch in range(2):
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            for number, batch in enumerate(loader):
                noised = data.noise(batch, stage=stage)._asdict()
                out |= {f"{stage} {epoch} {number} {field}": value for field, value in noised.items()}
    return out


@pytest.mark.parametrize("kind", ["owned", "stream", "wrapped"])
def test_every_batch_of_two_epochs(name, kind):
    assert_same(name, lambda: epochs(kind, compiled=False))


@pytest.mark.slow
def test_every_batch_that_workers_read(harder):
    assert_same(harder, lambda: epochs("with workers", compiled=False))


@pytest.mark.slow
@pytest.mark.compiled
def test_every_batch_of_the_compiled_pass():
    """Under both at once: each by itself takes as long to compile again."""
    assert_same("bfloat16 on meta", lambda: epochs("owned", compiled=True))


def test_what_importance_learns(name):
    index, loss = torch.arange(400), torch.rand(400)
    t = index % 20

    def made() -> dict[str, Any]:
        times, schedule = Importance(), LinearBeta(20)
        times.draw(Keys.pack(index), schedule)
        times.update(t, loss)
        again = Importance()
        again.load_state_dict(times.state_dict())
        assert torch.equal(again.draw(Keys.pack(index), schedule), times.draw(Keys.pack(index), schedule))
        weight = times.importance_weight(t, schedule)
        return {**times.state_dict(), "t": times.draw(Keys.pack(index), schedule), "weight": weight}

    assert_same(name, made)


class Learner(pl.LightningModule):
    def __init__(self, times: Importance) -> None:
        super().__init__()
        self.times, self.weight = times, torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = (self.weight * batch.x_t - batch.epsilon).square().flatten(1).mean(1)
        self.times.update(batch.t, loss)
        return loss.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_importance_learns_under_lightning_s_64_true():
    """Its training step runs with float64 as the default dtype."""
    times = Importance()
    data = DiffusionDataModule(IMAGES, process=ForwardProcess(LinearBeta(20), times), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=1, accelerator="cpu", precision="64-true", **quiet).fit(Learner(times), data)
    assert times.table.losses.dtype == torch.float32
    assert times.table.counts.sum() == 21


@pytest.mark.parametrize("null", [0.1, [0.1, 0.7], 3])
def test_a_null_label(name, null):
    label = torch.rand(16, 2) if isinstance(null, list) else torch.rand(16) if isinstance(null, float) else INDEX
    dropout = LabelDropout(0.5, null, "label", ("label",))
    assert_same(name, lambda: {"label": dropout(label, Keys.pack(INDEX))})
    assert (dropout(label, Keys.pack(INDEX)) == torch.tensor(null)).any()
