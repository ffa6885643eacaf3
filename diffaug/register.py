"""Registration of the package's configs with Hydra, as soon as Hydra is imported.

``import diffaug`` registers them, so that an application's own configs can say ``schedule: cosine``. To import Hydra
for that would take a tenth of the time that torch takes, and whoever writes Python alone has no use for it: so where
it has not been imported, the registration waits for its import.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Registering(Loader):
    """Loads Hydra as its own loader does, and then registers the configs."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # what else asks finds all as it would be
        import_module("diffaug.config")


class _Finder(MetaPathFinder):
    """Finds Hydra, once, as the other finders do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "hydra":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def register_configs() -> None:
    """Make the package's configs known to Hydra: now where it has been imported, else when it is."""
    if "hydra" in sys.modules:
        import_module("diffaug.config")
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
