"""Registration of the package's configs with Hydra, as soon as Hydra is imported.

``import diffaug`` registers them, so that an application's own configs can say ``schedule: cosine``. To import Hydra
for that would take a tenth of the time that torch takes, and whoever writes Python alone has no use for it: so where
it has not been imported, the registration waits for its import.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Finder(MetaPathFinder):
    """Finds Hydra, once, as the other finders do, and has it registered with as soon as it is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "hydra":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = spec and spec.loader

        def load(module: ModuleType) -> None:
            del loader.exec_module  # from here on the loader is as it would be
            loader.exec_module(module)
            import_module("diffaug.config")

        if loader is not None:
            loader.exec_module = load
        return spec


def register_configs() -> None:
    """Make the package's configs known to Hydra: now where it has been imported, else when it is."""
    if "hydra" in sys.modules:
        import_module("diffaug.config")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
