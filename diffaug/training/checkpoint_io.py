"""Atomic checkpoint files, checked before they are read, in a folder locked by the run that writes."""

import errno
import fcntl
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

_ABANDONED = 86400.0  # seconds after which a part is nobody's, where a file system cannot say who writes it
_WRITING: set[str] = set()  # the names of the parts that this process writes
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF"  # the start of torch.save's older format, which has no checksums
_DIRECTORY = 0x10  # a zip's mark of a folder: torch reads nothing of a record that has it, so memory holds what it held


_TorchCheckpointIO: Any = object  # that of either package stands here


class AtomicCheckpointIOBase(_TorchCheckpointIO):
    """Write and read checkpoints atomically: on a local disk the new one is whole under its name, or the one before is.

    It is written beside its place, under a name of the writer's own, flushed to the disk, and renamed. (Lightning's own
    goes by way of the system's folder for temporary files; onto another disk that is a copy, which a full disk or a
    kill cuts short.) Before it is read, its bytes are compared with the checksums that torch.save keeps in it and
    torch.load passes over; so a checkpoint that plain Lightning wrote is checked too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written: why, what is left, and what to do.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place, written, handled = Path(path), 0, sys.exc_info()[1]
        part = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        _WRITING.add(part.name)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(place.parent)
            with part.open("xb") as file:
                lock(file)  # while it is held, no other run takes the part for an abandoned one
                try:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(part, place)
                except RuntimeError as error:  # torch's word for a write that failed, after the error that says why
                    why = error.__context__
                    if isinstance(why, OSError) and why is not handled:
                        raise why from None
                    raise
                finally:
                    written = os.fstat(file.fileno()).st_size
                    part.unlink(missing_ok=True)
            _sync_folder(place.parent)
        except OSError as error:
            raise _make_write_error(place, written, error) from error
        finally:
            _WRITING.discard(part.name)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            RuntimeError: it is damaged, or is no checkpoint: why, and which one to go on from instead.
        """
        place = Path(path)
        if "://" in str(path) or not place.exists():
            return super().load_checkpoint(path, *arguments, **options)
        fault = find_damage(place)
        if fault:
            raise RuntimeError(f"The checkpoint {path} is damaged: {fault}. {_suggest_other(place)}")
        try:
            checkpoint = super().load_checkpoint(path, *arguments, **options)
        except (MemoryError, PermissionError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"The checkpoint {path} cannot be loaded: {said.rstrip('.')}. {_suggest_other(place)}"
            ) from error
        wanted = {"state_dict", "pytorch-lightning_version"}
        if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
            held = (
                f"keys {', '.join(map(str, checkpoint))}" if isinstance(checkpoint, dict) else type(checkpoint).__name__
            )
            raise RuntimeError(
                f"{path} is no checkpoint of Lightning's, which has the keys {' and '.join(sorted(wanted))}: it holds "
                f"{held}. {_suggest_other(place)}"
            )
        return checkpoint


def find_damage(path: Path) -> str | None:
    """Find what is wrong with the bytes of a checkpoint; None if nothing is, or if there are no checksums in it.

    It costs one reading of the file.
    """
    if path.is_dir():
        return "it is a folder, of which this trainer.strategy reads none"
    try:
        with path.open("rb") as file:
            start = file.read(len(_BEFORE_ZIP))
        if not start:
            return "it is empty"
        if not zipfile.is_zipfile(path):
            if start.startswith(b"PK"):
                return "its end is missing, so it was cut short"
            return None if start == _BEFORE_ZIP else f"it begins with {start!r}, as no checkpoint does"
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
                return None
            spoilt = archive.testzip() or next(
                (one.filename for one in records if one.external_attr & _DIRECTORY), None
            )
    except PermissionError:
        raise
    except Exception as error:  # of a damaged directory zipfile says one of many
        return f"{type(error).__name__}: {error}"
    return f"the bytes of its record {spoilt} are not those that were written (CRC-32)" if spoilt else None


def lock(file: IO[Any]) -> bool | None:
    """Lock an open file for as long as this process lives and has it open.

    A process that is killed holds no lock, and a process that was forked from the holder does not either.

    Returns:
        False if another process holds it, None if its file system has no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _remove_abandoned(folder: Path) -> None:
    """Remove the parts of checkpoints whose writers are there no more."""
    for part in folder.glob(".*.part"):
        if not re.fullmatch(r"\..+\.\d+-[0-9a-f]{8}\.part", part.name) or part.name in _WRITING:
            continue
        try:
            with part.open("r+b") as file:
                free, state = lock(file), part.stat()
                old = free or (free is None and time.time() - state.st_mtime > _ABANDONED)
                if old and state.st_size:  # an empty one may be just begun, and not yet locked
                    part.unlink()
        except OSError:  # its writer has just renamed it, or it is another user's
            pass


def _sync_folder(folder: Path) -> None:
    """Flush the folder's list of names too, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_write_error(place: Path, written: int, error: OSError) -> OSError:
    """Make the error for a checkpoint that could not be written."""
    whole, full = place.is_file(), error.errno in (errno.ENOSPC, errno.EDQUOT)
    got = ""
    if full:
        free = shutil.disk_usage(place.parent).free if place.parent.is_dir() else 0
        got = f"It got to {written:,} bytes; {free:,} bytes are free there. "
    before = "The one before it is whole" if whole else "There is none before it"
    elsewhere = f" and {quote_override('ckpt_path', place)}" if whole else ""
    return OSError(
        f"The checkpoint {place} could not be written: {error}. {got}{before}. {'Make room' if full else 'Mend that'}, "
        f"and give the same command again with {quote_override('hydra.run.dir', place.parent.parent)}; or set "
        f"hydra.run.dir to another folder{elsewhere}."
    )


def _suggest_other(place: Path) -> str:
    """Say from which checkpoint to go on instead: the newest other one in the folder that is whole."""
    others = [path for path in place.parent.glob("*.ckpt") if path.name != place.name and path.is_file()]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True):
        if not find_damage(path):
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
            return f"Go on from {path.name}, of {when}, by {quote_override('ckpt_path', path)}."
    return "No other whole one lies beside it. Set ckpt_path to another; ckpt_path=null begins from the start."


def quote_override(key: str, path: str | Path) -> str:
    """Write an override that sets a key to a path, quoted for Hydra and for the shell where that is needed."""
    text = str(path)
    if not re.fullmatch(r"[\w./-]+", text, re.ASCII):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return shlex.quote(f"{key}={text}")


def find_holder(folder: Path) -> str | None:
    """Say which run holds a folder, if another one does; leaves no trace."""
    if not (folder / ".lock").is_file():
        return None
    with (folder / ".lock").open("r+") as file:
        return None if lock(file) is not False else _held(folder, file)


def _held(folder: Path, file: IO[str]) -> str:
    file.seek(0)
    return (
        f"Another run is writing its checkpoints to {folder}: {file.read().strip() or 'another process'}. Two would "
        "overwrite each other's last.ckpt. Wait for it or end it, and give the same command again; or give this run a "
        "folder of its own by hydra.run.dir=FOLDER."
    )


def claim(folder: Path) -> IO[str] | str:
    """Claim a folder for the checkpoints of this run alone.

    The claim is a lock on a file in it, which the system ends with the process: none outlives a kill.

    Returns:
        The file, whose closing ends the claim; or why it cannot be had.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
        if lock(file) is False:
            with file:
                return _held(folder, file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    except OSError as error:
        return f"Checkpoints cannot be written to {folder}: {error}. Mend that, or set hydra.run.dir to another folder."
    return file
