"""A first run's terminal: what is left out of it, and what is not."""

import logging
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from tiny import OVERRIDES, train

from diffaug.training.quiet import LOGGED, LOGGERS, WARNED, quieten


@pytest.fixture
def _quiet():
    """The filters, and nothing of them afterwards."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [list(logger.filters) for logger in loggers]
    with warnings.catch_warnings():
        quieten("diffaug.pytorch_lightning")
        yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


def test_what_is_left_out_is_what_others_say_today():
    """A text that they no longer have is no reason for a filter."""
    package = Path(find_spec("pytorch_lightning").origin).parent
    places = [*package.rglob("*.py"), *Path(find_spec("lightning_fabric").origin).parent.rglob("*.py")]
    torch = Path(find_spec("torch").origin).parent
    places += [torch / "utils" / "cpp_extension.py", torch / "utils" / "_pytree.py"]
    said = "".join(path.read_text() for path in places)
    for text in (*LOGGED, *WARNED):
        assert text.replace("False", "{").split("{")[0] in said, text


@pytest.mark.usefixtures("_quiet")
def test_only_that_is_left_out(caplog):
    kept = ["GPU available: True (cuda), used: True", "TPU available: True", "`Trainer.fit` stopped"]
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        for text in (*LOGGED, *kept):
            rank_zero_info(text)
    assert [record.getMessage() for record in caplog.records] == kept
    kept = ["another", "The 'train_dataloader' does not have many workers"]
    with warnings.catch_warnings(record=True) as caught:
        for text in (*WARNED, *kept):
            warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == kept


@pytest.mark.slow
def test_a_first_run_says_little(tmp_path):
    done = train(tmp_path, *OVERRIDES, "hydra.run.dir=run", fresh=True)
    said = re.sub(r"\[[\d\-: ,]+\]", "", done.stderr + done.stdout).strip().splitlines()
    of_lightning = re.compile(r"\[pytorch_lightning\S*\]\[INFO\] - (GPU available|`Trainer)")
    lines = [line for line in said if not of_lightning.match(line)]
    expected = [
        "[diffaug][INFO] - seed 0",
        "[diffaug][INFO] - the forward process runs on ",
        "",
        "2 steps in ",
        "  pictures         none",
        "  validation loss ",
        "  x_T to N(0, I)   2.09e-05 bits per dimension",
        "  schedule         LinearBeta(",
    ]
    assert len(lines) == len(expected), "\n".join(lines)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), "\n".join(lines)
