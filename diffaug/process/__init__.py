"""The forward process: `ForwardProcess` (forward, closed_form), its passes (kernel, general), its chain and density."""

from diffaug.process.batch import NoisyBatch as NoisyBatch
from diffaug.process.chain import Posterior as Posterior
from diffaug.process.forward import ForwardProcess as ForwardProcess
