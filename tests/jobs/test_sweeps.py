"""Sweeps, as a user starts them: every rank trains the job it belongs to, also after jobs that failed."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny import LONG, OVERRIDES, ROOT, TWO, gone, losses, start, train, until

from diffaug.training.sweeps import build_command, choose_port, config_options, export_ranks, format_table, read_results

SWEEP = ("-m", *OVERRIDES, "hydra.sweep.dir=sweep")


def marks(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*-of-*")}


@pytest.mark.slow
def test_ranks_stay_with_their_job_after_jobs_that_failed(tmp_path):
    """One job fails before it fits, one on rank 1 alone; then two ranks train the third, and no other."""
    folders = 'hydra.sweep.subdir="n=${hydra.job.num},${seed}"'
    done = train(tmp_path, *SWEEP, *TWO, "+model.network.mark=before,rank1,neither", folders, expect=1)
    assert marks(tmp_path) == {"rank1-0-of-2", "rank1-1-of-2", "neither-0-of-2", "neither-1-of-2"}
    lines = done.stdout[done.stdout.index(" job  overrides") :].splitlines()
    assert re.search(r"^ +0  \+model\.network\.mark=before +failed: .*fails before it fits", lines[1])
    assert re.search(
        r"^ +1  \+model\.network\.mark=rank1 +failed: .*(SIGKILL|gloo)", lines[2]
    )  # rank 0, by whom it heard first
    assert re.search(r"^ +2  \+model\.network\.mark=neither +\d\.\d{4} +2\.09e-05 +\d+$", lines[3])
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [row["outcome"].split(":")[0] for row in rows] == ["failed", "failed", "completed"]
    assert json.loads((tmp_path / "sweep/n=2,0/summary.json").read_text())["steps"] == 2
    assert not (tmp_path / "multirun").exists(), "a rank opened a sweep of its own"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_two_schedules_in_one_table(tmp_path):
    done = train(tmp_path, *SWEEP, "schedule=linear,cosine", 'hydra.sweep.subdir="n=${hydra.job.num},${seed}"')
    rows = list(csv.DictReader((tmp_path / "sweep" / "results.csv").open()))
    assert [row["overrides"] for row in rows] == ["schedule=linear", "schedule=cosine"]
    assert [row["folder"] for row in rows] == ["n=0,0", "n=1,0"]
    names = [json.loads((tmp_path / "sweep" / row["folder"] / "summary.json").read_text())["schedule"] for row in rows]
    assert names[0].startswith("LinearBeta(")
    assert names[1].startswith("Cosine(")
    assert [float(row["prior_kl_bits_per_dim"]) for row in rows] == pytest.approx([2.09e-5, 1.26e-9], rel=0.01)
    assert len(re.findall(r"schedule=(?:linear|cosine)  +\d\.\d{4}", done.stdout)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_told_to_end_ends_its_job_which_keeps_what_it_did(told, tmp_path):
    """By SIGTERM to the sweep alone, or by SIGINT to all of it, as from a terminal."""
    process = start(tmp_path, *SWEEP, "seed=1,2", *LONG)
    until(lambda: marks(tmp_path), process, tmp_path / "log")
    job = int(next(tmp_path.glob("*-of-*")).read_text())
    if told == signal.SIGINT:
        os.killpg(process.pid, told)
    else:
        process.send_signal(told)
    assert process.wait(60) == 128 + told
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
    said = (tmp_path / "log").read_text()
    assert (tmp_path / "sweep/0/checkpoints/last.ckpt").is_file()
    assert not (tmp_path / "sweep/1").exists(), "the sweep went on"
    assert re.search(r"^ +0 .* unfinished", said, re.MULTILINE)
    assert f"{told.name}: saved step" in said
    assert "The sweep ends here. The same command with hydra.sweep.dir=sweep goes on." in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_sweep_that_is_told_twice_ends_at_once(tmp_path):
    process = start(tmp_path, *SWEEP, "seed=1,2", "+model.network.seconds=300")
    until(lambda: marks(tmp_path), process, tmp_path / "log")
    job = int(next(tmp_path.glob("*-of-*")).read_text())
    deadline = time.monotonic() + 60
    while process.poll() is None:  # a signal that comes while the first is taken counts with it
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)  # the latter if one more came while it ended
    assert gone(job)
    assert not (tmp_path / "sweep/1").exists(), "the sweep went on"


def launched_locally(folder: Path, tasks: int, *overrides: str) -> subprocess.Popen[bytes]:
    """A sweep of two seeds by submitit, on this machine: its processes and its queue are SLURM's in small."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    return start(folder, *SWEEP, *overrides, "hydra/launcher=local", f"hydra.launcher.tasks_per_node={tasks}")


@pytest.mark.slow
def test_submitit_starts_a_sweep_one_process_each(tmp_path):
    process = launched_locally(tmp_path, 1, "+model.network.mark=p,before")
    assert process.wait(200) == 1, (tmp_path / "log").read_text()[-3000:]
    assert marks(tmp_path) == {"p-0-of-1"}
    log = (tmp_path / "log").read_text()
    assert re.search(r"^ +0  \+model\.network\.mark=p +\d\.\d{4}", log, re.MULTILINE)
    assert re.search(r"^ +1  \+model\.network\.mark=before +failed: .*fails before it fits", log, re.MULTILINE)


