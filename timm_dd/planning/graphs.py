"""Graphs and modules on the meta device: copies without tensors, copies of a graph, a node's value."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import fx, nn

from ..compat import let_fx_name_all
from ..errors import SplitError, headline
from .inputs import Inputs
from .meta import AsOnCPU

let_fx_name_all()

MAKERS = {
    torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.linspace, torch.tensor, torch.eye, torch.rand,
    torch.randn,
}  # fmt: skip
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONTENTS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")  # of a module
STAYS_IN_EVAL = "_stays_in_eval"  # in the dict of a module that the model's ``train()`` leaves in eval mode


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are on the meta device; `model`'s are not copied."""
    memo: dict[int, torch.Tensor] = {}

    def empty(t: torch.Tensor) -> torch.Tensor:
        if id(t) not in memo:
            meta = t.detach().to("meta")
            memo[id(t)] = nn.Parameter(meta, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else meta
        return memo[id(t)]

    try:
        return _clone(model, empty, {})
    except (RuntimeError, TypeError, AttributeError, ValueError) as e:
        raise SplitError(f"{type(model).__name__} cannot be copied ({headline(e)})") from e


def _clone(module: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor], memo: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module and of those in it, with the `tensor` of each of their tensors; the shared stays shared."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        new.__dict__[name] = _copied(value, tensor, memo)
    for name, child in module._modules.items():
        new._modules[name] = child if child is None else _clone(child, tensor, memo)
    return new


def _copied(
    value: Any, tensor: Callable[[torch.Tensor], torch.Tensor], memo: dict[int, nn.Module], deep: int = 2
) -> Any:
    """An attribute of a copy: what it has of the module, tensors, modules and methods, is the copy's."""
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, nn.Module):
        return _clone(value, tensor, memo)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):  # a forward chosen in __init__
        return MethodType(value.__func__, _clone(value.__self__, tensor, memo))
    if type(value) is partial:
        given = (_copied(v, tensor, memo, deep - 1) for v in (value.func, *value.args))
        return partial(*given, **value.keywords)
    if not deep:
        return value
    if isinstance(value, dict):
        new = value.copy()
        new.update((key, _copied(v, tensor, memo, deep - 1)) for key, v in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(v, tensor, memo, deep - 1) for v in value)
    return value.copy() if isinstance(value, (list, set)) else value


TRACED = ("batch", "inputs", "signature")


class Graph(fx.GraphModule):
    """A GraphModule whose deep copies have all of its tensors: fx itself drops those that no node uses.

    Attributes, of what `trace.trace` gives:
        batch: of images with which it was traced.
        inputs, signature: what it takes.
    """

    batch = 2
    inputs: Inputs
    signature: inspect.Signature

    def __deepcopy__(self, memo: dict) -> Graph:
        root = nn.Module()
        for name in CONTENTS:
            root.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        root.training = self.training
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        kind = type(self).__mro__[1]  # fx makes a class for every instance
        new = graph_module(root, graph, type(self).__name__, kind)
        vars(new).update({name: vars(self)[name] for name in TRACED if name in vars(self)})
        return new

    def train(self, mode: bool = True) -> Graph:
        """As in every module; those that the traced model's own ``train()`` leaves in eval mode stay there."""
        super().train(mode)
        for module in self.modules():
            module.training = module.training and not vars(module).get(STAYS_IN_EVAL, False)
        return self


def graph_module(root: nn.Module, graph: fx.Graph, name: str, kind: type[Graph] = Graph) -> Graph:
    """`graph` on the modules and tensors of `root`, all of them."""
    gm = kind(nn.Module(), fx.Graph(), class_name=name)
    for contents in CONTENTS:
        gm.__dict__[contents] = root.__dict__[contents]
    gm.training = root.training
    gm.graph = graph
    return gm


def copy_graph(gm: fx.GraphModule) -> tuple[nn.Module, fx.Graph]:
    """The modules and the graph of a `GraphModule`, to be changed and made one with `graph_module`."""
    root = nn.Module()
    root.training = gm.training
    for contents in CONTENTS:
        root.__dict__[contents] = copy.copy(gm.__dict__[contents])
    memo: dict[int, nn.Module] = {}
    for name, child in gm._modules.items():
        root._modules[name] = child if child is None else _clone(child, lambda t: t, memo)
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return root, graph


