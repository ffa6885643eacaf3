"""Interruptions, with real processes and signals: each ends in a clear error or a state that a run goes on from."""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import OVERRIDES, ROOT, TWO, environment

from diffaug.checkpoints import AtomicCheckpointIO, LastCheckpoint
from diffaug.config import checkpoint_path

LONG = ("trainer.max_steps=100000", "trainer.val_check_interval=100000", "+model.network.seconds=0.02")


class Run:
    """A job in the background, in the folder ``run``."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.run = folder, folder / "run"
        self.last = self.run / "checkpoints" / "last.ckpt"
        self.log = folder / "log"
        words = [sys.executable, str(ROOT / "train.py"), *OVERRIDES, "hydra.run.dir=run", *overrides]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(words, cwd=folder, env=environment(folder), stdout=log, stderr=log)

    def until(self, ready: Callable[[], object], seconds: float = 90) -> None:
        for _ in range(int(seconds * 20)):
            if ready():
                return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"not within {seconds} s: {self.log.read_text()[-3000:]}")

    def pid(self, rank: int, world: int) -> int:
        """The process that is this rank, once it trains."""
        mark = self.folder / f"-{rank}-of-{world}"
        self.until(lambda: mark.is_file() and mark.read_text())
        return int(mark.read_text())

    def end(self, seconds: float = 60) -> int:
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
    with (run.run / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps[-2:] == [began, began + 1]
    return began


@pytest.mark.slow
def test_kill_at_a_random_moment_while_it_keeps_saving(tmp_path):
    """Saving at every step, so that the kill falls into a save as often as not; last.ckpt is whole every time."""
    began = -1
    for _ in range(2):
        run = Run(tmp_path, *LONG, "callbacks.last.minutes=0.0000001", "+model.network.mark=")
        run.until(lambda run=run, began=began: run.last.is_file() and step_of(run.last) > began)
        time.sleep(random.Random(began).uniform(0, 0.5))
        run.process.kill()
        run.process.wait()
        went_on = step_of(run.last)
        assert went_on > began
        began = went_on
    goes_on(tmp_path, "ckpt_path=last")


@pytest.mark.slow
def test_sigterm_saves_the_step_it_came_in(tmp_path):
    run = Run(tmp_path, *LONG)
    run.pid(0, 1)
    time.sleep(1)
    assert not run.last.exists()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert re.search(r"SIGTERM: saved step \d+ to .*last\.ckpt.*hydra\.run\.dir=", run.log.read_text())
    assert goes_on(tmp_path) > 0  # ckpt_path=auto


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_of_two_ranks_saves_on_both(rank, tmp_path):
    run = Run(tmp_path, *LONG, *TWO, "callbacks.last.every=5")
    pids = [run.pid(0, 2), run.pid(1, 2)]
    time.sleep(0.5)
    os.kill(pids[rank], signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM, run.log.read_text()[-3000:]
    assert gone(pids[1])
    assert step_of(run.last) % 5 == 0
    assert step_of(run.last) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_others(rank, tmp_path):
    run = Run(tmp_path, *LONG, *TWO, "callbacks.last.every=5", "callbacks.last.minutes=0.001")
    pids = [run.pid(0, 2), run.pid(1, 2)]
    run.until(run.last.is_file)
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    assert run.end() != 0
    assert gone(pids[1 - rank])
    assert time.monotonic() - began < 30 + 15  # the process group's timeout, and the time to end
    step_of(run.last)  # whole
    if rank == 1:
        assert re.search(r"(?i)gloo|terminated|closed", run.log.read_text())


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_in_an_error(tmp_path):
    run = Run(tmp_path, *LONG, "data.num_workers=1", "callbacks.last.minutes=0.001")
    main = run.pid(0, 1)
    run.until(run.last.is_file)
    children = Path(f"/proc/{main}/task/{main}/children")
    if not children.is_file():
        run.process.kill()
        pytest.skip("this system does not list a process's children")
    for child in map(int, children.read_text().split()):
        if b"multiprocessing" not in Path(f"/proc/{child}/cmdline").read_bytes():  # but its tracker of resources
            os.kill(child, signal.SIGKILL)
    assert run.end() == 1
    assert re.search(r"DataLoader worker \(pid.*\) (?:is killed by signal|exited unexpectedly)", run.log.read_text())
    goes_on(tmp_path, "data.num_workers=1")


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """A real one: a file system of so few bytes that one checkpoint fits, and not a second beside it."""
    small = tmp_path / "run"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs rights that are not here")
    try:
        quiet = "trainer.log_every_n_steps=100000"  # so that nothing but the checkpoint finds the disk full
        run = Run(tmp_path, *LONG, quiet, "callbacks.last.minutes=0.01", "~callbacks.checkpoint")
        run.until(run.last.is_file)
        (small / "filler").write_bytes(b"0" * (shutil.disk_usage(small).free - 4096))
        assert run.end() == 1
        text = run.log.read_text()
        said = r"(?s)last\.ckpt could not be written:.*bytes are free there\. The one before it is whole\. Make room"
        assert re.search(said, text), text[-3000:]
        assert not list(small.glob("checkpoints/.*")), "a part of a checkpoint stayed"
        step_of(run.last)
        (small / "filler").unlink()
        goes_on(tmp_path, "~callbacks.checkpoint")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


class TestWriting:
    @pytest.mark.parametrize("where", ["half way", "fsync", "rename"])
    def test_a_write_that_fails_leaves_what_was_there(self, where, tmp_path, monkeypatch):
        path = tmp_path / "checkpoints" / "last.ckpt"
        io = AtomicCheckpointIO()
        io.save_checkpoint({"step": 1, "weights": torch.zeros(1000)}, path)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def half(checkpoint: object, file: object) -> None:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

        if where == "half way":
            monkeypatch.setattr(torch, "save", half)
        else:
            monkeypatch.setattr(os, "fsync" if where == "fsync" else "replace", full)
        with pytest.raises(OSError, match=r"last\.ckpt could not be written: .*The one before it is whole.*hydra\.run"):
            io.save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, path)
        monkeypatch.undo()
        assert io.load_checkpoint(path, weights_only=True)["step"] == 1
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="There is none before it"):
            io.save_checkpoint({}, tmp_path / "new.ckpt")

    def test_a_checkpoint_that_was_cut_short_is_said(self, tmp_path):
        path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
        io.save_checkpoint({"weights": torch.zeros(1000)}, path)
        for size in (0, 100, path.stat().st_size - 10):
            path.write_bytes(path.read_bytes()[:size] if size else b"")
            with pytest.raises(RuntimeError, match=r"last\.ckpt cannot be read.*Set ckpt_path to another"):
                io.load_checkpoint(path, weights_only=True)
            io.save_checkpoint({"weights": torch.zeros(1000)}, path)

    def test_the_trainers_write_so(self):
        from diffaug.config import composed, made

        for choice in ("cpu", "ddp", "debug"):
            trainer = made(
                composed(
                    [f"trainer={choice}", "trainer.accelerator=cpu", "trainer.callbacks=null", "trainer.logger=false"]
                ).trainer
            )
            assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_auto_goes_on_where_there_is_something_to_go_on_from(tmp_path):
    assert checkpoint_path("auto", str(tmp_path)) is None
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    last.touch()
    assert checkpoint_path("auto", str(tmp_path)) == str(last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, r"callbacks\.last\.minutes must be a number > 0, but got 0"),
        ({"every": 0}, r"callbacks\.last\.every must be a whole number >= 1, but got 0"),
    ],
)
def test_mistakes_are_said(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LastCheckpoint(str(tmp_path), **options)
