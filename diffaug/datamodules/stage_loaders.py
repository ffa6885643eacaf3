"""StageLoaders: the method of a DataModule that makes a stage's loaders, there only where the stage has data."""

from functools import partial
from typing import Any


class StageLoaders:
    """What ``train_dataloader`` and the like of a DataModule are.

    Lightning asks which of these a DataModule overrides: of a stage without data it must find its own. They are not
    kept in the DataModule itself, where they would hide what a subclass overrides, and hold the DataModule in a cycle:
    the workers of its loaders would then outlive it, and end only ten seconds after they are told to.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.owner, self.name, self.stage = owner, name, name.removesuffix("_dataloader")

    def __get__(self, module: Any, _: type | None = None) -> Any:
        if module is None:
            return self
        if self.stage in module.stages:
            return partial(module.make_loaders, self.stage)
        return getattr(super(self.owner, module), self.name)
