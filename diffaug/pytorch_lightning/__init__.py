"""diffaug's classes for Trainers of `pytorch_lightning`.

Those for `lightning` are in `diffaug.lightning`, alike.

Each joins a base, which has all the code and the docstring, with the class of the package that it must be of.
"""

# pyright: reportIncompatibleVariableOverride=false
# For Lightning ``trainer`` is a variable, for us a property, which refuses a Trainer of the other package.

from functools import partial

import pytorch_lightning as pl
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import CSVLogger

from diffaug.datamodules import catalogue
from diffaug.datamodules.module import DiffusionBase
from diffaug.datamodules.wrapped import WrappedBase
from diffaug.encoding.writing import EncodingBase
from diffaug.training.callbacks import PicturesBase, ProgressBase, SummaryBase
from diffaug.training.checkpoint_io import AtomicCheckpointIOBase
from diffaug.training.denoiser import DenoiserBase
from diffaug.training.last_checkpoint import LastCheckpointBase
from diffaug.training.loss_by_level import LossByLevelBase
from diffaug.training.run_logger import RunLoggerBase


class DiffusionDataModule(DiffusionBase, pl.LightningDataModule): ...


class WrappedDataModule(WrappedBase, pl.LightningDataModule): ...


class Denoiser(DenoiserBase, pl.LightningModule): ...


class Encoding(EncodingBase, pl.LightningModule): ...


class LossByLevel(LossByLevelBase, pl.Callback): ...


class LastCheckpoint(LastCheckpointBase, Checkpoint): ...


class Pictures(PicturesBase, pl.Callback): ...


class Progress(ProgressBase, pl.Callback): ...


class Summary(SummaryBase, pl.Callback): ...


class RunLogger(RunLoggerBase, CSVLogger): ...


class AtomicCheckpointIO(AtomicCheckpointIOBase, TorchCheckpointIO): ...


digits = partial(catalogue.digits, DiffusionDataModule)
moving_digits = partial(catalogue.moving_digits, DiffusionDataModule)
torchvision = partial(catalogue.torchvision, DiffusionDataModule)
image_folder = partial(catalogue.image_folder, DiffusionDataModule)
store = partial(catalogue.store, DiffusionDataModule)
"""The data of configs/data/, as functions that make a DiffusionDataModule."""
