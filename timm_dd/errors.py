"""What a user can cause: each message says what was expected, what came, where, and what to do."""

import reprlib
from typing import Any


class TimmDDError(ValueError):
    """Whatever this package raises for what a user can cause."""


class SplitError(TimmDDError):
    """A model, a number of parts or a domain that cannot be split as asked."""


class MergeError(TimmDDError):
    """Parts that cannot be merged: missing, damaged, or not of one split."""


class WidthError(Exception):
    """Two axes that the algebra cannot make equal; the planner adds the node and raises SplitError."""


class TrainError(TimmDDError):
    """A training run that cannot start or cannot go on: data, options, or a loss that is not finite."""


class FileError(TimmDDError):
    """A file or folder that cannot be written, or a value that a file has no form for."""


class PushError(TimmDDError):
    """A push that the Hub refuses, or that does not reach it."""


def headline(error: BaseException) -> str:
    """The first line of another library's message, if need be shortened; the error's name if it has none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:300]}…"


def shown(value: Any) -> str:
    """What a file says, in the one line of a message, however long or deep it is."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
