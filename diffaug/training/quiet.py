"""Messages of Lightning and torch that a user of train.py can do nothing about, silenced by their text."""

import logging
import re
import warnings
from importlib import import_module

from lightning_utilities.core.rank_zero import rank_zero_only

LOGGED = (
    "💡 Tip: For seamless cloud",  # litlogger, litmodels
    "TPU available: False",
    "You are using a CUDA device",  # and the next line of it says what to call in code; trainer=gpu is the way here
    "No CUDA runtime is found, using CUDA_HOME",  # of a machine with CUDA's compiler and no GPU
)
LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "torch.utils.cpp_extension",
)
WARNED = (
    "`isinstance(treespec, LeafSpec)` is deprecated",  # Lightning's own use of torch
)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(LOGGED)


def quieten(room: str) -> None:
    """Silence these messages in this process's logs and warnings, and on other ranks what rank 0 says too.

    Arguments:
        room: diffaug.pytorch_lightning or diffaug.lightning. It is imported here, and the package with it: `lightning`
            prints every line once more by a handler of its own.
    """
    import_module(room)
    logging.getLogger("lightning").handlers.clear()
    if getattr(rank_zero_only, "rank", 0):
        logging.getLogger("diffaug").setLevel(logging.WARNING)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_reading)
    for text in WARNED:
        warnings.filterwarnings("ignore", message=re.escape(text))
