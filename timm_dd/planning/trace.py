"""A model as an fx graph with shapes, on the meta device: no weights in memory, no arithmetic.

`skeleton` copies a model's structure without its tensors, `trace` records its graph in eval mode, with what it does in
training (`modes`), and `evaluate_node` runs one node on meta tensors, so that shapes can be had at any input size.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import checkpoint

from ..compat import WeightNorm, let_einops_take, register_pytree_node, tree_knows, tree_leaves
from ..errors import SplitError, headline
from . import modes
from .graphs import (
    MAKERS,
    STAYS_IN_EVAL,
    Graph,
    ancestors,
    evaluate_node,
    float_type,
    graph_module,
    module_path,
    skeleton,
)
from .inputs import Inputs, Like, bind, leaves, signature_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
DROPOUTS = {F.dropout: nn.Dropout, F.dropout1d: nn.Dropout1d, F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}  # besides what ends with an underscore


class Known(fx.Proxy):
    """What a node gives, of which Python may ask what the sizes of the image decide: a length, a whole number."""

    def __getattr__(self, name: str) -> KnownAttribute:
        return KnownAttribute(self, name)

    @property
    def ndim(self) -> Any:
        """Of no image's size and no part: a number of Python, with which a dict may be asked."""
        return self.tracer.decide(self.node, torch.Tensor.dim, lambda: KnownAttribute(self, "ndim"))

    def __len__(self) -> int:
        return self.tracer.decide(self.node, len)

    def __int__(self) -> int:
        return self.tracer.decide(self.node, int)

    def __index__(self) -> int:
        return self.tracer.decide(self.node, operator.index)

    def __float__(self) -> float:
        return self.tracer.decide(self.node, float)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", assign_, (self, index, value), {})


class KnownAttribute(fx.proxy.Attribute, Known):
    """An attribute of `Known`, which becomes a node where it is not called."""


@dataclass(frozen=True)
class Decision:
    """What the forward asked of a node, the answer at the image's size, and the line where it asked."""

    node: fx.Node
    ask: Callable[[Any], Any]
    answer: Any
    line: str


