"""Every different part of a plan runs once, on the meta device, before anybody builds on the plan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import fx

from ..compat import tree_leaves
from ..errors import SplitError, headline
from ..planning.graphs import Graph, argument, evaluate_node, float_type
from ..planning.modes import where
from ..planning.plan import Plan
from .emit import emit


def check_parts_run(graph: Graph, plan: Plan) -> None:
    """Raise SplitError unless each part runs on its view, and gives what the whole network gives on images as large."""
    held = (graph.named_parameters(remove_duplicate=False), graph.named_buffers(remove_duplicate=False))
    dtypes, dtype = {name: t.dtype for name, t in chain(*held)}, float_type(graph)
    tensors = {name: t for name, t in {**plan.tensors, **plan.constants}.items() if name in dtypes}
    tried, whole = set(), None

    def run(network: fx.GraphModule, size: tuple[int, ...], name: str) -> list[tuple[int, ...]]:
        return _run(network, lambda given: argument(graph, given, plan.batch, size, dtype), size, name)

    for k, view in enumerate(plan.views()):
        shapes = {name: t.part_shape(k, plan.divisor) for name, t in tensors.items()}
        size = (*plan.input_size[: len(plan.input_size) - len(view.size)], *view.size)
        kind = (size, *shapes.values(), str([edit.values[k] for edit in plan.edits]))
        if kind in tried:
            continue
        tried.add(kind)
        made = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
        found = run(emit(graph, plan, k, made, graph), size, f"part {k}")
        if size == plan.input_size:
            whole = run(graph, size, "the network") if whole is None else whole
            if found != whole:
                raise SplitError(f"part {k} gives tensors of {found}, the whole network of {whole}; {_REPORT}")


_REPORT = "this network cannot be split as it is, report it with its code"


def _run(
    network: fx.GraphModule, example: Callable[[str], Any], size: tuple[int, ...], name: str
) -> list[tuple[int, ...]]:
    """The shapes of a network's outputs on the meta device."""
    env: dict[fx.Node, Any] = {}
    for node in network.graph.nodes:
        try:
            given = node.op == "placeholder"
            env[node] = example(node.target) if given else evaluate_node(network, node, env)
        except Exception as e:  # any operation may fail in its own way
            pixels = "×".join(map(str, size))
            raise SplitError(f"{name} does not run on {pixels}: {where(node)}: {headline(e)}; {_REPORT}") from e
    return [tuple(t.shape) for t in tree_leaves(env[node]) if isinstance(t, torch.Tensor)]
