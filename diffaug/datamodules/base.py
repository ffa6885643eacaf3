"""NoisingBase: what the DataModules share, process, seed, ranks, backend, recipe, state.

The classes of this room know no Lightning: `diffaug.pytorch_lightning` and `diffaug.lightning` join each with the
LightningDataModule of their package. So one and the same code runs under both, and ForwardProcess under neither.
"""

import inspect
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from diffaug.checks import flag, integer, refuse
from diffaug.datamodules.lightning_packages import check_trainer, refuse_as_loader
from diffaug.datamodules.progress import count_done, read_progress
from diffaug.datamodules.recipe import check_recipe, describe
from diffaug.datamodules.resume import Resume
from diffaug.datamodules.stage_loaders import StageLoaders
from diffaug.images.aligned import Aligned
from diffaug.on_device.condition_noise import ConditionNoise
from diffaug.on_device.holes import Hole
from diffaug.on_device.labels import LabelDropout
from diffaug.on_device.noiser import Noiser
from diffaug.on_device.posterior import Posterior
from diffaug.process import ForwardProcess
from diffaug.process.compiler import COMPILE_ELEMENTS
from diffaug.randomness.keys import STAGES

_log = logging.getLogger("diffaug")
_STAGE_OF = {"train": "train", "sanity_check": "val", "validate": "val", "test": "test", "predict": "predict"}
STAGES_OF_SETUP = {
    None: tuple(STAGES),
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
_UNSETTLED = "not settled"
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


class NoisingBase(ABC):
    """What a LightningDataModule needs so that its batches are noised on their device.

    Arguments:
        process: what is done to a batch.
        seed: of all draws, in [0, 2^64). None takes that of Lightning's ``seed_everything``, or else 0.
        device_transform: applied to each training batch of images on the accelerator, before the noise. What it draws
            repeats with the same batches; a sample's noise does not depend on its batch, what is drawn here does.
            Where ``images`` declares several it is given a dict of them, as `diffaug.images.aligned` says.
        encoder: applied to every batch of every stage on the accelerator, last before the noise: from float images in
            [-1, 1] to latents, which are noised as they are, or to a distribution of latents with ``mean`` and ``std``.
            A torch.nn.Module is moved there, in evaluation mode; one with a method ``encode``, as a diffusers VAE, is
            called by that.
        posterior: what is taken of such a distribution: "sample", a draw of its own for each visit and view of an
            image, keyed as the noise is; "fixed", one draw for each image; "mean".
        latent_stats: the latents' ``mean`` and ``std`` over the dataset, a number for each channel: with them latents
            are brought to mean 0 and the standard deviation ``process.sigma_data``. A store brings its own.
        label_dropout: the share of the training labels that are dropped, for classifier-free guidance.
        null_label: what stands for a dropped label.
        label_key: which field is the label.
        image_key: which part of an item is the image: a name, or a place in a tuple. None where there is only one.
        images: which parts of an item are images that transforms flip and crop together: a role for each by its name,
            "target" for the one to noise, "condition" (a field in [-1, 1], scaled as the target is) or "mask" (a field
            as it is), or a dict of it and of ``scale``, how many times the target's height and width it has in a batch,
            and ``value_range``, what its numbers span: {"role": "condition", "scale": 0.25, "value_range": [0, 1]}.
            None says nothing: then an item with several images and a transform is refused.
        condition_noise: a ForwardProcess for each condition that is noised too, by its name; its time is then a field
            named likewise with ``_t`` behind.
        hole: a mask for inpainting, drawn for each image and view, of `diffaug.on_device.holes`: the fields ``hole``
            and ``known``.
        views: how many noised copies of each training image a batch holds, side by side; it is decoded once.
        allow_changed_recipe: whether a checkpoint of another schedule, seed, ... may be gone on from.

    Attributes:
        trainer: the Trainer it is given to, of the package of its own LightningDataModule; None outside of one.
        stages: those it has data of: among "train", "val", "test", "predict".
    """

    _trainer: Any = None
    stages: tuple[str, ...] = ()
    train_dataloader = StageLoaders()
    val_dataloader = StageLoaders()
    test_dataloader = StageLoaders()
    predict_dataloader = StageLoaders()

    def __init__(
        self,
        process: ForwardProcess,
        *,
        seed: int | None = None,
        device_transform: Callable[[Any], Any] | None = None,
        encoder: Callable[[Tensor], Any] | None = None,
        posterior: str = "sample",
        latent_stats: Mapping[str, Any] | None = None,
        label_dropout: float = 0.0,
        null_label: Any = None,
        label_key: str = "label",
        image_key: str | int | None = None,
        images: Mapping[str, str | Mapping[str, Any]] | None = None,
        condition_noise: Mapping[str, ForwardProcess] | None = None,
        hole: Hole | None = None,
        views: int = 1,
        allow_changed_recipe: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(process, ForwardProcess):
            raise refuse("process", process, "a ForwardProcess")
        self.process = process
        self._given_seed = seed if seed is None else integer("data.seed", seed, 0, 2**64 - 1)
        self.seed = self._given_seed
        self.aligned = Aligned(images, image_key)
        self._noiser = Noiser(
            process,
            device_transform=device_transform,
            encoder=encoder,
            posterior=Posterior(posterior, latent_stats, process.sigma_data),
            views=views,
            dropout=LabelDropout(label_dropout, null_label, label_key, process.fields),
            aligned=self.aligned,
            condition_noise=ConditionNoise(condition_noise, self.aligned.conditions),
            hole=hole,
        )
        self.views, self.device_transform = self._noiser.views, device_transform
        self.allow_changed_recipe = flag("data.allow_changed_recipe", allow_changed_recipe)
        self.backend = _UNSETTLED
        self._done_before = -1  # how many batches were done as the last one came
        self._resume = Resume(allow_changed_recipe)

    @property
    def trainer(self) -> Any:
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        check_trainer(self, trainer)
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        """Refuse to be gone through: a Trainer that takes this for a loader is another package's."""
        raise refuse_as_loader(self)

    def _begin_setup(self, stage: str | None) -> None:
        """Take what is this run's and no earlier one's: the seed, a place to begin, an empty table of losses."""
        if self._given_seed is None:
            from_lightning = os.environ.get("PL_GLOBAL_SEED")
            self.seed = int(from_lightning or 0)
            _log.info("seed %d, %s", self.seed, "seed_everything's" if from_lightning else "as none was given")
        elif self.backend == _UNSETTLED:
            _log.info("seed %d", self.seed)
        if getattr(stage, "value", stage) in (None, "fit"):
            self._resume.begin_fit()
            if self.trainer and read_progress(self.trainer) == (0, 0):
                self.process.times.clear()

    def _settle_backend(self, stage: str | None, example: Tensor | None) -> None:
        """Try the compiled pass, and use it on all ranks or on none.

        Compiled and eager noise differ in the last bit, so which it is must not depend on the rank. It is settled
        before training and not at a first batch, which a rank with too little data never has.

        Arguments:
            stage: of Lightning's setup; None is all.
            example: one image as the process gets it, (1, *); None where that is not known yet.
        """
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        parts = self.process.parts
        shape = (1, 3, 32, 32) if parts is None else parts.example()
        image = torch.zeros(shape, dtype=torch.uint8, device="cpu") if example is None else example
        wanted = self.process.compiles(device, image.numel())
        works = wanted and self.process.can_compile(image.to(device), self._dtype(), self._batch_sizes(stage))
        if self.trainer:
            everywhere = self.trainer.strategy.reduce_boolean_decision(works, all=True)
            if works and not everywhere:
                _log.warning("another rank cannot compile the forward process: all ranks take the eager path")
            works = everywhere
        if wanted and not works:
            self._noiser.eager = True
        before, self.backend = self.backend, f"{device.type}, {'compiled' if works else 'eager'}"
        if works and example is None and self.process.compile_mode == "auto":
            self.backend += f" where a sample has {COMPILE_ELEMENTS} elements or more"
        if self.backend != before:  # setup runs once for each stage
            _log.info("the forward process runs on %s", self.backend)

    def _batch_sizes(self, stage: str | None) -> dict[str, set[int]]:
        """Return the stages of a setup, and the sizes of batch that are known to come in each, views counted."""
        return {name: set() for name in STAGES_OF_SETUP[getattr(stage, "value", stage)] if name in self.stages}

    def _ranks(self) -> dict[str, Any]:
        """Return the data-parallel rank and world size; model-parallel ranks count as one."""
        shared = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return {"rank": shared["rank"], "ranks": shared["num_replicas"]} if shared else {"rank": 0, "ranks": 1}

    @property
    def encodes(self) -> bool:
        """Whether an encoder makes latents of the dataset's images."""
        return self._noiser.encoder is not None

    @property
    def latents(self) -> bool:
        """Whether what is noised are latents, which have no range, and not images in [-1, 1]."""
        return self.encodes or self.process.value_range is None

    def _stage(self) -> str:
        return _STAGE_OF[self.trainer.state.stage.value] if self.trainer and self.trainer.state.stage else "train"

    def _dtype(self) -> torch.dtype | None:
        return _DTYPES.get(str(self.trainer.precision)) if self.trainer else None

    @abstractmethod
    def make_loaders(self, stage: str) -> Any:
        """Make the loaders of a stage: one, or as many as it has datasets."""

    @abstractmethod
    def clean_images(self, stage: str, count: int) -> Tensor | None:
        """Return up to so many images of a stage, spread evenly over it, on the CPU; None for a stream."""

    @abstractmethod
    def noise(self, batch: Any, *, stage: str = "train", dataset: int = 0) -> Any:
        """Noise a batch of the DataModule's own loaders, as a Trainer has it done; for use without one.

        Returns:
            A named tuple of the process's fields, or a nest of them where several loaders are gone through side by
            side.
        """

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Noise a batch on its device."""
        stage = self._stage()
        if stage == "train" and self.trainer:
            done = count_done(self.trainer)
            self.process.times.begin_batch(again=done == self._done_before)
            self._done_before = done
            self._resume.begin_batch()
        return self.noise(batch, stage=stage, dataset=dataloader_idx)

    def plot(self, batch: Any, count: int = 8) -> Any:
        """Draw a noised batch, with the x_0 in it: ``data.plot(batch).save("batch.png")``."""
        from diffaug import plots

        return plots.batch(self.process, batch, count=count)

    def recipe(self) -> dict[str, Any]:
        """Return what this run trains on, in plain types: kept in checkpoints, compared on a resume."""
        return {
            "seed": self.seed or 0,
            "schedule": repr(self.process.schedule),
            "times": repr(self.process.times),
            "noise": repr(self.process.noise),
            "target": self.process.target,
            "weight": repr(self.process.weight),
            "sigma_data": self.process.sigma_data,
            "value_range": self.process.value_range and list(self.process.value_range),
            "pair": repr(self.process.pair),
            "parts": repr(self.process.parts),
            "fields": list(self.process.fields),
            "views": self.views,
            "device_transform": describe(self.device_transform),
            "encoder": describe(self._noiser.encoder),
            "posterior": self._noiser.posterior.kind,
            "latent_stats": self._noiser.posterior.stats,
            "image_key": self.aligned.target,
            "images": self.aligned.roles,
            "hole": repr(self._noiser.hole),
            "condition_noise": repr(self._noiser.condition_noise.processes),
            "label_dropout": self._noiser.dropout.rate,
            "null_label": repr(self._noiser.dropout.null),
        }

    def state_dict(self) -> dict[str, Any]:
        progress = self._resume.state(self.trainer) if self.trainer else None
        unfinished = self.trainer is not None and count_done(self.trainer) == self._done_before
        times = self.process.times.state_dict(unfinished=unfinished)
        return {"recipe": self.recipe(), "progress": progress, "times": times, "backend": self.backend}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer and self.trainer.state.fn not in (None, "fit"):
            return  # its weights are wanted, not its training
        check_recipe(self.recipe(), state_dict.get("recipe", {}), self.allow_changed_recipe)
        if state_dict.get("progress"):
            self._resume.load(state_dict["progress"])
        earlier = state_dict.get("backend", self.backend)
        if earlier != self.backend != _UNSETTLED:  # which it is where only the state is read, without a Trainer
            _log.warning(
                "this run was on %s and goes on on %s: its noise agrees with what it would have been to 1e-6 of its "
                "scale, not bit for bit",
                earlier,
                self.backend,
            )
        if state_dict.get("times"):
            self.process.times.load_state_dict(state_dict["times"])


OPTIONS = tuple(inspect.signature(NoisingBase).parameters)[1:]
"""The names of the options that both DataModules take."""
