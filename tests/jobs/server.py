"""A process that has imported what jobs import, and forks them: one begins in a tenth of a second, not in seven.

The tests start jobs by `Popen` and `run` here, which are as subprocess's; the server begins with the first of them and
ends with the tests. A job is a real process, with its own pid and group, killed by real signals. Its own are its words,
variables, folder, streams, ``sys.path``, ``__main__``, diffaug, and its end: atexit, the trace of an uncaught error.
The Python commands that it starts (the other ranks of Lightning's, the jobs of a sweep) join its group; their parent is
the server. The server has one thread and has drawn nothing.

A job shares with others what it would have of its own in a fresh process: the hash seed of strings, what is read as
Python or a library is loaded (OMP_NUM_THREADS is 1), warnings that an import gives. So tests of the start itself use
subprocess, as do some of several ranks; and ``pytest -m slow --fresh`` starts every job afresh.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FRESH = not hasattr(os, "pidfd_open")
IMPORTS = (  # not diffusers, which looks for a GPU as it is imported: after that no fork can use one
    *("torch", "torchvision", "torch._inductor.compile_fx", "pytorch_lightning", "hydra.main", "sklearn.datasets"),
    *("matplotlib.pyplot", "tensorboard", "hydra_plugins.hydra_submitit_launcher.submitit_launcher"),
)


class Forked:
    """To a process that the server has forked what `subprocess.Popen` is to others."""

    def __init__(self, words: list[str], cwd: str, env: Mapping[str, str], streams: list[int], group: int) -> None:
        self.args, self.returncode = words, None
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._line.connect(address())
        job = {"words": words, "cwd": cwd, "env": dict(env), "group": group}
        socket.send_fds(self._line, [json.dumps(job).encode()], streams)
        self.pid = int(self._line.recv(99))

    def poll(self, seconds: float | None = 0) -> int | None:
        if self.returncode is None and select.select([self._line], [], [], seconds)[0]:
            status = self._line.recv(99)
            self.returncode = int(status) if status else self.returncode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Popen(subprocess.Popen):
    """Start a process; one of Python that is told no more than cwd, env, stdout and stderr by the server."""

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        words = [str(word) for word in arguments[0]] if arguments and isinstance(arguments[0], list) else []
        if words[1:2] == ["-u"] and options.get("shell") is False:  # as submitit starts the tasks of a job
            del words[1]
        known = words[:1] == [sys.executable] and (words[1] == "-m" or words[1][0] != "-") and len(arguments) == 1
        told = {name for name, value in options.items() if value and name != "encoding"}
        if FRESH or not known or told - {"cwd", "env", "stdout", "stderr"} or not address():
            return super().__new__(cls)
        streams = [options.get(name) or default for name, default in (("stdout", 1), ("stderr", 2))]
        streams = [stream if isinstance(stream, int) else stream.fileno() for stream in streams]
        cwd, env = str(options.get("cwd") or os.getcwd()), options.get("env") or os.environ
        return Forked(words[1:], cwd, env, streams, os.getpgrp() if _address else 0)


def run(
    words: list[str],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with ``capture_output`` and ``text``."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = (subprocess.Popen if fresh else Popen)(words, cwd=cwd, env=env, stdout=out, stderr=error)
        try:
            process.wait(timeout)
        finally:
            process.kill()
        texts = [(file.seek(0), file.read())[1] for file in (out, error)]
        return subprocess.CompletedProcess(words, process.returncode, *texts)


_address = ""  # in the server and its jobs


@functools.cache
def address() -> str:
    """Where the server listens; it begins if this is not one of its jobs. Empty where it cannot fork."""
    if _address:
        return _address
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    address.server = subprocess.Popen([sys.executable, __file__], env=variables, text=True, **pipes)  # ends with stdin
    name = address.server.stdout.readline().strip()
    return f"\0{name}" if name else ""


def serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a job for each that asks and tell it how that ended. Return a job and its streams, in the job's process."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready = select.select([0, listener, *running], [], [])[0]
        if 0 in ready:  # the tests have ended
            for pid, _ in running.values():
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for descriptor in running.keys() & set(ready):
            pid, line = running.pop(descriptor)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(descriptor)
            with line, contextlib.suppress(OSError):  # who asked is dead
                line.send(str(status).encode())
        if listener in ready:
            line, _ = listener.accept()
            said, streams, _, _ = socket.recv_fds(line, 1 << 20, 2)
            if not said:
                continue
            job = json.loads(said)
            pid = os.fork()
            if not pid:
                for other in (line, listener, *(line for _, line in running.values())):
                    other.close()
                for descriptor in running:
                    os.close(descriptor)
                return job, streams
            for stream in streams:
                os.close(stream)
            with contextlib.suppress(OSError):
                os.setpgid(pid, job["group"])  # before anyone can signal the group
                line.send(str(pid).encode())
            running[os.pidfd_open(pid)] = pid, line


def become(words: list[str], cwd: str, env: dict[str, str], group: int, streams: list[int]) -> None:
    """Run a script, or ``-m module``, as a process of its own does."""
    os.setpgid(0, group)
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()  # as Python's own, which does so itself
    subprocess.Popen = Popen
    paths = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [cwd if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0])), *paths]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def end() -> None:
    """End a job without taking down its modules, which takes half a second. Threads and other atexits come before."""
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


if __name__ == "__main__":
    _status: int | None = None
    atexit.register(end)  # the first, so the last to be called
    for name in IMPORTS:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("a fork would lose a thread of what was imported: every job starts afresh")
    assert "diffaug" not in sys.modules
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")  # a name without a file, which Linux chooses
    _address = listener.getsockname().decode()
    listener.listen()
    print(_address[1:], flush=True)
    job, streams = serve(listener)
    try:
        become(**job, streams=streams)
        _status = 0
    except SystemExit as exit:
        _status = {None: 0}.get(exit.code, exit.code if isinstance(exit.code, int) else 1)
        raise
    except Exception:
        _status = 1
        raise
