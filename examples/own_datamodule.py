"""A LightningDataModule that knows nothing of diffusion, wrapped.

python examples/own_datamodule.py --steps 200
"""

import argparse

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from diffaug import Cosine, DiffusionDataModule, ForwardProcess


class Digits(pl.LightningDataModule):
    """An ordinary DataModule, as there are many."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        dataset = TensorDataset(x, torch.tensor(labels))
        self.train, self.val = random_split(dataset, [0.9, 0.1], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class Denoiser(pl.LightningModule):
    """Guesses the noise; its training_step receives what ``fields`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        x_t, epsilon, unit = batch
        guess = self.layers(torch.cat([x_t.flatten(1), unit[:, None].float()], 1)).view_as(x_t)
        return (guess - epsilon).square().mean()

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int) -> float:
    pl.seed_everything(0)
    process = ForwardProcess(Cosine(), fields=("x_t", "epsilon", "unit"), value_range=(0, 1))
    data = DiffusionDataModule.wrap(Digits(), process)
    trainer = pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    model = Denoiser()
    trainer.fit(model, data)
    return trainer.validate(model, data)[0]["val_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
