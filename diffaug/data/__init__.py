"""DiffusionDataModule: any image data in, ``(x_t, epsilon, t)`` on the accelerator out.

One's own datasets (module), streams of them (stream), or another LightningDataModule (wrapped, whose loaders rebuilt
makes again with places); what is done to a batch on its device is in noising.
"""

from diffaug.data.module import DiffusionDataModule as DiffusionDataModule
