"""The forward process: `ForwardProcess` (forward, closed_form), its passes (kernel, whole), the chain, the density."""

from diffaug.process.batch import NoisyBatch as NoisyBatch
from diffaug.process.chain import Posterior as Posterior
from diffaug.process.forward import ForwardProcess as ForwardProcess
