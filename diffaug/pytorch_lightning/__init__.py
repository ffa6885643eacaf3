"""diffaug's classes for Trainers of `pytorch_lightning`.

Those for `lightning` are in `diffaug.lightning`, alike.

Each joins a base, which has all the code, with the class of the package that it must be of.
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
from diffaug.encoding.module import EncodingBase
from diffaug.training.callbacks import PicturesBase, ProgressBase, SummaryBase
from diffaug.training.checkpoint_io import AtomicCheckpointIOBase
from diffaug.training.denoiser import DenoiserBase
from diffaug.training.last_checkpoint import LastCheckpointBase
from diffaug.training.loss_by_level import LossByLevelBase
from diffaug.training.run_logger import RunLoggerBase


class DiffusionDataModule(DiffusionBase, pl.LightningDataModule):
    __doc__ = DiffusionBase.__doc__


class WrappedDataModule(WrappedBase, pl.LightningDataModule):
    __doc__ = WrappedBase.__doc__


class Denoiser(DenoiserBase, pl.LightningModule):
    __doc__ = DenoiserBase.__doc__


class Encoding(EncodingBase, pl.LightningModule):
    __doc__ = EncodingBase.__doc__


class LossByLevel(LossByLevelBase, pl.Callback):
    __doc__ = LossByLevelBase.__doc__


class LastCheckpoint(LastCheckpointBase, Checkpoint):
    __doc__ = LastCheckpointBase.__doc__


class Pictures(PicturesBase, pl.Callback):
    __doc__ = PicturesBase.__doc__


class Progress(ProgressBase, pl.Callback):
    __doc__ = ProgressBase.__doc__


class Summary(SummaryBase, pl.Callback):
    __doc__ = SummaryBase.__doc__


class RunLogger(RunLoggerBase, CSVLogger):
    __doc__ = RunLoggerBase.__doc__


class AtomicCheckpointIO(AtomicCheckpointIOBase, TorchCheckpointIO):
    __doc__ = AtomicCheckpointIOBase.__doc__


digits = partial(catalogue.digits, DiffusionDataModule)
moving_digits = partial(catalogue.moving_digits, DiffusionDataModule)
torchvision = partial(catalogue.torchvision, DiffusionDataModule)
image_folder = partial(catalogue.image_folder, DiffusionDataModule)
"""The data of configs/data/, as functions that make a DiffusionDataModule."""
store = partial(catalogue.store, DiffusionDataModule)
