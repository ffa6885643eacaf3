"""What the checks refuse, and that nothing of the public interface takes a word for true or false."""

import dataclasses
import inspect
import pickle
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
from diffaug.checks import bounded, check_fields, flag, instance, integer, number, one_of
from diffaug.commands.encode import encode
from diffaug.pytorch_lightning import Denoiser, Encoding, image_folder, torchvision
from diffaug.store.latents import Latents

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
    "allow_rounding": lambda value: Latents(torch.nn.Identity(), "float16", value),
    "pixels": lambda value: encode(module(), "nowhere", None, Encoding, pixels=value),
    "update": lambda value: encode(module(), "nowhere", None, Encoding, update=value),
    "clip": lambda value: sample(clip=value),
    "progress": lambda value: sample(progress=value),
}


@pytest.mark.parametrize("word", ["no", "off", "false", "yes", 2])
@pytest.mark.parametrize("name", FLAGS)
def test_words_are_no_flags(name, word):
    """On a command line, no and off reach Python as strings, which are true."""
    with pytest.raises(ValueError, match=rf"{re.escape(name)} must be .*[tT]rue.*[fF]alse.* but got {word!r}"):
        FLAGS[name](word)


def test_wrapped_modules_take_no_words():
    with pytest.raises(ValueError, match=r"data\.allow_changed_recipe must be true or false, but got 'no' \(str\)"):
        DiffusionDataModule.wrap(pl.LightningDataModule(), PROCESS, allow_changed_recipe="no")


def test_flags_are_taken():
    assert flag("x", True) is True
    assert flag("x", False) is False
    assert module(pin_memory=None, in_order=None).loader_options == {}  # DataLoader's own default


def test_objects_are_told_by_their_class():
    with pytest.raises(ValueError, match=r"^model\.network must be a Module, but got 'unet' \(str\)\.$"):
        instance("model.network", "unet", nn.Module, "a Module")
    network = nn.Linear(1, 1)
    assert instance("model.network", network, nn.Module, "a Module") is network


def test_every_flag_of_the_public_interface_is_checked():
    """Each parameter whose default is true or false, of what has no underscore and is no part of another's inside."""
    inside = {"Images.check_range", "Stream.train", "Level.limit", "take_apart.batch"}
    inside |= {"build_images.look", "DiffusionBase.build.look", "ForwardProcess.draw.eager"}
    inside |= {"Times.state_dict.unfinished", "Importance.state_dict.unfinished", "Times.begin_batch.again"}
    inside |= {"rebuild.overfit", "check_images.bytes_too"}
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


@dataclasses.dataclass(frozen=True)
class Settings:
    low: float = bounded(0.5, above=0, below=1, at_most="high")
    high: float | None = bounded(None, at_least=0, at_most=100)
    first: int = bounded(1, at_least=1, below="last")
    last: "int" = bounded(10, at_least=1, at_most=2**31)  # noqa: RUF009
    free: float = 0.0
    on: bool = False
    colour: str = one_of("red", ("red", "blue"))
    either: int | float = 1

    def __post_init__(self) -> None:
        check_fields(self, "group.settings")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": 1}, r"group.settings.low must be a number in (0, 1), but got 1 (int)."),
        ({"low": None}, r"group.settings.low must be a number in (0, 1), but got None (NoneType)."),
        ({"low": True}, r"group.settings.low must be a number in (0, 1), but got True (bool)."),
        ({"high": -1.0}, r"group.settings.high must be a number in [0, 100], but got -1.0 (float)."),
        ({"high": 0.25}, r"group.settings.low must be at most group.settings.high, 0.25, but got 0.5 (float)."),
        ({"first": 10}, r"group.settings.first must be less than group.settings.last, 10, but got 10 (int)."),
        ({"first": 0}, r"group.settings.first must be a whole number >= 1, but got 0 (int)."),
        ({"first": 1.5}, r"group.settings.first must be a whole number >= 1, but got 1.5 (float)."),
        ({"last": False}, r"group.settings.last must be a whole number in [1, 2147483648], but got False (bool)."),
        ({"last": 1e300}, r"group.settings.last must be a whole number in [1, 2147483648], but got 1e+300 (float)."),
        ({"free": "x"}, r"group.settings.free must be a finite number, but got 'x' (str)."),
        ({"free": float("inf")}, r"group.settings.free must be a finite number, but got inf (float)."),
        ({"on": "no"}, r"group.settings.on must be true or false, but got 'no' (str)."),
        ({"colour": "green"}, r"group.settings.colour must be one of 'red', 'blue', but got 'green' (str)."),
    ],
)
def test_ranges_beside_the_fields(wrong, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**wrong)


def test_what_the_ranges_let_through():
    settings = Settings(high=3, last=20.0, free=-1, on=True, colour="blue", either=2)
    assert [(value, type(value)) for value in dataclasses.astuple(settings)[1:]] == [
        (3.0, float), (1, int), (20, int), (-1.0, float), (True, bool), ("blue", str), (2, int)
    ]  # fmt: skip
    assert eval(repr(settings)) == settings == pickle.loads(pickle.dumps(settings))
    assert hash(eval(repr(settings))) == hash(settings)
    assert Settings(low=0.5, high=0.5) != Settings()


def test_single_values():
    assert number("x", 3, above=2) == 3.0
    for bounds, wanted in {(("at_least", 4),): "a number >= 4", (("below", 3),): r"a number in \(-inf, 3\)"}.items():
        with pytest.raises(ValueError, match=f"^x must be {wanted}, but got 3 "):
            number("x", 3, **dict(bounds))
    assert integer("x", -5) == -5
    with pytest.raises(ValueError, match=r"^x must be a whole number, but got 'y' \(str\)\.$"):
        integer("x", "y")
