"""Schedules: how signal turns into noise with t. `diffaug.schedules.base` holds the interface, and how to add one."""

from diffaug.schedules.base import BetaSchedule as BetaSchedule
from diffaug.schedules.base import Scaling as Scaling
from diffaug.schedules.base import Schedule as Schedule
from diffaug.schedules.continuous import EDM as EDM
from diffaug.schedules.continuous import VE as VE
from diffaug.schedules.continuous import VPSDE as VPSDE
from diffaug.schedules.continuous import LinearLogSNR as LinearLogSNR
from diffaug.schedules.continuous import Rectified as Rectified
from diffaug.schedules.continuous import Trigonometric as Trigonometric
from diffaug.schedules.discrete import Cosine as Cosine
from diffaug.schedules.discrete import Inverse as Inverse
from diffaug.schedules.discrete import Laplace as Laplace
from diffaug.schedules.discrete import LinearBeta as LinearBeta
from diffaug.schedules.discrete import ScaledLinearBeta as ScaledLinearBeta
from diffaug.schedules.discrete import SigmoidAlphaBar as SigmoidAlphaBar
from diffaug.schedules.discrete import SigmoidBeta as SigmoidBeta
from diffaug.schedules.subsets import Respaced as Respaced
from diffaug.schedules.subsets import Truncated as Truncated
from diffaug.schedules.tabulated import Tabulated as Tabulated
from diffaug.schedules.wrappers import Discretised as Discretised
from diffaug.schedules.wrappers import InterpolatedShift as InterpolatedShift
from diffaug.schedules.wrappers import Shifted as Shifted
from diffaug.schedules.wrappers import Wrapper as Wrapper
from diffaug.schedules.wrappers import ZeroTerminalSNR as ZeroTerminalSNR
