"""Noise: keyed random numbers (`diffaug.noise.philox`) and the kinds of noise made of them (`diffaug.noise.kinds`)."""

from diffaug.noise.kinds import Gaussian as Gaussian
from diffaug.noise.kinds import Noise as Noise
from diffaug.noise.kinds import gaussian as gaussian