def given(node: fx.Node, where: Sequence[str | int]) -> Any:
    """The argument of a node at `where`, as in ("args", 1, "stop"): a number, or the node that computes it."""
    at = getattr(node, where[0])
    for step in where[1:]:
        at = getattr(at, step) if isinstance(at, slice) else at[step]
    return at


def argument(gm: Graph, name: str, batch: int, size: Sequence[int], dtype: torch.dtype) -> Any:
    """What a traced network takes under `name`, on the meta device, for a batch of images of `size`, (C, *size)."""
    return gm.inputs.empty(gm.inputs.named(gm.signature)[name], batch, size, dtype)


def float_type(model: nn.Module) -> torch.dtype:
    """The type of the images that the model takes."""
    return first_float((*model.parameters(), *model.buffers()))


def first_float(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """The first floating dtype among `tensors`, float32 if there is none."""
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """Channels-last where one of `tensors` is held so. Strides tell it of sizes of 1 too, which both formats fit."""
    for t in tensors:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(t.ndim)
        if last and t.is_contiguous(memory_format=last) and t.stride(1) == 1 and t.stride(-1) == t.shape[1]:
            return last
    return torch.contiguous_format


def evaluate_node(gm: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The node's value on meta tensors, its inputs taken from `env`."""
    with AsOnCPU():
        return _evaluated(gm, node, env)


def _evaluated(gm: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.op == "get_attr":
        value = gm
        for name in node.target.split("."):
            value = getattr(value, name)
        return value.to("meta") if isinstance(value, torch.Tensor) else value
    if node.op == "call_module":
        module = gm.get_submodule(node.target)
        if isinstance(module, NORMS) or _normalises(module, *args):  # which torch finds by a slow decomposition
            return torch.empty_like(args[0])
        if isinstance(module, nn.RNNBase) and isinstance(args[0], torch.Tensor):  # torch goes through all steps
            return of_sequence(module, *args)
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "output":
        return args[0]
    if node.target in MAKERS:
        kwargs = {**kwargs, "device": "meta"}
    return node.target(*args, **kwargs)


def _normalises(module: nn.Module, x: Any, *_: Any) -> bool:
    """Whether it is a norm over the last dims of a tensor, which has them: the result is like the tensor."""
    return isinstance(module, nn.LayerNorm) and x.shape[-len(module.normalized_shape) :] == module.normalized_shape


def of_sequence(module: nn.RNNBase, x: torch.Tensor, hx: Any = None) -> tuple[torch.Tensor, Any]:
    """What a recurrent network gives for a sequence, by shape alone: all outputs, and the last states.

    Raises:
        RuntimeError: a step has another number of features.
    """
    if x.shape[-1] != module.input_size:
        raise RuntimeError(f"expected {module.input_size} features in each step, got {x.shape[-1]}")
    directions, out = 2 if module.bidirectional else 1, module.proj_size or module.hidden_size
    batch = () if x.ndim == 2 else (x.shape[0 if module.batch_first else 1],)
    hidden, cell = (x.new_empty(directions * module.num_layers, *batch, n) for n in (out, module.hidden_size))
    return x.new_empty(*x.shape[:-1], directions * out), (hidden, cell) if module.mode == "LSTM" else hidden


def ancestors(node: fx.Node, known: Container[fx.Node]) -> Iterator[fx.Node]:
    """`node` and what it is computed from, as far as it is not `known`, inputs first."""
    wanted, stack = set[fx.Node](), [node]
    while stack:
        n = stack.pop()
        if n not in known and n not in wanted:
            wanted.add(n)
            stack.extend(n.all_input_nodes)
    return (n for n in node.graph.nodes if n in wanted)


def source_line(node: fx.Node) -> str:
    """The line of the model's code that the node comes from, for messages; empty if not known."""
    line = node.meta.get("line")
    return f" at {line}" if line else ""


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was recorded in; empty at the top."""
    if node.op in ("call_module", "get_attr"):
        return node.target
    stack: Sequence = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
