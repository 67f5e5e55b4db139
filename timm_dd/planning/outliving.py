"""What a forward put into caches that outlive its trace, symbols and tensors without values, is taken out again.

A dict of its module, a helper that the model shares with its copies, a `functools.cache`: the user's own model has to
find there later what it put there itself, or nothing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from types import CellType, FrameType, ModuleType

DEPTH = 4  # of what holds them: a tuple in a list in a dict


def forget(left: Iterable[weakref.ref]) -> None:
    """Take what is left of these out of whatever holds it."""
    values = [value for ref in left if (value := ref()) is not None]
    if values:
        _forget(values, DEPTH)


def _forget(values: list, depth: int) -> None:
    found, several = {id(value) for value in values}, []
    for holder in gc.get_referrers(*values):
        if holder is values or isinstance(holder, FrameType):
            continue
        if isinstance(holder, dict):
            _clear(holder, found, delete=not _is_namespace(holder))
        elif isinstance(holder, CellType):
            holder.cell_contents = None
        elif hasattr(type(holder), "cache_clear"):
            holder.cache_clear()
        elif isinstance(holder, list) and not all(id(item) in found for item in holder):
            holder[:] = [item for item in holder if id(item) not in found]
        elif isinstance(holder, (list, tuple)) or type(holder) in map(type, values):  # an attribute holds its symbol
            several.append(holder)
        elif hasattr(holder, "__dict__") and not isinstance(holder, type):
            _clear(vars(holder), found, delete=False)
    if several and depth > 1:
        _forget(several, depth - 1)


def _clear(names: dict, found: set[int], delete: bool) -> None:
    for name, value in [*names.items()]:
        if id(value) not in found and id(name) not in found:
            continue
        if delete:
            del names[name]
        else:
            names[name] = None  # as of a cache that is still empty


def _is_namespace(names: dict) -> bool:
    """Whether these are the names of a module, of a class or of an object."""
    holders = gc.get_referrers(names)
    return any(isinstance(h, (ModuleType, type)) or getattr(h, "__dict__", None) is names for h in holders)
