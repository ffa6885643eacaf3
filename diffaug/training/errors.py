"""Errors as a user reads them: one sentence where the mistake is theirs, and the file that holds the stack."""

import logging
import os
import re
import traceback
from pathlib import Path

from hydra.errors import CompactHydraException, HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from diffaug.training.checkpoint_io import quote_override

_PACKAGE = Path(__file__).resolve().parents[1]
# The text of an error that crossed from a DataLoader's worker: a stack, of which the last place and what follows count.
_FROM_A_WORKER = re.compile(
    r'Caught \w+ in .*\n  File "(?P<file>[^"]+)", line \d+, in [^\n]+\n'
    r"    (?P<line>[^\n]*)\n(?:    [^\n]*\n)*[\w.]+: (?P<text>.*)",
    re.DOTALL,
)

# OmegaConf's of a resolver that raises, and Hydra's.
_RESOLVED = re.compile(r"\w+ raised while resolving interpolation: (?P<text>.*?)(\n +full_key: .*)?", re.DOTALL)
_REFUSED = re.compile(r"Error in call to target '(?P<target>[^']+)':\n.*\nfull_key: (?P<key>\S+)", re.DOTALL)


class UserError(CompactHydraException):
    """An error of the user's, of which Hydra prints the text alone.

    Arguments:
        sentence: what is wrong.
        log: the file that holds the stack.
    """

    def __init__(self, sentence: str, log: str) -> None:
        super().__init__(sentence, log)  # both, so that it can be pickled

    def __str__(self) -> str:
        return "{}\nThe stack is in {}".format(*self.args)


class Told(KeyboardInterrupt):
    """A command was told to end.

    Arguments:
        number: of the signal, SIGINT or SIGTERM.
        sentence: what becomes of what it did.
    """

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.number = number


def sentence(error: BaseException) -> str | None:
    """Say an error of the user's in a sentence; None for an error of code, whose stack says more.

    The user's are those that diffaug itself raises, here or in a DataLoader's worker, and those by which Hydra,
    OmegaConf and Lightning refuse a configuration.
    """
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        refused, cause = _REFUSED.fullmatch(str(error)), error.__cause__
        said = refused and "{key} cannot be made by {target}: ".format(**refused.groupdict())
        return sentence(cause) or (f"{said}{cause} ({type(cause).__name__})" if said else str(error))
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return f"{error}\nQuote a value of other characters, for Hydra and for the shell: {quote_override(key, value)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set and has no default: give it a value by {error.full_key}=..."
    if type(error).__name__ == "MisconfigurationException":
        return f"Lightning's Trainer refuses its arguments (trainer.*): {error}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        resolved = _RESOLVED.fullmatch(str(error))
        return resolved["text"] if resolved and _is_refused(error) else str(error)
    worker = _FROM_A_WORKER.fullmatch(str(error).rstrip())
    if worker is not None:
        return worker["text"] if _is_refusal(worker["file"], worker["line"]) else None
    return str(error) if _is_refused(error) else None


def _is_refused(error: BaseException) -> bool:
    stack = traceback.extract_tb(error.__traceback__)
    return bool(stack) and _is_refusal(stack[-1].filename, stack[-1].line)


def _is_refusal(file: str, line: str | None) -> bool:
    """Return whether an error came up at a ``raise`` of diffaug's own, and not in a call from there."""
    return _PACKAGE in Path(file).resolve().parents and (line or "").lstrip().startswith("raise ")


def for_the_user(error: Exception) -> Exception:
    """Write an error's stack to the run's log, and return what is to be raised: the error, or what a user reads of it.

    The error itself where it is none of the user's, where there is no log, and where HYDRA_FULL_ERROR is set.
    """
    log = next((h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)), None)
    if log is None or isinstance(error, UserError):
        return error
    stack = (type(error), error, error.__traceback__)
    log.handle(logging.LogRecord("diffaug", logging.ERROR, __file__, 0, "the run ended by an error", None, stack))
    said = None if os.environ.get("HYDRA_FULL_ERROR", "0") == "1" else sentence(error)
    return error if said is None else UserError(said, log.baseFilename)
