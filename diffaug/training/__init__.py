"""The training job of train.py: network, pictures, metrics, loss by noise level, checkpoints, sweeps.

None of it is needed to use the DataModule in a job of one's own. The classes here lack their Lightning base:
`diffaug.pytorch_lightning` and `diffaug.lightning` have them with it.
"""
