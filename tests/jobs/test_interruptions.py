"""Interruptions, with real processes and signals: each ends in a clear error or a state that a run goes on from."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tiny import LONG, TWO, Run, goes_on, gone, step_of

from diffaug.config import checkpoint_path


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
    assert not run.last.exists()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert re.search(r"SIGTERM: saved step \d+ to .*last\.ckpt.*hydra\.run\.dir=", run.log.read_text())
    assert goes_on(tmp_path) > 0  # ckpt_path=auto


@pytest.mark.slow
def test_sigterm_to_rank_0_alone_saves_on_both(tmp_path):
    """To rank 1 alone, and to both: Ctrl-C's tests."""
    run = Run(tmp_path, *LONG, *TWO, "callbacks.last.every=5")
    pids = [run.pid(0, 2), run.pid(1, 2)]
    os.kill(pids[0], signal.SIGTERM)
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
    # Where it dies while it hands over a batch, its connection is what breaks.
    dead = r"DataLoader worker \(pid.*\) (?:is killed by signal|exited unexpectedly)|ConnectionResetError|EOFError"
    assert re.search(dead, run.log.read_text())
    goes_on(tmp_path, "data.num_workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), TWO], ids=["one", "two ranks"])
def test_a_second_run_in_the_folder_is_refused_as_long_as_the_first_lives(options, tmp_path):
    first = Run(tmp_path, *LONG, "data.num_workers=1", "callbacks.last.minutes=0.001")
    main = first.pid(0, 1)
    first.until(first.last.is_file)
    left = {name: (tmp_path / "run" / name).read_bytes() for name in (".hydra/config.yaml", ".hydra/overrides.yaml")}
    second = Run(tmp_path, "schedule=cosine", *options)
    assert second.end() == 1
    said = re.findall(rf"Another run is writing its checkpoints to .*: process {main} on ", second.log.read_text())
    assert len(said) == 1, second.log.read_text()[-3000:]
    assert not (tmp_path / "-0-of-2").exists(), "it trained"
    assert all((tmp_path / "run" / name).read_bytes() == held for name, held in left.items())
    began = step_of(first.last)
    first.until(lambda: step_of(first.last) > began)
    first.process.kill()
    first.process.wait()
    goes_on(tmp_path, *options, *(("data.batch_size=4",) if options else ()))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_with_the_words_that_go_on(tmp_path):
    run = Run(tmp_path)
    assert run.end() == 0
    whole = run.last.read_bytes()
    run.last.write_bytes(whole[:-100])
    again = Run(tmp_path, "trainer.max_steps=4")
    assert again.end() == 1
    said = re.search(
        r"(?s)last\.ckpt is damaged: its end is missing.*Go on from best\.ckpt, .* by (ckpt_path=\S+)\.",
        again.log.read_text(),
    )
    assert said is not None, again.log.read_text()[-3000:]
    more = Run(tmp_path, "trainer.max_steps=4", said[1])
    assert more.end() == 0, more.log.read_text()[-3000:]
    assert step_of(run.last) == 4


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
        assert not list(small.glob("checkpoints/.*.part")), "a part of a checkpoint stayed"
        step_of(run.last)
        (small / "filler").unlink()
        goes_on(tmp_path, "~callbacks.checkpoint")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_auto_goes_on_where_there_is_something_to_go_on_from(tmp_path, caplog):
    assert checkpoint_path("auto", str(tmp_path)) is None
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=last: there is no .*last\.ckpt"):
        checkpoint_path("last", str(tmp_path))
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    for age, name in ((300, "best.ckpt"), (200, "epoch=3-step=40.ckpt")):  # as they are without LastCheckpoint
        (last.parent / name).touch()
        os.utime(last.parent / name, (time.time() - age,) * 2)
        assert checkpoint_path("auto", str(tmp_path)) == str(last.parent / name)
    assert re.search(r"there is no .*last\.ckpt, so the run goes on from .*best\.ckpt, the newest", caplog.text)
    last.touch()
    assert checkpoint_path("auto", str(tmp_path)) == str(last)


def test_auto_takes_none_of_a_run_whose_folder_is_within(tmp_path):
    other = tmp_path / "outputs" / "a"
    (other / ".hydra").mkdir(parents=True)
    (other / "checkpoints").mkdir()
    (other / "checkpoints" / "best.ckpt").touch()
    (tmp_path / ".hydra").mkdir()
    assert checkpoint_path("auto", str(tmp_path)) is None
    own = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=5.ckpt"
    own.parent.mkdir(parents=True)
    own.touch()
    assert checkpoint_path("auto", str(tmp_path)) == str(own)
