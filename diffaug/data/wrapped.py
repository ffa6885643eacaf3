"""Another LightningDataModule, wrapped: its hooks, its loaders, its state; then the noise."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from diffaug.checks import refuse
from diffaug.data.batch import Place
from diffaug.data.items import described, split
from diffaug.data.module import DiffusionDataModule
from diffaug.data.placed import Placed, Places, batch_place, device_of, leaves, mapped, rows_from
from diffaug.data.rebuild import rebuilt
from diffaug.data.recipe import check_ranks
from diffaug.data.sources import spread, warn_of_half_range
from diffaug.data.stream import Stream
from diffaug.process import ForwardProcess
from diffaug.randomness.philox import STAGES, Purpose
from diffaug.randomness.user_code import keyed_random_state


class WrappedDataModule(DiffusionDataModule):
    """Noise what another LightningDataModule yields: `DiffusionDataModule.wrap` makes one.

    The inner DataModule's hooks are called as a Trainer would call them, its device transforms
    (``on_after_batch_transfer``) before the noise; attributes that the wrapper lacks are its own, read and set (so that
    Lightning's Tuner finds a batch size that its loaders have). Its loaders are made
    again, so that each sample's noise is keyed by its index, where they are plain torch DataLoaders over map-style
    datasets; otherwise noise is keyed by the place in the stream, which repeats only with the same ranks, workers and
    batches. The log says which, for each loader.

    Arguments:
        inner: the other DataModule.
        process: what is done to a batch.
        seed, device_transform, encoder, label_dropout, null_label, label_key, image_key, views, allow_changed_recipe:
            as in `DiffusionDataModule`. ``image_key`` is a place in, or a key of, the batch as the inner DataModule's
            hooks leave it.

    Example::

        data = DiffusionDataModule.wrap(MNISTDataModule("data"), process=ForwardProcess(Cosine()))
        trainer.fit(model, data)  # in training_step: x_t, epsilon, t = batch
    """

    _whole = False

    def __init__(
        self,
        inner: pl.LightningDataModule,
        process: ForwardProcess,
        *,
        seed: int | None = None,
        device_transform: Callable[[Tensor], Tensor] | None = None,
        encoder: Callable[[Tensor], Tensor] | None = None,
        label_dropout: float = 0.0,
        null_label: Any = None,
        label_key: str = "label",
        image_key: str | int | None = None,
        views: int = 1,
        allow_changed_recipe: bool = False,
    ) -> None:
        if not isinstance(inner, pl.LightningDataModule):
            raise refuse("data.inner", inner, "a pytorch_lightning.LightningDataModule")
        if isinstance(inner, DiffusionDataModule):
            raise refuse("data.inner", inner, "a DataModule of clean images; this one makes noise itself")
        self.inner = inner
        attached = inner.trainer
        super().__init__(
            process=process,
            seed=seed,
            device_transform=device_transform,
            encoder=encoder,
            label_dropout=label_dropout,
            null_label=null_label,
            label_key=label_key,
            image_key=image_key,
            views=views,
            allow_changed_recipe=allow_changed_recipe,
        )
        self.trainer = attached  # pyright: ignore[reportIncompatibleVariableOverride]
        for name in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices", "_log_hyperparams"):
            setattr(self, name, getattr(inner, name))
        self._loaders: dict[str, Any] = {}
        self._counts = dict.fromkeys(STAGES, 0)
        # Lightning asks which of these a DataModule defines: those that the inner one lacks must not be there at all.
        for stage in STAGES:
            if is_overridden(f"{stage}_dataloader", inner):
                setattr(self, f"{stage}_dataloader", partial(self._remade, stage))

        # Its own loaders have these, the wrapper's none: here they would hide them, from Lightning's Tuner too.
        for name in ("batch_size", "shuffle", "sampler", "drop_last"):
            del self.__dict__[name]
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
        self.inner.trainer = trainer

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
        self.inner.setup(stage)  # pyright: ignore[reportArgumentType]
        self._settle_backend(None)  # how large its images are is seen at the first batch

    def teardown(self, stage: str) -> None:
        self.inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        self.inner.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict.get("inner", {}))

    def _remade(self, stage: str) -> Any:
        if stage == "train":
            self._resume.announce(self.trainer)
        made = getattr(self.inner, f"{stage}_dataloader")()
        together = made if isinstance(made, CombinedLoader) else None
        tree = made if together is None else together.iterables
        numbers = iter(range(len(leaves(tree))))
        several = len(leaves(tree)) > 1

        overfit = bool(self.trainer and self.trainer.overfit_batches)

        def one(loader: Any) -> Any:
            number = next(numbers)
            name = f"{type(self.inner).__name__}.{stage}_dataloader()" + (f", loader {number}" if several else "")
            place = {"stage": stage, "number": number, "seed": self.seed or 0, "name": name, **self._ranks()}
            return rebuilt(loader, **place, overfit=overfit, epoch=self._epoch)

        tree = mapped(one, tree, tree, "")
        if stage == "train":
            self._resume.begin(self.trainer, leaves(tree), "max_size_cycle" if together is None else together._mode)
        # In evaluation Lightning goes through several loaders one after another, unless it is told otherwise.
        apart = stage != "train" and (together is None or together._mode == "sequential")
        self._loaders[stage] = None if apart else tree
        return tree if together is None else CombinedLoader(tree, together._mode)  # pyright: ignore[reportArgumentType]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        bare, places = self._taken_apart(batch)
        return Placed(self.inner.on_before_batch_transfer(bare, dataloader_idx), places)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        bare, places = self._taken_apart(batch)
        moved = self.inner.transfer_batch_to_device(bare, device, dataloader_idx)
        return Placed(moved, Placed(bare, places).to_device(device))

    def _taken_apart(self, batch: Any) -> tuple[Any, list[Places | None]]:
        """A batch without places, and the places: one for each sub-batch."""
        if isinstance(batch, Placed):
            return batch.batch, batch.places
        tree = self._loaders.get(self._stage())
        if not isinstance(tree, (Mapping, list, tuple)):
            return batch, [None]
        parts: list[Any] = []
        mapped(parts.append, tree, batch, "the batch")
        bare = mapped(lambda part: part.batch if isinstance(part, Placed) else part, tree, batch, "the batch")
        return bare, [part.places[0] if isinstance(part, Placed) else None for part in parts]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        stage = self._stage()
        if stage == "train":
            self._resume.begin_batch()
        return self.noise(batch, stage=stage, dataset=dataloader_idx)

    def noise(self, batch: Any, *, stage: str = "train", dataset: int = 0) -> Any:
        """What is done on the device, for use without a Trainer: the inner DataModule's hook, then the noise."""
        bare, places = self._taken_apart(batch)
        count = self._batch_number(stage)
        first = next((p.first for p in places if p), None) or self._place_in_stream(count, stage)
        device = next((p.rows.device for p in places if p), None) or device_of(bare)
        with keyed_random_state(device, self.seed or 0, Purpose.DEVICE_TRANSFORM, STAGES[stage], dataset, *first, 2):
            bare = self.inner.on_after_batch_transfer(bare, dataset)
        numbered = iter(enumerate(places))
        tree = self._loaders.get(stage)

        def one(part: Any) -> Any:
            number, known = next(numbered)
            if part is None:  # a loader that has ended before the others
                return None
            return self._noised(part, known, count, stage, dataset + number)

        return mapped(one, tree if isinstance(tree, (Mapping, list, tuple)) else None, bare, "the batch")

    def _noised(self, batch: Any, places: Places | None, count: int, stage: str, dataset: int) -> Any:
        where = f"the batch of {type(self.inner).__name__}.{stage}_dataloader()"
        image, extra = split(batch, self.image_key, where, batch=True)
        if not isinstance(image, Tensor) or image.ndim < 2:
            raise ValueError(
                f"{where} must hold its images as one tensor of shape (B, ...), but has {described(image)}."
            )
        what = f"{stage}, loader {dataset}"
        if self._noiser.check_once(image, where, what):
            warn_of_half_range([image], self.process.value_range, where)
        if places is None:
            places = rows_from(self._place_in_stream(count, stage), len(image), image.device)
        if len(places.rows) != len(image):
            raise ValueError(
                f"{where} has {len(image)} images of {len(places.rows)} samples: the collate function and the hooks of "
                f"{type(self.inner).__name__} must keep one image a sample, in order, so that each has its own noise. "
                "For several noised copies of an image set data.views."
            )
        key = {"seed": self.seed or 0, "stage": stage, "dataset": dataset, "dtype": self._dtype()}
        return self._noiser(image, places.rows, extra, first=places.first, **key)

    def _place_in_stream(self, count: int, stage: str) -> Place:
        return batch_place(count, epoch=self._epoch() if stage == "train" else 0, **self._ranks())

    def _batch_number(self, stage: str) -> int:
        """How many batches of the epoch came before this one, on this rank."""
        if not self.trainer or not self.trainer.state.stage:
            self._counts[stage] += 1
            return self._counts[stage] - 1
        fit, trainer = self.trainer.fit_loop.epoch_loop, self.trainer
        validation = fit.val_loop if trainer.state.fn == "fit" else trainer.validate_loop
        loop = {"train": fit, "val": validation, "test": trainer.test_loop, "predict": trainer.predict_loop}[stage]
        return loop.batch_progress.current.ready

    def images(self, stage: str, number: int = 0) -> Any:
        raise ValueError(
            f"The images of {stage} are {type(self.inner).__name__}'s own; clean_images({stage!r}, n) gives some."
        )

    def clean_images(self, stage: str, count: int) -> Tensor | None:
        """Images of a stage, as the inner DataModule's loader and hooks give them; None where they have no index."""
        loader = leaves(getattr(self.inner, f"{stage}_dataloader")())[0]
        again = rebuilt(loader, stage=stage, number=0, seed=self.seed or 0, rank=0, ranks=1, name=stage)
        if again is loader or isinstance(again.dataset, Stream):
            return None
        some = [Place(i, 0, 0, 0) for i in spread(len(again.dataset), count)]
        bare = again.collate_fn(again.dataset.__getitems__(some)).batch
        with keyed_random_state(torch.device("cpu"), self.seed or 0, Purpose.DEVICE_TRANSFORM):
            bare = self.inner.on_after_batch_transfer(self.inner.on_before_batch_transfer(bare, 0), 0)
        return split(bare, self.image_key, "the batch", batch=True)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loaders": {}}  # a process that is started makes its own


def check_options(inner: Any, options: Mapping[str, Any]) -> None:
    """Refuse what `DiffusionDataModule.wrap` does not take: such as a batch size, which is the inner DataModule's."""
    known = [name for name in inspect.signature(WrappedDataModule).parameters if name not in ("inner", "process")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"DiffusionDataModule.wrap has no options {unknown}: datasets, transforms and loaders are "
            f"{type(inner).__name__}'s own, so set there what concerns them. wrap takes {', '.join(known)}."
        )
