"""The symbols of which a forward is traced: what nodes give, and what Python may ask of it as of its value.

`Known` records what is done with it, and answers, as its value would, what the sizes of the image decide (a length, a
whole number, a branch), of which class it is, and what it has. What changes a tensor in place is recorded as that. Of
an ``is`` no object can answer, and as a key of a dict, which may outlive the trace, none should: see `witness`.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterator
from opcode import opmap
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx

from ..compat import tree_map_only
from .memory import IN_PLACE

ASKING = {opmap[name] for name in ("LOAD_ATTR", "MATCH_CLASS")}
NOT_ASKING = {"torch", __name__.partition(".")[0]}  # whose questions are not a forward's: they know symbols


def asks() -> bool:
    """Whether a forward asks the function that calls this one, not torch or what traces."""
    return asks_in(sys._getframe(2))


def asks_in(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] not in NOT_ASKING


def by_its_name() -> bool:
    """Whether a forward asks the attribute that calls this one in Python, as ``x.__class__`` or in a ``match``. C code
    asks too, for a forward that calls it; what torch's is told to be a tensor it takes for one, and crashes."""
    frame = sys._getframe(2)
    at, code = frame.f_lasti, frame.f_code.co_code
    while code[at] == opmap.get("CACHE"):  # of the instruction before
        at -= 2
    return frame.f_code is torch.is_tensor.__code__ or code[at] in ASKING and asks_in(frame)


def assign_(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``x[index] = value``, as an operation that gives `x`."""
    x[index] = value
    return x


class Known(fx.Proxy):
    """What a node gives, of which Python may ask what the sizes of the image decide: a length, a whole number; and of
    which class it is, and what it has: `isinstance`, `torch.is_tensor` and `hasattr` answer as of the value."""

    _is_param = _is_buffer = False  # torch's classes ask this of whatever is a tensor

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return self._class() if by_its_name() else type(self)

    def _class(self) -> type:
        """The class of the value."""
        return self.tracer.ask(self.node, type, Known)

    def __getattr__(self, name: str) -> KnownAttribute:
        if name.startswith("__array") or name == "__cuda_array_interface__":  # whose values it has not
            raise AttributeError(name)
        if hasattr(torch.Tensor, name) or not asks() or self.tracer.ask(self.node, lambda v: hasattr(v, name), True):
            return KnownAttribute(self, name)
        raise AttributeError(f"{self._class().__name__!r} object has no attribute {name!r}")

    @property
    def ndim(self) -> Any:
        """Of no image's size and no part: a number of Python, with which a dict may be asked."""
        return self.tracer.decide(self.node, torch.Tensor.dim, lambda: KnownAttribute(self, "ndim"))

    @property
    def grad_fn(self) -> Any:
        return KnownAttribute(self, "grad_fn") if self.tracer.decide(self.node, has_history) else None

    def __iter__(self) -> Iterator:
        return self.tracer.iter(self)  # fx's own keeps its frame, and all symbols in those around it, in a cycle

    def __len__(self) -> int:
        return self.tracer.decide(self.node, len)

    def __int__(self) -> int:
        return self.tracer.decide(self.node, int)

    def __index__(self) -> int:
        return self.tracer.decide(self.node, operator.index)

    def __float__(self) -> float:
        return self.tracer.decide(self.node, float)

    def __format__(self, spec: str) -> str:
        return self.tracer.decide(self.node, lambda value: format(value, spec), lambda: repr(self))

    def __str__(self) -> str:
        return self.tracer.decide(self.node, str, lambda: repr(self)) if asks() else repr(self)

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> tuple[Any, Any]:
        return other // self, other % self

    def __mul__(self, other: Any) -> Any:
        return other * int(self) if isinstance(other, (list, tuple)) else super().__mul__(other)

    def __rmul__(self, other: Any) -> Any:
        return other * int(self) if isinstance(other, (list, tuple)) else super().__rmul__(other)

    def __array_function__(self, function: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        """What NumPy's ``prod`` and its kin find of a size, of the numbers in it."""
        if not issubclass(self._class(), tuple):
            return NotImplemented
        args, kwargs = tree_map_only(Known, tuple, (args, kwargs))
        return function(*args, **kwargs)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """What a function of NumPy finds of a number is what `math`'s or the operator finds."""
        if hasattr(math, ufunc.__name__) and method == "__call__" and len(inputs) == 1:
            return getattr(math, ufunc.__name__)(self)
        return getattr(ufunc, method)(*map(_as_object, inputs), **kwargs)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", assign_, (self, index, value), {})


def _augmented(function: Callable) -> Callable:
    def method(self: Known, other: Any) -> Any:
        """In place, where it is a tensor: whoever has the same one, or a view of it, sees it."""
        if not issubclass(self._class(), (torch.Tensor, Known)):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for augmented in IN_PLACE:
    setattr(Known, f"__{augmented.__name__}__", _augmented(augmented))


class KnownAttribute(fx.proxy.Attribute, Known):
    """An attribute of `Known`, which becomes a node where it is not called."""


def _as_object(value: Any) -> Any:
    """A symbol as an array of it, so that NumPy does not look into it."""
    if not issubclass(type(value), Known):
        return value
    array = np.empty((), object)
    array[()] = value
    return array


def has_history(t: torch.Tensor) -> bool:
    return t.grad_fn is not None


class _Answers(type):
    def __call__(cls, *args: Any) -> Any:
        return args[0]._class() if len(args) == 1 and isinstance(args[0], Known) else type(*args)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, type)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, type)


class Type(metaclass=_Answers):
    """``type`` as a forward asks it, of which `Known` is of the class of its value."""


def is_instance(value: Any, kinds: Any) -> bool:
    """``isinstance`` as a forward asks it, of which `Known` is of the class of its value."""
    return isinstance(value, kinds) or (
        issubclass(type(value), Known) and value.tracer.ask(value.node, lambda v: isinstance(v, kinds), False)
    )


def is_callable(value: Any) -> bool:
    """``callable`` as a forward asks it, of which `Known` is a tensor."""
    return callable(value) and (type(value) is not Known or value.tracer.ask(value.node, callable, True))
