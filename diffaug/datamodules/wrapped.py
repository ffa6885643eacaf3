"""WrappedBase: another LightningDataModule's hooks, loaders and state; then the noise."""

from functools import partial
from importlib import import_module
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from diffaug.checks import refuse
from diffaug.datamodules.base import OPTIONS, NoisingBase
from diffaug.datamodules.lightning_packages import OURS, check_package, check_trainer, is_data_module, package_of
from diffaug.datamodules.nested_batches import device_of, is_leaf, map_parts
from diffaug.datamodules.progress import current_epoch
from diffaug.datamodules.rebuilt_loaders import rebuild
from diffaug.datamodules.recipe import check_ranks
from diffaug.datamodules.sources import check_stores, spread_indices, warn_of_half_range
from diffaug.images.items import describe_value, name_parts, take_apart
from diffaug.loader.batch import Batch, Place, Places, first_place
from diffaug.loader.stream import Stream
from diffaug.process import ForwardProcess
from diffaug.randomness.keys import STAGES, Purpose
from diffaug.randomness.user_code import keyed_random_state


class WrappedBase(NoisingBase):
    """Noise what another LightningDataModule yields: `DiffusionDataModule.wrap` makes one.

    The inner DataModule's hooks are called as a Trainer would call them, its device transforms
    (``on_after_batch_transfer``) before the noise; attributes that the wrapper lacks are its own, read and set (so that
    Lightning's Tuner finds a batch size that its loaders have). Its loaders are rebuilt, so that each sample's noise is
    keyed by its index, where they are plain torch DataLoaders over map-style datasets; otherwise noise is keyed by the
    place in the stream, which repeats only with the same ranks, workers and batches. The log says which, for each.

    Arguments:
        inner: the other LightningDataModule, of this one's package.
        process: what is done to a batch.
        options: those of `diffaug.datamodules.base.NoisingBase`. ``image_key`` is a place in, or a key of, the batch as
            the inner DataModule's hooks leave it; ``images`` has names of its parts.

    For example, of a DataModule for MNIST:

        data = DiffusionDataModule.wrap(MNISTDataModule("data"), process=ForwardProcess(Cosine()))
        trainer.fit(model, data)  # in training_step: x_t, epsilon, t = batch
    """

    _whole = False

    def __init__(self, inner: Any, process: ForwardProcess, **options: Any) -> None:
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"DiffusionDataModule.wrap has no options {unknown}: datasets, transforms and loaders are "
                f"{type(inner).__name__}'s own, so set there what concerns them. wrap takes {', '.join(OPTIONS)}."
            )
        if not is_data_module(inner):
            raise refuse("data.inner", inner, "a LightningDataModule, of pytorch_lightning or of lightning.pytorch")
        check_package(self, inner)
        if isinstance(inner, NoisingBase):
            raise refuse("data.inner", inner, "a DataModule of clean images; this one makes noise itself")
        if process.pair is not None and process.pair.times.together > 1:
            raise ValueError(
                f"pair.times={process.pair.times!r} wants groups of samples in one process, which a wrapped loader "
                "does not keep together: give its dataset to DiffusionDataModule(train=...) instead."
            )
        self.inner = inner
        attached = inner.trainer
        super().__init__(process, **options)
        self.trainer = attached
        for name in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "_log_hyperparams"):
            setattr(self, name, getattr(inner, name))
        self._nests: dict[str, Any] = {}
        self._counts = dict.fromkeys(STAGES, 0)
        overrides = self._lightning("model_helpers").is_overridden
        self.stages = tuple(stage for stage in STAGES if overrides(f"{stage}_dataloader", inner))
        self._whole = True

    def __setattr__(self, name: str, value: Any) -> None:
        # Where what is read is the inner one's, so is what is set: Lightning's Tuner sets a batch_size.
        theirs = self._whole and not hasattr(type(self), name) and name not in self.__dict__
        object.__setattr__(self.inner if theirs and hasattr(self.inner, name) else self, name, value)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(inner, name)

    @property
    def trainer(self) -> Any:
        return self.inner.trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        check_trainer(self, trainer)
        self.inner.trainer = trainer

    def _lightning(self, name: str) -> Any:
        """Return a module of utilities of the package that this is of."""
        return import_module(f"{package_of(self)}.utilities.{name}")

    @property
    def hparams(self) -> Any:
        return self.inner.hparams

    @property
    def hparams_initial(self) -> Any:
        return self.inner.hparams_initial

    def prepare_data(self) -> None:
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        self._begin_setup(stage)
        check_ranks(self.trainer, self.recipe())
        self.inner.setup(stage)
        self._settle_backend(stage, None)  # how large its images are is seen at the first batch

    def teardown(self, stage: str) -> None:
        self.inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        self.inner.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict.get("inner", {}))

    def make_loaders(self, stage: str) -> Any:
        if stage == "train":
            self._resume.announce(self.trainer)
        made = getattr(self.inner, f"{stage}_dataloader")()
        combined = self._lightning("combined_loader").CombinedLoader
        together = made if isinstance(made, combined) else None
        nest = made if together is None else together.iterables
        loaders = tree_leaves(nest)
        overfit = bool(self.trainer and self.trainer.overfit_batches)

        def one(loader: Any, number: int) -> Any:
            of_several = f", loader {number}" if len(loaders) > 1 else ""
            name = f"{type(self.inner).__name__}.{stage}_dataloader(){of_several}"
            dataset = getattr(loader, "dataset", None)
            check_stores(dataset, name, self._noiser.encoder, self.aligned, self.process.fields)
            place = {"stage": stage, "number": number, "seed": self.seed or 0, "name": name, **self._ranks()}
            return rebuild(loader, **place, overfit=overfit, epoch=partial(current_epoch, self.trainer))

        numbers = count()
        nest = tree_map(lambda loader: one(loader, next(numbers)), nest)
        if stage == "train":
            mode = "max_size_cycle" if together is None else together._mode
            self._resume.begin(self.trainer, tree_leaves(nest), mode)
        # In evaluation Lightning goes through several loaders one after another, unless it is told otherwise.
        apart = stage != "train" and (together is None or together._mode == "sequential")
        self._nests[stage] = None if apart else nest
        return nest if together is None else combined(nest, together._mode)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = self._join(batch)
        return Batch(self.inner.on_before_batch_transfer(batch.content, dataloader_idx), batch.places)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        batch = self._join(batch)
        return Batch(self.inner.transfer_batch_to_device(batch.content, device, dataloader_idx), batch.places)

    def _join(self, batch: Any) -> Batch:
        """Join a nest of batches into one, whose content is as the user's code knows it."""
        if isinstance(batch, Batch):
            return batch
        nest, parts = self._nests.get(self._stage()), []
        if is_leaf(nest):
            return Batch(batch, [None])
        map_parts(parts.append, nest, batch)
        content = map_parts(lambda part: part.content if isinstance(part, Batch) else part, nest, batch)
        return Batch(content, [part.places[0] if isinstance(part, Batch) else None for part in parts])

    def noise(self, batch: Any, *, stage: str = "train", dataset: int = 0) -> Any:
        batch = self._join(batch)
        number = self._batch_number(stage)
        known = next((places for places in batch.places if places), None)
        first = known.first if known else self._first_place(number, stage)
        device = self.trainer.strategy.root_device if self.trainer else device_of(batch.content)
        with keyed_random_state(
            device, self.seed or 0, Purpose.DEVICE_TRANSFORM, STAGES[stage], dataset, *first[:6], 2
        ):
            content = self.inner.on_after_batch_transfer(batch.content, dataset)
        loaders = iter(enumerate(batch.places, dataset))

        def one(part: Any) -> Any:
            loader, places = next(loaders)
            if part is None:  # a loader that has ended before the others
                return None
            return self._noise_part(part, places, number, stage, loader)

        nest = self._nests.get(stage)
        return one(content) if is_leaf(nest) else map_parts(one, nest, content)

    def _noise_part(self, batch: Any, places: Places | None, number: int, stage: str, loader: int) -> Any:
        where = f"the batch of {type(self.inner).__name__}.{stage}_dataloader()"
        image, extra = take_apart(batch, self.aligned.target, where, batch=True)
        if not isinstance(image, Tensor) or image.ndim < 2:
            raise ValueError(
                f"{where} must hold its images as one tensor of shape (B, ...), but has {describe_value(image)}."
            )
        if stage == "train" and self.device_transform is not None:
            self.aligned.check_declared(
                name_parts(batch), image, self.process.fields, where, "data.device_transform", batch=True
            )
        self.aligned.check_held(extra, where)
        what = f"{stage}, loader {loader}"
        for name in self.aligned.beside:
            if not isinstance(extra[name], Tensor):
                raise refuse(f"{name} of {where}", extra[name], "one tensor of shape (B, ...), as data.images names it")
        unranged = self.aligned.unranged(extra)
        for name in self.aligned.conditions:
            if self._noiser.check_once(extra[name], where, what, name) and name in unranged:
                warn_of_half_range([extra[name]], self.process.value_range, f"{name} of {where}", name)
        if self._noiser.check_once(image, where, what):
            warn_of_half_range([image], self.process.value_range, where)
        if places is None:
            places = Places.count_from(self._first_place(number, stage), len(image))
        if len(places.rows) != len(image):
            raise ValueError(
                f"{where} has {len(image)} images of {len(places.rows)} samples: the collate function and the hooks of "
                f"{type(self.inner).__name__} must keep one image a sample, in order, so that each has its own noise. "
                "For several noised copies of an image set data.views."
            )
        key = {"seed": self.seed or 0, "stage": stage, "dataset": loader, "dtype": self._dtype()}
        return self._noiser(image, places, extra, **key)

    def _first_place(self, number: int, stage: str) -> Place:
        return first_place(number, epoch=current_epoch(self.trainer) if stage == "train" else 0, **self._ranks())

    def _batch_number(self, stage: str) -> int:
        """Return how many batches of the epoch came before this one, on this rank."""
        if not self.trainer or not self.trainer.state.stage:
            self._counts[stage] += 1
            return self._counts[stage] - 1
        fit, trainer = self.trainer.fit_loop.epoch_loop, self.trainer
        validation = fit.val_loop if trainer.state.fn == "fit" else trainer.validate_loop
        loop = {"train": fit, "val": validation, "test": trainer.test_loop, "predict": trainer.predict_loop}[stage]
        return loop.batch_progress.current.ready

    def clean_images(self, stage: str, count: int) -> Tensor | None:
        """Return images of a stage, as the inner DataModule's loader and hooks give them; None without an index."""
        loader = tree_leaves(getattr(self.inner, f"{stage}_dataloader")())[0]
        again = rebuild(loader, stage=stage, number=0, seed=self.seed or 0, rank=0, ranks=1, name=stage)
        if again is loader or isinstance(again.dataset, Stream):
            return None
        some = [Place(i, 0, 0, 0) for i in spread_indices(len(again.dataset), count)]
        bare = again.collate_fn(again.dataset.__getitems__(some)).content
        with keyed_random_state(torch.device("cpu"), self.seed or 0, Purpose.DEVICE_TRANSFORM):
            bare = self.inner.on_after_batch_transfer(self.inner.on_before_batch_transfer(bare, 0), 0)
        return take_apart(bare, self.aligned.target, "the batch", batch=True)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_nests": {}}  # a process that is started makes its own


def wrap(inner: Any, process: ForwardProcess, **options: Any) -> WrappedBase:
    """Noise what another LightningDataModule yields: returns a WrappedDataModule of that one's own package.

    Arguments:
        inner, process, options: those of `WrappedBase`.
    """
    package = package_of(inner) or "pytorch_lightning"  # where it is of neither, that is refused there
    return import_module(OURS[package]).WrappedDataModule(inner, process, **options)
