"""Checkpoint files: whole or not at all, of one writer, and read only if their bytes are those that were written."""

import errno
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from tiny import checkpoint, load

from diffaug.config import compose_config
from diffaug.pytorch_lightning import AtomicCheckpointIO
from diffaug.training.checkpoint_io import claim

FORK = multiprocessing.get_context("fork")


@contextmanager
def beside(work: Callable[[], object]) -> Iterator[int]:
    """The work in another process, and its process id; it has begun where it has called `started`."""
    process = FORK.Process(target=work)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.kill()
        process.join()


def until(ready: Callable[[], object]) -> None:
    for _ in range(1000):
        if ready():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to it within 10 s")


class Unsaveable:
    def __reduce__(self) -> Any:
        raise RuntimeError("CUDA error")


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(where, tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint(checkpoint(1), path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, where, full)
    said = (
        r"last\.ckpt could not be written: .*No space left.* It got to 6,\d+ bytes; [\d,]+ bytes are free there\. "
        rf"The one before it is whole\. Make room, .* with hydra\.run\.dir={tmp_path}/run; or set "
        rf"hydra\.run\.dir to another folder and ckpt_path={path}\.$"
    )
    with pytest.raises(OSError, match=said):
        io.save_checkpoint(checkpoint(2), path)
    with pytest.raises(OSError, match=r"There is none before it\. .*to another folder\.$"):
        io.save_checkpoint(checkpoint(2), path.with_name("new.ckpt"))
    monkeypatch.undo()
    assert load(path)["global_step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_write_that_fails_half_way_says_the_cause_that_torch_hides(tmp_path):
    """A real failure, by the limit on the size of a file; torch says "unexpected pos"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written: .*File too large.*Mend that, and") as raised:
            AtomicCheckpointIO().save_checkpoint(checkpoint(1, 10**6), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not re.search(r"free there|Make room", str(raised.value))
    assert not list(tmp_path.iterdir())


def test_what_is_not_the_disks_fault_is_not_blamed_on_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"could not be written.*(?:Not a directory|File exists)") as raised:
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "file" / "last.ckpt")
    assert not re.search(r"free there|Make room", str(raised.value))
    try:
        raise FileNotFoundError("what ended the run, and has a callback save")
    except FileNotFoundError:
        with pytest.raises(RuntimeError, match=r"^CUDA error"):
            AtomicCheckpointIO().save_checkpoint({"no": Unsaveable()}, tmp_path / "last.ckpt")
    with pytest.raises((pickle.PicklingError, AttributeError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"no": lambda: 1}, tmp_path / "last.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["file"], "a part stayed"


def test_trainers_write_atomically():
    for choice in ("cpu", "ddp", "debug"):
        trainer = instantiate(
            compose_config(
                [f"trainer={choice}", "trainer.accelerator=cpu", "trainer.callbacks=null", "trainer.logger=false"]
            ).trainer
        )
        assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)


def test_two_writers_at_once_each_write_a_whole_checkpoint(tmp_path):
    """As two runs in one folder would, did the second not heed the first."""
    path = tmp_path / "last.ckpt"

    def write(step: int) -> None:
        os.nice(5)
        while True:
            AtomicCheckpointIO().save_checkpoint(checkpoint(step, 20000), path)

    with beside(lambda: write(1)), beside(lambda: write(2)):
        until(path.is_file)
        seen: list[int] = []
        while len(seen) < 200 or len(set(seen)) < 2:
            found = load(path)
            assert set(found["state_dict"]["a.weight"].tolist()) == {float(found["global_step"])}
            seen.append(found["global_step"])
            assert len(seen) < 20000


def test_the_part_of_a_writer_that_is_gone_goes_and_that_of_one_at_work_stays(tmp_path, monkeypatch):
    path, io = tmp_path / "epoch=1.ckpt", AtomicCheckpointIO()

    def half(_: object, file: Any) -> None:
        file.write(b"half")
        file.flush()
        signal.pause()

    def write() -> None:
        monkeypatch.setattr(torch, "save", half)
        io.save_checkpoint(checkpoint(), path)

    def parts() -> list[Path]:
        return [part for part in tmp_path.glob(".*.part") if part.read_bytes() == b"half"]

    (tmp_path / ".mine.part").write_bytes(b"a user's")
    with beside(write):
        until(parts)
        io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
        assert len(parts()) == 1
    assert len(parts()) == 1
    io.save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".mine.part", "last.ckpt"]


def test_a_second_run_is_told_of_the_first_as_long_as_that_lives(tmp_path):
    """Also while a worker that was forked from the first outlives it."""
    worker = tmp_path / "worker"

    def hold() -> None:
        held = claim(tmp_path / "checkpoints")
        assert not isinstance(held, str)
        child = os.fork()
        if child:
            worker.write_text(str(child))
        signal.pause()

    with beside(hold) as first:
        until(lambda: worker.is_file() and worker.read_text())
        for _ in range(2):
            said = claim(tmp_path / "checkpoints")
            assert isinstance(said, str)
            assert said.startswith(
                f"Another run is writing its checkpoints to {tmp_path}/checkpoints: process {first} "
            )
            assert re.search(r" on \S+, since 20.*this run a folder of its own by hydra\.run\.dir=FOLDER\.$", said)
        os.kill(first, signal.SIGKILL)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        try:
            os.kill(int(worker.read_text()), 0)
            taken = claim(tmp_path / "checkpoints")
            assert not isinstance(taken, str), taken
            assert f"process {os.getpid()} on" in (tmp_path / "checkpoints" / ".lock").read_text()
            taken.close()
        finally:
            os.kill(int(worker.read_text()), signal.SIGKILL)


def test_where_there_are_no_locks_a_run_goes_on(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    for _ in range(2):
        assert not isinstance(claim(tmp_path), str)
    old, new = (tmp_path / f".last.ckpt.1-0000000{n}.part" for n in range(2))
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (0, 0))
    AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "last.ckpt")
    assert sorted(file.name for file in tmp_path.iterdir()) == [new.name, ".lock", "last.ckpt"]


def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path):
    (tmp_path / "file").touch()
    assert re.search(r"cannot be written to .*hydra\.run\.dir", str(claim(tmp_path / "file" / "checkpoints")))
