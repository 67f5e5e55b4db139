"""Every different part of a plan runs once, on the meta device, before anybody builds on the plan."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import fx

from ..compat import tree_leaves
from ..errors import SplitError, headline
from ..planning.graphs import evaluate_node, float_type
from ..planning.modes import where
from ..planning.plan import Plan
from .emit import emit


def check_parts_run(graph: fx.GraphModule, plan: Plan) -> None:
    """Raise SplitError unless each part runs on its view, and gives what the whole network gives on images as large."""
    held = (graph.named_parameters(remove_duplicate=False), graph.named_buffers(remove_duplicate=False))
    dtypes = {name: t.dtype for name, t in chain(*held)}
    tensors = {name: t for name, t in {**plan.tensors, **plan.constants}.items() if name in dtypes}
    tried, whole = set(), None
    for k, view in enumerate(plan.views()):
        shapes = {name: t.part_shape(k, plan.divisor) for name, t in tensors.items()}
        size = (*plan.input_size[: len(plan.input_size) - len(view.size)], *view.size)
        kind = (size, *shapes.values(), str([edit.values[k] for edit in plan.edits]))
        if kind in tried:
            continue
        tried.add(kind)
        made = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
        found = _run(emit(graph, plan, k, made, graph), (plan.batch, *size), f"part {k}")
        if size == plan.input_size:
            whole = _run(graph, (plan.batch, *size), "the network") if whole is None else whole
            if found != whole:
                raise SplitError(f"part {k} gives tensors of {found}, the whole network of {whole}; {_REPORT}")


_REPORT = "this network cannot be split as it is, report it with its code"


def _run(network: fx.GraphModule, shape: tuple[int, ...], name: str) -> list[tuple[int, ...]]:
    """The shapes of a network's outputs on the meta device."""
    env: dict[fx.Node, Any] = {}
    dtype = float_type(network)
    for node in network.graph.nodes:
        try:
            image = node.op == "placeholder"
            env[node] = torch.empty(shape, dtype=dtype, device="meta") if image else evaluate_node(network, node, env)
        except Exception as e:  # any operation may fail in its own way
            size = "×".join(map(str, shape[1:]))
            raise SplitError(f"{name} does not run on {size}: {where(node)}: {headline(e)}; {_REPORT}") from e
    return [tuple(t.shape) for t in tree_leaves(env[node]) if isinstance(t, torch.Tensor)]
