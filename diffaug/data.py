"""DiffusionDataModule: any image dataset in, ``(x_t, epsilon, t)`` on the accelerator out.

dataset item -> the user's transform, still uint8, + its place       in the workers
             -> collate, pin, transfer: a quarter of the bytes
             -> on_after_batch_transfer: device_transform, then the ForwardProcess, in one pass
             -> NoisyBatch(x_t, epsilon, t) -> training_step
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL.Image import Image
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from diffaug.checks import integer, refuse
from diffaug.images import ImageBatch, Images, Place, check_range, collate
from diffaug.loaders import EpochLoader, EpochSampler, EvaluationSampler
from diffaug.noise.philox import DATASET_BITS, INDEX_BITS, STAGES, VIEW_BITS
from diffaug.process import ForwardProcess
from diffaug.targets import FIELDS

_log = logging.getLogger("diffaug")
_STAGE_OF = {
    RunningStage.TRAINING: "train",
    RunningStage.SANITY_CHECKING: "val",
    RunningStage.VALIDATING: "val",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}
_STAGES_OF_SETUP = {
    None: tuple(STAGES),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
_LOADER_OPTIONS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)

Source = Dataset[Any] | Callable[[], Dataset[Any]]


class DiffusionDataModule(pl.LightningDataModule):
    """Noise any image dataset for a Lightning Trainer.

    Arguments:
        train: a map-style dataset, or a function without arguments that makes one. A function is called once on rank 0
            before the others (there it may download), then on every rank.
        val, test, predict: likewise, or a list of them.
        process: what is done to a batch.
        seed: of all draws, in [0, 2^64). None takes that of Lightning's ``seed_everything``, or else 0.
        transform: applied to each training image in the workers, as the dataset yields it.
        eval_transform: likewise for the other stages; None applies none.
        device_transform: applied to each training batch of images on the accelerator, before the noise.
        image_key: which part of an item is the image: a name, or a place in a tuple. None where there is only one.
        image_shape: what every image must have, for example (3, 32, 32), so that a network can be built to it; None
            takes whatever comes.
        views: how many noised copies of each training image a batch holds, side by side; it is decoded once.
        val_repeats: how many times each validation image is seen, each at another t.
        batch_size: images per process, before ``views``.
        shuffle: whether each training epoch has an order of its own.
        sampler: the training order instead: any sampler of indices.
        drop_last: whether a training epoch's last batch is dropped where it is short.
        loader_options: DataLoader's own: num_workers, pin_memory, prefetch_factor, persistent_workers, ...

    Example::

        data = DiffusionDataModule(train=CIFAR10("data"), process=ForwardProcess(Cosine()), batch_size=128)
        trainer.fit(model, data)  # in training_step: x_t, epsilon, t = batch
    """

    def __init__(
        self,
        train: Source | None = None,
        val: Source | Sequence[Source] | None = None,
        test: Source | Sequence[Source] | None = None,
        predict: Source | Sequence[Source] | None = None,
        *,
        process: ForwardProcess,
        seed: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        device_transform: Callable[[Tensor], Tensor] | None = None,
        image_key: str | int | None = None,
        image_shape: Sequence[int] | None = None,
        views: int = 1,
        val_repeats: int = 1,
        batch_size: int = 32,
        shuffle: bool = True,
        sampler: Sampler[int] | None = None,
        drop_last: bool = False,
        allow_changed_recipe: bool = False,
        **loader_options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(process, ForwardProcess):
            raise refuse("process", process, "a ForwardProcess")
        if _are_datasets(train):
            raise refuse("data.train", train, "one dataset; join several by torch.utils.data.ConcatDataset")
        unknown = sorted(set(loader_options) - set(_LOADER_OPTIONS))
        if unknown:
            raise ValueError(
                f"DiffusionDataModule has no options {unknown}. Beside its own it takes DataLoader's "
                f"{', '.join(_LOADER_OPTIONS)}."
            )
        integer("data.num_workers", loader_options.get("num_workers", 0), 0)
        self.process = process
        self.seed = seed if seed is None else integer("data.seed", seed, 0, 2**64 - 1)
        self.batch_size = integer("data.batch_size", batch_size, 1)
        self.views = integer("data.views", views, 1, 2**VIEW_BITS - 1)
        self.val_repeats = integer("data.val_repeats", val_repeats, 1, 2**VIEW_BITS - 1)
        self.transform, self.eval_transform, self.device_transform = transform, eval_transform, device_transform
        self.image_key, self.shuffle, self.sampler, self.drop_last = image_key, shuffle, sampler, drop_last
        self.allow_changed_recipe = allow_changed_recipe
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.loader_options = loader_options
        self._sources = {"train": train, "val": val, "test": test, "predict": predict}
        self._datasets: dict[str, list[Any]] = {}
        self._checked: set[str] = set()
        self._loaded: dict[str, Any] | None = None
        # Lightning asks which of these a DataModule defines: those without data must not be there at all.
        for stage in STAGES:
            if self._sources[stage] is not None:
                setattr(self, f"{stage}_dataloader", getattr(self, f"_{stage}_dataloader"))

    def _listed(self, stage: str) -> list[Source]:
        source = self._sources[stage]
        if source is None:
            return []
        return list(source) if _are_datasets(source) else [source]  # pyright: ignore[reportReturnType, reportArgumentType]

    def prepare_data(self) -> None:
        """Make what is made by a function once, on one process, so that it can download."""
        for stage in STAGES:
            for source in self._listed(stage):
                if not isinstance(source, Dataset) and callable(source):
                    source()

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets of a stage, and look at one item of each: what is wrong with it is said before training."""
        if self.seed is None:
            from_lightning = os.environ.get("PL_GLOBAL_SEED")
            self.seed = int(from_lightning or 0)
            _log.info("seed %d, %s", self.seed, "seed_everything's" if from_lightning else "as none was given")
        else:
            _log.info("seed %d", self.seed)
        for name in _STAGES_OF_SETUP[getattr(stage, "value", stage)]:
            if name not in self._datasets:
                self._datasets[name] = [self._prepared(s, name, i) for i, s in enumerate(self._listed(name))]

    def _prepared(self, source: Source, stage: str, number: int) -> Images:
        many = _are_datasets(self._sources[stage])
        name = f"data.{stage}[{number}]" if many else f"data.{stage}"
        integer(f"the number of data.{stage} datasets", number, 0, 2**DATASET_BITS - 1)
        dataset: Any = source if isinstance(source, Dataset) or not callable(source) else source()
        if (
            isinstance(dataset, IterableDataset)
            or not hasattr(dataset, "__getitem__")
            or not hasattr(dataset, "__len__")
        ):
            raise refuse(name, dataset, "a map-style dataset, with a length and items by index")
        if not 0 < len(dataset) <= 2**INDEX_BITS:
            raise ValueError(
                f"{name} must hold at least one image, but {type(dataset).__name__} has length {len(dataset)}."
            )
        images = Images(
            dataset,
            transform=self.transform if stage == "train" else self.eval_transform,
            image_key=self.image_key,
            wanted=[field for field in self.process.fields if field not in FIELDS],
            value_range=self.process.value_range,
            name=name,
            check_range=stage != "train" or self.device_transform is None,
            domain=(self.seed or 0, STAGES[stage], number),
        )
        first = images[Place(0, 0, 0, 0)][0]
        shape = tuple(first.shape)
        low, high = self.process.value_range
        if images.check_range and first.is_floating_point() and low < 0 <= first.min() and first.max() > high / 2:
            _log.warning(
                "%s[0] has no value below 0, though process.value_range is [%g, %g]: if your images are in [0, 1] "
                "(torchvision's ToTensor), set process.value_range=[0,1]",
                name,
                low,
                high,
            )
        if self.image_shape is not None and shape != self.image_shape:
            raise ValueError(
                f"data.image_shape says {list(self.image_shape)}, but {name}[0] has shape {list(shape)}: set it to the "
                "shape of your images (the network is built to it)."
            )
        return images

    def images(self, stage: str, number: int = 0) -> Images:
        """A stage's dataset as its loader reads it: items are (image, place, extra), before any noise."""
        return self._datasets[stage][number]

    def _ranks(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "ranks": trainer.world_size} if trainer else {"rank": 0, "ranks": 1}

    def _options(self) -> dict[str, Any]:
        pin = torch.cuda.is_available()
        return {"batch_size": self.batch_size, "collate_fn": collate, "pin_memory": pin, **self.loader_options}

    def _train_dataloader(self) -> EpochLoader:
        images = self.images("train")
        sampler = EpochSampler(
            len(images), seed=self.seed or 0, shuffle=self.shuffle, sampler=self.sampler, **self._ranks()
        )
        # A generator of its own: a DataLoader without one moves torch's global state at every epoch.
        generator = torch.Generator()
        return EpochLoader(images, sampler=sampler, drop_last=self.drop_last, generator=generator, **self._options())

    def _evaluation_loaders(self, stage: str, repeats: int = 1) -> Any:
        loaders = [
            DataLoader(
                images,
                sampler=EvaluationSampler(len(images), repeats=repeats, **self._ranks()),
                generator=torch.Generator(),
                **self._options(),
            )
            for images in self._datasets[stage]
        ]
        return loaders if _are_datasets(self._sources[stage]) else loaders[0]

    def _val_dataloader(self) -> Any:
        return self._evaluation_loaders("val", self.val_repeats)

    def _test_dataloader(self) -> Any:
        return self._evaluation_loaders("test")

    def _predict_dataloader(self) -> Any:
        return self._evaluation_loaders("predict")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Noise a batch on its device."""
        if not isinstance(batch, ImageBatch):
            raise refuse("the batch", type(batch), "one that diffaug's own loaders made; wrap yours with them")
        stage = _STAGE_OF[self.trainer.state.stage] if self.trainer and self.trainer.state.stage else "train"
        return self.noise(batch, stage=stage, dataset=dataloader_idx)

    def noise(self, batch: ImageBatch, *, stage: str = "train", dataset: int = 0) -> Any:
        """What `on_after_batch_transfer` does, for use without a Trainer."""
        image, place, extra = batch.image, batch.place, batch.extra
        if stage == "train" and self.device_transform is not None:
            image = self._transformed(image)
        index, view, position, epoch = place.unbind(1)
        if stage == "train" and self.views > 1:
            copies = torch.arange(self.views, device=place.device)
            view = (view[:, None] * self.views + copies).flatten()
            position = (position[:, None] * self.views + copies).flatten()
            image, index, epoch = (x.repeat_interleave(self.views, 0) for x in (image, index, epoch))
            extra = {name: _repeated(value, self.views) for name, value in extra.items()}
        return self.process(
            image,
            index,
            seed=self.seed or 0,
            stage=stage,
            dataset=dataset,
            epoch=epoch,
            view=view,
            position=position,
            extra=extra,
            dtype=_DTYPES.get(str(self.trainer.precision)) if self.trainer else None,
        )

    def _transformed(self, image: Tensor) -> Tensor:
        assert self.device_transform is not None
        image = self.device_transform(image)
        if image.is_floating_point() and "train" not in self._checked:
            check_range(image, self.process.value_range, "data.device_transform's result")
            self._checked.add("train")
        return image

    def recipe(self) -> dict[str, Any]:
        """What decides the draws of this run, in plain types: kept in checkpoints, compared on a resume."""
        return {
            "seed": self.seed or 0,
            "schedule": repr(self.process.schedule),
            "times": repr(self.process.times),
            "noise": repr(self.process.noise),
            "views": self.views,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"recipe": self.recipe(), "times": self.process.times.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._check_recipe(state_dict)
        if state_dict.get("times"):
            self.process.times.load_state_dict(state_dict["times"])

    def _check_recipe(self, state_dict: dict[str, Any]) -> None:
        ours, theirs = self.recipe(), state_dict.get("recipe", {})
        changed = [f"{key}: {theirs[key]} -> {ours[key]}" for key in ours if key in theirs and theirs[key] != ours[key]]
        if changed and not self.allow_changed_recipe:
            raise ValueError(
                "This checkpoint was trained on another recipe than the one given now:\n  "
                + "\n  ".join(changed)
                + "\nResume with the old values, or set data.allow_changed_recipe=true if you mean to change them."
            )
        if changed:
            _log.warning("going on with a changed recipe: %s", "; ".join(changed))


def _are_datasets(source: Any) -> bool:
    """Whether a list is one of several datasets, and not itself a dataset: a list of items."""
    items = (Tensor, np.ndarray, tuple, list, Mapping, int, float, Image)
    return isinstance(source, (list, tuple)) and not any(isinstance(part, items) for part in source)


def _repeated(value: Any, views: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(views, 0)
    return [item for item in value for _ in range(views)]
