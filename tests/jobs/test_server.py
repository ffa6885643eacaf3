"""A job that the server forks is as a fresh process, to itself and to who started it."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import server
from server import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(server.FRESH, reason="there is no server")]

SCRIPTS = {
    "itself": "import os, sys; print(sys.argv, os.getcwd(), os.environ['A'], sys.path[:2], __name__, __file__)",
    "module": "import sys; print(sys.argv[1:], __name__, __spec__.name, sys.path[0])",
    "not imported": "import sys; print('diffaug' in sys.modules, 'server' in sys.modules)",
    "status": "import sys; sys.exit(3)",
    "large status": "import sys; sys.exit(-2)",
    "said": "import sys; sys.exit('no more')",
    "error": "print('before'); 1 / 0",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "last words": "import atexit; atexit.register(print, 'last')",
    "a thread goes on": "import threading; threading.Timer(0.2, print, ['late']).start()",
    "a child": """
import os, subprocess, sys
if sys.argv[1:] == ["child"]:
    print("child", os.environ["B"], os.getpgrp() == int(os.environ["GROUP"]), flush=True)
    sys.exit(5)
variables = {**os.environ, "B": "b", "GROUP": str(os.getpgrp())}
child = subprocess.Popen([sys.executable, __file__, "child"], env=variables)
assert child.wait(60) == child.poll() == 5
long = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
long.kill()
print(long.wait())
""",
}


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let fresh processes be interrupted: started in the background, a shell's children inherit to ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("what", SCRIPTS)
def test_it_is_and_ends_as_a_fresh_process(what, tmp_path):
    (tmp_path / "job.py").write_text(SCRIPTS[what])
    words = [sys.executable, *(["-m", "job"] if what == "module" else [str(tmp_path / "job.py")]), "one", "two=2"]
    variables = {**os.environ, "A": "ü", "PYTHONPATH": str(tmp_path)}
    ours, theirs = (run(words, tmp_path, variables, fresh=fresh, timeout=60) for fresh in (False, True))
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_no_two_draw_alike(tmp_path):
    (tmp_path / "job.py").write_text("import random, numpy; print(random.random(), numpy.random.rand())")
    words = [sys.executable, str(tmp_path / "job.py")]
    drawn = [number for _ in range(2) for number in run(words, tmp_path).stdout.split()]
    assert len({*drawn, str(random.random()), str(np.random.rand())}) == 6


def test_it_is_waited_for_and_killed(tmp_path):
    (tmp_path / "job.py").write_text("import time; time.sleep(300)")
    process = server.Popen([sys.executable, str(tmp_path / "job.py")], cwd=tmp_path)
    assert isinstance(process, server.Forked)
    assert process.poll() is None
    assert os.getpgid(process.pid) == process.pid
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.terminate()
    assert process.wait(10) == process.returncode == -15
