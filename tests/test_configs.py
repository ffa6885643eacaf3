"""Every config composes and makes what it says; what is wrong on a command line is said before any data is read."""

import ast
import functools
import inspect
import os
import random
import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import shared
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from shared import CONFIGS, names

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta
from diffaug.config import check_keys, check_words, checkpoint_path, config_dir, report, seed_all
from diffaug.datamodules.base import NoisingBase
from diffaug.help import comments_of, write_comments
from diffaug.loader.training import LOADER_OPTIONS
from diffaug.store.layout import Field, Split, write_info


def choices(group: str) -> list[str]:
    return [f"{group}={name}" for name in names(group.partition("@")[0])]


PARTS = [(group, name) for group in ("schedule", "noise", "times", "weight") for name in names(group)]
# What is chosen of one group says nothing of another's, so several groups are gone through at once.
SEVERAL = (
    zip_longest(
        sorted(choices("experiment"), key=lambda choice: choice == "experiment=diffusion_forcing"),  # it has its data
        *(choices(group) for group in ("data", "model", "trainer", "callbacks", "logger")),
    ),
    zip_longest(["parts=frames", "parts=tokens"], choices("part_law@process.parts.law"), fillvalue="parts=patches"),
    [("pair=imm schedule=rectified process.fields=[x_t,epsilon,t,x_r]",)],  # the others: see test_pair_laws
)
CHOICES = [" ".join(filter(None, some)) for several in SEVERAL for some in several]


def composed(*overrides: str, folder: str = "outputs/test") -> DictConfig:
    return shared.composed(f"folder={folder}", *overrides, config="train")


@pytest.fixture(autouse=True)
def _root() -> None:
    assert config_dir() == CONFIGS


@functools.cache
def parts() -> DictConfig:
    """Every choice of these groups beside the default ones, in one composition: each takes a third of a second."""
    config = composed(*(f"+{group}@all.{group}.{name}={name}" for group, name in PARTS))
    OmegaConf.resolve(config)
    return config["all"]


@pytest.mark.parametrize(("group", "name"), PARTS)
def test_every_part_composes(group, name):
    part = instantiate(parts()[group][name])
    assert isinstance(ForwardProcess(**{"schedule": LinearBeta(), group: part}), ForwardProcess)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice, tmp_path):
    if "data=store" in choice:
        split = Split("train", 1, 1, {"image": Field("uint8", (3, 32, 32))})
        info = {"format": 1, "finished": True, "made_from": {}, "latents": None, "splits": {"train": [split]}}
        write_info(tmp_path, info)
        choice += f" data.root={tmp_path}"
    if "data=image_folder" in choice:
        choice += " data.root=photos"
    if "data=own" in choice:
        choice += " data.train={_target_:torchvision.datasets.FakeData,_partial_:true} data.image_shape=[3,32,32]"
    if "data=mixture" in choice:
        sets = ",".join(f"{name}:{{_target_:torchvision.datasets.FakeData,_partial_:true}}" for name in "ab")
        choice += f" data.train.sets={{{sets}}} data.train.weights={{a:3,b:1}} data.image_shape=[3,32,32]"
    config = composed(*choice.split())
    OmegaConf.to_container(config, resolve=True)
    assert isinstance(instantiate(config.process), ForwardProcess)
    if "data=" in choice:
        data = instantiate(config.data)
        assert isinstance(data, DiffusionDataModule)
        # One process serves both: what its times learn from the losses is what the next times are drawn by.
        assert instantiate(config.model, process=data.process).process is data.process


