"""A model as an fx graph with shapes, on the meta device: no weights in memory, no arithmetic.

`trace` records the graph of a `skeleton` in eval mode, with what it does in training (`modes`), and refuses what is not
the same on another batch or without gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import checkpoint

from ..compat import WeightNorm, let_einops_take, tree_map_only
from ..errors import SplitError, headline
from . import modes
from .graphs import (
    STAYS_IN_EVAL,
    Graph,
    float_type,
    graph_module,
    module_path,
    skeleton,
)
from .inputs import Inputs, leaves, signature_of
from .memory import chain_in_place
from .meta import META
from .symbols import Known, KnownAttribute
from .tracer import Tracer
from .training import by_mode
from .witness import check_same

CONSTANT = "_tensor_constant"  # as fx calls what a forward makes of no symbol
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}


def trace(
    model: nn.Module,
    is_leaf: Callable[[Any], bool],
    size: Sequence[int],
    batch: int = 2,
    inputs: Inputs | None = None,
) -> Graph:
    """The graph of a `skeleton` in eval mode on `batch` images of `size`, (C, *size), and the other `inputs`; its state
    dict has the model's keys, all of them.

    Raises:
        SplitError: fx cannot trace the model, or the batch's size decides what the model does, or whether gradients are
            computed.
    """
    _check_plain(model)
    inputs = Inputs.image(size) if inputs is None else inputs
    tracer, graph = _traced(model, is_leaf, inputs, batch)
    _check_devices(model, graph)
    _check_elsewhere(model, is_leaf, inputs, batch, tracer, graph)
    with torch.enable_grad(), _without_checkpoints():
        check_same(model, graph, inputs, tracer.example)
    _drop_assertions(graph)
    _inputs_first(graph, model)
    chain_in_place(graph, model, tracer.example)
    _chunk_as_pieces(graph)
    _numbers_of_python(graph, model)
    _dropout_as_modules(graph, model)
    _additions(graph, model)
    gm = graph_module(model, graph, type(model).__name__)
    gm.batch, gm.inputs, gm.signature = batch, inputs, signature_of(model)
    return gm


def _check_plain(model: nn.Module) -> None:
    """Raise SplitError for modules that do more than their forward says."""
    for path, module in model.named_modules():
        if is_parametrized(module) and not _normalises_rows(module):
            raise SplitError(
                f"{path or type(model).__name__} is parametrized; remove_parametrizations makes plain weights of it"
            )
        for hook in (hook for kind in HOOKS for hook in vars(module)[kind].values()):
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise SplitError(
                f"{path or type(model).__name__} has a hook, {name}, of whose doings nothing is known; remove the hook "
                "(one that makes a weight with remove_weight_norm, remove_spectral_norm or prune.remove), and register "
                "it on the parts or on the merged model"
            )


def _traced(
    model: nn.Module, is_leaf: Callable[[Any], bool], inputs: Inputs, batch: int, grads: bool = True
) -> tuple[Tracer, fx.Graph]:
    named, dtype = inputs.named(signature_of(model)), float_type(model)

    def example(name: str, other: int | None = None) -> Any:
        return inputs.empty(named[name], batch if other is None else other, inputs.size, dtype)

    let_einops_take(Known, KnownAttribute)
    tracer = Tracer(is_leaf, inputs, example, grads)
    try:
        with torch.enable_grad(), _without_checkpoints():
            return tracer, tracer.trace(model)
    except SplitError:
        raise
    except Exception as e:  # any code of the model runs here and may fail in its own way
        branches = isinstance(e, fx.proxy.TraceError)
        if branches and tracer.failed is not None:
            shape = "×".join(map(str, inputs.size))
            raise SplitError(f"{type(model).__name__} does not run on images of {shape}: {tracer.failed}") from e
        remedy = "its forward must not branch on the values of tensors"
        other = "while it is traced, a tensor or a size computed from one is a symbol, which not all code takes"
        raise SplitError(
            f"torch.fx cannot trace {type(model).__name__}: {type(e).__name__}: {headline(e)}; "
            f"{modes.raised_at(e)}{remedy if branches else other}"
        ) from e


def _check_devices(model: nn.Module, graph: fx.Graph) -> None:
    """Raise SplitError where the graph keeps the meta device, on which it is traced, or a tensor made there."""
    for node in graph.nodes:
        made = getattr(model, node.target) if node.op == "get_attr" and node.target.startswith(CONSTANT) else None
        kept = [*leaves(node.args), *leaves(tuple(node.kwargs.values())), getattr(made, "device", None)]
        if META in kept:
            raise SplitError(
                f"{modes.where(node)}: the device of a tensor of the model, which is another one while it is traced; "
                "take that of an input, or of `next(self.parameters())`"
            )


def _check_elsewhere(
    model: nn.Module,
    is_leaf: Callable[[Any], bool],
    inputs: Inputs,
    batch: int,
    tracer: Tracer,
    graph: fx.Graph,
) -> None:
    """Raise SplitError where the model does something else on another batch (of a single image, of one image more, of
    many), or without gradients, as it is evaluated. A batch on which it does not run, as of 1 image where it folds 4
    frames into one, says nothing."""
    name, listing = type(model).__name__, _listing(graph)

    def differs(batch: int, grads: bool = True) -> bool:
        return _listing(_traced(skeleton(model), is_leaf, inputs, batch, grads)[1]) != listing

    for other in sorted({1, batch + 1, 2 * batch, 1000 * batch} - {batch}):
        decision, found = tracer.other_decision(other), False
        with contextlib.suppress(SplitError):
            found = decision is not None and differs(other)
        if found:
            raise SplitError(
                f"{name} at {decision.line} does something else on a batch of {other} than on one of {batch}; what the "
                "forward does must not depend on the number of images"
            )
    if tracer.of_gradients is not None and differs(batch, grads=False):
        raise SplitError(
            f"{name} at {tracer.of_gradients} does something else where no gradients are computed; branch on "
            "`self.training`"
        )


def _listing(graph: fx.Graph) -> list[tuple]:
    """What it computes; what the forward only asked for is left out."""
    place = {node: i for i, node in enumerate(modes.working(graph))}
    listed = ((n, fx.node.map_arg((n.args, n.kwargs), place.__getitem__)) for n in place)
    return [(n.op, n.target, str(given if n.target is operator.getitem else _tuples(given))) for n, given in listed]


def _tuples(given: Any) -> Any:
    """With tuples for lists, which only an index tells apart; a checkpoint makes tuples of lists."""
    return tuple(map(_tuples, given)) if isinstance(given, (list, tuple)) else given


def _normalises_rows(module: nn.Module) -> bool:
    """Whether all that is parametrized are weights of whose rows each has its own norm; see `Op.param`."""
    if isinstance(module, nn.RNNBase):
        return False
    lists = module.parametrizations.values()
    return all(len(ps) == 1 and isinstance(ps[0], WeightNorm) and ps[0].dim == 0 < ps.original0.ndim for ps in lists)


@contextlib.contextmanager
def _without_checkpoints() -> Iterator[None]:
    """A reentrant checkpoint takes tensors alone; here it is the function that it recomputes."""

    class Inlined:
        @staticmethod
        def apply(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    original = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = Inlined  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = original  # type: ignore[misc]


def _drop_assertions(graph: fx.Graph) -> None:
    """Assertions hold global sizes."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target is torch._assert:
            _erase(graph, node)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase `node`, and what was computed for it alone."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    for n in inputs:
        if not n.users and n.op in ("call_function", "call_method"):
            _erase(graph, n)