@pytest.mark.slow
def test_submitit_puts_a_job_of_two_ranks_back_into_the_queue_and_it_goes_on(tmp_path):
    process = launched_locally(
        tmp_path,
        2,
        *TWO,
        "trainer.max_steps=100",
        "trainer.val_check_interval=100",
        "+model.network.seconds=0.05",
        "callbacks.last.every=5",
    )
    until(lambda: marks(tmp_path) == {"-0-of-2", "-1-of-2"}, process, tmp_path / "log")
    first = int((tmp_path / "-0-of-2").read_text())
    run = tmp_path / "sweep" / "0"
    os.kill(first, signal.SIGTERM)  # what SLURM sends first: the ranks save, and go on
    until((run / "checkpoints" / "last.ckpt").is_file, process, tmp_path / "log")
    os.kill(first, signal.SIGUSR2)  # what submitit has asked for: they save, and end, and begin again
    assert process.wait(200) == 0, (tmp_path / "log").read_text()[-3000:]
    assert int((tmp_path / "-0-of-2").read_text()) != first, "the job did not end"
    logs = "".join(path.read_text() for path in (tmp_path / "sweep").glob(".submitit/*/*_log.*"))
    step = int(re.search(r"SIGUSR2: saved step (\d+)", logs + (run / "train.log").read_text()).group(1))
    assert 0 < step < 100
    assert step % 5 == 0
    assert sorted(step for step, _ in losses(run)) == list(range(100)), "steps were lost or done again"
    assert json.loads((run / "summary.json").read_text())["steps"] == 100


@pytest.mark.slow
def test_the_commands_of_the_page_compose():
    """Every command of docs/large.md, the launcher's options too; of a sweep its first job."""
    from hydra import compose, initialize_config_dir

    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    page = (ROOT / "docs" / "large.md").read_text()
    commands = re.findall(r"^(?:torchrun \S+|python) train\.py (.*)$", page, re.MULTILINE)
    assert len(commands) >= 9
    for line in commands:
        words = [word.split(",")[0] for word in line.split() if word != "-m"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            config = compose("train", [*words, "folder=x"], return_hydra_config=True)
        if "hydra/launcher=slurm" in words:
            assert config.hydra.launcher._target_.endswith("SlurmLauncher")
            assert config.hydra.launcher.additional_parameters.requeue
            assert config.hydra.launcher.tasks_per_node == config.trainer.devices
            assert config.hydra.launcher.nodes == config.trainer.num_nodes


def test_the_options_that_choose_configs_are_kept():
    words = ["-m", "schedule=linear,cosine", "--config-name", "mine", "-cd=more", "--multirun", "seed=1"]
    assert config_options(words) == ["--config-name", "mine", "-cd=more"]


def test_the_command_of_a_job_is_its_own(monkeypatch):
    from hydra.core.hydra_config import HydraConfig

    hydra = {
        "overrides": {
            "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=basic", "hydra.sweep.dir=x", "hydra.verbose=true"],
            "task": ["schedule=cosine", "data.root='a b'"],
        },
        "runtime": {"output_dir": '/x/schedule=cosine,"a"'},
        "job": {"num": 3, "id": "3"},
    }
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create(hydra)))
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "schedule=linear,cosine", "hydra.verbose=true"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    assert build_command() == [
        sys.executable,
        os.path.abspath("train.py"),
        "hydra.verbose=true",
        "schedule=cosine",
        "data.root='a b'",
        'hydra.run.dir="/x/schedule=cosine,\\"a\\""',
        "hydra.job.num=3",
        "hydra.job.id=3",
    ]


def test_the_table_leaves_out_what_all_share_and_numbers_of_a_job_that_failed(tmp_path):
    for number, (schedule, how) in enumerate([("linear", "completed"), ("cosine", "failed: OSError: no room\nmore")]):
        record = tmp_path / str(number) / ".hydra"
        record.mkdir(parents=True)
        overrides = ["trainer=ddp", f"schedule={schedule}"]
        OmegaConf.save({"hydra": {"job": {"num": number}, "overrides": {"task": overrides}}}, record / "hydra.yaml")
        (record / "outcome.txt").write_text(how)
        summary = {"val_loss": 0.5, "prior_kl_bits_per_dim": 1e-5, "seconds": 12.3}
        (record.parent / "summary.json").write_text(json.dumps(summary))
    assert format_table(read_results(tmp_path)).splitlines() == [
        " job  overrides         val_loss   prior KL   seconds",
        "   0  schedule=linear     0.5000      1e-05        12",
        "   1  schedule=cosine  failed: OSError: no room more",
    ]


def test_the_jobs_of_an_array_have_ports_of_their_own():
    ports = [choose_port(f"1234567_{task}") for task in range(100)]
    assert len({*ports, choose_port("1234568_0")}) == 101
    assert all(10000 <= port < 30000 for port in ports)


def test_tasks_and_devices_must_be_as_many(monkeypatch):
    pytest.importorskip("submitit")
    for name, value in {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "7",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_GLOBALID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "before")  # so that it is put back
    with pytest.raises(ValueError, match=r"trainer\.devices=1, but hydra\.launcher\.tasks_per_node=2.*Set hydra\.l"):
        export_ranks(OmegaConf.create({"trainer": {"devices": 1}}))
    export_ranks(OmegaConf.create({"trainer": {"devices": 2, "num_nodes": 1}}))
    assert (os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")
