"""diffaug: data augmentation for diffusion models.

A transform, `ForwardProcess`, and the LightningDataModule that applies it, `DiffusionDataModule`: any image dataset
in, ``(x_t, epsilon, t)`` on the accelerator out.
"""

import diffaug.config  # so that Hydra finds the package's configs
from diffaug.data import DiffusionDataModule as DiffusionDataModule
from diffaug.process import ForwardProcess as ForwardProcess
from diffaug.process import NoisyBatch as NoisyBatch
from diffaug.schedules import Cosine as Cosine
from diffaug.schedules import LinearBeta as LinearBeta
from diffaug.schedules import Rectified as Rectified
from diffaug.schedules import ScaledLinearBeta as ScaledLinearBeta
from diffaug.schedules import Schedule as Schedule
from diffaug.times import Times as Times
from diffaug.times import Uniform as Uniform