@pytest.mark.slow
def test_documented_commands_compose():
    """Every train.py command of the README and of docs/, as it stands there."""
    pages = [CONFIGS.parent / "README.md", *(CONFIGS.parent / "docs").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    commands = re.findall(r"^(?:python|torchrun .*) ?train\.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 18
    for command in set(commands):
        words = [word for word in command.split() if not word.startswith(("hydra", "-m"))]
        words = [word.split(",")[0] for word in words] if command.startswith("-m") else words
        words += ["data.image_shape=[3,64,64]"] if "data=store" in words else []  # else as the store, not here, says
        OmegaConf.to_container(composed(*words), resolve=True)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["schedule=cosin"], HydraException, r"(?s)Could not find 'schedule/cosin'.*Available options.*cosine.*linear"),
        (["schedule.beta_ende=0.1"], ConfigCompositionException, r"Could not override 'schedule\.beta_ende'"),
        (["schedul=cosine"], ConfigCompositionException, r"Could not override 'schedul'"),
        (["+schedule.foo=1"], InstantiationException, r"foo"),
        (  # other values: test_values
            ["schedule.beta_end=abc"],
            InstantiationException,
            r"schedule\.beta_end must be a number in \(0, 1\), but got 'abc' \(str\)",
        ),
        (["data.batch_size=-1"], InstantiationException, r"data\.batch_size must be a whole number >= 1, but got -1"),
        (["data.batchsize=1"], ConfigCompositionException, r"Could not override 'data\.batchsize'"),
        (["process.compile=perhaps"], InstantiationException, r"process\.compile must be one of"),
        (["model.target=eps"], InstantiationException, r"target must be one of 'epsilon'"),
        (["process.fields=[x_t,t]"], InstantiationException, r"model needs \['epsilon'\] in process\.fields"),
        (["parts=patches"], InstantiationException, r"process\.parts gives each part .* UNet2DModel takes one time"),
        (
            ["experiment=diffusion_forcing", "part_law@process.parts.law=context"],
            InstantiationException,
            r"model needs part_mask in process\.fields, which is \['x_t', 'v', 't'\]",
        ),
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


def keys(node: Any, *above: str) -> Iterator[str]:
    """The keys of a YAML file, as they are set on a command line."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield ".".join((*above, key))
            yield from keys(value, *above, key)


def loaded(name: str) -> Any:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


# What a Trainer of another release may have more or fewer of, from 2.6 on.
OF_OTHER_RELEASES = {"model_registry", "enable_autolog_hparams"}
OWN_VALUES = {
    *("default_root_dir", "devices", "precision", "max_steps", "max_epochs", "val_check_interval"),
    *("check_val_every_n_epoch", "log_every_n_steps", "gradient_clip_val", "callbacks", "logger", "plugins"),
    "enable_model_summary",
}


def test_every_trainer_argument_is_there_with_its_default():
    config = {key: value for key, value in loaded("trainer/auto").items() if not key.startswith("_")}
    arguments = inspect.signature(pl.Trainer).parameters
    assert set(config) ^ set(arguments) <= OF_OTHER_RELEASES
    for name in set(config) & set(arguments) - OWN_VALUES:
        assert config[name] == arguments[name].default, name


def test_every_option_of_the_datamodule_is_there_with_its_default():
    config = loaded("data/base/module")
    of_both = inspect.signature(NoisingBase).parameters
    options = {**of_both, **inspect.signature(DiffusionDataModule).parameters}
    datasets = {"train", "val", "test", "predict"}
    assert config.pop("defaults") == ["_self_", {"/encoder@encoder": None}]
    assert set(config) == set(options) - {*datasets, "options"} | set(LOADER_OPTIONS)
    assert datasets <= set(loaded("data/own"))
    for name in set(config) & set(options) - {"process", "seed", "batch_size"}:
        assert config[name] == options[name].default, name


def test_no_error_names_a_key_that_is_not_there():
    """Else it could be set only with a plus sign. Parts' keys come with them; inner is of wrap."""
    known = set(keys(loaded("train"))) | set(keys(loaded("data/base/module"), "data"))
    for path in CONFIGS.glob("*/*.yaml"):
        config, group = loaded(f"{path.parent.name}/{path.stem}") or {}, path.parent.name
        known |= set(keys(config, group))
        for part in config.get("defaults", ()):  # such as /coverage@coverage: independent
            known |= {f"{group}.{key.partition('@')[2]}" for key in part if "@" in key and isinstance(part, dict)}
    known |= {f"schedule.base.{name.removeprefix('schedule.')}" for name in known if name.startswith("schedule.")}
    known |= {f"data.{name}" for name in known if name.startswith("encoder.")}
    groups = "schedule|times|noise|weight|pair|data|process|model|trainer|callbacks|logger"
    named = set()
    for path in sorted((CONFIGS.parent / "diffaug").rglob("*.py")):
        tree = ast.parse(path.read_text())
        comments = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments:
                named |= set(re.findall(rf"\b(?:{groups})(?:\.[a-z_]+[a-z])+(?![\w.]*/)", node.value))
    named -= {"data.noise", "data.setup", "data.train_dataloader", "process.mix"}  # what to call
    named -= {"schedule.at_shape", "data.inner", "schedule.png"}
    named -= {name for name in named if name.startswith("process.parts")}
    named -= {"data.folder", "data.mixture", "data.bucketed"}
    assert named - known == set()
    assert len(named) > 60


def test_no_choice_is_only_a_base():
    for group in ("data", "trainer"):
        assert not (CONFIGS / group / "base.yaml").exists()
    with pytest.raises(HydraException, match=r"Available options in 'data':\s+cifar10\s+digits\s+fashion_mnist\s+im"):
        composed("data=base")


def test_without_callbacks_and_loggers(tmp_path):
    config = composed("callbacks=none", "logger=none", "trainer=cpu", folder=str(tmp_path))
    trainer = instantiate(config.trainer)
    assert trainer.loggers == []
    assert not [callback for callback in trainer.callbacks if type(callback).__module__.startswith("diffaug")]
    assert report(str(tmp_path)) == f"\neverything is in {tmp_path}"


@pytest.mark.parametrize(
    ("name", "module", "files"),
    [
        ("csv", "csv", "metrics.csv"),
        ("tensorboard", "tensorboard", "tensorboard/events.out.*"),
        pytest.param("wandb", "wandb", "wandb/offline-run-*", marks=pytest.mark.slow),
    ],
)
def test_loggers(name, module, files, tmp_path, monkeypatch):
    """Beside metrics.csv, all in the run's folder, without a network."""
    pytest.importorskip(module, reason=f"{name} is not installed: pip install diffaug[loggers]")
    monkeypatch.setenv("WANDB_SILENT", "true")
    offline = ["logger.wandb.offline=true"] if name == "wandb" else []
    config = composed(f"logger={name}", *offline, folder=str(tmp_path))
    OmegaConf.resolve(config.logger)
    for logger in instantiate(config.logger).values():
        logger.log_metrics({"loss": 0.5}, step=1)
        logger.finalize("success")
        logger.save()
    assert "0.5" in (tmp_path / "metrics.csv").read_text()
    assert list(tmp_path.glob(files))


def test_the_default_trainer_takes_the_gpu_where_there_is_one():
    config = composed()
    assert (config.trainer.accelerator, config.trainer.devices) == ("auto", 1)
    assert composed("trainer=cpu").trainer.accelerator == "cpu"
    one = composed("trainer=gpu").trainer
    assert (one.accelerator, one.devices, one.precision) == ("gpu", 1, "bf16-mixed")


def test_seeds_of_64_bits(monkeypatch):
    """All of it goes to the draws; Lightning's, of which the network's weights come, has 32 bits."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
    seed_all(2**64 - 1)
    assert os.environ["PL_GLOBAL_SEED"] == str(2**32 - 1)
    assert torch.initial_seed() == 2**32 - 1
    seed_all(7)
    assert torch.initial_seed() == 7
    assert instantiate(composed(f"seed={2**64 - 1}").data).seed == 2**64 - 1
    for wrong in (2**64, -1, "abc"):
        with pytest.raises(ValueError, match=r"^seed must be a whole number in \[0, 18446744073709551615\], but got"):
            seed_all(wrong)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def test_words_are_no_flags_of_the_trainer():
    config = composed("trainer=ddp", "trainer.sync_batchnorm=no", "trainer.deterministic=warn").trainer
    with pytest.raises(ValueError, match=r"^trainer\.sync_batchnorm must be true or false, but got 'no' \(str\)\.$"):
        check_words(config)
    config.sync_batchnorm = True
    check_words(config)


def test_help_has_every_key_with_its_comment():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        page = compose("train", ["folder=x", "trainer=ddp"], return_hydra_config=True).hydra.help.template
    assert re.search(r"^  trainer=ddp: auto, cpu, debug, fsdp, gpu$", page, re.MULTILINE)
    assert re.search(r"^  coverage@times\.coverage=independent: .*sobol", page, re.MULTILINE)
    assert "base" not in page.partition("Keys of these")[0]
    lines = page.splitlines()
    for line in (
        "trainer:  # several processes, each with all of the network: trainer=ddp trainer.devices=8; on the CPU: "
        "trainer.accelerator=cpu",
        "  devices: 2  # of each node: how many, a list of which, or -1, all",
        "    timeout:  # after which a lost rank ends the job",
        "  target: $${model.target}  # on whose loss the weight acts",  # Hydra's template makes one dollar of two
        "  image_shape:  # [channels, height, width] of every image, which the network is built to",
        "  rescale: false  # true: both ends times 1000 / timesteps",
    ):
        assert line in lines, line
    for name in ("trainer/auto", "data/base/module"):
        text = (CONFIGS / f"{name}.yaml").read_text()
        comments = comments_of(text)
        without = {key for key in yaml.safe_load(text) if not comments.get((key,))}
        assert without <= {"_target_", "_convert_", "defaults"}


def test_comments_of_yaml():
    text = "\n".join(
        [
            "# @package _global_",
            "# of the file",
            "a: 1 # one",
            "b: # two",
            "  c: 'x # y'",
            "  d: {e: 1} # four",
            "  f:",
            "    - g: 1 # of a list",
        ]
    )
    assert comments_of(text) == {(): "of the file", ("a",): "one", ("b",): "two", ("b", "d"): "four"}
    assert write_comments("b:\n  d:\n    e: 2\na: '3'", comments_of(text)).splitlines() == [
        "b:  # two",
        "  d:  # four",
        "    e: 2",
        "a: '3'  # one",
    ]


def test_the_vocabulary_lists_every_choice():
    table = re.findall(
        r"^\| ([\w@.]+)(?:, [\w ]+)? \| ([\w, ]+) \|$", (CONFIGS.parent / "docs/vocabulary.md").read_text(), re.M
    )
    listed: dict[str, set[str]] = {}
    for name, choices in table:
        listed.setdefault(name.partition("@")[0], set()).update(choices.split(", "))
    for group in sorted(
        path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in ("model", "hydra")
    ):
        assert listed[group] == {path.stem for path in (CONFIGS / group).glob("*.yaml")}, group


UNREAD = {
    "+shedule=cosine": r"\+shedule=cosine: shedule is no key of train\.py, .* did you mean schedule=cosine\?$",
    "++shedule.timesteps=9": r"did you mean schedule\.timesteps=9\?$",
    "+part_law=monotone": r"did you mean part_law@process\.parts\.law=monotone\?$",
    "+parts.axis=2": r"did you mean process\.parts\.axis=2\?$",
    "+batch_size=7": r"did you mean data\.batch_size=7\?$",
    "+max_step=7": r"did you mean trainer\.max_steps=7\?$",
    "+schedule@zzz=cosine": r"zzz is no key of train\.py, .*its keys are callbacks, .*weight\.$",
}


@functools.cache
def with_unread_keys() -> DictConfig:
    return composed("seed=1", *list(UNREAD)[1:])  # the second makes the first's key


@pytest.mark.parametrize("word", UNREAD)
def test_a_key_that_nothing_would_read_is_refused(word):
    hydra = OmegaConf.create({"job": {"config_name": "train"}, "overrides": {"task": ["seed=1", word]}})
    with pytest.raises(ValueError, match=UNREAD[word]):
        check_keys(with_unread_keys(), hydra)
    hydra.job.config_name = "mine"
    check_keys(with_unread_keys(), hydra)


def test_a_key_that_is_there_or_that_is_read_is_not_refused():
    words = ["parts=frames", "+process.parts.law.x=1", "+width=2", "data.batch_size=${width}", "+data.foo=1"]
    words += ["++trainer.precision=32", "++seed=3", "+hydra.job.name=a"]
    config = composed(*(word for word in words if "hydra" not in word))
    check_keys(config, OmegaConf.create({"job": {"config_name": "train"}, "overrides": {"task": words}}))


def test_train_looks_at_the_keys_before_anything_is_made():
    calls = re.findall(r"^    (?:\w+ = )?(\w+)\(", (CONFIGS.parent / "train.py").read_text(), re.MULTILINE)
    assert calls[0] == "check_keys"
