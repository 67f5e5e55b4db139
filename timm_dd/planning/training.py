"""One graph of two: what a forward does in eval mode, and in training what it does then.

Both are gone through side by side. Steps that only training has, from one tensor to one, as a drop path that is a
function, become a module that takes them in training: `Steps`. A number that is another one in training (the
probability of an attention's dropout) is found `by_mode`. Whatever else differs is an error with its line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from ..errors import SplitError
from .graphs import STAYS_IN_EVAL, module_path
from .modes import REMEDY, mark_training_only, where, working


def by_mode(training: bool, in_eval: float, in_training: float) -> float:
    """A number of the graph that is another one while the network trains."""
    return in_training if training else in_eval


class Steps(nn.Module):
    """What a forward does with a tensor while the module that it is called in trains."""

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self.steps = fx.GraphModule(nn.Module(), graph)
        mark_training_only(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.steps(x) if self.training else x


def keep_training(
    model: nn.Module,
    graph: fx.Graph,
    other: nn.Module,
    training: fx.Graph,
    is_tensor: Callable[[fx.Node], bool],
) -> None:
    """Make the `graph` of `model` in eval mode that of both modes; `training` is that of an `other` copy in training.

    Args:
        is_tensor: whether a node in training gives one.

    Raises:
        SplitError: they differ in more than numbers, and steps from one tensor to one.
    """
    both = _Both(model, other, working(training), is_tensor)
    for node in working(graph):
        both.advance(node)


class _Both:
    """Goes through the nodes of both graphs.

    Attributes:
        left: the nodes in training that have no twin yet.
        twins: those that have, by their twins in eval mode.
        after: what a tensor has become in training, by (its node, the node in training of what it becomes).
    """

    def __init__(self, model: nn.Module, other: nn.Module, training: Sequence[fx.Node], is_tensor: Callable):
        self.model, self.other, self.left, self.is_tensor = model, other, [*training], is_tensor
        self.working = set(training)
        self.twins: dict[fx.Node, fx.Node] = {}
        self.after: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def advance(self, node: fx.Node) -> None:
        """Find the twin of the next node in eval mode, and make the node that of both.

        Raises:
            SplitError: it has none.
        """
        for i, twin in enumerate(self.left):
            if self._are_alike(node, twin) and self._follows(node, twin, self.left[:i]):
                self.twins[node], self.left = twin, self.left[i + 1 :]
                return
        blamed = node if not self.left or self.left[0].op == "output" else self.left[0]
        raise SplitError(f"{where(blamed)}: one of training and eval mode does this, the other not; {REMEDY}")

    def _follows(self, node: fx.Node, twin: fx.Node, steps: Sequence[fx.Node]) -> bool:
        """Whether `node` is that of both modes where training takes some `steps` before."""
        call = None
        if steps:
            entry = self._entry(steps)
            x = next((n for n, t in self.twins.items() if t is entry), None)
            if entry is None or x is None:
                return False
            call = self.after[x, steps[-1]] = self._insert(steps, entry, x, node)
        try:
            self._unite(node, twin)
        except _Unlike:
            if call is not None:
                del self.after[x, steps[-1]]
                node.graph.erase_node(call)
            return False
        return True

    def _entry(self, steps: Sequence[fx.Node]) -> fx.Node | None:
        """The tensor from which `steps` go to one; None if they are more than calls of functions that do that."""
        given = {n for step in steps for n in step.all_input_nodes if n not in steps}
        used = {n for step in steps[:-1] for n in step.users if n in self.working and n not in steps}
        calls = all(step.op in ("call_function", "call_method") for step in steps)
        tensors = len(given) == 1 and all(map(self.is_tensor, (*given, steps[-1])))
        return given.pop() if calls and tensors and not used else None

    def _are_alike(self, node: fx.Node, twin: fx.Node) -> bool:
        """Whether they do the same. A tensor that the forward makes is the same in both; a parameter is, on the meta
        device."""
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        if node.op != "get_attr":
            return True
        a, b = (attrgetter(node.target)(m) for m in (self.model, self.other))
        return not isinstance(a, torch.Tensor) or a.is_meta or torch.equal(a, b)

    def _insert(self, steps: Sequence[fx.Node], entry: fx.Node, x: fx.Node, before: fx.Node) -> fx.Node:
        """A call of a module that takes the `steps`, in the module where the forward takes them."""
        graph = fx.Graph()
        copies = {entry: graph.placeholder("x")}
        for step in steps:
            copies[step] = graph.node_copy(step, copies.__getitem__)
        graph.output(copies[steps[-1]])
        path, new = module_path(steps[-1]), Steps(graph)
        owner, name = self.model.get_submodule(path), f"_{steps[-1].name}_in_training"
        vars(new).update((k, v) for k, v in vars(owner).items() if k == STAYS_IN_EVAL)
        vars(owner)[name] = new.train(owner.training)  # none of its modules yet, which a forward may go through
        with before.graph.inserting_before(before):
            call = before.graph.call_module(f"{path}.{name}".lstrip("."), (x,))
        call.meta = dict(steps[-1].meta)
        return call

    def _unite(self, node: fx.Node, twin: fx.Node) -> None:
        """Raises _Unlike if their arguments differ in more than numbers."""
        made: list[fx.Node] = []
        try:
            given = self._in_both(node, (node.args, node.kwargs), (twin.args, twin.kwargs), made)
        except _Unlike:
            for new in reversed(made):
                node.graph.erase_node(new)
            raise
        node.args, node.kwargs = given

    def _in_both(self, node: fx.Node, a: Any, b: Any, made: list[fx.Node]) -> Any:
        """The arguments of a node, from those of both modes. A flag or a fraction that differs is a switch, one of the
        nodes `made`: no rule needs to know more of it than its value in eval mode. Whole numbers are sizes."""
        if isinstance(a, fx.Node):
            same = self.twins[a] is b
            a = a if same else self.after.get((a, b))
            same = a is not None
        elif isinstance(a, (tuple, list)):
            same = isinstance(b, (tuple, list)) and len(a) == len(b)
            a = type(a)(self._in_both(node, x, y, made) for x, y in zip(a, b)) if same else a
        elif isinstance(a, dict):
            same = isinstance(b, dict) and a.keys() == b.keys()
            a = {key: self._in_both(node, a[key], b[key], made) for key in a} if same else a
        elif isinstance(a, slice):
            same = isinstance(b, slice)
            ends = ((s.start, s.stop, s.step) for s in (a, b))
            a = slice(*self._in_both(node, *ends, made)) if same else a
        else:
            same = type(a) is type(b) and (a is b or a == b)
            if not same and {type(a), type(b)} in ({bool}, {float}, {float, int}):
                made += _switch(node, a, b)
                return made[-1]
        if not same:
            raise _Unlike
        return a


class _Unlike(Exception):
    """Two nodes, one in each mode, that differ in more than numbers."""


def _switch(node: fx.Node, in_eval: float, in_training: float) -> tuple[fx.Node, fx.Node]:
    """A `by_mode` for an argument of `node`, by the mode of the module that the node was recorded in; it comes last."""
    path, graph = module_path(node), node.graph
    owner = path.rpartition(".")[0] if node.op == "call_module" else path
    with graph.inserting_before(node):
        training = graph.create_node("get_attr", f"{owner}.training".lstrip("."))
        return training, graph.call_function(by_mode, (training, in_eval, in_training))
