"""One job of a sweep or of a cluster.

In a sweep each job is a process of its own, started as its user would start it alone: ``python train.py`` with the
job's overrides and its folder. So the ranks that Lightning starts for it by copying its command line train that job
and no other (started from within the sweep they would each open a sweep of their own), and what a job leaves behind,
a process group, variables, memory of a GPU, or a crash, does not reach the next.
"""

import atexit
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from textwrap import shorten
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf

from diffaug.training.checkpoint_io import find_holder
from diffaug.training.errors import UserError, for_the_user

_OUTCOME = "outcome.txt"  # beside Hydra's own records of the job
_NUMBERS = {"val_loss": ".4f", "prior_kl_bits_per_dim": ".3g", "seconds": ".0f"}  # in the table, and how written
_OF_THE_SWEEP = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper", "hydra/sweeper", "hydra.launcher", "hydra/launcher")


class JobFailed(CompactHydraException):
    """A job of a sweep ended with an error, which it has said itself; the sweep goes on. Arguments: error, folder."""

    def __str__(self) -> str:
        return "{} ({})".format(*self.args)


class Guard(Callback):
    """Hydra callback: refuse a folder where another run is training, or that cannot be made, before Hydra writes there.

    (A run that comes so near that it passes here is refused at setup.)
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.run.dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refusal = find_holder(folder / "checkpoints")
        except OSError as error:
            refusal = f"hydra.run.dir={folder} cannot be written: {error.strerror}."
        if refusal is not None:  # an Exception would be no more than a warning of Hydra's
            print(refusal, file=sys.stderr)
            raise SystemExit(1)


def job(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Wrap what ``hydra.main`` decorates: one job, in a process of its own where Hydra would run a sweep in one.

    Under submitit it tells Lightning which rank this is. A job of a sweep returns its validation loss, which is what
    a sweeper that searches goes by. The stack of an error goes to the run's log; of an error of the user's the
    terminal shows no more than a sentence, and where the log is: see `diffaug.training.errors`.
    """

    @wraps(function)
    def run(config: DictConfig) -> Any:
        submitit = "SUBMITIT_EXECUTOR" in os.environ
        if not submitit and HydraConfig.get().mode == RunMode.MULTIRUN:
            run_alone()
            return read_summary(Path(HydraConfig.get().runtime.output_dir)).get("val_loss")
        try:
            if submitit:
                export_ranks(config)
            return function(config)
        except Exception as error:
            said = for_the_user(error)
            if said is error:
                raise
            raise said from None  # Hydra would print the text of a cause, too

    return run


def run_alone() -> None:
    """Run the job that Hydra is at as a process of its own, and wait for it.

    Told to end by SIGTERM or SIGINT (Ctrl-C), it tells the job, waits until that has kept what it has done, and ends
    the sweep; told again, it ends both at once.

    Raises:
        JobFailed: it ended with an error.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    told = [signal.SIGTERM, *([signal.SIGINT] if callable(signal.getsignal(signal.SIGINT)) else [])]  # nohup's is not
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in told}
    process = subprocess.Popen(build_command(), cwd=get_original_cwd())
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        sweep = HydraConfig.get().sweep.dir
        print(f"The sweep ends here. The same command with hydra.sweep.dir={sweep} goes on.", file=sys.stderr)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if status:
        said = read_outcome(folder)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        error = said.removeprefix("failed: ") if said.startswith("failed: ") else f"the process ended {how}"
        raise JobFailed(error, folder)


def build_command() -> list[str]:
    """Return the command line that runs the job that Hydra is at, alone: its overrides and its folder, no ``-m``."""
    import __main__

    hydra = HydraConfig.get()
    start = ["-m", __main__.__spec__.name] if __main__.__spec__ else [os.path.abspath(sys.argv[0])]
    folder = hydra.runtime.output_dir.replace("\\", "\\\\").replace('"', '\\"')
    return [
        sys.executable,
        *start,
        *config_options(sys.argv[1:]),
        *(override for override in hydra.overrides.hydra if not override.startswith(_OF_THE_SWEEP)),
        *hydra.overrides.task,
        f'hydra.run.dir="{folder}"',
        f"hydra.job.num={hydra.job.num}",
        f"hydra.job.id={hydra.job.id}",
    ]


def config_options(arguments: list[str]) -> list[str]:
    """Return Hydra's options of a command line that choose the configs, without overrides and ``-m``."""
    chosen: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"):
            chosen += [word] if equals else [word, next(rest, "")]
    return chosen


