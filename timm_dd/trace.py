"""A model as an fx graph with shapes, on the meta device: no weights in memory, no arithmetic.

`skeleton` copies a model's structure without its tensors, `trace` records its graph in eval mode, and
`evaluate` runs one node on meta tensors, so that shapes can be had at any input size.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from .errors import SplitError

MAKERS = {torch.arange, torch.zeros, torch.ones, torch.empty, torch.full, torch.linspace, torch.tensor, torch.eye}
DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}


class Tracer(fx.Tracer):
    """fx tracing with the modules that have a rule as leaves. timm marks modules as leaves too, those that branch on
    sizes and those that work in place: these are traced through, at the sizes that the image gives. What is computed
    from a buffer is part of the graph, as it is from a parameter.

    Args:
        inputs: of the model, by name: the image on the meta device, the defaults of the others.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[nn.Module], bool], inputs: dict[str, Any]):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._is_leaf, self._inputs = is_leaf, inputs
        self._env: dict[fx.Node, Any] = {}
        self._evaluating = False

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return self._is_leaf(m) or super().is_leaf_module(m, qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch on sizes goes the way it goes at the image's size; one on values of a tensor is an error of fx."""
        self._evaluating = True
        try:
            for node in self.graph.nodes:
                if node not in self._env:
                    given = node.op == "placeholder"
                    self._env[node] = self._inputs[node.target] if given else evaluate(self.root, node, self._env)
            value = self._env[obj.node]
        except Exception:  # not to be known from sizes
            return super().to_bool(obj)
        finally:
            self._evaluating = False
        return super().to_bool(obj) if isinstance(value, torch.Tensor) else bool(value)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers are on the meta device; `model`'s are not copied."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):  # a plain attribute, not a parameter
                memo[id(value)] = value.to("meta")
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, AttributeError) as e:
        raise SplitError(
            f"{type(model).__name__} cannot be copied ({str(e).splitlines()[0]}); keep plain tensors as buffers"
        ) from e


def trace(model: nn.Module, is_leaf: Callable[[nn.Module], bool], size: Sequence[int]) -> fx.GraphModule:
    """The graph of a `skeleton` on images of `size`, (C, *size), in eval mode; its state dict has the model's keys, all
    of them.

    Dropout that is called as a function of `training` becomes a module, so that a part drops while it trains.

    Raises:
        SplitError: fx cannot trace the model.
    """
    for path, module in model.named_modules():
        if is_parametrized(module):
            raise SplitError(
                f"{path or type(model).__name__} is parametrized; remove_parametrizations makes plain weights of it"
            )
    model.eval()
    image, *others = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    inputs = {image.name: torch.empty(2, *size, device="meta", dtype=float_type(model)), **defaults}
    try:
        graph = Tracer(is_leaf, inputs).trace(model, concrete_args=defaults or None)
    except Exception as e:  # any code of the model runs here and may fail in its own way
        raise SplitError(
            f"torch.fx cannot trace {type(model).__name__}: {type(e).__name__}: {str(e).splitlines()[0]}; "
            "its forward must not branch on the values of tensors"
        ) from e
    _drop_assertions(graph)
    _chain_in_place(graph)
    gm = fx.GraphModule(model, graph, class_name=type(model).__name__)
    _dropout_as_modules(gm)
    _keep_state(gm, model)
    return gm


def float_type(model: nn.Module) -> torch.dtype:
    """The type of the images that the model takes."""
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


def _drop_assertions(graph: fx.Graph) -> None:
    """Assertions hold global sizes; with those on arguments that were fixed to their defaults go the placeholders."""
    first = next(iter(graph.nodes))
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target in (torch._assert, torch.fx._symbolic_trace._assert_is_none):
            _erase(graph, node)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and node is not first:
            graph.erase_node(node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase `node`, and what was computed for it alone."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for n in inputs:
        if not n.users and n.op in ("call_function", "call_method"):
            _erase(graph, n)


def _chain_in_place(graph: fx.Graph) -> None:
    """Whoever reads a tensor after ``tensor.mul_(…)`` reads the result of that."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            before = node.args[0]
            before.replace_all_uses_with(node, lambda user, i=order[node]: order[user] > i)


def _dropout_as_modules(gm: fx.GraphModule) -> None:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in DROPOUTS and not _argument(node, 2, "training", True):
            p = _argument(node, 1, "p", 0.5)
            gm.add_submodule(f"_{node.name}", DROPOUTS[node.target](p))
            with gm.graph.inserting_before(node):
                new = gm.graph.call_module(f"_{node.name}", (_argument(node, 0, "input", None),))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
    gm.recompile()


def _argument(node: fx.Node, position: int, keyword: str, default: Any) -> Any:
    return node.kwargs.get(keyword, node.args[position] if len(node.args) > position else default)


def _keep_state(gm: fx.GraphModule, model: nn.Module) -> None:
    """Give `gm` the model's state dict keys: fx drops what no node uses and makes buffers persistent."""
    keys = set(model.state_dict())
    tensors = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    own = {**dict(gm.named_buffers(remove_duplicate=False)), **dict(gm.named_parameters(remove_duplicate=False))}
    for name in own.keys() - keys:
        owner, _, leaf = name.rpartition(".")
        gm.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    for name in sorted(keys & tensors.keys() - own.keys()):
        path, _, leaf = name.rpartition(".")
        owner = _submodule(gm, path)
        if isinstance(tensors[name], nn.Parameter):
            owner.register_parameter(leaf, tensors[name])
        else:
            owner.register_buffer(leaf, tensors[name])


def _submodule(root: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    return root


def evaluate(gm: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The node's value on meta tensors, its inputs taken from `env`."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
    if node.op == "get_attr":
        value = gm
        for name in node.target.split("."):
            value = getattr(value, name)
        return value.to("meta") if isinstance(value, torch.Tensor) else value
    if node.op == "call_module":
        return gm.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    if node.op == "output":
        return args[0]
    if node.target in MAKERS:
        kwargs = {**kwargs, "device": "meta"}
    return node.target(*args, **kwargs)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was recorded in; empty at the top."""
    if node.op in ("call_module", "get_attr"):
        return node.target
    stack: Sequence = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
