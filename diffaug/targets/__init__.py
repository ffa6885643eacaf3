"""Targets, fields and loss weights: what a network is given and asked for, and how much an error weighs.

``fields`` (everything a batch can hold), ``conversions`` (from one target to another), ``weight`` and ``weight_kinds``
(of the loss), ``pairs`` (two or three states of one image; their times are laws of `diffaug.times`).
"""

from diffaug.schedules.level import SIGMA_DATA as SIGMA_DATA
from diffaug.schedules.level import Level as Level
from diffaug.targets.conversions import as_input as as_input
from diffaug.targets.conversions import check_target as check_target
from diffaug.targets.conversions import convert as convert
from diffaug.targets.conversions import convertible as convertible
from diffaug.targets.conversions import recover as recover
from diffaug.targets.fields import FIELDS as FIELDS
from diffaug.targets.fields import IMAGE_FIELDS as IMAGE_FIELDS
from diffaug.targets.fields import INPUTS as INPUTS
from diffaug.targets.fields import NUMBER_FIELDS as NUMBER_FIELDS
from diffaug.targets.fields import PAIR_FIELDS as PAIR_FIELDS
from diffaug.targets.fields import PAIR_STATES as PAIR_STATES
from diffaug.targets.fields import TARGETS as TARGETS
from diffaug.targets.fields import THIRD_FIELDS as THIRD_FIELDS
from diffaug.targets.fields import mix_table as mix_table
from diffaug.targets.fields import mixes as mixes
from diffaug.targets.fields import number_field as number_field
from diffaug.targets.pairs import Pair as Pair
from diffaug.targets.weight import Weight as Weight
from diffaug.targets.weight_kinds import ELBO as ELBO
from diffaug.targets.weight_kinds import P2 as P2
from diffaug.targets.weight_kinds import CosMap as CosMap
from diffaug.targets.weight_kinds import Debiased as Debiased
from diffaug.targets.weight_kinds import EDMWeight as EDMWeight
from diffaug.targets.weight_kinds import FusedSNR as FusedSNR
from diffaug.targets.weight_kinds import MinSNR as MinSNR
from diffaug.targets.weight_kinds import SigmaSqrt as SigmaSqrt
from diffaug.targets.weight_kinds import SigmoidWeight as SigmoidWeight
from diffaug.targets.weight_kinds import SNRWeight as SNRWeight
from diffaug.targets.weight_kinds import SoftMinSNR as SoftMinSNR
from diffaug.targets.weight_kinds import TruncatedSNR as TruncatedSNR
from diffaug.targets.weight_kinds import Unweighted as Unweighted
