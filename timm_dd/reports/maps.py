"""Feature maps of the composed network beside those of a part: theorem 2.1, layer by layer.

Which positions lie on the activation field of a part's box is seen by computing with NaN outside the box: what is still
a number there has not looked outside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from ..algebra.axes import FrozenAxis, block
from ..algebra.domain import spatial
from ..algebra.view import Box
from ..compat import tree_map_only
from ..planning.graphs import Graph
from ..planning.inputs import Inputs, as_call
from ..planning.plan import Plan
from ..surgery.emit import emit_whole
from ..surgery.parts import Parts
from .claims import Claim


@dataclass(frozen=True)
class Pair:
    """A layer's maps in the composed network and in part k.

    Attributes:
        whole: the composed network's, all of it.
        at: where in it part k's numbers lie, an open index.
        part: part k's map, of the shape of ``whole[at]``.
        field: which of its numbers lie on the activation field of the part's box.
    """

    claim: Claim
    k: int
    whole: torch.Tensor
    at: tuple
    part: torch.Tensor
    field: torch.Tensor


def pairs(
    nets: Sequence[fx.GraphModule],
    plan: Plan,
    wanted: Sequence[Claim],
    boxes: Sequence[Box],
    given: Given,
    members: Iterable[int] | None = None,
) -> Iterator[Pair]:
    """The maps of the composed network, nets[0], beside those of the parts on their boxes, where they can be compared;
    of all parts, or of `members`."""
    composed, *parts = nets
    nodes, full = {c.node for c in wanted}, [box.extent == spatial(plan.input_size) for box in boxes]
    y = _Maps(composed, nodes).of(given.values)
    comparable = {c.node: c for c in wanted if c.aligned or all(full)}
    for k in range(len(parts)) if members is None else members:
        maps = _Maps(parts[k], nodes).of(given.on_images(boxes[k].crop))
        alone = partial(_nan_outside, box=boxes[k])
        inside = y if full[k] else _Maps(composed, nodes, _Outside(plan, k)).of(given.on_images(alone))
        for node, claim in comparable.items():
            axes = [c or (None if full[k] else p) for c, p in zip(claim.channels, claim.places)]
            at = block(y[node].shape, [None, *axes], k, plan.divisor)
            outside = inside[node][at].isnan() & ~y[node][at].isnan()  # a NaN from the weights is a failure
            yield Pair(claim, k, y[node], at, maps[node], ~outside)


def in_float64(model: nn.Module, parts: Parts, head: str) -> list[fx.GraphModule]:
    """Copies of the composed network and of the parts, on the CPU, as they add up."""
    nets = [copy.deepcopy(net).to("cpu", torch.float64).eval() for net in (emit_whole(parts.graph, model), *parts)]
    for part in nets[1:] if head == "mean" else ():
        for name in parts.plan.head:
            part.get_parameter(name).data.div_(parts.plan.parts)  # (2.22)
    return nets


def windows(plan: Plan) -> dict[str, tuple[FrozenAxis | None, ...]]:
    """The weights that read only some positions in a part, and the axes of what they read."""
    read = {name: t.axes[1:] for name, t in plan.tensors.items() if len(t.axes) > 1}
    return {name: axes for name, axes in read.items() if any(a is not None and a.is_windowed for a in axes)}


@dataclass(frozen=True)
class Given:
    """The arguments to compute with, in float64: those that the graph takes, and how."""

    inputs: Inputs
    trees: tuple
    values: tuple

    @classmethod
    def random(cls, graph: Graph) -> Given:
        inputs, generator = graph.inputs, torch.Generator().manual_seed(0)
        trees = tuple(inputs.taken(graph.signature).values())
        return cls(inputs, trees, tuple(inputs.random(tree, graph.batch, generator) for tree in trees))

    @classmethod
    def of(cls, graph: Graph, x: Any) -> Given:
        given = graph.inputs.checked(graph.signature, *as_call(x, graph.signature))
        values = tree_map_only(torch.Tensor, _in_double, tuple(given.values()))
        return cls(graph.inputs, tuple(graph.inputs.taken(graph.signature).values()), values)

    def on_images(self, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple:
        """The arguments, their images changed."""
        return tuple(self.inputs.on_images(change, tree, v) for tree, v in zip(self.trees, self.values))


def _in_double(t: torch.Tensor) -> torch.Tensor:
    return t.to("cpu", torch.float64 if t.is_floating_point() else t.dtype)


class _Outside:
    """What part k's weights do not read, of those that read only some positions: set to zero, as their blocks are."""

    def __init__(self, plan: Plan, k: int):
        self.plan, self.k, self.windows = plan, k, windows(plan)

    def hide(self, module: str, x: torch.Tensor) -> torch.Tensor:
        axes = next((axes for name, axes in self.windows.items() if name.startswith(module + ".")), None)
        if axes is None:
            return x
        whole = [None] * (x.ndim - len(axes))
        at = block(x.shape, [*whole, *axes], self.k, self.plan.divisor)
        hidden = torch.zeros_like(x)
        hidden[at] = x[at]
        return hidden


class _Maps(fx.Interpreter):
    """Runs a graph and keeps the maps of some nodes; of several results the first."""

    def __init__(self, gm: fx.GraphModule, nodes: set[str], outside: _Outside | None = None):
        super().__init__(gm)
        self.nodes, self.outside = nodes, outside
        self.kept: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def of(self, arguments: Sequence) -> Mapping[str, torch.Tensor]:
        self.run(*arguments)
        return self.kept

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.nodes:
            first = result
            while isinstance(first, (tuple, list)):
                first = first[0]
            self.kept[n.name] = first.clone()  # an activation in place may follow
        return result

    def call_module(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if self.outside is not None:
            args = (self.outside.hide(target, args[0]), *args[1:])
        return super().call_module(target, args, kwargs)


def _nan_outside(x: torch.Tensor, box: Box) -> torch.Tensor:
    masked = torch.full_like(x, torch.nan)
    box.crop(masked).copy_(box.crop(x))
    return masked
