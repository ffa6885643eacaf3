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
    for base in type(thing).__mro__:
        for package in OURS:
            if base.__module__.startswith(f"{package}."):
                return package
    return None


def is_data_module(thing: Any) -> bool:
    """Return whether something is a LightningDataModule of either package."""
    package = package_of(thing)
    return package is not None and isinstance(thing, import_module(package).LightningDataModule)


def check_package(ours: Any, theirs: Any) -> None:
    """Refuse a Trainer, or what else comes from Lightning, that is of another package than ours.

    Raises:
        TypeError: it is; names both classes and the import to change.
    """
    other = package_of(theirs)
    if other not in (None, package_of(ours)):
        raise TypeError(f"{_name(ours)} does not work with {_name(theirs)}. {_remedy(ours)}")


def refuse_as_loader(ours: Any) -> TypeError | ValueError:
    """Build the error for a DataModule that is gone through as if it were a loader."""
    return ValueError(  # not a TypeError, in whose place Lightning puts its own text
        f"{_name(ours)} is no loader: data.train_dataloader() is. A Trainer takes it for one if it is the other "
        f"package's. {_remedy(ours)}"
    )


def _name(thing: Any) -> str:
    return f"{type(thing).__name__} (a class of {package_of(thing)})"


def _remedy(ours: Any) -> str:
    mine = package_of(ours) or ""
    (other,) = OURS.keys() - {mine}
    name = type(ours).__name__
    return (
        f"pytorch_lightning and lightning.pytorch do not mix: import {name} from {OURS[other]}, or everything else "
        f"from {mine}."
    )
