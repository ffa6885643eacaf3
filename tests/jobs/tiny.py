"""What the tests share that start processes: the smallest network that trains, a job, and a checkpoint."""

import atexit
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import server
import torch
from torch import Tensor, nn

from diffaug.pytorch_lightning import AtomicCheckpointIO

ROOT = Path(__file__).resolve().parents[2]

OVERRIDES = (
    "model.network._target_=tiny.Tiny",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.num_sanity_val_steps=0",
    "trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "data.batch_size=8",
    "~callbacks.pictures",
)
TWO = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy.timeout.minutes=0.5")

LONG = ("trainer.max_steps=100000", "trainer.val_check_interval=100000", "+model.network.seconds=0.02")


def environment(folder: Path) -> dict[str, str]:
    """The variables of a process that imports this module, and the package beside it, and leaves marks in a folder."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("tests/jobs", "tests", "tests/training", ""))
    return {**os.environ, "PYTHONPATH": paths, "TINY_FOLDER": str(folder), "OMP_NUM_THREADS": "1"}


def train(
    folder: Path, *words: str, expect: int = 0, fresh: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run train.py in a folder to its end, and return what it said."""
    command = [sys.executable, str(ROOT / "train.py"), *words]
    done = server.run(command, folder, {**environment(folder), **variables}, fresh=fresh)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_code(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python that may import the tests of training, as a script: Lightning starts other ranks by its name."""
    (folder / "job.py").write_text(code)
    return server.run([sys.executable, str(folder / "job.py")], folder, environment(folder))


def losses(run: Path) -> list[tuple[int, float]]:
    """The step and the training loss of each row of a run's metrics.csv."""
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["train_loss"])) for row in csv.DictReader(file) if row["train_loss"]]


class Tiny(nn.Module):
    """One convolution, and t as a number; leaves a file MARK-RANK-of-WORLD in TINY_FOLDER when it is first called.

    While it is evaluated it leaves a file "validates" there.

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
        if not self.training:
            Path(os.environ["TINY_FOLDER"], "validates").touch()
        time.sleep(self.seconds)
        return self.convolution(x) + self.weight * t.reshape(-1, 1, 1, 1) / 1000


def start(folder: Path, *words: str, fresh: bool = False) -> subprocess.Popen[bytes]:
    """Start train.py in a folder as a terminal would: in a group of its own, where Ctrl-C is heard.

    What it says goes to the file ``log`` there. (What a shell starts in the background ignores Ctrl-C, and so does all
    that such a process starts.)
    """
    own: dict[str, Any] = {}
    if fresh or server.FRESH:  # what the server does for its jobs
        own = {"start_new_session": True, "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    command = [sys.executable, str(ROOT / "train.py"), *words]
    with (folder / "log").open("a") as log:
        process = server.Popen(command, cwd=folder, env=environment(folder), stdout=log, stderr=log, **own)
    atexit.register(process.kill)  # an interrupt of the tests does not reach it
    return process


def until(ready: Callable[[], object], process: Any, log: Path, seconds: float = 180) -> None:
    """Look again and again, as long as the process lives, whether something has come about."""
    for _ in range(int(seconds * 20)):
        if ready():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"not within {seconds} s: {log.read_text()[-3000:]}")


class Run:
    """A job in the background, in the folder ``run``; a ``fresh`` process, or one forked by `server`."""

    def __init__(self, folder: Path, *overrides: str, fresh: bool = False) -> None:
        self.folder, self.run = folder, folder / "run"
        self.last = self.run / "checkpoints" / "last.ckpt"
        self.log = folder / "log"
        self.process = start(folder, *OVERRIDES, "hydra.run.dir=run", *overrides, fresh=fresh)

    def until(self, ready: Callable[[], object]) -> None:
        until(ready, self.process, self.log)

    def pid(self, rank: int, world: int) -> int:
        """The process that is this rank, once it trains."""
        mark = self.folder / f"-{rank}-of-{world}"
        self.until(lambda: mark.is_file() and mark.read_text())
        return int(mark.read_text())

    def end(self, seconds: float = 180) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it hangs: {self.log.read_text()[-3000:]}") from None


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def gone(pid: int, seconds: float = 45) -> bool:
    for _ in range(int(seconds * 20)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").exists() and ") Z " in Path(f"/proc/{pid}/stat").read_text():
            return True
        time.sleep(0.05)
    return False


def goes_on(folder: Path, *overrides: str) -> int:
    """Go on with the run to two steps more, and say where it went on from."""
    began = step_of(folder / "run/checkpoints/last.ckpt")
    run = Run(folder, f"trainer.max_steps={began + 2}", *overrides)
    assert run.end() == 0, run.log.read_text()[-3000:]
    assert step_of(run.last) == began + 2
    assert json.loads((run.run / "summary.json").read_text())["steps"] == began + 2
    assert [step for step, _ in losses(run.run)[-2:]] == [began, began + 1]
    return began


def checkpoint(step: int = 1, size: int = 1000) -> dict[str, Any]:
    """Like one of Lightning's; all of its weights are the step."""
    weights = {
        "a.weight": torch.full((size,), float(step)),
        "a.bias": torch.arange(3),
        "b": torch.ones(2, 3).bfloat16(),
    }
    return {"global_step": step, "pytorch-lightning_version": "2.6.0", "state_dict": weights, "name": "x/y", "lr": 1e-3}


def load(path: Path) -> dict[str, Any]:
    return AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
