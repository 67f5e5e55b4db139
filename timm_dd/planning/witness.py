"""Whether a traced graph does what the module itself does: the same torch functions on the same tensors, in one order.

While a forward is traced its tensors and numbers are symbols. `symbols.Known` answers as of their values what an object
may answer; of ``x.dtype is torch.half``, and of whatever else looks past that, symbols know nothing. So both run once
on the meta device, and the calls are compared, numbers and all. What works on constants alone is left out, since the
graph has its result; they stay on the CPU, for caches of theirs may outlive this. The module runs twice, since a graph
remembers nothing from call to call but what is in buffers. One that does not run on tensors without values bears no
witness.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_aggregate

from ..compat import tree_leaves
from ..errors import SplitError
from .graphs import skeleton
from .inputs import Inputs, bind, signature_of
from .meta import META, AsOnCPU
from .modes import line_here
from .outliving import forget

# The result is like the first argument; what meta tensors take for it is a slow decomposition.
LIKE_INPUT = {F.batch_norm, F.instance_norm, F.layer_norm, F.group_norm}
# What is of the numbers of no tensor, or of those of the first one alone.
OF_NO_NUMBERS = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.Tensor.new_zeros,
    torch.Tensor.new_ones, torch.Tensor.new_full, torch.Tensor.new_empty, torch.Tensor.new_tensor,
}  # fmt: skip
AS_TENSOR = {torch.as_tensor, torch.asarray}  # which the graph has not
LIKE_ANOTHER = {torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.view_as, torch.Tensor.expand_as}


class Calls(AsOnCPU):
    """The torch functions that are called within it on what comes from `tensors`, and with what, tensors by where they
    come from.

    Args:
        expected: the calls that there should be, if that is known.
        results: is filled with all tensors that come of them.

    Attributes:
        made: the calls.
        line: of the model's code, that made the first call that was not expected.
        returned: what `run` found returned.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], expected: Sequence | None = None, results: list | None = None):
        super().__init__()
        self.made: list[tuple] = []
        self.line: str | None = None
        self.returned: list = []
        self._expected, self._results = expected, results
        self._kept = [*tensors]  # so that no other has the id of one
        self._names: dict[int, Any] = {id(t): ("given", i) for i, t in enumerate(self._kept)}

    def run(self, function: Callable[[], Any]) -> Calls:
        with self:
            self.returned = [self._name(t) for t in tree_leaves(function()) if isinstance(t, torch.Tensor)]
        return self

    def __torch_function__(self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unbind and sys._getframe(1).f_code is torch.Tensor.__iter__.__code__:
            with self:  # as the graph has it
                return tuple(args[0][i] for i in range(len(args[0])))
        if func in AS_TENSOR and isinstance(args[0], torch.Tensor):
            with self:
                return args[0].to(*args[1:], **kwargs) if args[1:] or kwargs else args[0]
        if func in LIKE_INPUT:
            result = args[0] if args else kwargs["input"]
        else:
            result = super().__torch_function__(func, types, args, kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        if self._results is not None:
            self._results += [weakref.ref(t) for t in made if t.is_meta]
        if (made or func.__name__ in ("__setitem__", "__set__")) and self._works_on_these(func, args, kwargs):
            if func is torch.Tensor.detach:  # which the graph has for blocks without gradients too
                names = [self._names[id(args[0])]]
            elif func.__name__ == "__get__":  # an attribute, which the graph reads where it is used
                names = [(func, self._names[id(args[0])])]
            else:
                names = [(len(self.made), i) for i in range(len(made))]
                self._add((func, _plain(map_aggregate((args, kwargs), self._name))))
            self._kept += made
            for t, name in zip(made, names):
                self._names.setdefault(id(t), name)
        return result

    def make(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        return func(*args, **kwargs)

    def _add(self, call: tuple) -> None:
        expected, at = self._expected, len(self.made)
        self.made.append(call)
        if expected is not None and self.line is None and (at >= len(expected) or not _same(expected[at], call)):
            self.line = line_here()

    def _name(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return META if isinstance(value, torch.device) else value
        return self._names.get(id(value), ("constant", tuple(value.shape)))

    def _works_on_these(self, func: Callable, args: tuple, kwargs: dict) -> bool:
        if func in OF_NO_NUMBERS:
            return False
        given = args[:1] if func in LIKE_ANOTHER else (args, kwargs)
        return any(id(t) in self._names for t in tree_leaves(given) if isinstance(t, torch.Tensor))


def _plain(tree: Any) -> tuple:
    """Flat: what is given as a list may be given as several arguments too."""
    if isinstance(tree, dict):
        tree = sorted(tree.items())
    return tuple(leaf for inner in tree for leaf in _plain(inner)) if isinstance(tree, (tuple, list)) else (tree,)


def _same(a: tuple, b: tuple) -> bool:
    return a == b or repr(a) == repr(b)  # numbers that are none do not equal themselves


def check_same(model: nn.Module, graph: fx.Graph, inputs: Inputs, given: Callable[[str], Any]) -> None:
    """Raise SplitError, with the line, where a `skeleton` does another thing than the graph that was traced of it, in
    its first call or in the next.

    Args:
        given: what the model takes, on the meta device, by name.
    """
    made: list[weakref.ref] = []
    try:
        found, again = _differences(model, graph, inputs, given, made)
    finally:
        forget(made)
    name = type(model).__name__
    if found is not None:
        raise SplitError(
            f"{name} does {found} what its traced graph does not; while it is traced, tensors, sizes and dtypes are "
            "symbols: compare them with `==`, not with `is`, and set none of their attributes"
        )
    if again is not None:
        raise SplitError(
            f"{name} does {again} something else when it is called again; keep what changes from call to call in "
            "buffers, and change them in place"
        )


def _differences(
    model: nn.Module, graph: fx.Graph, inputs: Inputs, given: Callable[[str], Any], made: list[weakref.ref]
) -> tuple[str | None, str | None]:
    """Where the module's first call and its second do something else, if they do; `made` is filled with its tensors."""
    values: dict[str, Any] = {}

    def value(name: str, _: Any) -> Any:
        return values.setdefault(name, given(name))

    def tensors(module: nn.Module) -> list[torch.Tensor]:
        images = (t for t in tree_leaves(values) if isinstance(t, torch.Tensor))
        return [*images, *module.parameters(), *module.buffers()]

    own = skeleton(model)

    def run() -> Any:
        return own.train().eval()(*bound.args, **bound.kwargs)  # `train` clears what a forward keeps of the weights

    try:
        bound = bind(signature_of(model), inputs.args, inputs.kwargs, value)
        placed = [values[node.target] for node in graph.find_nodes(op="placeholder")]
        traced = Calls(tensors(model)).run(lambda: fx.Interpreter(model, graph=graph).run(*placed))
        before = tensors(own)
        calls = [Calls(before, traced.made, made) for _ in range(2)]
        found, again = (call.run(run) for call in calls)
    except Exception:  # any operation may fail without values
        return None, None
    return _unlike(found, traced), _unlike(again, traced)


def _unlike(found: Calls, expected: Calls) -> str | None:
    """Where they differ, if they do."""
    if found.line is not None:
        return f"at {found.line}"
    same = found.returned == expected.returned and len(found.made) == len(expected.made)
    return None if same else "in what it returns"
