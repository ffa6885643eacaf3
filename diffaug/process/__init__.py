"""The forward process: `ForwardProcess` (forward, closed_form), how it draws (drawing, coefficients), the one pass over
the pixels (kernel, compiler), the chain of single steps (chain), and what a recipe trains on (density).
"""

from diffaug.process.batch import NoisyBatch as NoisyBatch
from diffaug.process.chain import Posterior as Posterior
from diffaug.process.forward import ForwardProcess as ForwardProcess
