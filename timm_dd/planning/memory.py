"""What a forward changes in place, and who reads the memory afterwards: under another name, or through a view.

The graph runs as the model does, so the values are right by themselves. What is known of a tensor is known of a node,
however, so that a change has to be seen in the graph: after ``y.mul_(…)``, or ``y *= …``, who reads y reads the node of
the change (`chain_in_place`); who reads a tensor that shares its memory reads that `overlaid` with it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..compat import storage_key, tree_leaves
from .graphs import evaluate_node

# ``x += y`` of tensors, and the same in a tensor of its own.
IN_PLACE: Mapping[Any, Callable] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.ipow: operator.pow,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
}  # fmt: skip


def overlaid(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`x`, after another tensor with the same memory has become `change`."""
    return x


def works_in_place(node: fx.Node, model: nn.Module) -> bool:
    """Whether it changes the tensor that is its first argument."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(vars(model.get_submodule(node.target)).get("inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in IN_PLACE or node.kwargs.get("inplace", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def read_after(graph: fx.Graph, model: nn.Module) -> set[fx.Node]:
    """The nodes after which the memory of their first argument may be read, by whatever name. What has weights makes
    memory of its own; of the rest it is not known."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    group: dict[fx.Node, list[fx.Node]] = {}  # of nodes that may share memory
    last: dict[int, int] = {}  # when any of a group is used
    found = set()
    for node in graph.nodes:
        if node.args and isinstance(node.args[0], fx.Node) and last[id(group[node.args[0]])] > order[node]:
            found.add(node)
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        own = module is not None and any(True for _ in module.parameters())
        groups = {id(group[n]): group[n] for n in ([] if own else node.all_input_nodes)}
        joined = max(groups.values(), key=len, default=[])
        ends = [last.get(i, 0) for i in groups] + [order[user] for user in node.users]
        for other in groups.values():
            if other is not joined:
                joined += other
                group.update(dict.fromkeys(other, joined))
        joined.append(node)
        group[node], last[id(joined)] = joined, max(ends, default=0)
    return found


def chain_in_place(graph: fx.Graph, model: nn.Module, given: Callable[[str], Any]) -> None:
    """Let whoever reads a tensor after it was changed in place read the change.

    Args:
        given: what the graph takes, on the meta device, by name.
    """
    order: dict[fx.Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    changes = [node for node in graph.nodes if works_in_place(node, model)]
    for node in changes:
        node.args[0].replace_all_uses_with(node, lambda user, i=order[node]: order[user] > i)  # type: ignore[union-attr]
    seen = read_after(graph, model) if changes else set()
    changes = [node for node in changes if node in seen]
    memory = _memory(graph, model, given) if changes else {}
    for node in changes:
        for other in list(graph.nodes):
            if order[other] < order[node] and memory[other] & memory[node]:
                _overlay(graph, other, node, order, memory)


def _overlay(
    graph: fx.Graph, x: fx.Node, change: fx.Node, order: dict[fx.Node, float], memory: dict[fx.Node, set[int]]
) -> None:
    later = {user for user in x.users if order[user] > order[change]}
    if not later:
        return
    with graph.inserting_after(change):
        new = graph.call_function(overlaid, (x, change))
    new.meta = dict(change.meta)
    order[new], memory[new] = order[change] + 0.5, memory[x]
    x.replace_all_uses_with(new, later.__contains__)


def _memory(graph: fx.Graph, model: nn.Module, given: Callable[[str], Any]) -> dict[fx.Node, set[int]]:
    """The storages of what each node gives; none where that is not known."""
    values: dict[fx.Node, Any] = {}
    try:
        for node in graph.nodes:
            values[node] = given(node.target) if node.op == "placeholder" else evaluate_node(model, node, values)
    except Exception:  # any operation may fail on meta tensors; the planner says so
        pass
    tensors = {node: [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)] for node, value in values.items()}
    return {node: set(map(storage_key, tensors.get(node, ()))) for node in graph.nodes}
