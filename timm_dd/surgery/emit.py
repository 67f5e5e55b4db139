"""Restriction of a graph and of its tensors to part k, as a plan says; knows no operation."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..errors import SplitError
from ..planning.graphs import copy_graph, given, graph_module, memory_format
from ..planning.plan import SHARE, Plan, TensorPlan


def emit(
    graph: fx.GraphModule, plan: Plan, k: int, tensors: Mapping[str, torch.Tensor], source: nn.Module
) -> fx.GraphModule:
    """Part k: a copy of the traced `graph` with the plan's edits and `tensors`, part k's by name. Its modules are in
    training or eval mode as those of `source`, the whole network, are."""
    part, copied = copy_graph(graph)
    nodes = {n.name: n for n in copied.nodes}
    modules = dict(part.named_modules(remove_duplicate=False))
    for edit in plan.edits:
        if not edit.where:
            _fix(nodes[edit.node], edit.values[k])
        elif edit.where[-1] == "*":
            _scale(nodes[edit.node], edit.where, edit.values[k])
        elif edit.where[-1] == SHARE:
            _share_of(nodes[edit.node], edit.where[:-1], *edit.values[k])
        elif edit.module is None:
            node, (side, *where) = nodes[edit.node], edit.where
            setattr(node, side, _replace(getattr(node, side), where, edit.values[k]))
        else:
            *path, attr = edit.where
            owner = modules[".".join((edit.module, *path))]
            value = edit.values[k]
            setattr(owner, attr, tuple(value) if isinstance(value, (list, tuple)) else value)
    for output in plan.outputs:
        _spread(part, nodes[output.node], output.dim, output.axis.size, output.axis.index(k, plan.divisor))
    _give(modules, tensors)
    for path, module in modules.items():
        module.training = _mode(source, path)
    return graph_module(part, copied, type(graph).__name__)


def _mode(source: nn.Module, path: str) -> bool:
    """Whether the module at `path`, or the one that tracing put it into, is in training mode."""
    owner = source
    for name in path.split("."):
        inner = owner._modules.get(name)
        if inner is None:
            break
        owner = inner
    return owner.training


def emit_whole(graph: fx.GraphModule, model: nn.Module) -> fx.GraphModule:
    """A copy of the traced `graph` with the tensors of `model`, which it shares.

    Raises:
        SplitError: `model` is not of the network that was traced.
    """
    expected, found = (
        {name: tuple(t.shape) for name, t in m.state_dict(keep_vars=True).items()} for m in (graph, model)
    )
    for name in expected | found:
        if expected.get(name) != found.get(name):
            shapes = f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            raise SplitError(f"this {type(model).__name__} is not the network that was split: {shapes}")
    whole, copied = copy_graph(graph)
    named = (*whole.named_parameters(remove_duplicate=False), *whole.named_buffers(remove_duplicate=False))
    tensors = {name: _tensor(name, model, graph) for name, _ in named}
    _give(dict(whole.named_modules(remove_duplicate=False)), tensors)
    return graph_module(whole, copied, type(graph).__name__)


def _give(modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put `tensors`, by name, in the places of those that `modules`, by path, have; what was tied stays tied."""
    new: dict[int, torch.Tensor] = {}  # by the identity of the old
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(modules[path], leaf)
        if id(old) not in new:
            trained = isinstance(old, nn.Parameter)
            new[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if trained else tensor
        setattr(modules[path], leaf, new[id(old)])


def _fix(node: fx.Node, value: Any) -> None:
    """Put a number in the place of a node; what its methods give is a number too, ``(16).bit_length()``."""
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
        if user.op == "call_method" and not isinstance(user.args[0], fx.Node):
            _fix(user, getattr(user.args[0], str(user.target))(*user.args[1:], **user.kwargs))
            user.graph.erase_node(user)


def _scale(node: fx.Node, where: tuple, value: float) -> None:
    """Multiply an argument of a node by a number."""
    side, i, _ = where
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(operator.mul, (getattr(node, side)[i], value))
    setattr(node, side, _replace(getattr(node, side), (i,), scaled))


def _share_of(node: fx.Node, where: tuple, numerator: int, denominator: int) -> None:
    """Take of a number that the graph computes, an argument of a node, the part's share."""
    side, *steps = where
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, (given(node, where), numerator))
        share = node.graph.call_function(operator.floordiv, (product, denominator))
    setattr(node, side, _replace(getattr(node, side), steps, share))


