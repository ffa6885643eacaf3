"""Training on a GPU: is the transfer overlapped, does anything wait, and what does a step cost more?

    python benchmarks/trace.py OUT.json

It traces three steps with torch's profiler, for chrome://tracing, and prints the calls that wait for the device and the
copies; names the lines that wait, by torch's own watch; and times steps of a small network on batches of images, with
the noise made by diffaug and by hand in the step. (Where there is no GPU it runs on the CPU, which tries the script and
shows nothing.)
"""

import collections
import logging
import statistics
import sys
import time
import traceback
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

import diffaug
from diffaug import DiffusionDataModule, ForwardProcess, LinearBeta

BATCH = 64


class Repeated(Dataset[Any]):
    """A few images over and over, so that no memory is filled."""

    def __init__(self, images: torch.Tensor, length: int) -> None:
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> tuple[torch.Tensor]:
        return (self.images[place % len(self.images)],)


class Model(pl.LightningModule):
    """Two convolutions, so that the data's share of a step shows; notes when each step begins."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1)
        )
        self.by_hand, self.begun = by_hand, []
        alpha_bars = LinearBeta().alpha_bars.float()
        self.register_buffer("signal", alpha_bars.sqrt())
        self.register_buffer("noise", (1 - alpha_bars).sqrt())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.begun.append(time.perf_counter())
        if self.by_hand:
            x_0 = batch[0].float() / 127.5 - 1
            epsilon = torch.randn_like(x_0)
            t = torch.randint(0, 1000, (len(x_0),), device=x_0.device)
            x_t = self.signal[t].view(-1, 1, 1, 1) * x_0 + self.noise[t].view(-1, 1, 1, 1) * epsilon
        else:
            x_t, epsilon = batch.x_t, batch.epsilon
        return (self.network(x_t) - epsilon).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(steps: int, side: int, by_hand: bool = False) -> list[float]:
    """Seconds from the beginning of each step to that of the next."""
    images = Repeated(torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8), BATCH * steps)
    if by_hand:
        data: Any = DataLoader(images, BATCH, shuffle=True, pin_memory=torch.cuda.is_available())
    else:
        data = DiffusionDataModule(images, process=ForwardProcess(LinearBeta()), batch_size=BATCH, seed=0)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "accelerator": "auto", "devices": 1, "num_sanity_val_steps": 0}
    model = Model(by_hand)
    pl.Trainer(max_steps=steps, **options).fit(model, data)
    return [after - before for before, after in zip(model.begun, model.begun[1:], strict=False)]


def waits(steps: int) -> collections.Counter[str]:
    """The lines that wait for the GPU while a run goes on, by torch's own watch, and how often."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack() if f.filename not in (__file__, warnings.__file__)]
            ours = [f for f in frames if f.filename.startswith(diffaug.__path__[0])]
            frame = (ours or frames)[-1]
            found[f"{frame.filename}:{frame.lineno} {frame.line}"] += 1

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        fit(steps, 64)
    torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    side = 256 if torch.cuda.is_available() else 32
    fit(3, side)  # compiles
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fit(3, side)
    profiler.export_chrome_trace(sys.argv[1])
    for event in profiler.key_averages():
        if any(word in event.key for word in ("Synchronize", "Memcpy", "aten::item", "_local_scalar_dense", "triton")):
            on_device = f", {event.device_time_total / 1e3:.2f} ms of the device" if event.device_time_total else ""
            print(f"{event.key}: {event.count} times, {event.cpu_time_total / 1e3:.2f} ms of the host{on_device}")
    if torch.cuda.is_available():
        print("\nlines that wait for the GPU in a run of 10 steps:")
        for line, count in waits(10).items():
            print(f"{count} times: {line}")
    print("\n| images | ms a step, by hand | diffaug |\n|---|---|---|")
    for side, steps in ((32, 60), (256, 30)) if torch.cuda.is_available() else ((32, 12),):
        fit(10, side)
        turns = [(fit(steps, side, by_hand=True), fit(steps, side)) for _ in range(3)]
        hand, ours = (statistics.median(step for turn in turns for step in turn[i][5:]) * 1e3 for i in range(2))
        print(f"| {BATCH} of 3x{side}x{side} | {hand:.2f} | {ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
