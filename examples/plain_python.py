"""Train a noise predictor without Lightning's Trainer and without Hydra: a loop, a network, a ForwardProcess.

python examples/plain_python.py --steps 200
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diffaug import Cosine, ForwardProcess


class Network(nn.Module):
    """Guesses the noise in 8x8 images: a few layers on the pixels and the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64))

    def forward(self, x_t: Tensor, unit: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t.flatten(1), unit[:, None].float()], 1)).view_as(x_t)


def main(steps: int) -> float:
    torch.manual_seed(0)  # of the network; the noise has the seed of its own below
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), in [0, 16]
    process = ForwardProcess(Cosine(), fields=("x_t", "epsilon", "unit"), value_range=(0, 16))
    loader = DataLoader(TensorDataset(images, torch.arange(len(images))), batch_size=64, shuffle=True)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    step, epoch, loss = 0, 0, torch.zeros(())
    while step < steps:
        for x_0, index in loader:
            x_t, epsilon, unit = process(x_0, index, seed=0, epoch=epoch)
            loss = (network(x_t, unit) - epsilon).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
        epoch += 1
    print(f"step {step}: loss {loss:.3f}")
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
