"""Three training steps on a GPU under torch's profiler: is the transfer overlapped, does anything wait?

    python benchmarks/trace.py OUT.json

It prints the calls that wait for the device and the copies, and leaves a trace for chrome://tracing. Written without a
GPU, and not run on one. (Where there is none it runs on the CPU, which tries the script and shows nothing.)
"""

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 3, 3, padding=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.convolution(batch.x_t) - batch.epsilon).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(steps: int) -> None:
    images = TensorDataset(torch.randint(0, 256, (64 * steps, 3, 256, 256), dtype=torch.uint8))
    data = DiffusionDataModule(images, process=ForwardProcess(LinearBeta()), batch_size=64, pin_memory=True, seed=0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="auto", devices=1, max_steps=steps, **options).fit(Model(), data)


def main() -> None:
    fit(3)  # compiles
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fit(3)
    profiler.export_chrome_trace(sys.argv[1])
    for event in profiler.key_averages():
        if any(word in event.key for word in ("Synchronize", "Memcpy", "aten::item", "_local_scalar_dense")):
            print(f"{event.key}: {event.count} times, {event.cpu_time_total / 1e3:.2f} ms of the host")


if __name__ == "__main__":
    main()