def _inputs_first(graph: fx.Graph, model: nn.Module) -> None:
    """What a call names stands where it would without its name, so that a rule has no need of the names."""
    for node in graph.nodes:
        if node.op == "call_module" and node.kwargs:
            forward = inspect.signature(model.get_submodule(node.target).forward)
            bound = forward.bind(*node.args, **node.kwargs)
            node.args, node.kwargs = bound.args, bound.kwargs
        elif node.op == "call_function" and not node.args:
            named = dict(node.kwargs)
            first = next((named.pop(name) for name in ("input", "tensors") if name in named), None)
            if first is not None:
                node.args, node.kwargs = (first,), named


def chunk_or_split(x: torch.Tensor, sizes: int | list[int], dim: int) -> tuple[torch.Tensor, ...]:
    """``x.chunk`` by a count, ``x.split`` by sizes."""
    return x.chunk(sizes, dim) if isinstance(sizes, int) else x.split(sizes, dim)


def _chunk_as_pieces(graph: fx.Graph) -> None:
    """Chunks of equal sizes in the model may have different ones in a part."""
    for node in graph.nodes:
        if node.target in (torch.chunk, "chunk"):
            node.op, node.target = "call_function", chunk_or_split
            node.args = tuple(_argument(node, i, name, 0) for i, name in enumerate(("input", "chunks", "dim")))
            node.kwargs = {}


def _numbers_of_python(graph: fx.Graph, model: nn.Module) -> None:
    """Widths and groups that were computed with NumPy, as rules and plan.json know numbers."""
    for node in graph.find_nodes(op="call_module"):
        for module in model.get_submodule(node.target).modules():
            given = {name: v for name, v in vars(module).items() if isinstance(v, (np.generic, tuple, list))}
            vars(module).update(tree_map_only(np.generic, np.generic.item, given))


def _dropout_as_modules(graph: fx.Graph, model: nn.Module) -> None:
    """Dropout called as a function of the mode is a module where it is called, whose probability can be set."""
    for node in list(graph.nodes):
        training = _argument(node, 2, "training", True)
        if node.target not in DROPOUTS or not isinstance(training, fx.Node) or training.target is not by_mode:
            continue
        path = module_path(node)
        owner, new = model.get_submodule(path), DROPOUTS[node.target](_argument(node, 1, "p", 0.5))
        vars(new).update((name, mark) for name, mark in vars(owner).items() if name == STAYS_IN_EVAL)
        owner.add_module(f"_{node.name}", new.train(owner.training))
        with graph.inserting_before(node):
            called = graph.call_module(f"{path}._{node.name}".lstrip("."), (_argument(node, 0, "input", None),))
        node.replace_all_uses_with(called)
        for unused in (node, training, training.args[0]):
            graph.erase_node(unused)


def _additions(graph: fx.Graph, model: nn.Module) -> None:
    """A tensor that is a plain attribute, or that the forward makes, becomes a buffer outside the state dict; a module
    that the trace made becomes one of the model's."""
    for node in graph.nodes:
        if node.op not in ("get_attr", "call_module"):
            continue
        path, _, leaf = node.target.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(vars(owner).get(leaf), torch.Tensor):
            owner.register_buffer(leaf, vars(owner).pop(leaf), persistent=False)
        elif isinstance(vars(owner).get(leaf), nn.Module):
            owner.add_module(leaf, vars(owner).pop(leaf))


def _argument(node: fx.Node, position: int, keyword: str, default: Any) -> Any:
    return node.kwargs.get(keyword, node.args[position] if len(node.args) > position else default)
