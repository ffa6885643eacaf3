"""What the checks refuse, and that nothing of the public interface takes a word for true or false."""

import inspect
import pkgutil
import re
from importlib import import_module

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

import diffaug
from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta, Offset
from diffaug.checks import flag
from diffaug.data.catalogue import image_folder, torchvision
from diffaug.data.order import EpochSampler
from diffaug.training.denoiser import Denoiser

PROCESS = ForwardProcess(LinearBeta(), compile=False)


def module(**options):
    return DiffusionDataModule(train=TensorDataset(torch.zeros(4, 1, 4, 4)), process=PROCESS, **options)


def sample(**options):
    return Denoiser(nn.Identity(), PROCESS).sample((1, 1, 4, 4), **options)


def folder(**options):
    return image_folder(root=".", image_size=8, process=PROCESS, **options)


def dataset(root, train, download):
    raise AssertionError("not to be called")


FLAGS = {
    "schedule.rescale": lambda value: LinearBeta(rescale=value),
    "noise.normalize": lambda value: Offset(normalize=value),
    "process.compile": lambda value: ForwardProcess(LinearBeta(), compile=value),
    "data.shuffle": lambda value: module(shuffle=value),
    "data.drop_last": lambda value: module(drop_last=value),
    "data.pin_memory": lambda value: module(pin_memory=value),
    "data.persistent_workers": lambda value: folder(persistent_workers=value),
    "data.in_order": lambda value: module(in_order=value),
    "data.allow_changed_recipe": lambda value: module(allow_changed_recipe=value),
    "data.download": lambda value: torchvision(dataset, root=".", download=value, process=PROCESS),
    "clip": lambda value: sample(clip=value),
    "progress": lambda value: sample(progress=value),
}


@pytest.mark.parametrize("word", ["no", "off", "false", "yes", 2])
@pytest.mark.parametrize("name", FLAGS)
def test_words_are_no_flags(name, word):
    """On a command line, no and off reach Python as strings, which are true."""
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must be .*[tT]rue.*[fF]alse.* but got {word!r}"):
        FLAGS[name](word)


def test_wrapped_modules_and_samplers_take_no_words():
    with pytest.raises(ValueError, match=r"data\.allow_changed_recipe must be true or false, but got 'no' \(str\)"):
        DiffusionDataModule.wrap(pl.LightningDataModule(), PROCESS, allow_changed_recipe="no")
    with pytest.raises(ValueError, match=r"data\.shuffle must be true or false, but got 'no' \(str\)"):
        EpochSampler(4, shuffle="no")


def test_flags_are_taken():
    assert flag("x", True) is True
    assert flag("x", False) is False
    assert module(pin_memory=None, in_order=None).loader_options == {}  # DataLoader's own default


def test_every_flag_of_the_public_interface_is_checked():
    """Each parameter whose default is true or false, of what has no underscore and is no part of another's inside."""
    inside = {"Images.check_range", "Stream.train", "Level.limit", "split.batch", "number.open_low", "number.open_high"}
    inside |= {"prepared.look", "rebuild.overfit", "check_images.bytes_too"}
    found = set()
    for info in pkgutil.walk_packages(diffaug.__path__, "diffaug."):
        if info.name == "diffaug.__main__":
            continue
        room = import_module(info.name)
        for name, thing in vars(room).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name or not callable(thing):
                continue
            functions = {name: thing}
            if inspect.isclass(thing):
                functions |= {f"{name}.{own}": f for own, f in vars(thing).items() if inspect.isfunction(f)}
            for called, function in functions.items():
                try:
                    parameters = inspect.signature(function).parameters.values()
                except ValueError:
                    continue
                found |= {f"{called}.{p.name}" for p in parameters if isinstance(p.default, bool)}
    found = {name for name in found if "._" not in name} - inside
    known = {name.split(".")[-1] for name in FLAGS}
    assert {name for name in found if name.split(".")[-1] not in known} == set()
    assert len(found) >= 8
