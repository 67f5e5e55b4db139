"""Every different part of a plan runs once, on the meta device, before anybody builds on the plan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import fx, nn

from ..compat import tree_leaves, tree_map_only
from ..errors import SplitError, headline
from ..planning.graphs import Graph, argument, evaluate_node, float_type, skeleton
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

    for k in range(plan.parts):
        shapes = {name: t.part_shape(k, plan.divisor) for name, t in tensors.items()}
        size = plan.part_input_size(k)
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


def check_packed_runs(
    pack: Callable[[Sequence], nn.Module], parts: Sequence[nn.Module], graph: Graph, plan: Plan
) -> None:
    """Raise SplitError unless the network that `pack` makes of the parts runs on their stacked views, in both modes.
    What the meta device cannot tell, where values are read, is tried on zeros."""
    size, dtype = plan.part_input_size(0), float_type(graph)
    given = [argument(graph, name, plan.batch, size, dtype) for name in graph.inputs.taken(graph.signature)]
    stacked = tree_map_only(torch.Tensor, lambda t: t.expand(len(parts), *t.shape), given)
    for training in (False, True):
        shapes = [skeleton(part).train(training).to(dtype) for part in parts]
        try:
            with torch.device("meta"):
                _Located(pack(shapes)).run(*stacked)
        except SplitError as e:
            if _runs(shapes[0], given):
                raise e
            values = pack([copy.deepcopy(part).train(training).to("cpu", dtype) for part in parts])
            zeros = tree_map_only(torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), stacked)
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                _Located(values).run(*zeros)


def _runs(part: nn.Module, given: list) -> bool:
    try:
        with torch.device("meta"):
            _Located(part).run(*given)
    except SplitError:
        return False
    return True


class _Located(fx.Interpreter):
    """Runs a graph; an error names the place."""

    def __init__(self, network: nn.Module):
        super().__init__(network)
        self.extra_traceback = False  # more than one line

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as e:  # any operation may fail in its own way
            raise SplitError(
                f"{where(n)}: torch.vmap cannot take this for all parts at once ({headline(e)}); train the parts one "
                "after another (--engine sequential), or write it with operations on whole tensors"
            ) from e


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
