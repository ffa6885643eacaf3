"""What a Trainer can do for a diffusion run: pictures, a summary, metrics, and the loss by noise level."""

from diffaug.callbacks.levels import LossByLevel as LossByLevel
from diffaug.callbacks.run import Pictures as Pictures
from diffaug.callbacks.run import Progress as Progress
from diffaug.callbacks.run import RunLogger as RunLogger
from diffaug.callbacks.run import Summary as Summary
