"""Checkpoints that an interruption cannot spoil: written whole or not at all, often enough, and read only if whole."""

from diffaug.checkpoints.files import AtomicCheckpointIO as AtomicCheckpointIO
from diffaug.checkpoints.last import LastCheckpoint as LastCheckpoint