def export_ranks(config: DictConfig) -> None:
    """Tell Lightning, by the variables it reads, which of submitit's tasks this process is.

    Raises:
        ValueError: the trainer wants another number of processes than there are tasks.
    """
    from submitit import JobEnvironment

    here = JobEnvironment()
    for key, count in (("devices", here.num_tasks // here.num_nodes), ("num_nodes", here.num_nodes)):
        wanted, launched = OmegaConf.select(config, f"trainer.{key}"), "tasks_per_node" if key == "devices" else "nodes"
        if isinstance(wanted, int) and wanted != count:
            raise ValueError(
                f"trainer.{key}={wanted}, but hydra.launcher.{launched}={count}: Lightning needs one task for each "
                f"device. Set hydra.launcher.{launched}={wanted} or trainer.{key}={count}."
            )
    if here.num_tasks == 1:
        return
    os.environ.update(
        LOCAL_RANK=str(here.local_rank),
        NODE_RANK=str(here.node),
        WORLD_SIZE=str(here.num_tasks),
        MASTER_ADDR="127.0.0.1" if here.num_nodes == 1 else here.hostnames[0],
        MASTER_PORT=str(choose_port(here.job_id)),
    )


def choose_port(job_id: str) -> int:
    """Choose a port in [10000, 30000) on which the ranks of a job meet, another for each job of an array."""
    number, _, task = job_id.partition("_")
    return 10000 + (int(re.sub(r"\D", "", number) or 0) * 101 + int(re.sub(r"\D", "", task) or 0)) % 20000


class Table(Callback):
    """Hydra callback: note in a job's folder how it ended, and print what the jobs came to when their sweep ends.

    Hydra tells of the end of a sweep only where no job failed, so the table is printed as the process ends.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.register(show_results, Path(config.hydra.sweep.dir).absolute())

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._note(config, "unfinished")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status == JobStatus.COMPLETED:
            self._note(config, "completed")
        else:
            error = job_return._return_value  # the property raises it
            said = isinstance(error, (UserError, JobFailed))
            text = error.args[0] if said else f"{type(error).__name__}: {error}"
            self._note(config, f"failed: {text}")

    def _note(self, config: DictConfig, text: str) -> None:
        rank = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"))
        if config.hydra.output_subdir is not None and not any(int(number or 0) for number in rank):
            Path(config.hydra.runtime.output_dir, config.hydra.output_subdir, _OUTCOME).write_text(text + "\n")


def read_outcome(folder: Path) -> str:
    """Read how the job in this folder ended: completed, unfinished, or ``failed: ...``."""
    path = folder / ".hydra" / _OUTCOME
    return path.read_text().strip() if path.is_file() else "unfinished"


def read_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of the run in this folder, empty where there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read what each job of the sweep in this folder came to, in the order of the jobs.

    A job that has not completed has an ``outcome`` and no numbers: those of an earlier validation are not its result.
    """
    rows: list[dict[str, Any]] = []
    for path in folder.glob("**/.hydra/hydra.yaml"):
        record, run = OmegaConf.load(path).hydra, path.parent.parent
        outcome = read_outcome(run)
        found = read_summary(run) if outcome == "completed" else {}
        numbers = {name: found.get(name) for name in _NUMBERS}
        row = {"job": int(record.job.num), "overrides": list(record.overrides.task), **numbers}
        rows.append({**row, "outcome": outcome, "folder": str(run.relative_to(folder))})
    rows.sort(key=lambda row: row["job"])
    common = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set()
    for row in rows:  # what every job shares tells none from another
        row["overrides"] = " ".join(override for override in row["overrides"] if override not in common)
    return rows


def show_results(folder: Path) -> None:
    """Print the table of a sweep's results, and write it to results.csv in its folder."""
    rows = read_results(folder)
    if not rows:
        return
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\n{format_table(rows)}\n\nresults.csv and each job's folder are in {folder}", flush=True)


def format_table(rows: list[dict[str, Any]]) -> str:
    """Format the results as lines of text: a job that has no numbers has its outcome in their place."""
    width = max(len("overrides"), *(len(row["overrides"]) for row in rows))
    lines = [f"{'job':>4}  {'overrides':{width}}  {'val_loss':>9}  {'prior KL':>9}  {'seconds':>8}"]
    for row in rows:
        if row["outcome"] == "completed":
            loss, prior, seconds = (
                "-" if row[name] is None else f"{row[name]:{form}}" for name, form in _NUMBERS.items()
            )
            end = f"{loss:>9}  {prior:>9}  {seconds:>8}"
        else:
            end = shorten(row["outcome"], 200, placeholder=" ...")
        lines.append(f"{row['job']:>4}  {row['overrides']:{width}}  {end}")
    return "\n".join(lines)
