"""What a user can cause: each message says what was expected, what came, where, and what to do."""

import contextlib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


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


class ReportError(TimmDDError):
    """A folder that a report cannot be made of, or images that it cannot show."""


class BugError(TimmDDError):
    """What nobody has foreseen: the place, and the request to report it."""


@contextlib.contextmanager
def reporting(where: Callable[[], str]) -> Iterator[None]:
    """What is unforeseen inside becomes a `BugError` that names the place; what the system says (no memory, no file)
    and warnings that the user made errors stay as they are."""
    try:
        yield
    except (TimmDDError, WidthError, OSError, MemoryError, Warning):
        raise
    except Exception as e:
        raise BugError(
            f"{where()}: {type(e).__name__}: {headline(e)}; that is a bug of timm_dd: report it with the network's code"
        ) from e


@contextlib.contextmanager
def looking_into(folder: Any, kind: type[TimmDDError]) -> Iterator[None]:
    """Where the system does not let us look is an error of this kind."""
    try:
        yield
    except OSError as e:
        where = shown(str(e.filename or folder))
        raise kind(f"{where} cannot be read ({e.strerror or e}); check its name, and who may read it") from e


def public(function: Callable[P, R]) -> Callable[P, R]:
    """`reporting` for a function that users call; arguments that it does not have are Python's TypeError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        signature.bind(*args, **kwargs)
        with reporting(lambda: function.__qualname__):
            return function(*args, **kwargs)

    return call


def headline(error: BaseException) -> str:
    """The first line of another library's message, if need be shortened; the error's name if it has none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:300]}…"


def shown(value: Any) -> str:
    """What a file says, in the one line of a message, however long or deep it is."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
