"""DiffusionDataModule: any image data in, ``(x_t, epsilon, t)`` on the accelerator out.

dataset item -> the user's transform, still uint8, + its place       in the workers       images, loaders, stream
             -> collate, pin, transfer: a quarter of the bytes
             -> device_transform, encoder, then the ForwardProcess    on_after_batch_transfer      noising, labels
             -> NoisyBatch(x_t, epsilon, t) -> training_step

The user's datasets are in module and sources; another LightningDataModule in wrapped, its loaders in rebuilt, placed.
"""

from diffaug.data.module import DiffusionDataModule as DiffusionDataModule
