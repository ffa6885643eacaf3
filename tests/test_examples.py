"""Every example does what it says."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import server
from shared import ROOT

EXAMPLES = ROOT / "examples"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ran(folder: Path, *command: str) -> str:
    """What an example prints, run from an empty folder."""
    done = server.run([sys.executable, str(EXAMPLES / command[0]), *command[1:]], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_example_is_tested():
    names = {path.name for path in EXAMPLES.iterdir() if not path.name.startswith(("_", "."))}
    assert names == {"plain_python.py", "own_datamodule.py", "with_lightning.py", "lightning_cli.py", "own_hydra_app"}


def test_plain_python_learns():
    pytest.importorskip("sklearn")
    example = loaded("plain_python")
    losses = [example.main(60) for _ in range(2)]
    assert losses[0] == losses[1] < 0.75  # 1 is a network that guesses nothing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_datamodule", "with_lightning"])
def test_a_datamodule_learns(name, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: False)  # to compile takes a minute
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert loaded(name).main(60) < 0.75
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.mark.slow
def test_lightning_cli(tmp_path):
    pytest.importorskip("jsonargparse")
    run = ("--trainer.max_steps=2", "--trainer.logger=false", "--trainer.enable_checkpointing=false")
    arguments = ("fit", "--data.schedule=diffaug.LinearBeta", "--data.schedule.timesteps=100", *run)
    assert "max_steps=2" in ran(tmp_path, "lightning_cli.py", *arguments)
    words = [sys.executable, str(EXAMPLES / "lightning_cli.py"), *arguments, "--print_config"]
    config = server.run(words, tmp_path).stdout
    assert "class_path: diffaug.LinearBeta" in config
    assert "timesteps: 100" in config
    (tmp_path / "run.yaml").write_text(config)
    (tmp_path / "config.yaml").unlink()  # what LightningCLI leaves of a run, and does not write over
    assert "max_steps=2" in ran(tmp_path, "lightning_cli.py", "fit", "--config=run.yaml")


@pytest.mark.slow
def test_own_hydra_app(tmp_path):
    out = ran(tmp_path, "own_hydra_app/app.py", "schedule=linear", "schedule.timesteps=100", "steps=2")
    assert "trained 2 steps with LinearBeta(timesteps=100" in out
    assert "trained 2 steps with Cosine(timesteps=50" in ran(
        tmp_path, "own_hydra_app/app.py", "schedule=mine", "steps=2"
    )
    wrong = server.run([sys.executable, str(EXAMPLES / "own_hydra_app" / "app.py"), "schedule=cosin"], tmp_path)
    assert wrong.returncode != 0
    assert all(name in wrong.stderr for name in ("mine", "cosine", "linear", "rectified"))


@pytest.mark.slow
def test_own_groups_come_first(tmp_path):
    """data=digits is the application's, though the package has one of that name."""
    out = ran(tmp_path, "own_hydra_app/app.py", "--cfg", "job", "--package", "data")
    assert "network.digits" in out
    assert "lightning.diffaug" not in out
