"""How a forward is recorded: its symbols answer what the sizes of the image decide, and ordinary code goes on.

A branch, a length or a text that only these sizes decide goes the way that it goes at the image's size, and is noted,
so that `trace` can ask whether it goes the same way on other batches.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from timm.layers import get_notrace_functions
from torch import fx, nn

from ..compat import register_pytree_node, tree_knows
from ..errors import SplitError, headline
from . import modes
from .graphs import ancestors, evaluate_node, skeleton
from .inputs import Inputs, Like, bind, leaves, signature_of
from .modes import line_here
from .outliving import forget
from .surroundings import where_symbols_are_taken
from .symbols import Known, has_history
from .training import keep_training

OF_GRADIENTS = {"requires_grad", "is_leaf"}  # attributes of tensors


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
        grads: whether gradients are computed, as the forward may ask of a tensor.

    Attributes:
        decisions: all that the forward asked of sizes.
        of_gradients: the line where it first asked whether they are computed.
    """

    proxy_buffer_attributes = True

    def __init__(self, is_leaf: Callable[[Any], bool], inputs: Inputs, example: Callable, grads: bool = True):
        super().__init__(autowrap_functions=tuple(filter(is_leaf, get_notrace_functions())))
        self._is_leaf, self._inputs, self.example, self.grads = is_leaf, inputs, example, grads
        self._env: dict[fx.Node, Any] = {}
        self._evaluating, self.with_grads = False, True
        self._given: list[weakref.ref] = []
        self.decisions: list[Decision] = []
        self.of_gradients: str | None = None
        self.failed: str | None = None  # why sizes are not known

    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if self._is_leaf(m) or modes.is_training_only(m):
            return True
        return super().is_leaf_module(m, qualified_name) and not _has_methods(m)

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
            return _given_out(self, root_fn(root, *bound.args, **bound.kwargs))

        return forward, [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        known = Known(node, self)
        if node.op != "get_attr":  # whose symbols fx holds in a cycle
            self._given.append(weakref.ref(known))
        return known

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch on sizes goes the way it goes at the image's size; one on values of a tensor is an error of fx."""
        return self.decide(obj.node, bool, lambda: super(Tracer, self).to_bool(obj))

    def iter(self, obj: fx.Proxy) -> Iterator:
        return iter([obj[i] for i in range(self.decide(obj.node, len, lambda: super(Tracer, self).iter(obj)))])

    def decide(self, node: fx.Node, ask: Callable[[Any], Any], otherwise: Callable[[], Any] | None = None) -> Any:
        """What `ask` says of the node's value at the image's size; `otherwise` where that is not known."""
        try:
            value = self._value(node)
            if isinstance(value, torch.Tensor) and ask not in (len, torch.Tensor.dim, has_history):
                raise TypeError(
                    f"{ask.__name__} of a tensor's values at {line_here()}, which are not known while it is traced"
                )
            answer = ask(value)
        except Exception:  # any operation may fail on meta tensors; then fx says what it cannot trace
            if otherwise is None:
                raise
            return otherwise()
        self.decisions.append(Decision(node, ask, answer, line_here()))
        if ask is has_history or node.target is getattr and node.args[1] in OF_GRADIENTS:
            self.of_gradients = self.of_gradients or line_here()
        return answer

    def ask(self, node: fx.Node, ask: Callable[[Any], Any], otherwise: Any) -> Any:
        """What `ask` says of the node's value, whatever the size of the image; `otherwise` where it is not known."""
        try:
            return ask(self._value(node))
        except Exception:  # as in `decide`
            return otherwise

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # before it is taken for a tensor
            return a.node
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def _value(self, node: fx.Node) -> Any:
        """At the image's size, on the meta device."""
        self._evaluating = True
        try:
            with torch.set_grad_enabled(self.grads):
                self._evaluate_all()
            return self._env[node]
        finally:
            self._evaluating = False

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
        return self.example(node.target, batch)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = line_here()
        if not self.with_grads:
            node.meta["no_grad"] = True
        return node

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if self._evaluating or _is_made(self, m):
            return forward(*args, **kwargs)
        result = super().call_module(m, forward, args, kwargs)
        if not m.training and args and result is args[0] and _acts_in_training(self, m, forward, args, kwargs):
            modes.mark_training_only(m)
            return super().call_module(m, forward, args, kwargs)
        return result

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph in eval mode, which does in training what the model does."""
        first, other = skeleton(root).train().eval(), skeleton(root).train()  # `train` clears what a forward keeps
        graph = self._of_one_mode(first, concrete_args)
        modes.mark_alike(first, root.eval())
        for node in (*graph.find_nodes(op="get_attr"), *graph.find_nodes(op="call_module")):
            if not hasattr(root, node.target.split(".")[0]):  # a tensor that the forward makes, its own function
                vars(root)[node.target] = getattr(first, node.target)
        modes.mark_alike(root, other)
        self._env = {}
        with modes.watched_draws() as drawn:
            try:
                training = self._of_one_mode(other, concrete_args)
            except Exception as e:
                raise SplitError(
                    f"torch.fx cannot trace {type(root).__name__} in training mode: {type(e).__name__}: {headline(e)}; "
                    f"{modes.raised_at(e)}{modes.REMEDY}"
                ) from e
            if drawn():
                raise SplitError(
                    f"{type(root).__name__} draws random numbers in training, outside of tensors, and so would do in "
                    f"all its parts what it did once; {modes.REMEDY}"
                )
        keep_training(root, graph, other, training, partial(_gives_tensor, self))
        return graph

    def _of_one_mode(self, root: nn.Module, concrete_args: dict[str, Any] | None) -> fx.Graph:
        """The graph in the mode that `root` is in, without attributes that were read for nothing."""
        try:
            with where_symbols_are_taken(self):
                graph = super().trace(root, concrete_args)
        finally:
            _forget_attributes(root)
            forget(self._given)
        modes.detach(graph)
        asked = {decision.node for decision in self.decisions}
        for node in graph.find_nodes(op="call_function", target=getattr):
            if not node.users and node not in asked:
                graph.erase_node(node)
        return graph

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)


def _has_methods(module: nn.Module) -> bool:
    """Whether methods were replaced on the module itself, which is then no layer of torch's."""
    return any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def _forget_attributes(model: nn.Module) -> None:
    """Without the symbols that a forward kept in the modules of a copy, which has done its work."""
    for module in model.modules():
        for name, value in [*vars(module).items()]:
            if any(issubclass(type(leaf), fx.Proxy) for leaf in leaves(value)):
                vars(module)[name] = None


def _gives_tensor(tracer: Tracer, node: fx.Node) -> bool:
    """At the image's size, as far as that can be said without values."""
    try:
        for n in ancestors(node, tracer._env):
            tracer._env[n] = tracer._evaluate(n, tracer._env)
    except Exception:  # any operation may fail on meta tensors
        return False
    return isinstance(tracer._env[node], torch.Tensor)


def _is_made(tracer: Tracer, module: nn.Module) -> bool:
    """Whether it is none of the model's, as one that a forward makes, ``self.layers[2:](x)`` or ``nn.ReLU()(x)``.

    Raises:
        SplitError: so are tensors in it.
    """
    if module in tracer.submodule_paths:
        return False
    own = {id(t) for t in chain(tracer.root.parameters(), tracer.root.buffers())}
    if not own.issuperset(map(id, chain(module.parameters(), module.buffers()))):
        raise SplitError(
            f"{type(module).__name__} at {line_here()} has tensors that are none of the model's; make it in __init__, "
            "and keep it as an attribute or in a ModuleList"
        )
    return True


def _acts_in_training(tracer: Tracer, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a module without tensors that gives back its input in eval mode does not do so in training."""
    attributes = (vars(module).values() for module in m.modules())
    if any(isinstance(v, torch.Tensor) for v in chain(m.parameters(), m.buffers(), *attributes)):
        return False
    count, stack, asked = len(tracer.graph.nodes), tracer.module_stack.copy(), len(tracer.decisions)
    m.train()
    with modes.watched_draws() as drawn:
        try:
            return forward(*args, **kwargs) is not args[0] or drawn()
        except Exception:  # a branch on what it draws; it runs as it is
            return True
        finally:
            m.eval()
            tracer.module_stack = stack
            del tracer.decisions[asked:]
            for node in list(tracer.graph.nodes)[: count - 1 : -1]:
                tracer.graph.erase_node(node)


def _given_out(tracer: Tracer, value: Any) -> Any:
    """What the forward returns, in which fx would make a plain dict of any class of dict."""
    if isinstance(value, dict):
        entries = {key: _given_out(tracer, v) for key, v in value.items()}
        return entries if type(value) is dict else tracer.create_proxy("call_function", *_remade(value, entries))
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_given_out(tracer, v) for v in value)
    return value


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
                register_pytree_node(kind, _flattened, partial(_unflattened, kind, bool(args)))
            return kind, args, kwargs
    raise SplitError(
        f"gives a {kind.__name__}, which cannot be made of its entries; return a dict, or a tuple of tensors"
    )


def _flattened(value: dict) -> tuple[list, list]:
    return list(value.values()), list(value)


def _unflattened(kind: type, of_dict: bool, values: Iterable, keys: list) -> Any:
    entries = dict(zip(keys, values))
    return kind(entries) if of_dict else kind(**entries)
