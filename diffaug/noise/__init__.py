"""Noise: the kinds of epsilon, made of keyed random numbers (`diffaug.randomness.philox`)."""

from diffaug.noise.kinds import Gaussian as Gaussian
from diffaug.noise.kinds import Immiscible as Immiscible
from diffaug.noise.kinds import InputPerturbation as InputPerturbation
from diffaug.noise.kinds import Noise as Noise
from diffaug.noise.kinds import Offset as Offset
from diffaug.noise.kinds import StudentT as StudentT
from diffaug.noise.kinds import gaussian as gaussian
from diffaug.noise.pyramid import Pyramid as Pyramid
