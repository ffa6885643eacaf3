"""The smallest network that trains, for the tests that start processes: what they test is not the network."""

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = (
    "model.network._target_=tiny.Tiny",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "+trainer.num_sanity_val_steps=0",
    "+trainer.limit_val_batches=1",
    "+trainer.enable_progress_bar=false",
    "data.batch_size=8",
    "~callbacks.pictures",
)
TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy.timeout.minutes=0.5")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that imports this module and leaves its marks in a folder."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TINY_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}


class Tiny(nn.Module):
    """One convolution, and t as a number; leaves a file MARK-RANK-of-WORLD in TINY_FOLDER when it is first called.

    Arguments:
        mark: says which job this is: one that fails "before" it fits, on "rank1" alone in its first step, or not.
        seconds: how long a call takes at least.
    """

    def __init__(self, mark: object = "", seconds: float = 0.0, **_: object) -> None:
        super().__init__()
        self.mark, self.seconds, self.called = mark, seconds, False
        if mark == "before":
            raise ValueError("this job fails before it fits")
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not self.called:
            ranks = torch.distributed.is_initialized()
            rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ranks else (0, 1)
            Path(os.environ["TINY_FOLDER"], f"{self.mark}-{rank}-of-{world}").write_text(str(os.getpid()))
            if self.mark == f"rank{rank}":
                raise ValueError(f"this job fails on rank {rank}")
        self.called = True
        time.sleep(self.seconds)
        return self.convolution(x) + self.weight * t.reshape(-1, 1, 1, 1) / 1000
