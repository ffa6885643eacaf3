"""Schedules: how signal turns into noise with t. See `diffaug.schedules.base` for the one interface."""

from diffaug.schedules.base import BetaSchedule as BetaSchedule
from diffaug.schedules.base import Schedule as Schedule
from diffaug.schedules.continuous import Rectified as Rectified
from diffaug.schedules.discrete import Cosine as Cosine
from diffaug.schedules.discrete import LinearBeta as LinearBeta
from diffaug.schedules.discrete import ScaledLinearBeta as ScaledLinearBeta
