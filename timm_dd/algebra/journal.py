"""Transactions: an operation of the algebra succeeds whole, or every `Width` and `Axis` is as it was.

What may change is `Journaled`: inside a `transaction` each of its attributes is written down before it is overwritten.
That holds for whoever writes, and for normal forms that an `Axis` keeps, which would else mention undone bindings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_Entry = tuple[object, str, Any]  # an object, an attribute, its value before
_journal: ContextVar[list[_Entry] | None] = ContextVar("journal", default=None)  # each thread has its own


class Journaled:
    """An object whose attributes a failing `transaction` sets back. One that is new has nothing to set back."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        journal = _journal.get()
        if journal is not None and hasattr(self, name):
            journal.append((self, name, getattr(self, name)))
        object.__setattr__(self, name, value)


@contextlib.contextmanager
def transaction() -> Iterator[None]:
    """Changes made inside stay; where an exception leaves, all of them are undone.

    One inside another is undone alone where its exception is caught in between, and with the outer one otherwise::

        with transaction():
            head, rest = split_axis(axis, 5)
            unify(head, other)  # where this fails, `axis` is not split either
    """
    journal, token = _journal.get(), None
    if journal is None:
        journal = []
        token = _journal.set(journal)
    start = len(journal)
    try:
        yield
    except BaseException:
        while len(journal) > start:
            changed, name, before = journal.pop()
            object.__setattr__(changed, name, before)
        raise
    finally:
        if token is not None:
            _journal.reset(token)