class Tracer(fx.Tracer):
    """fx tracing with the modules and timm's functions that have a rule as leaves. timm marks others as leaves too,
    those that branch on sizes and those that work in place: these are traced through, at the sizes that the image
    gives. What is computed from a buffer is part of the graph, as it is from a parameter.

    Args:
        inputs: what the model takes.
        example: an argument on the meta device, by its name, for a batch of images, by default that of the trace.

    Attributes:
        decisions: all that the forward asked of sizes.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[Any], bool], inputs: Inputs, example: Callable):
        super().__init__(autowrap_functions=tuple(filter(is_leaf, get_notrace_functions())))
        self._is_leaf, self._inputs, self._example = is_leaf, inputs, example
        self._env: dict[fx.Node, Any] = {}
        self._evaluating = False
        self.decisions: list[Decision] = []
        self.failed: str | None = None  # why sizes are not known

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return self._is_leaf(m) or modes.is_training_only(m) or super().is_leaf_module(m, qualified_name)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """The forward as a function of the model alone, on a placeholder for each argument that holds tensors; tuples,
        lists and dicts are what they are in Python, of entries of the placeholder."""
        inputs = self._inputs

        def place(name: str, tree: Any) -> Any:
            if not any(isinstance(leaf, Like) for leaf in leaves(tree)):
                return tree
            return entries(self.create_proxy("placeholder", name, (), {}), tree)

        def entries(proxy: fx.Proxy, tree: Any) -> Any:
            if isinstance(tree, dict):
                return {key: entries(proxy[key], inner) for key, inner in tree.items()}
            if isinstance(tree, (tuple, list)):
                return type(tree)(entries(proxy[i], inner) for i, inner in enumerate(tree))
            return proxy if isinstance(tree, Like) else tree

        bound = bind(signature_of(self.root), inputs.args, inputs.kwargs, place)

        @functools.wraps(root_fn)
        def forward(root: nn.Module) -> Any:
            return self._given_out(root_fn(root, *bound.args, **bound.kwargs))

        return forward, [self.root]

    def _given_out(self, value: Any) -> Any:
        """What the forward returns, in which fx would make a plain dict of any class of dict."""
        if isinstance(value, dict):
            entries = {key: self._given_out(v) for key, v in value.items()}
            return entries if type(value) is dict else self.create_proxy("call_function", *_remade(value, entries))
        if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            return type(value)(map(self._given_out, value))
        return value

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Known(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch on sizes goes the way it goes at the image's size; one on values of a tensor is an error of fx."""
        return self.decide(obj.node, bool, lambda: super(Tracer, self).to_bool(obj))

    def iter(self, obj: fx.Proxy) -> Iterator:
        return iter([obj[i] for i in range(self.decide(obj.node, len, lambda: super(Tracer, self).iter(obj)))])

    def decide(self, node: fx.Node, ask: Callable[[Any], Any], otherwise: Callable[[], Any] | None = None) -> Any:
        """What `ask` says of the node's value at the image's size; `otherwise` where that is not known."""
        self._evaluating = True
        try:
            self._evaluate_all()
            value = self._env[node]
            if isinstance(value, torch.Tensor) and ask not in (len, torch.Tensor.dim):
                raise TypeError(
                    f"{ask.__name__} of a tensor's values at {_line()}, which are not known while it is traced"
                )
            answer = ask(value)
        except Exception:  # any operation may fail on meta tensors; then fx says what it cannot trace
            if otherwise is None:
                raise
            return otherwise()
        finally:
            self._evaluating = False
        self.decisions.append(Decision(node, ask, answer, _line()))
        return answer

    def _evaluate_all(self) -> None:
        for node in self.graph.nodes:
            if node not in self._env:
                try:
                    self._env[node] = self._evaluate(node, self._env)
                except Exception as e:
                    if not isinstance(e, NotImplementedError) and "meta" not in str(e):  # it needs no values either
                        self.failed = f"{node.meta['line']} fails: {headline(e)}"
                    raise

    def other_decision(self, batch: int) -> Decision | None:
        """The first decision that is another one on a `batch` of images; None too where the model does not run."""
        env: dict[fx.Node, Any] = {}
        try:
            for decision in self.decisions:
                for node in ancestors(decision.node, env):
                    env[node] = self._evaluate(node, env, batch)
                if decision.ask(env[decision.node]) != decision.answer:
                    return decision
        except Exception:  # any operation may refuse a batch in its own way
            pass
        return None

    def _evaluate(self, node: fx.Node, env: dict[fx.Node, Any], batch: int | None = None) -> Any:
        if node.op != "placeholder":
            return evaluate_node(self.root, node, env)
        return self._example(node.target, batch)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _line()
        if not torch.is_grad_enabled():
            node.meta["no_grad"] = True
        return node

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if not m.training and args and result is args[0] and self._acts_in_training(m, forward, args, kwargs):
            modes.mark_training_only(m)
            return super().call_module(m, forward, args, kwargs)
        return result

    def _acts_in_training(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> bool:
        """Whether a module without tensors that gives back its input in eval mode does not do so in training."""
        attributes = (vars(module).values() for module in m.modules())
        if any(isinstance(v, torch.Tensor) for v in chain(m.parameters(), m.buffers(), *attributes)):
            return False
        count, stack, asked = len(self.graph.nodes), self.module_stack.copy(), len(self.decisions)
        m.train()
        with modes.watched_draws() as drawn:
            try:
                return forward(*args, **kwargs) is not args[0] or drawn()
            except Exception:  # a branch on what it draws; it runs as it is
                return True
            finally:
                m.eval()
                self.module_stack = stack
                del self.decisions[asked:]
                for node in list(self.graph.nodes)[: count - 1 : -1]:
                    self.graph.erase_node(node)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph in eval mode, which does in training what the model does."""
        first, other = skeleton(root).train().eval(), skeleton(root).train()  # `train` clears what a forward keeps
        graph = self._of_one_mode(first, concrete_args)
        modes.mark_alike(first, root.eval())
        for node in graph.find_nodes(op="get_attr"):  # a tensor that the forward makes
            if not hasattr(root, node.target.split(".")[0]):
                setattr(root, node.target, getattr(first, node.target))
        modes.mark_alike(root, other)
        self._env = {}
        with modes.watched_draws() as drawn:
            try:
                training = self._of_one_mode(other, concrete_args)
            except Exception as e:
                raise SplitError(
                    f"torch.fx cannot trace {type(root).__name__} in training mode: {type(e).__name__}: {headline(e)}; "
                    f"{_raised_at(e)}{modes.REMEDY}"
                ) from e
            if drawn():
                raise SplitError(
                    f"{type(root).__name__} draws random numbers in training, outside of tensors, and so would do in "
                    f"all its parts what it did once; {modes.REMEDY}"
                )
        modes.keep_training(root, graph, other, training)
        return graph

    def _of_one_mode(self, root: nn.Module, concrete_args: dict[str, Any] | None) -> fx.Graph:
        """The graph in the mode that `root` is in, without attributes that were read for nothing."""
        with _buffers_may_be_computed(), _sizes_may_be_computed():
            graph = super().trace(root, concrete_args)
        modes.detach(graph)
        asked = {decision.node for decision in self.decisions}
        for node in graph.find_nodes(op="call_function", target=getattr):
            if not node.users and node not in asked:
                graph.erase_node(node)
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


def _remade(value: dict, entries: dict) -> tuple[type, tuple, dict]:
    """A call that makes an object of a class of dict of its `entries`; trees look into such objects from now on.

    Raises:
        SplitError: the class cannot be made of entries.
    """
    kind = type(value)
    for args, kwargs in (((entries,), {}), ((), entries)):
        try:
            made = kind(*args, **kwargs)
        except Exception:  # any class takes what it likes
            continue
        if list(made) == list(entries) and all(made[key] is entries[key] for key in entries):
            if not tree_knows(kind):
                register_pytree_node(kind, _flattened, functools.partial(_unflattened, kind, bool(args)))
            return kind, args, kwargs
    raise SplitError(
        f"gives a {kind.__name__}, which cannot be made of its entries; return a dict, or a tuple of tensors"
    )


def _flattened(value: dict) -> tuple[list, list]:
    return list(value.values()), list(value)


def _unflattened(kind: type, of_dict: bool, values: Iterable, keys: list) -> Any:
    entries = dict(zip(keys, values))
    return kind(entries) if of_dict else kind(**entries)


def _line() -> str:
    return modes.line_of(traceback.walk_stack(None))


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
        SplitError: fx cannot trace the model, or the batch's size decides what the model does.
    """
    _check_plain(model)
    inputs = Inputs.image(size) if inputs is None else inputs
    tracer, graph = _traced(model, is_leaf, inputs, batch)
    _check_batches(model, is_leaf, inputs, batch, tracer, graph)
    _drop_assertions(graph)
    _inputs_first(graph, model)
    _chain_in_place(graph, model)
    _chunk_as_pieces(graph)
    _dropout_as_modules(graph, model)
    _constants_as_buffers(graph, model)
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


def _traced(model: nn.Module, is_leaf: Callable[[Any], bool], inputs: Inputs, batch: int) -> tuple[Tracer, fx.Graph]:
    named, dtype = inputs.named(signature_of(model)), float_type(model)

    def example(name: str, other: int | None) -> Any:
        return inputs.empty(named[name], batch if other is None else other, inputs.size, dtype)

    let_einops_take(Known, KnownAttribute)
    tracer = Tracer(is_leaf, inputs, example)
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
            f"{_raised_at(e)}{remedy if branches else other}"
        ) from e


