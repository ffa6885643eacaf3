"""DiffusionBase: the user's datasets, as loaders whose batches are noised on the accelerator."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from diffaug.checks import flag, integer, refuse
from diffaug.datamodules.base import OPTIONS, STAGES_OF_SETUP, NoisingBase
from diffaug.datamodules.progress import current_epoch
from diffaug.datamodules.recipe import check_ranks, describe
from diffaug.datamodules.sources import (
    Source,
    are_datasets,
    build_images,
    check_shape,
    check_stores,
    dataset_name,
    largest_bucket,
    list_functions,
    list_sources,
    spread_indices,
)
from diffaug.datamodules.wrapped import wrap
from diffaug.datasets.indexed import describe_dataset, is_stream
from diffaug.loader.batch import Batch, collate
from diffaug.loader.dataset import Images
from diffaug.loader.evaluation import EvaluationSampler, choose_times, evaluation_loader
from diffaug.loader.stream import Stream, StreamLoader, check_no_key, check_overfit, check_stream
from diffaug.loader.training import (
    LOADER_OPTIONS,
    EpochLoader,
    EpochSampler,
    FixedSampler,
    Loader,
    TrainingLoader,
    check_loader_options,
    choose_order,
)
from diffaug.order.epoch import SHARD_WINDOW
from diffaug.process import ForwardProcess
from diffaug.randomness.keys import STAGES, VIEW_BITS


class DiffusionBase(NoisingBase):
    """Noise any image dataset for a Lightning Trainer.

    Arguments:
        train: a dataset, or a function without arguments that makes one. A function is called once on rank 0 before
            the others (there it may download), then on every rank. An iterable dataset, a stream, has no indices: its
            draws are keyed by ``key``, or else by the sample's place in it, which includes rank and worker, and repeat
            exactly only with the same numbers of both; after an interruption it is read again up to where it was.
        val: likewise, or a list of them.
        test: likewise.
        predict: likewise.
        process: what is done to a batch.
        transform: applied to each training image in the workers, as the dataset yields it; where ``images`` declares
            several of an item, to a dict of them.
        eval_transform: likewise for the other stages; None applies none.
        key: of streams, the part of an item that tells it from all others, text, bytes or a whole number, by name
            (``__key__`` of WebDataset) or by place in a tuple: a sample's draws are then its own, whoever reads it.
        image_shape: what every image must have, for example (3, 32, 32), so that a network can be built to it; None
            takes whatever comes.
        val_times: which t validation is at: "even" (spread over unit time, each image at a t of its own), "grid"
            (every image at the same ``val_repeats`` times) or "fixed" (every image at ``val_at``).
        val_at: the unit time of val_times="fixed", in [0, 1).
        val_repeats: how many times each validation image is seen, each at another t.
        batch_size: images per process, before ``views``.
        shuffle: whether each training epoch has an order of its own.
        sampler: the training order instead: any sampler of indices.
        shard_window: how many shards are open at a time in the shuffled order of a set that has them: litdata's and
            MosaicML's StreamingDataset, or one with an attribute ``shard_sizes``. None shuffles it as a whole.
        drop_last: whether a training epoch's last batch is dropped where it is short.
        options: those of `diffaug.datamodules.base.NoisingBase`, which every DataModule here has: seed, views, encoder,
            label_dropout, ...; and DataLoader's own: num_workers, pin_memory, prefetch_factor, persistent_workers, ...,
            of which None leaves DataLoader's default, for pin_memory whether there is a CUDA device.

    Attributes:
        sources: the datasets of each stage, or functions that make them.
        listed: the stages that were given as a list.

    For example, of CIFAR-10:

        data = DiffusionDataModule(train=CIFAR10("data"), process=ForwardProcess(Cosine()), batch_size=128)
        trainer.fit(model, data)  # in training_step: x_t, epsilon, t = batch
    """

    train_dataloader: Callable[[], Any]  # there if, and only if, there is data to train on

    def __init__(
        self,
        train: Source | None = None,
        val: Source | Sequence[Source] | None = None,
        test: Source | Sequence[Source] | None = None,
        predict: Source | Sequence[Source] | None = None,
        *,
        process: ForwardProcess,
        transform: Callable[[Any], Any] | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        key: str | int | None = None,
        image_shape: Sequence[int] | None = None,
        val_times: str = "even",
        val_at: float = 0.5,
        val_repeats: int = 1,
        batch_size: int = 32,
        shuffle: bool = True,
        sampler: Sampler[int] | None = None,
        shard_window: int | None = SHARD_WINDOW,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        loader_options = {name: options.pop(name) for name in LOADER_OPTIONS if name in options}
        if not options.keys() <= set(OPTIONS):
            known = ", ".join((*OPTIONS, *LOADER_OPTIONS))
            raise ValueError(
                f"DiffusionDataModule has no options {sorted(options.keys() - set(OPTIONS))}. Beside its own it takes "
                f"{known}."
            )
        super().__init__(process, **options)
        given = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources = list_sources(given)
        self.listed = {stage for stage, source in given.items() if are_datasets(source)}
        self.loader_options = check_loader_options(loader_options)
        self.batch_size = integer("data.batch_size", batch_size, 1)
        self.val_repeats = integer("data.val_repeats", val_repeats, 1, 2**VIEW_BITS - 1)
        self._val_times = choose_times(val_times, val_at, self.val_repeats)
        for name, function in (("transform", transform), ("eval_transform", eval_transform)):
            if function is not None and not callable(function):
                raise refuse(f"data.{name}", function, "a function or a torch.nn.Module, from an image to another")
        if key is not None and (isinstance(key, bool) or not isinstance(key, (str, int))):
            raise refuse("data.key", key, "the name of a part of an item, or its place in a tuple")
        self.transform, self.eval_transform, self.key = transform, eval_transform, key
        self.shuffle, self.sampler = flag("data.shuffle", shuffle), sampler
        self.shard_window = shard_window if shard_window is None else integer("data.shard_window", shard_window, 1)
        self.drop_last = flag("data.drop_last", drop_last)
        self.image_shape = check_shape(image_shape)
        self._datasets: dict[str, list[Any]] = {}
        self.stages = tuple(stage for stage in STAGES if self.sources[stage])

    def prepare_data(self) -> None:
        """Make what is made by a function once, on one process, so that it can download."""
        for stage in STAGES:
            for make in list_functions(self.sources[stage]):
                make()

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets of a stage, and look at one item of each: what is wrong with it is said before training."""
        seed = self.seed
        self._begin_setup(stage)
        if self.seed != seed:
            self._datasets.clear()  # what their transforms draw is keyed by it
        for name in STAGES_OF_SETUP[getattr(stage, "value", stage)]:
            if name not in self._datasets:
                self._datasets[name] = self.build(name)
        check_ranks(self.trainer, self.recipe())
        self._settle_backend(stage, None if self._noiser.encoder else self._example())

    def recipe(self) -> dict[str, Any]:
        data = {
            images.name.removeprefix("data."): describe_dataset(images.dataset)
            for stage in ("train", "val")
            for images in self._datasets.get(stage, [])
        }
        return {
            **super().recipe(),
            **data,
            "transform": describe(self.transform),
            "eval_transform": describe(self.eval_transform),
            "key": self.key,
            "val_times": repr(self._val_times),
            "val_repeats": self.val_repeats,
        }

    def _batch_sizes(self, stage: str | None) -> dict[str, set[int]]:
        sizes = super()._batch_sizes(stage)
        for name in sizes:
            views, repeats = self.views if name == "train" else 1, self.val_repeats if name == "val" else 1
            for images in self._datasets.get(name, []):
                whole = {self.batch_size}
                if not is_stream(images.dataset) and not (name == "train" and self.drop_last):
                    whole.add(-(-len(images) * repeats // self._ranks()["ranks"]) % self.batch_size)  # the last batch
                sizes[name] |= {size * views for size in whole if size}
        return sizes

    def _example(self) -> Tensor | None:
        """Return one image of any stage. From streams nothing is taken before its time: of ``image_shape``, or None."""
        made = (self.clean_images(stage, 1) for stage in STAGES if self._datasets.get(stage))
        unseen = torch.zeros(1, *self.image_shape, dtype=torch.uint8, device="cpu") if self.image_shape else None
        return next((image for image in made if image is not None), unseen)

    def build(self, stage: str, *, look: bool = True) -> list[Images]:
        """Build the datasets of a stage, ready for their loaders; unless told not to, look at some of their images."""
        return [self._build(stage, number, look) for number in range(len(self.sources[stage]))]

    def _build(self, stage: str, number: int, look: bool) -> Images:
        train, name = stage == "train", dataset_name(stage, number, stage in self.listed)
        images = build_images(
            self.sources[stage][number],
            stage=stage,
            number=number,
            name=name,
            seed=self.seed or 0,
            image_shape=self.image_shape,
            look=look,
            transform=self.transform if train else self.eval_transform,
            aligned=self.aligned,
            wanted=self.aligned.wanted(self.process.fields, self._noiser.made),
            value_range=self.process.value_range,
            check_range=not train or self.device_transform is None,
        )
        if is_stream(images.dataset):
            given = {"data.sampler": train and self.sampler is not None}
            given["data.val_repeats"] = stage == "val" and self.val_repeats > 1
            check_stream(images.dataset, name, self.key, [option for option, is_set in given.items() if is_set])
        elif train:
            check_no_key(self.key, name, images.dataset)
        check_stores(images.dataset, name, self._noiser.encoder, self.aligned, self.process.fields)
        return images

    def images(self, stage: str, number: int = 0) -> Images:
        """Return a stage's dataset as its loader reads it: items are (image, place, extra), before any noise.

        Raises:
            RuntimeError: it is not made yet.
        """
        if stage not in self._datasets:
            of = {"train": "fit", "val": "fit"}.get(stage, stage)
            raise RuntimeError(f"data.{stage} is not made yet: call data.setup({of!r}) first, as a Trainer does.")
        return self._datasets[stage][number]

    def clean_images(self, stage: str, count: int) -> Tensor | None:
        images = self.images(stage)
        if is_stream(images.dataset):
            return None
        alike = largest_bucket(images.dataset)
        chosen = spread_indices(len(images) if alike is None else len(alike), count)
        places = [images.place(i if alike is None else int(alike[i])) for i in chosen]
        return collate(images.__getitems__(places)).image

    def _options(self) -> dict[str, Any]:
        # A generator of its own: a DataLoader without one moves torch's global state at every epoch.
        always = {"batch_size": self.batch_size, "collate_fn": collate, "generator": torch.Generator()}
        return {**always, "pin_memory": torch.cuda.is_available(), **self.loader_options}

    def make_loaders(self, stage: str) -> Any:
        if stage != "train":
            return self._evaluation_loaders(stage)
        loader = self._train_loader(self.images("train"))
        self._resume.begin(self.trainer, [loader])
        return loader

    def _train_loader(self, images: Images) -> TrainingLoader:
        options = {"drop_last": self.drop_last, **self._options()}
        overfit = bool(self.trainer and self.trainer.overfit_batches)
        if is_stream(images.dataset):
            check_overfit(overfit, images.name)
            epoch = partial(current_epoch, self.trainer)
            return StreamLoader(Stream(images, **self._ranks(), epoch=epoch, key=self.key), **options)
        ranks = self._ranks()
        chosen = {"shuffle": self.shuffle, "sampler": self.sampler, "shard_window": self.shard_window, "fixed": overfit}
        batch = self.batch_size * ranks["ranks"]
        order = choose_order(images.dataset, images.name, batch, seed=self.seed or 0, **chosen)
        group = self.process.pair.times.together if self.process.pair else 1
        if self.batch_size % group:
            raise refuse("data.batch_size", self.batch_size, f"a multiple of pair.times.group, {group}")
        sampler = (FixedSampler if overfit else EpochSampler)(order, **ranks, group=group)
        if self.drop_last and sampler.num_samples < self.batch_size:
            raise ValueError(
                f"data.drop_last=true leaves no batch to train on: each of {sampler.num_replicas} processes has "
                f"{sampler.num_samples} images, fewer than data.batch_size={self.batch_size}. Set a smaller "
                "data.batch_size, or data.drop_last=false."
            )
        return EpochLoader(images, sampler=sampler, **options)

    def _evaluation_loaders(self, stage: str) -> Any:
        loaders, repeats = [], self.val_repeats if stage == "val" else 1
        for number in range(len(self.sources[stage])):
            images = self.images(stage, number)
            if is_stream(images.dataset):
                stream = Stream(images, **self._ranks(), train=False, key=self.key)
                loaders.append(Loader(stream, **self._options()))
            else:
                sampler = EvaluationSampler(len(images), repeats=repeats, **self._ranks())
                loaders.append(evaluation_loader(images, sampler, stage, images.name, **self._options()))
        return loaders if stage in self.listed else loaders[0]

    def noise(self, batch: Any, *, stage: str = "train", dataset: int = 0) -> Any:
        if not isinstance(batch, Batch) or batch.places[0] is None:
            raise refuse("the batch", type(batch), "one that diffaug's own loaders made; wrap yours with them")
        times = self._val_times if stage == "val" else None
        key = {"seed": self.seed or 0, "stage": stage, "dataset": dataset, "dtype": self._dtype()}
        return self._noiser(batch.image, batch.places[0], batch.extra, times=times, **key)

    wrap = staticmethod(wrap)
