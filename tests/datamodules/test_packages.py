"""Both packages of Lightning, side by side in one process: alike under each, and never mixed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import server
import torch
from hydra.utils import instantiate
from shared import assert_alike, composed, pictures
from tiny import OVERRIDES, ROOT, environment
from torch.utils.data import DataLoader

import diffaug.lightning
import diffaug.pytorch_lightning
from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.datamodules.lightning_packages import package_of

if os.environ.get("LIGHTNING") == "lightning":  # then the one goes by the other's name: see which_lightning
    pytest.skip("is about both packages, whichever the other tests are run under", allow_module_level=True)

PACKAGES = {"pytorch_lightning": (pl, diffaug.pytorch_lightning), "lightning": (L.pytorch, diffaug.lightning)}
OTHER = {"pytorch_lightning": "lightning", "lightning": "pytorch_lightning"}


def process() -> ForwardProcess:
    return ForwardProcess(LinearBeta(100), compile=False)


def model_of(package: str) -> Any:
    """A LightningModule of a package that keeps its batches and its losses."""

    class Listener(PACKAGES[package][0].LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.seen: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = (self.weight * batch.x_t - batch.epsilon).square().mean()
            self.seen.append((*batch, loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return Listener()


def data_of(package: str, **options: Any) -> Any:
    return PACKAGES[package][1].DiffusionDataModule(
        pictures(20), process=process(), **{"batch_size": 4, "seed": 3, **options}
    )


def inner_of(package: str) -> Any:
    class Pictures(PACKAGES[package][0].LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(pictures(20), batch_size=4, shuffle=True)

    return Pictures()


def trainer_of(package: str, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 2}
    return PACKAGES[package][0].Trainer(accelerator="cpu", **{"enable_checkpointing": False, **quiet, **options})


@pytest.mark.parametrize("wrapped", [False, True])
def test_triples_and_losses_are_equal(wrapped):
    seen = {}
    for package in PACKAGES:
        model = model_of(package)
        data = DiffusionDataModule.wrap(inner_of(package), process(), seed=3) if wrapped else data_of(package)
        trainer_of(package).fit(model, data)
        seen[package] = model.seen
    assert_alike(*seen.values())


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_cross_over(package, wrapped, tmp_path):
    """Saved under one inside an epoch, gone on from under the other: the rest is that of a run that was whole."""

    def data(of: str) -> Any:
        return DiffusionDataModule.wrap(inner_of(of), process(), seed=3) if wrapped else data_of(of)

    whole, first, rest = model_of(package), model_of(package), model_of(OTHER[package])
    trainer_of(package).fit(whole, data(package))
    stopped = trainer_of(package, max_steps=3)
    stopped.fit(first, data(package))
    stopped.save_checkpoint(tmp_path / "three.ckpt")
    trainer_of(OTHER[package]).fit(rest, data(OTHER[package]), ckpt_path=tmp_path / "three.ckpt", weights_only=False)
    assert_alike([*first.seen, *rest.seen], whole.seen)


def test_both_have_the_same_names():
    own = [
        {name for name, thing in vars(ours).items() if getattr(thing, "__module__", None) == ours.__name__}
        for _, ours in PACKAGES.values()
    ]
    assert own[0] == own[1] >= {"DiffusionDataModule", "WrappedDataModule", "Denoiser", "LossByLevel"}


@pytest.mark.parametrize("package", PACKAGES)
def test_wrap_answers_in_kind(package):
    for asked in (DiffusionDataModule, diffaug.lightning.DiffusionDataModule):
        wrapped = asked.wrap(inner_of(package), process())
        assert type(wrapped) is PACKAGES[package][1].WrappedDataModule


MIXED = {
    "pytorch_lightning": (
        "(a class of pytorch_lightning) does not work with {} (a class of lightning.pytorch). pytorch_lightning and "
        "lightning.pytorch do not mix: import {} from diffaug.lightning, or everything else from pytorch_lightning."
    ),
    "lightning": (
        "(a class of lightning.pytorch) does not work with {} (a class of pytorch_lightning). pytorch_lightning and "
        "lightning.pytorch do not mix: import {} from diffaug.pytorch_lightning, or everything else from "
        "lightning.pytorch."
    ),
}


@pytest.mark.parametrize("package", PACKAGES)
class TestMixes:
    def test_a_trainer_of_the_other(self, package):
        text = MIXED[package].format("Trainer", "DiffusionDataModule")
        data = data_of(package)
        with pytest.raises(TypeError, match=re.escape(f"DiffusionDataModule {text}")):
            trainer_of(OTHER[package]).fit(model_of(OTHER[package]), datamodule=data)
        assert data._datasets == {}  # refused before any data is read

    def test_given_as_if_it_were_a_loader(self, package):
        """A Trainer of the other package does not know it for a DataModule."""
        remedy = MIXED[package].partition(". ")[2].format("DiffusionDataModule")
        other = PACKAGES[OTHER[package]][0].__name__
        text = f"is no loader to go through: it was given to a Trainer of {other}, which does not know it. {remedy}"
        with pytest.raises(ValueError, match=re.escape(text)):
            trainer_of(OTHER[package]).fit(model_of(OTHER[package]), data_of(package))

    def test_a_wrapped_one(self, package):
        """What must change is what the DataModule that is wrapped is derived from."""
        other = PACKAGES[OTHER[package]][0].__name__
        data = DiffusionDataModule.wrap(inner_of(package), process())
        text = f"import LightningDataModule from {other}, from which Pictures is derived, or everything else from"
        with pytest.raises(TypeError, match=re.escape(text)):
            trainer_of(OTHER[package]).fit(model_of(OTHER[package]), datamodule=data)
        with pytest.raises(TypeError, match=r"WrappedDataModule \(.*does not work with Pictures \("):
            PACKAGES[package][1].WrappedDataModule(inner_of(OTHER[package]), process())

    def test_one_derived_from_ours(self, package):
        class Mine(PACKAGES[package][1].DiffusionDataModule):
            pass

        data = Mine(pictures(20), process=process())
        text = f"import DiffusionDataModule from {PACKAGES[OTHER[package]][1].__name__}, from which Mine is derived, or"
        with pytest.raises(TypeError, match=re.escape(text)):
            trainer_of(OTHER[package]).fit(model_of(OTHER[package]), datamodule=data)

    def test_callbacks_and_loggers(self, package, tmp_path):
        """Before any data is read where the DataModule is one of ours; ours, with any DataModule."""
        lightning, ours, other = *PACKAGES[package], OTHER[package]
        for callback in (ours.LossByLevel(), ours.LastCheckpoint(tmp_path), lightning.callbacks.Timer("00:00:01:00")):
            name = type(callback).__name__
            text = f"{name} {MIXED[package].format('Trainer', name)}"
            if isinstance(callback, lightning.callbacks.Timer):
                text = text.partition(" from ")[0] + f" from {PACKAGES[other][0].__name__}, or"
            data = data_of(other)
            with pytest.raises(TypeError, match=re.escape(text)):
                trainer_of(other, callbacks=[callback]).fit(model_of(other), data)
            assert data._datasets == {}
        logger = ours.RunLogger(tmp_path)
        with pytest.raises(TypeError, match=re.escape(f"RunLogger {MIXED[package].format('Trainer', 'RunLogger')}")):
            trainer_of(other, logger=logger).fit(model_of(other), data_of(other))
        loader = DataLoader(pictures(4))
        with pytest.raises(TypeError, match=r"LossByLevel .* does not work with Trainer"):
            trainer_of(other, callbacks=[ours.LossByLevel()]).fit(model_of(other), loader)

    def test_a_model(self, package):
        """Lightning itself refuses it."""
        other = OTHER[package]
        denoiser = PACKAGES[package][1].Denoiser(torch.nn.Identity(), process())
        with pytest.raises(TypeError, match=r"must be a `LightningModule`.*got `Denoiser`"):
            trainer_of(other).fit(denoiser, data_of(other))


def test_a_callback_of_anothers_whose_inner_is_none_of_ours():
    class Mine(pl.Callback):
        def __init__(self) -> None:
            self.inner = 3

    with pytest.raises(
        TypeError, match=r"^Mine \(.* import Callback from lightning\.pytorch, from which Mine is derived"
    ):
        trainer_of("lightning", callbacks=[Mine()]).fit(model_of("lightning"), data_of("lightning"))


def test_a_state_that_is_read_without_a_trainer_warns_of_nothing(caplog):
    """As DataModule.load_from_checkpoint does: no backend is settled, so none is another one."""
    trained = data_of("pytorch_lightning")
    trainer_of("pytorch_lightning").fit(model_of("pytorch_lightning"), trained)
    caplog.clear()
    data_of("pytorch_lightning").load_state_dict(trained.state_dict())
    assert caplog.records == []


def test_what_is_of_neither_is_refused():
    with pytest.raises(ValueError, match=r"data\.inner must be a LightningDataModule, of pytorch_lightning or of"):
        DiffusionDataModule.wrap(object(), process())


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_one_key_turns_every_class(package, tmp_path):
    words = (f"lightning={package}", "trainer=cpu", "callbacks=loss_by_level", f"folder={tmp_path}")
    config = composed(*words, config="train")
    data = instantiate(config.data)
    made = [data, instantiate(config.model, process=data.process), trainer := instantiate(config.trainer)]
    made += [*trainer.callbacks, *trainer.loggers]
    assert {package_of(thing) for thing in made} == {PACKAGES[package][0].__name__}
    other = PACKAGES[OTHER[package]][0].__name__
    assert f"_target_: {other}." not in str(config)


def run_train(folder: Path, *words: str, fresh: bool = False, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, *words, "hydra.run.dir=run"]
    return server.run(command, folder, {**environment(folder), **variables}, fresh=fresh)


@pytest.mark.slow
def test_two_processes_under_each(tmp_path):
    """train.py on two ranks, as a user starts them: equal rows of metrics."""
    rows = {}
    for package in PACKAGES:
        folder = tmp_path / package
        folder.mkdir()
        done = run_train(folder, f"lightning={package}", "trainer=ddp", "trainer.accelerator=cpu", fresh=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (done.stdout + done.stderr).count("the forward process runs on") == 1, "rank 0 alone says it"
        rows[package] = Path(folder, "run", "metrics.csv").read_text()
        assert json.loads(Path(folder, "run", "summary.json").read_text())["steps"] == 2
        assert not (folder / "outputs").exists()
    assert rows["lightning"] == rows["pytorch_lightning"]


@pytest.mark.slow
def test_without_the_lightning_package(tmp_path):
    """A sentence that says what to install, wherever it is missed first."""
    (tmp_path / "lightning.py").write_text("raise ModuleNotFoundError('no lightning here')\n")
    done = run_train(tmp_path, "lightning=lightning", "trainer=cpu", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode != 0
    assert 'diffaug.lightning needs the lightning package: pip install "diffaug[lightning]"' in done.stderr
    assert "Traceback" not in done.stderr
