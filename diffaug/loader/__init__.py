"""Loaders: samples, asked for by Place in the workers, joined into batches.

`dataset` asks for an item and transforms it (`stream` where it is only iterated), `batch` joins items with their
places; `training` has the loader that can begin inside an epoch, `evaluation` the one that sees each sample once.
"""
