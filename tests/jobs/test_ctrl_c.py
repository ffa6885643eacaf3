"""Ctrl-C: the first saves as SIGTERM does and ends, the second ends at once; no signal is lost."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tiny import LONG, TWO, Run, goes_on, gone, load, step_of

from diffaug.pytorch_lightning import LastCheckpoint
from diffaug.training.checkpoint_io import claim

WORKER = "data.num_workers=1"
ENDS = "saving after this step (or the validation under way), then ending"


def text(run: Run) -> str:
    return run.log.read_text()


def catches(pid: int) -> bool:
    """Whether a process handles SIGINT itself, rather than leave it to the system."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) & 1 << signal.SIGINT - 1)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_from_a_terminal_all_are_told_and_the_run_saves_and_goes_on(start, tmp_path):
    """Also where it comes twice, as from `timeout`; and the worker still brings the batches up to the next step."""
    slow_step = "trainer.accumulate_grad_batches=30"
    run = Run(tmp_path, *LONG, slow_step, WORKER, f"+data.multiprocessing_context={start}")
    run.pid(0, 1)
    for _ in range(2):
        os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    assert text(run).count(ENDS) == 1
    said = re.findall(
        r"SIGINT: saved step (\d+) to .*last\.ckpt, .*same command with hydra\.run\.dir=.*goes on", text(run)
    )
    assert [int(step) for step in said] == [step_of(run.last)]
    assert not re.search(r"Traceback|Error|DataLoader worker", text(run)), text(run)
    assert goes_on(tmp_path, slow_step) > 0


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all", 1])
def test_two_ranks_agree_on_the_step(whom, tmp_path):
    run = Run(tmp_path, *LONG, *TWO, WORKER, "callbacks.last.every=20")
    pids = [run.pid(0, 2), run.pid(1, 2)]
    if whom == "all":
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        os.kill(pids[whom], signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT, text(run)[-3000:]
    assert gone(pids[1])
    assert step_of(run.last) % 20 == 0
    assert text(run).count("SIGINT: saved step") == 1
    assert text(run).count(ENDS) == (whom == "all")
    assert not re.search(r"Traceback|Error|DataLoader worker", text(run)), text(run)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), TWO], ids=["alone", "two ranks"])
def test_the_second_ends_at_once(options, tmp_path):
    """In the middle of a step, and unsaved; nothing of it stands in the way of the next run."""
    world = 2 if options else 1
    run = Run(tmp_path, *LONG, *options, WORKER, "model.network.seconds=300")
    pids = [run.pid(rank, world) for rank in range(world)]
    workers = [int(word) for pid in pids for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    os.killpg(run.process.pid, signal.SIGINT)
    run.until(lambda: not any(catches(pid) for pid in pids))
    assert run.process.poll() is None
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end(5) == -signal.SIGINT
    assert all(gone(pid) for pid in pids + workers)
    assert text(run).count(ENDS) == 1
    assert not run.last.exists()
    assert "Traceback" not in text(run)
    if not options:
        again = Run(tmp_path)
        assert again.end() == 0, text(again)[-3000:]


@pytest.mark.slow
def test_in_a_validation_it_takes_effect_after_that(tmp_path):
    """On two ranks; of one see `test_no_signal_is_lost`."""
    run = Run(tmp_path, *LONG, *TWO, WORKER, "trainer.val_check_interval=2", "trainer.limit_val_batches=20")
    mark = tmp_path / "validates"
    run.until(mark.is_file)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT, text(run)[-3000:]
    assert (run.run / "summary.json").is_file(), "the validation was cut off"
    assert step_of(run.last) == 2, "it went on, though all ranks were there"
    assert not re.search(r"Traceback|Error|DataLoader worker", text(run)), text(run)


@pytest.mark.slow
def test_before_it_trains_it_is_an_ordinary_interrupt(tmp_path):
    run = Run(tmp_path, *LONG, fresh=True)
    run.until((run.run / ".hydra" / "config.yaml").is_file)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() != 0
    assert ENDS not in text(run)
    assert not run.last.exists()


class Model(pl.LightningModule):
    """The smallest that trains; does its deed at a hook."""

    def __init__(self, hook: str, deed: Callable[[], object]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.hook, self.deed = hook, deed

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        if self.hook == "training_step":
            self.deed()
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        if self.hook == "validation_step":
            self.deed()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.hook == "save":
            self.deed()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT as Python has it, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fit(hook: str, deed: Callable[[], object], folder: Path, minutes: float = 10) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=4,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[LastCheckpoint(str(folder), minutes=minutes)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 1)), batch_size=2)
    trainer.fit(Model(hook, deed), data, data)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("hook", "step"),
    [("save", 2), ("training_step", 1), ("validation_step", 4)],
    ids=["save", "step", "validation"],
)
def test_no_signal_is_lost(hook, step, told, tmp_path, capfd, caplog):
    """One that comes while a checkpoint is written, or in the validation after the last step, ends the run too."""
    waiting = [told]
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as ended:
        fit(
            hook,
            lambda: os.kill(os.getpid(), waiting.pop()) if waiting else None,
            tmp_path,
            minutes=1e-9 if hook == "save" else 10,
        )
    assert ended.value.code == 128 + told
    assert load(tmp_path / "last.ckpt")["global_step"] == step
    assert f"{told.name}: saved step {step} to" in caplog.text
    assert ("Ctrl-C: saving after this step" in capfd.readouterr().err) == (told == signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not isinstance(claim(tmp_path), str)


@pytest.mark.usefixtures("interrupts")
def test_what_a_shell_has_ignore_it_ignores_it(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fit("training_step", lambda: os.kill(os.getpid(), signal.SIGINT), tmp_path)
    assert load(tmp_path / "last.ckpt")["global_step"] == 4
