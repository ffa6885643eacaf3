"""The two packages of Lightning, `pytorch_lightning` and `lightning.pytorch`: alike, but their classes do not mix.

Which one something is of is read from its class, never guessed from what is installed or imported.
"""

from importlib import import_module
from typing import Any, TypeAlias

Trainer: TypeAlias = Any
LightningModule: TypeAlias = Any
"""Either package's: there is no type that both are of."""

OURS = {"pytorch_lightning": "diffaug.pytorch_lightning", "lightning.pytorch": "diffaug.lightning"}
"""Where diffaug's classes for each package are."""


def package_of(thing: Any) -> str | None:
    """Return the package of Lightning that something's class comes from; None for neither."""
    return next((package for base in type(thing).__mro__ if (package := _package_of_class(base))), None)


def _package_of_class(base: type) -> str | None:
    return next((package for package in OURS if base.__module__.startswith(f"{package}.")), None)


def is_data_module(thing: Any) -> bool:
    """Return whether something is a LightningDataModule of either package."""
    package = package_of(thing)
    return package is not None and isinstance(thing, import_module(package).LightningDataModule)


def check_package(ours: Any, theirs: Any) -> None:
    """Refuse a Trainer, or what else comes from Lightning, that is of another package than ours.

    Raises:
        TypeError: it is; names both classes and the import to change.
    """
    other, mine = package_of(theirs), package_of(ours)
    if other is not None and mine is not None and other != mine:
        raise TypeError(f"{_name(ours)} does not work with {_name(theirs)}. {_remedy(ours, mine, other)}")


def check_trainer(ours: Any, trainer: Any) -> None:
    """Refuse a Trainer of another package than ours, or one with callbacks or loggers of another."""
    check_package(ours, trainer)
    for part in (*getattr(trainer, "callbacks", ()), *getattr(trainer, "loggers", ())):
        check_package(part, trainer)


def refuse_as_loader(ours: Any) -> ValueError:
    """Build the error for a DataModule that is gone through as if it were a loader."""
    mine = package_of(ours) or "pytorch_lightning"
    (other,) = OURS.keys() - {mine}
    return ValueError(  # not a TypeError, in whose place Lightning puts its own text
        f"{_name(ours)} is no loader to go through: it was given to a Trainer of {other}, which does not know it. "
        f"{_remedy(ours, mine, other)}"
    )


def _name(thing: Any) -> str:
    return f"{type(thing).__name__} (a class of {package_of(thing)})"


def _remedy(ours: Any, mine: str, other: str) -> str:
    """Say what to import from where: the class itself, or that which the user's own is derived from."""
    inner = getattr(ours, "inner", None)  # of a DataModule that wraps another
    made_of = type(inner if is_data_module(inner) else ours)
    whose = next(base for base in made_of.__mro__ if base.__module__ in OURS.values() or _package_of_class(base))
    place = OURS[other] if whose.__module__ in OURS.values() else other
    change = f"import {whose.__name__} from {place}"
    derived = "" if whose is made_of else f", from which {made_of.__name__} is derived"
    return f"pytorch_lightning and lightning.pytorch do not mix: {change}{derived}, or everything else from {mine}."
