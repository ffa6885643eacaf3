"""Stores: datasets prepared once, in large files that are mapped into memory.

`layout` is how a store lies on the disk, `shards` writes it, `reader` reads it; of latents, `moments` is what an
encoder makes of a batch, and `latents` the rows and sums that are kept of that.
"""

from diffaug.store.moments import Moments, Stored
from diffaug.store.reader import Store

__all__ = ["Moments", "Store", "Stored"]
