"""The `lightning` package: diffaug's classes for it are in diffaug.lightning, by the same names.

python examples/with_lightning.py --steps 200
"""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from diffaug import Cosine, ForwardProcess
from diffaug.lightning import Denoiser, DiffusionDataModule


class Network(nn.Module):
    """Called as network(x, time), as the Denoiser does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), time[:, None].float()], 1)).view_as(x)


def main(steps: int) -> float:
    L.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    dataset = TensorDataset(x, torch.tensor(labels))
    process = ForwardProcess(Cosine())
    data = DiffusionDataModule(train=dataset, val=dataset, process=process, batch_size=64)
    model = Denoiser(Network(), process, time="unit")
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    return trainer.validate(model, data)[0]["val_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
