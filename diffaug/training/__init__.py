"""The training job of train.py: network, pictures, metrics, loss by noise level, checkpoints, sweeps.

None of it is needed to use the DataModule in a job of one's own.
"""

from diffaug.training.callbacks import Pictures as Pictures
from diffaug.training.callbacks import Progress as Progress
from diffaug.training.callbacks import RunLogger as RunLogger
from diffaug.training.callbacks import Summary as Summary
from diffaug.training.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
from diffaug.training.denoiser import Denoiser as Denoiser
from diffaug.training.last_checkpoint import LastCheckpoint as LastCheckpoint
from diffaug.training.loss_by_level import LossByLevel as LossByLevel