def _raised_at(error: Exception) -> str:
    line = modes.line_of(reversed(list(traceback.walk_tb(error.__traceback__))))
    return f"{line}; " if line else ""


def _check_batches(
    model: nn.Module,
    is_leaf: Callable[[Any], bool],
    inputs: Inputs,
    batch: int,
    tracer: Tracer,
    graph: fx.Graph,
) -> None:
    """Raise SplitError where the model does something else on another batch: one of a single image, of one image more,
    of many. A batch on which it does not run, as of 1 image where it folds 4 frames into one, says nothing."""
    for other in sorted({1, batch + 1, 2 * batch, 1000 * batch} - {batch}):
        decision = tracer.other_decision(other)
        if decision is None:
            continue
        try:
            _, another = _traced(skeleton(model), is_leaf, inputs, other)
        except SplitError:
            continue
        if _listing(another) != _listing(graph):
            raise SplitError(
                f"{type(model).__name__} at {decision.line} does something else on a batch of {other} than on one of "
                f"{batch}; what the forward does must not depend on the number of images"
            )


def _listing(graph: fx.Graph) -> list[tuple]:
    return [(n.op, n.target, str(n.args), str(n.kwargs)) for n in graph.nodes]


def _normalises_rows(module: nn.Module) -> bool:
    """Whether all that is parametrized are weights of whose rows each has its own norm; see `Op.param`."""
    if isinstance(module, nn.RNNBase):
        return False
    lists = module.parametrizations.values()
    return all(len(ps) == 1 and isinstance(ps[0], WeightNorm) and ps[0].dim == 0 < ps.original0.ndim for ps in lists)


