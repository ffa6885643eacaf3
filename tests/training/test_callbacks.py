"""Loss by noise level: right sums, right over ranks, nothing for empty bins; labels; samples over training."""

import csv
import itertools
import json
import math
import time

import pytest
import pytorch_lightning as pl
import shared
import torch
from pytorch_lightning.loggers import CSVLogger
from tiny import run_code
from torch import nn
from torch.utils.data import Subset, TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.pytorch_lightning import Denoiser, LastCheckpoint, LossByLevel, Pictures, Progress, RunLogger, Summary
from diffaug.targets import MinSNR
from diffaug.training.loss_by_level import sum_bins, summarise_bins

EDGES = (-math.inf, -2.0, 0.0, 2.0, math.inf)


class Net(nn.Module):
    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.embedding = nn.Embedding(labels, 1) if labels else None
        self.seen = None

    def forward(self, x, time, class_labels=None):
        self.seen = class_labels
        return self.scale * x + (0 if self.embedding is None else self.embedding(class_labels).view(-1, 1, 1, 1))


def module(count=24, labels=False, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    dataset = TensorDataset(images, torch.arange(count) % 3)
    fields = ("x_t", "epsilon", "t", "label") if labels else ("x_t", "epsilon", "t")
    process = ForwardProcess(LinearBeta(), fields=fields, compile=False, **options)
    return DiffusionDataModule(train=dataset, val=dataset, process=process, seed=0, batch_size=5)


def trainer(folder, *callbacks, **options):
    length = {"max_epochs": -1, "max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
    logger = CSVLogger(folder, name="", version="")
    return shared.trainer(callbacks=list(callbacks), logger=logger, log_every_n_steps=1, **length, **options)


def test_bins_by_hand():
    levels = torch.tensor([-math.inf, -5.0, -2.0, -0.5, 0.0, 7.0, math.inf])
    errors = torch.tensor([1.0, 3.0, 10.0, 20.0, 5.0, 2.0, 4.0])
    sums = sum_bins(levels, errors, 2 * errors, EDGES)
    found = summarise_bins(sums, EDGES)
    assert [row[:2] for row in found] == list(itertools.pairwise(EDGES))
    assert [row[2:] for row in found] == [
        (2, 2, 1, 10),
        (2, 15, 5, 500),
        (1, 5, 0, 50),
        (2, 3, 1, 20),
    ]
    # A bin that is empty is not there; what lies beyond finite outer edges is in no bin.
    inside = summarise_bins(sum_bins(levels, errors, None, (-2.0, 0.0, 1.0, 2.0)), (-2.0, 0.0, 1.0, 2.0))
    assert [row[:3] for row in inside] == [(-2.0, 0.0, 2), (0.0, 1.0, 1)]


def test_a_run_reports_what_its_steps_returned(tmp_path):
    data, callback = module(weight=MinSNR()), LossByLevel(str(tmp_path), edges=EDGES)
    model = Denoiser(Net(), data.process)
    kept = []

    class Keep(pl.Callback):
        def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if not trainer.sanity_checking and trainer.global_step == 6:
                kept.append(outputs)

    trainer(tmp_path, callback, Keep()).fit(model, data)
    t, errors, weights = (torch.cat([out[name] for out in kept]) for name in ("t", "errors", "weights"))
    assert len(t) == 24
    levels = data.process.schedule.log_snr(t)
    last = {row[3:5]: row for row in callback.rows if row[:2] == ("val", 6)}
    for low, high in itertools.pairwise(EDGES):
        own = errors[(levels >= low) & (levels < high)].double()
        weighted = (errors * weights)[(levels >= low) & (levels < high)].double()
        if not len(own):
            assert (low, high) not in last
            continue
        *_, count, mean, std, weighted_mean, _ = last[low, high]
        assert count == len(own)
        assert mean == pytest.approx(own.mean().item(), rel=1e-6)
        assert std == pytest.approx(own.std(correction=0).item(), rel=1e-4, abs=1e-5)
        assert weighted_mean == pytest.approx(weighted.mean().item(), rel=1e-6)
    assert sum(row[5] for row in callback.rows if row[:2] == ("train", 3)) == 15  # three batches of five
    with (tmp_path / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    name = "val_loss_by_log_snr/-2_to_0/mean"
    assert [float(row[name]) for row in logged if row.get(name)][-1] == pytest.approx(last[-2.0, 0.0][6])
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
    assert (tmp_path / "loss_by_level.png").is_file()
    assert len((tmp_path / "loss_by_level.csv").read_text().splitlines()) == len(callback.rows) + 1


def test_over_unit_time_and_across_a_resume():
    callback = LossByLevel(over="unit")
    assert callback.edges[1] == 0.1
    callback.rows = [("val", 3, 0, 0.0, 0.1, 2, 0.5, 0.1, 0.5, "log_snr")]
    other = LossByLevel(over="unit")
    other.load_state_dict(callback.state_dict())
    assert other.rows == callback.rows


def test_a_module_that_returns_no_errors_is_told_once(tmp_path, caplog):
    class Plain(Denoiser):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    data, callback = module(), LossByLevel()
    trainer(tmp_path, callback, num_sanity_val_steps=0).fit(Plain(Net(), data.process), data)
    assert callback.rows == []
    assert sum("must return a dict with t and errors" in record.message for record in caplog.records) == 1


@pytest.mark.slow
def test_labels_reach_the_network_in_training_and_sampling(tmp_path):
    data = module(labels=True)
    network = Net(labels=3)
    model = Denoiser(network, data.process, condition="label")
    pictures = Pictures(str(tmp_path), samples=4, steps=2)
    trainer(tmp_path, pictures).fit(model, data)
    assert network.seen.tolist() == [pictures.labels[k % 5].item() for k in range(4)]
    assert (tmp_path / "samples.png").is_file()
    model.sample((2, 1, 4, 4), steps=2, labels=torch.tensor([2, 0]))
    assert network.seen.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"model\.condition is 'label', so sample\(\) needs labels="):
        model.sample((2, 1, 4, 4), steps=2)
    with pytest.raises(ValueError, match=r"model\.condition is None, so sample\(\) takes no labels"):
        Denoiser(Net(), module().process).sample((2, 1, 4, 4), steps=2, labels=torch.tensor([2, 0]))
    with pytest.raises(ValueError, match=r"The model needs \['label'\] in process\.fields"):
        Denoiser(Net(3), module().process, condition="label")


def test_progress_keeps_a_row_for_each_validation(tmp_path):
    data, progress = module(), Progress(str(tmp_path), samples=2, steps=2)
    trainer(tmp_path, progress).fit(Denoiser(Net(), data.process), data)
    assert [step for step, _ in progress.taken] == [3, 6]
    assert not torch.equal(progress.taken[0][1], progress.taken[1][1])
    assert (tmp_path / "progress.png").is_file()
    other = Progress(str(tmp_path))
    other.load_state_dict(progress.state_dict())
    assert [step for step, _ in other.taken] == [3, 6]


class Named(TensorDataset):
    classes = ("cats", "dogs")


@pytest.mark.parametrize("kind", ["named", "subset", "nameless", "wrapped"])
def test_the_names_of_the_classes_are_in_the_summary(tmp_path, kind):
    images = torch.zeros(8, 1, 4, 4, dtype=torch.uint8)
    dataset = (TensorDataset if kind == "nameless" else Named)(images, torch.arange(8) % 2)
    process = ForwardProcess(LinearBeta(), compile=False)
    if kind == "wrapped":
        inner = pl.LightningDataModule.from_datasets(dataset, dataset, batch_size=4)
        data = DiffusionDataModule.wrap(inner, process=process)
    else:
        data = DiffusionDataModule(
            Subset(dataset, range(6)) if kind == "subset" else dataset, dataset, process=process, batch_size=2
        )
    trainer(tmp_path, Summary(str(tmp_path)), limit_train_batches=3).fit(Denoiser(Net(), process), data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.get("classes") == (["cats", "dogs"] if kind in ("named", "subset") else None)


@pytest.mark.parametrize("left_out", ["val=None", "limit_val_batches=0", "nothing"])
def test_a_run_without_validation_leaves_its_summary_too(tmp_path, left_out):
    data = module()
    if left_out == "val=None":
        data = DiffusionDataModule(data.sources["train"][0], process=data.process, seed=0, batch_size=5)
    options = {"limit_val_batches": 0} if left_out == "limit_val_batches=0" else {}
    trainer(tmp_path, Summary(str(tmp_path)), **options).fit(Denoiser(Net(), data.process), data)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert (summary["val_loss"] is None) == (left_out != "nothing")
    assert summary["prior_kl_bits_per_dim"] > 0


def test_the_seconds_of_a_run_are_those_of_all_its_processes(tmp_path, monkeypatch):
    """And a finished run that is given again, which trains no step, keeps them."""
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    told = []
    for _ in range(2):
        data, path = module(), tmp_path / "last.ckpt"
        of_a_run = trainer(tmp_path, Summary(str(tmp_path)))
        of_a_run.fit(Denoiser(Net(), data.process), data, ckpt_path=str(path) if path.exists() else None)
        of_a_run.save_checkpoint(path)
        told.append(of_a_run.callbacks[0].seconds)
        of_a_run.validate(datamodule=data, model=Denoiser(Net(), data.process), verbose=False)
        assert json.loads((tmp_path / "summary.json").read_text())["seconds"] == told[-1]
    assert told[0] == told[1] >= 100


def test_what_an_encoder_makes_is_no_image(tmp_path):
    """Three channels of latents are not drawn as colours, and x_T's distance is not that of the images."""
    images = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    process = ForwardProcess(LinearBeta(), compile=False)
    data = DiffusionDataModule(
        TensorDataset(images), TensorDataset(images), process=process, encoder=torch.nn.Conv2d(3, 3, 1), batch_size=5
    )
    trainer(tmp_path, Summary(str(tmp_path)), Pictures(str(tmp_path), steps=2)).fit(Denoiser(Net(), process), data)
    assert json.loads((tmp_path / "summary.json").read_text())["prior_kl_bits_per_dim"] is None
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["schedule.png"]


@pytest.mark.parametrize(
    ("callback", "options", "wanted"),
    [
        (Pictures, {"rows": 0}, "a whole number >= 1"),
        (Pictures, {"samples": -1}, "a whole number >= 0"),
        (Pictures, {"steps": 0}, "a whole number >= 1"),
        (Progress, {"samples": 0}, "a whole number >= 1"),
        (Progress, {"steps": 0}, "a whole number >= 1"),
        (Progress, {"every": 0}, "a whole number >= 1"),
        (LossByLevel, {"over": "sigma"}, "one of 'log_snr', 'unit'"),
        (LossByLevel, {"edges": [1, 0]}, "numbers that rise, at least two"),
        (LastCheckpoint, {"minutes": 0}, "a number > 0"),
        (LastCheckpoint, {"every": 0}, "a whole number >= 1"),
    ],
)
def test_what_would_fail_in_training_or_after_it_is_refused_before(callback, options, wanted):
    room = {LossByLevel: "loss_by_level", LastCheckpoint: "last"}.get(callback, callback.__name__.lower())
    (name,) = options
    with pytest.raises(ValueError, match=rf"^callbacks\.{room}\.{name} must be {wanted}, but got "):
        callback("folder", **options)


RANKS = """
import shared, test_callbacks as own
data, callback = own.module(), own.LossByLevel(edges=own.EDGES)
trainer = shared.trainer(devices={ranks}, strategy={strategy!r}, callbacks=[callback])
trainer.validate(own.Denoiser(own.Net(), data.process), data, verbose=False)
if trainer.is_global_zero:
    print("ROWS", [row[3:9] for row in callback.rows])
"""


@pytest.mark.slow
def test_two_ranks_report_what_one_does(tmp_path):
    """24 images in batches of 5: two ranks see 12 each, with a short last batch; sums are added before dividing."""

    def rows(ranks, strategy):
        done = run_code(tmp_path, RANKS.format(ranks=ranks, strategy=strategy))
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("ROWS"))
        return eval(line.removeprefix("ROWS "), {"inf": math.inf})

    one, two = rows(1, "auto"), rows(2, "ddp")
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_metrics_hold_each_step_once_after_a_run_that_was_killed(tmp_path):
    """The steps after the checkpoint are taken again: their rows of before go, those up to it stay."""
    for first, last in ((1, 7), (4, 9)):
        logger = RunLogger(str(tmp_path))
        logger.log_hyperparams({"a": 1})
        for step in range(first, last):
            logger.log_metrics({"loss": 10 * first + step}, step)
        logger.save()
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["loss", "step"]
    assert [row[1] for row in rows[1:]] == [str(step) for step in range(1, 9)]
    assert [float(row[0]) for row in rows[1:]] == [11, 12, 13, 44, 45, 46, 47, 48]
