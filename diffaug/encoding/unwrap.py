"""Another LightningDataModule's datasets, taken out of its loaders, so that a store can be made of them."""

from importlib import import_module
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, default_collate

from diffaug.checks import refuse
from diffaug.datamodules.lightning_packages import OURS, package_of
from diffaug.datamodules.module import DiffusionBase
from diffaug.datamodules.recipe import describe
from diffaug.datamodules.wrapped import WrappedBase
from diffaug.datasets.indexed import own_recipe
from diffaug.images.items import name_parts

_HOOKS = ("on_before_batch_transfer", "on_after_batch_transfer")
_STAGES = {"train": "fit", "val": "fit", "test": "test"}


class Collated(Dataset[Any]):
    """A dataset whose items have been through a user's collate function, each as a batch of its own.

    Arguments:
        dataset: the user's, map-style.
        collate: the user's, from a list of items to a batch.
    """

    def __init__(self, dataset: Any, collate: Any) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        batch = self.collate([self.dataset[index]])
        if isinstance(batch, Tensor):
            return batch[0]
        return {str(name): part[0] for name, part in name_parts(batch).items()}

    def recipe(self) -> dict[str, Any]:
        """Return what is known of how it was made."""
        return {**own_recipe(self.dataset), "of": type(self.dataset).__name__, "collate_fn": describe(self.collate)}


def unwrap(data: WrappedBase, trainer: Any) -> DiffusionBase:
    """Return a DataModule of diffaug's own over the datasets of a wrapped one's loaders.

    Arguments:
        trainer: which the wrapped one may want to know.

    Raises:
        ValueError: it does something to whole batches, or its loaders are not torch's.
    """
    inner, name = data.inner, type(data.inner).__name__
    hooks = [hook for hook in _HOOKS if data._lightning("model_helpers").is_overridden(hook, inner)]
    if hooks:
        raise ValueError(
            f"{name}.{hooks[0]} is of whole batches, on their way to the device: a store holds what comes before. "
            "Leave it out here, and set what it does as data.device_transform with data=store."
        )
    data.trainer = trainer
    inner.prepare_data()
    stages = {stage: setup for stage, setup in _STAGES.items() if stage in data.stages}
    for setup in dict.fromkeys(stages.values()):
        inner.setup(setup)
    sources: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for stage in stages:
        made = getattr(inner, f"{stage}_dataloader")()
        loaders = tree_leaves(getattr(made, "iterables", made))
        for loader in loaders:
            if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
                raise ValueError(
                    f"{name}.{stage}_dataloader() gives a {type(loader).__name__} that is not torch's DataLoader over "
                    "single items, so its dataset's items are not known: give the datasets to DiffusionDataModule."
                )
            size = getattr(loader.batch_sampler, "batch_size", None) or 32
            options = options or {"batch_size": size, "num_workers": loader.num_workers}
        sets = [
            loader.dataset if loader.collate_fn is default_collate else Collated(loader.dataset, loader.collate_fn)
            for loader in loaders
        ]
        sources[stage] = sets if len(sets) > 1 else sets[0]
    given = {"encoder": data._noiser.encoder, "device_transform": data.device_transform, "seed": data.seed}
    given |= {"image_key": data.aligned.target, "images": data.aligned.roles, "process": data.process}
    return import_module(OURS[package_of(data) or ""]).DiffusionDataModule(**sources, **given, **options)


def check_own(data: object, command: str) -> None:
    """Refuse a DataModule whose datasets are not known, as one that is wrapped, for a command that looks at them."""
    if not isinstance(data, DiffusionBase):
        wanted = (
            f"a DiffusionDataModule of datasets for {command}; of one that is wrapped make a store first, by encode"
        )
        raise refuse("data", type(data).__name__, wanted)
