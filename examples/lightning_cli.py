"""diffaug under LightningCLI: schedule, batch size, ... from the command line or from a YAML file of its own.

python examples/lightning_cli.py fit --data.schedule diffaug.LinearBeta --data.schedule.timesteps 100 \
    --trainer.max_steps 200
python examples/lightning_cli.py fit --print_config > run.yaml && python examples/lightning_cli.py fit --config run.yaml

It needs ``pip install "jsonargparse[signatures]"``, as LightningCLI itself does.
"""

import torch
from own_datamodule import Denoiser
from pytorch_lightning.cli import LightningCLI
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from diffaug import Cosine, DiffusionDataModule, ForwardProcess, Schedule


def digits() -> TensorDataset:
    return TensorDataset(torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16)


class Digits(DiffusionDataModule):
    """One's own DataModule: what the command line sets, and nothing else."""

    def __init__(self, schedule: Schedule = Cosine(), batch_size: int = 64) -> None:  # noqa: B008 - frozen
        process = ForwardProcess(schedule, fields=("x_t", "epsilon", "unit"), value_range=(0, 1))
        super().__init__(digits, process=process, batch_size=batch_size)


if __name__ == "__main__":
    LightningCLI(Denoiser, Digits)
