"""The list of an image folder's broken files: ``python -m diffaug check`` writes it, data.on_error=skip reads it."""

import errno
import json
import re
import shlex
from pathlib import Path

from PIL import Image

from diffaug.datasets.atomic_file import open_whole

NAME = ".diffaug-broken.json"
"""In the folder that the files lie in; hidden, so that it is no file of the dataset."""
ON_ERROR = ("raise", "skip")


def command(**options: object) -> str:
    """Return the command line that writes the list, with these options of the folder but for those that are None."""
    given = [f"data.{key}={_quoted(str(value))}" for key, value in options.items() if value is not None]
    return "python -m diffaug check data=image_folder " + shlex.join(given)


def _quoted(value: str) -> str:
    """Quote a value for Hydra's grammar where it must be; the shell's quotes come on top of it."""
    return value if re.fullmatch(r"[\w./:~-]+", value) else '"' + value.replace('"', r"\"") + '"'


def reason(error: Exception) -> str:
    """Say why a file could not be read, as the end of a sentence."""
    if isinstance(error, Image.DecompressionBombError):
        return f"is suspiciously large: {error} If it is right, raise PIL.Image.MAX_IMAGE_PIXELS."
    return f"cannot be read: {error} ({type(error).__name__})."


def is_lasting(error: Exception) -> bool:
    """Return whether an error is of the file, and not of the moment: open files, permission, a failing disk."""
    if isinstance(error, OSError) and error.errno is not None:  # Pillow's own have none
        return error.errno in (errno.ENOENT, errno.ELOOP)  # a link to nowhere
    return not isinstance(error, MemoryError)


def read(path: Path, again: str) -> set[str]:
    """Read the names on a list.

    Arguments:
        path: the list's file.
        again: the command line that writes it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    try:
        return set(json.loads(path.read_text())["broken"])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.on_error=skip goes by a list of the broken files, but there is no {path}. This writes it: {again}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of broken files. This writes it: {again}") from error


def write(path: Path, broken: dict[str, str]) -> None:
    """Write the list, whole or not at all: what is wrong with each file, by its name within the folder."""
    with open_whole(path) as file:
        file.write((json.dumps({"broken": dict(sorted(broken.items()))}, indent=1) + "\n").encode())
