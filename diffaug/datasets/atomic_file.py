"""A file that is written whole or not at all, whatever interrupts it, also where several processes write it at once."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextmanager
def open_whole(path: Path) -> Generator[BinaryIO]:
    """Open a file to be written beside its place, hidden; at the end, if nothing went wrong, it is put there."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
