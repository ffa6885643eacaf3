"""diffaug: data augmentation for diffusion models.

A transform, `ForwardProcess`, and the LightningDataModule that applies it, `DiffusionDataModule`: any image dataset
in, ``(x_t, epsilon, t)`` on the accelerator out.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import diffaug.registration  # so that Hydra finds the package's configs
from diffaug.noise import Gaussian as Gaussian
from diffaug.noise import Immiscible as Immiscible
from diffaug.noise import InputPerturbation as InputPerturbation
from diffaug.noise import Noise as Noise
from diffaug.noise import Offset as Offset
from diffaug.noise import Pyramid as Pyramid
from diffaug.noise import StudentT as StudentT
from diffaug.process import ForwardProcess as ForwardProcess
from diffaug.process import NoisyBatch as NoisyBatch
from diffaug.schedules import EDM as EDM
from diffaug.schedules import VE as VE
from diffaug.schedules import VPSDE as VPSDE
from diffaug.schedules import Cosine as Cosine
from diffaug.schedules import Discretised as Discretised
from diffaug.schedules import InterpolatedShift as InterpolatedShift
from diffaug.schedules import Inverse as Inverse
from diffaug.schedules import Laplace as Laplace
from diffaug.schedules import LinearAlpha as LinearAlpha
from diffaug.schedules import LinearBeta as LinearBeta
from diffaug.schedules import LinearLogSNR as LinearLogSNR
from diffaug.schedules import OptimalTransport as OptimalTransport
from diffaug.schedules import Polynomial as Polynomial
from diffaug.schedules import Rectified as Rectified
from diffaug.schedules import Respaced as Respaced
from diffaug.schedules import ScaledLinearBeta as ScaledLinearBeta
from diffaug.schedules import Schedule as Schedule
from diffaug.schedules import Shifted as Shifted
from diffaug.schedules import ShiftedByTokens as ShiftedByTokens
from diffaug.schedules import SigmoidAlphaBar as SigmoidAlphaBar
from diffaug.schedules import SigmoidBeta as SigmoidBeta
from diffaug.schedules import SubVPSDE as SubVPSDE
from diffaug.schedules import Tabulated as Tabulated
from diffaug.schedules import Trigonometric as Trigonometric
from diffaug.schedules import Truncated as Truncated
from diffaug.schedules import ZeroTerminalSNR as ZeroTerminalSNR
from diffaug.targets import ELBO as ELBO
from diffaug.targets import P2 as P2
from diffaug.targets import CosMap as CosMap
from diffaug.targets import Debiased as Debiased
from diffaug.targets import EDMWeight as EDMWeight
from diffaug.targets import FusedSNR as FusedSNR
from diffaug.targets import MinSNR as MinSNR
from diffaug.targets import Pair as Pair
from diffaug.targets import SigmaSqrt as SigmaSqrt
from diffaug.targets import SigmoidWeight as SigmoidWeight
from diffaug.targets import SNRWeight as SNRWeight
from diffaug.targets import SoftMinSNR as SoftMinSNR
from diffaug.targets import TruncatedSNR as TruncatedSNR
from diffaug.targets import Unweighted as Unweighted
from diffaug.targets import Weight as Weight
from diffaug.targets import convert as convert
from diffaug.times import Antithetic as Antithetic
from diffaug.times import Beta as Beta
from diffaug.times import Biased as Biased
from diffaug.times import ContextParts as ContextParts
from diffaug.times import Coverage as Coverage
from diffaug.times import Cubic as Cubic
from diffaug.times import Importance as Importance
from diffaug.times import Independent as Independent
from diffaug.times import IndependentParts as IndependentParts
from diffaug.times import LogitNormal as LogitNormal
from diffaug.times import LogLogistic as LogLogistic
from diffaug.times import LogNormal as LogNormal
from diffaug.times import LogUniform as LogUniform
from diffaug.times import MixedTimes as MixedTimes
from diffaug.times import Mode as Mode
from diffaug.times import MonotoneParts as MonotoneParts
from diffaug.times import Parts as Parts
from diffaug.times import PerImage as PerImage
from diffaug.times import PlateauLogitNormal as PlateauLogitNormal
from diffaug.times import SharedParts as SharedParts
from diffaug.times import Sobol as Sobol
from diffaug.times import SplitLogNormal as SplitLogNormal
from diffaug.times import Stepwise as Stepwise
from diffaug.times import Stratified as Stratified
from diffaug.times import Times as Times
from diffaug.times import TwoLevelParts as TwoLevelParts
from diffaug.times import Uniform as Uniform
from diffaug.times import VDiffusion as VDiffusion

diffaug.registration.register_configs()

if TYPE_CHECKING:
    from diffaug.datasets.bucketed import Bucketed as Bucketed
    from diffaug.datasets.buckets import Buckets as Buckets
    from diffaug.datasets.folder import ImageFolder as ImageFolder
    from diffaug.datasets.mixture import Mixture as Mixture
    from diffaug.pytorch_lightning import DiffusionDataModule as DiffusionDataModule

_WHEN_ASKED_FOR = {
    "Bucketed": "diffaug.datasets.bucketed",
    "Buckets": "diffaug.datasets.buckets",
    "DiffusionDataModule": "diffaug.pytorch_lightning",
    "ImageFolder": "diffaug.datasets.folder",
    "Mixture": "diffaug.datasets.mixture",
}
"""What is imported only then: Lightning takes seconds, and a ForwardProcess needs none."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module 'diffaug' has no attribute {name!r}")
    return getattr(import_module(_WHEN_ASKED_FOR[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHEN_ASKED_FOR})


__version__ = "0.2.0"
