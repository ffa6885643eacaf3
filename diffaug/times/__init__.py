"""Times: the density of t (`diffaug.times.densities`), its coverage (`diffaug.times.coverage`), and times of parts
(`diffaug.times.parts`)."""

from diffaug.times.coverage import Antithetic as Antithetic
from diffaug.times.coverage import ByIndex as ByIndex
from diffaug.times.coverage import Coverage as Coverage
from diffaug.times.coverage import Fixed as Fixed
from diffaug.times.coverage import Grid as Grid
from diffaug.times.coverage import Independent as Independent
from diffaug.times.coverage import PerImage as PerImage
from diffaug.times.coverage import Sobol as Sobol
from diffaug.times.coverage import Stratified as Stratified
from diffaug.times.densities import LevelTimes as LevelTimes
from diffaug.times.densities import Times as Times
from diffaug.times.densities import Uniform as Uniform
from diffaug.times.densities import UnitTimes as UnitTimes
from diffaug.times.importance import Importance as Importance
from diffaug.times.level_densities import LaplaceLogSNR as LaplaceLogSNR
from diffaug.times.level_densities import LogLogistic as LogLogistic
from diffaug.times.level_densities import LogNormal as LogNormal
from diffaug.times.level_densities import LogUniform as LogUniform
from diffaug.times.level_densities import SplitLogNormal as SplitLogNormal
from diffaug.times.level_densities import VDiffusion as VDiffusion
from diffaug.times.mixed import MixedTimes as MixedTimes
from diffaug.times.parts import ContextParts as ContextParts
from diffaug.times.parts import IndependentParts as IndependentParts
from diffaug.times.parts import MonotoneParts as MonotoneParts
from diffaug.times.parts import PartLaw as PartLaw
from diffaug.times.parts import Parts as Parts
from diffaug.times.parts import SharedParts as SharedParts
from diffaug.times.parts import TwoLevelParts as TwoLevelParts
from diffaug.times.unit_densities import Beta as Beta
from diffaug.times.unit_densities import Biased as Biased
from diffaug.times.unit_densities import Cubic as Cubic
from diffaug.times.unit_densities import LogitNormal as LogitNormal
from diffaug.times.unit_densities import Mode as Mode
from diffaug.times.unit_densities import PlateauLogitNormal as PlateauLogitNormal
from diffaug.times.unit_densities import Stepwise as Stepwise
