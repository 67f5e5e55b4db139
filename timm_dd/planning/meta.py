"""Tensors on the meta device as if they were on a CPU: a forward that asks for their device goes the way it goes there,
and what it makes or moves there joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from ..compat import tree_leaves

CPU, META = torch.device("cpu"), torch.device("meta")
ANSWERS = {
    torch.Tensor.device.__get__: CPU,
    torch.Tensor.is_cpu.__get__: True,
    torch.Tensor.is_meta.__get__: False,
}
STAY = {torch.Tensor.cpu, torch.Tensor.cuda}  # where they are


class AsOnCPU(TorchFunctionMode):
    """Within it, what is asked of tensors on the meta device is answered as of a CPU's."""

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(t, torch.Tensor) and t.device == META for t in tree_leaves((args, kwargs))):
            return self.make(func, args, kwargs)
        if func in ANSWERS:
            return ANSWERS[func]
        if func in STAY:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(META if isinstance(a, str) else a for a in args)
        if func is torch.Tensor.type and len(args) == 2 and isinstance(args[1], str):  # "torch.FloatTensor"
            args = (args[0], torch.empty(0).type(args[1]).dtype)
        result = func(*map_aggregate(args, _moved), **map_aggregate(_there(kwargs), _moved))
        return result.replace("meta.", "") if func is torch.Tensor.type and isinstance(result, str) else result

    def make(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What is made of no such tensor; there, if it is said where."""
        return func(*args, **_there(kwargs))


def _there(kwargs: dict) -> dict:
    """With the meta device for any other."""
    return {**kwargs, "device": META} if "device" in kwargs else kwargs


def _moved(value: Any) -> Any:
    """A device, or a tensor of one, as the meta device's."""
    if isinstance(value, torch.Tensor):
        return value if value.device == META else value.to(META)
    return META if isinstance(value, torch.device) else value
