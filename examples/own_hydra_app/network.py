"""The application's own model and dataset."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def digits() -> TensorDataset:
    return TensorDataset(torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16)


class Denoiser(pl.LightningModule):
    """Guesses the noise in 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 64))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x_t, epsilon, unit = batch
        guess = self.layers(torch.cat([x_t.flatten(1), unit[:, None].float()], 1)).view_as(x_t)
        return (guess - epsilon).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