@contextlib.contextmanager
def _buffers_may_be_computed() -> Iterator[None]:
    """A forward that makes its buffer anew, for positions of another size, gives what it made a name of its own."""
    original = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        if isinstance(value, fx.Proxy) and name in module._buffers:
            del module._buffers[name]
        original(module, name, value)

    nn.Module.__setattr__ = assign  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _sizes_may_be_computed() -> Iterator[None]:
    """``torch.zeros(n, …)`` is a node where the graph computes n, of which torch says that it is no number."""

    def recording(maker: Callable) -> Callable:
        @functools.wraps(maker)
        def make(*args: Any, **kwargs: Any) -> Any:
            proxies = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy))
            proxy = next(proxies, None)
            if proxy is None:
                return maker(*args, **kwargs)
            return proxy.tracer.create_proxy("call_function", maker, args, kwargs)

        return make

    for maker in MAKERS:
        setattr(torch, maker.__name__, recording(maker))
    try:
        yield
    finally:
        for maker in MAKERS:
            setattr(torch, maker.__name__, maker)


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


def assign_(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``x[index] = value``, as an operation that gives `x`."""
    x[index] = value
    return x


def _chain_in_place(graph: fx.Graph, model: nn.Module) -> None:
    """Whoever reads a tensor after ``tensor.mul_(…)`` reads the result of that."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if _in_place(node, model) and isinstance(node.args[0], fx.Node):
            before = node.args[0]
            before.replace_all_uses_with(node, lambda user, i=order[node]: order[user] > i)


def _in_place(node: fx.Node, model: nn.Module) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return bool(vars(model.get_submodule(node.target)).get("inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in IN_PLACE or node.kwargs.get("inplace", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


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


def _dropout_as_modules(graph: fx.Graph, model: nn.Module) -> None:
    """Dropout called as a function of the mode is a module where it is called, whose probability can be set."""
    for node in list(graph.nodes):
        training = _argument(node, 2, "training", True)
        if node.target not in DROPOUTS or not isinstance(training, fx.Node) or training.target is not modes.by_mode:
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


def _constants_as_buffers(graph: fx.Graph, model: nn.Module) -> None:
    """A tensor that is a plain attribute, or that the forward makes, becomes a buffer outside the state dict."""
    for node in graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = node.target.rpartition(".")
            owner = model.get_submodule(path)
            if isinstance(owner.__dict__.get(leaf), torch.Tensor):
                owner.register_buffer(leaf, owner.__dict__.pop(leaf), persistent=False)


def _argument(node: fx.Node, position: int, keyword: str, default: Any) -> Any:
    return node.kwargs.get(keyword, node.args[position] if len(node.args) > position else default)
