"""Every config composes and makes what it says; what is wrong on a command line is said before any data is read."""

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from diffaug import DiffusionDataModule, ForwardProcess
from diffaug.config import checkpoint_path, config_dir

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CHOICES = [
    f"{path.parent.name}={path.stem}"
    for group in (
        "schedule",
        "times",
        "noise",
        "weight",
        "data",
        "model",
        "trainer",
        "callbacks",
        "logger",
        "experiment",
    )
    for path in sorted((CONFIGS / group).glob("*.yaml"))
    if path.stem != "base"
]


def composed(*overrides: str, folder: str = "outputs/test") -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [f"folder={folder}", *overrides])


@pytest.fixture(autouse=True)
def _root() -> None:
    assert config_dir() == CONFIGS


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice):
    group, name = choice.split("=")
    if group == "data" and name == "image_folder":
        choice += " data.root=photos"
    config = composed(*choice.split())
    OmegaConf.to_container(config, resolve=True)
    assert isinstance(instantiate(config.process), ForwardProcess)
    if group == "data":
        data = instantiate(config.data)
        assert isinstance(data, DiffusionDataModule)
        # One process serves both: what its times learn from the losses is what the next times are drawn by.
        assert instantiate(config.model, process=data.process).process is data.process


def test_documented_commands_compose():
    """Every train.py command of the README and of docs/, as it stands there."""
    pages = [CONFIGS.parent / "README.md", *(CONFIGS.parent / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    commands = re.findall(r"^(?:python|torchrun .*) ?train\.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 18
    for command in commands:
        words = [word for word in command.split() if not word.startswith(("hydra", "-m"))]
        words = [word.split(",")[0] for word in words] if command.startswith("-m") else words
        OmegaConf.to_container(composed(*words), resolve=True)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["schedule=cosin"], HydraException, r"(?s)Could not find 'schedule/cosin'.*Available options.*cosine.*linear"),
        (["schedule.beta_ende=0.1"], ConfigCompositionException, r"Could not override 'schedule\.beta_ende'"),
        (["schedul=cosine"], ConfigCompositionException, r"Could not override 'schedul'"),
        (["+schedule.foo=1"], InstantiationException, r"foo"),
        (
            ["schedule.beta_end=abc"],
            InstantiationException,
            r"schedule\.beta_end must be a number in \(0, 1\), but got 'abc' \(str\)",
        ),
        (
            ["schedule.beta_end=1.5"],
            InstantiationException,
            r"schedule\.beta_end must be a number in \(0, 1\), but got 1\.5",
        ),
        (
            ["schedule.beta_start=0.5"],
            InstantiationException,
            r"beta_start must not be greater than schedule\.beta_end.*0\.5 and 0\.02",
        ),
        (["schedule.timesteps=0"], InstantiationException, r"schedule\.timesteps must be a whole number"),
        (["data.batch_size=-1"], InstantiationException, r"data\.batch_size must be a whole number >= 1, but got -1"),
        (["data.batchsize=1"], ConfigCompositionException, r"Could not override 'data\.batchsize'"),
        (["process.compile=perhaps"], InstantiationException, r"process\.compile must be one of"),
        (["model.target=eps"], InstantiationException, r"target must be one of 'epsilon'"),
        (["process.fields=[x_t,t]"], InstantiationException, r"model needs \['epsilon'\] in process\.fields"),
    ],
)
def test_mistakes_are_said(overrides, error, message):
    def make() -> None:
        config = composed(*overrides)
        data = instantiate(config.data)
        instantiate(config.model, process=data.process)

    with pytest.raises(error, match=message):
        make()


def test_fields_follow_the_model():
    config = composed("model.target=v")
    assert instantiate(config.process).fields == ("x_t", "v", "t")


def test_no_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    run = tmp_path / "outputs" / "2026-01-01" / "00-00-00"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)ckpt_path=last: there is no .*last\.ckpt.*hydra\.run\.dir=outputs/2026-01-01/00-00-00",
    ):
        checkpoint_path("last", str(tmp_path / "new"))
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere\.ckpt"):
        checkpoint_path("nowhere.ckpt", "")
    assert checkpoint_path(None, "") is None
    assert checkpoint_path("last", str(run)) == str(run / "checkpoints" / "last.ckpt")
    other: Any = tmp_path / "empty"
    other.mkdir()
    monkeypatch.chdir(other)
    with pytest.raises(FileNotFoundError, match=r"none under outputs"):
        checkpoint_path("last", "x")