def _spread(part: nn.Module, node: fx.Node, dim: int, size: int, index: torch.Tensor) -> None:
    """Put what leaves the network at `node` in its place among zeros: prolongation of features."""
    graph, name = node.graph, f"_{node.name}_{dim}"
    part.register_buffer(name, index, persistent=False)
    output = next(iter(reversed(graph.nodes)))
    with graph.inserting_before(output):
        spread = graph.call_function(prolong, (node, dim, size, graph.get_attr(name)))
    output.args = fx.node.map_arg(output.args, lambda n: spread if n is node else n)


def prolong(x: torch.Tensor, dim: int, size: int, index: torch.Tensor) -> torch.Tensor:
    """`x` at the indices `index` of a dim of `size`, and zeros elsewhere."""
    shape = [*x.shape[:dim], size, *x.shape[dim + 1 :]]
    return x.new_zeros(shape).index_copy(dim, index.to(x.device), x)


def _replace(argument: Any, where: Sequence, value: Any) -> Any:
    """`argument` with `value` at `where`, a path through tuples, lists, dicts and slices."""
    if not where:
        return list(value) if isinstance(value, tuple) else value
    step, *rest = where
    if isinstance(argument, slice):
        bounds = {"start": argument.start, "stop": argument.stop, "step": argument.step, step: value}
        return slice(bounds["start"], bounds["stop"], bounds["step"])
    if isinstance(argument, Mapping):
        return {**argument, step: _replace(argument[step], rest, value)}
    return type(argument)(_replace(a, rest, value) if i == step else a for i, a in enumerate(argument))


def slices(
    plan: Plan, k: int, model: nn.Module, graph: fx.GraphModule, names: Iterable[str], fresh: bool = False
) -> dict[str, torch.Tensor]:
    """Part k's slices of a model's tensors; those of a fresh model's weights re-scaled."""
    found = {}
    for name in names:
        t = plan.constants.get(name) or plan.tensors[name]
        found[name] = restrict(_tensor(name, model, graph), t, k, plan)
        if fresh and t.scale:
            found[name].mul_(t.scale[k])
    return found


def _tensor(name: str, model: nn.Module, graph: fx.GraphModule) -> torch.Tensor:
    """The model's tensor; one that the model makes while it runs is in the graph alone."""
    for owner in (model, graph):
        value: Any = owner
        for step in name.split("."):
            value = getattr(value, step, None)
        if value is not None:
            return value.detach()
    raise AttributeError(f"{name} is neither in the model nor in its graph")


def restrict(tensor: torch.Tensor, t: TensorPlan, k: int, plan: Plan) -> torch.Tensor:
    """Part k's block of a global tensor, a copy in its memory format. A summed bias is shared out: b/K to each of its K
    owners, and to the last what is left, so that the shares add up to b without rounding."""
    block, held_in = tensor, memory_format(tensor)
    for dim, index in enumerate(t.index(k, plan.divisor)):
        if index is not None:
            block = block.index_select(dim, index.to(tensor.device))
    if t.reduce != "sum":
        return block.clone(memory_format=held_in) if block is tensor else block.to(memory_format=held_in)
    owners = torch.zeros(plan.parts + 1, *t.shape, device="cpu")  # of each element among the first 0, 1 … K parts
    for j in range(plan.parts):
        owners[j + 1 :][(slice(None), *t.block(j, plan.divisor))] += 1
    before, total = (owners[i][t.block(k, plan.divisor)].to(tensor.device) for i in (k, -1))
    share = _share(block, total)
    shared = torch.where((before + 1 < total) | (block == 0), share, block - (total - 1) * share)  # -0 stays
    return shared.to(tensor.dtype, memory_format=held_in)


def _share(b: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
    """b / owners in float64, cut off after the last digit that b has in its dtype: what is left for the last owner is
    then no larger than b and has no digit more, so that its dtype holds it."""
    wide, info = b.double(), torch.finfo(b.dtype)
    digit = wide / (2 * torch.frexp(wide).mantissa) * info.eps
    digit = digit.clamp(min=info.smallest_normal * info.eps)
    return torch.where(b == 0, wide, (wide / owners / digit).trunc() * digit)
