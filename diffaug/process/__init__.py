"""The forward process: `ForwardProcess` (forward), the batches it makes (batch), and the chain behind it (chain)."""

from diffaug.process.batch import NoisyBatch as NoisyBatch
from diffaug.process.chain import Posterior as Posterior
from diffaug.process.forward import ForwardProcess as ForwardProcess
