"""Messages of Lightning and torch that a user of train.py can do nothing about, silenced by their text."""

import logging
import re
import warnings
from importlib import import_module

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


def quieten(package: str) -> None:
    """Silence these messages in this process's logs and warnings.

    Arguments:
        package: of Lightning, imported here: `lightning` prints every line once more by a handler of its own.
    """
    import_module(package)
    logging.getLogger("lightning").handlers.clear()
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_reading)
    for text in WARNED:
        warnings.filterwarnings("ignore", message=re.escape(text))
