"""The command line with shards of a few rows: ``KILL=4 python small_shards.py encode ...``, run by tests.

It is killed, kill -9, as it flushes the file of a store that KILL counts to; with 0 never. With SIGNAL=2, or 15,
all processes of its group are told by that signal instead.
"""

import os
import signal
import sys

from diffaug.__main__ import main
from diffaug.store import shards

shards._LEAST_BYTES = 6000
if "SIGNAL" in os.environ and "LOCAL_RANK" not in os.environ:
    os.setpgid(0, 0)
kill, flush = int(os.environ["KILL"]), os.fsync


def count_down(descriptor: int) -> None:
    global kill
    kill -= 1
    if kill == 0:
        if "SIGNAL" in os.environ:
            os.killpg(0, int(os.environ["SIGNAL"]))
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)


os.fsync = count_down
sys.exit(main())
