"""Numbers from files."""

from pathlib import Path

import numpy as np

from diffaug.checks import refuse


def read_numbers(where: str, path: str) -> list[float]:
    """The numbers of a .npy, .npz (of one array) or .csv file, as a flat list.

    Arguments:
        where: the YAML key that names the file, for the error.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise refuse(where, path, "a list of numbers, or a file of them; there is no such file")
    try:
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                (array,) = arrays.values()
        else:
            array = np.load(file) if file.suffix == ".npy" else np.loadtxt(file, delimiter=",")
        return np.asarray(array, dtype=np.float64).ravel().tolist()
    except (ValueError, OSError) as error:
        raise refuse(where, path, "a .npy, .npz (of one array) or .csv file of numbers") from error
