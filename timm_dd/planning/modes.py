"""What a model does only while it trains, which its graph in eval mode lacks: a part does the same, or it is refused.

A module that only adds noise in training stays a module, `is_training_only`. A number that is another one in training
(the probability of an attention's dropout) is found `by_mode`. Whatever else differs between the graphs of both modes
is an error with its line. What is computed under ``torch.no_grad()`` is `detached`.
"""

from __future__ import annotations

import linecache
import operator
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..compat import tree_map_only
from ..errors import SplitError
from .graphs import STAYS_IN_EVAL, module_path

LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
REMEDY = (
    "put it into a module of its own without parameters that returns its input in eval mode, or leave it out of the "
    "model that is split"
)

# What may only have been asked for; see `working`.
PURE = "getitem eq ne lt le gt ge add sub mul truediv floordiv mod pow neg pos not_ and_ or_".split()
READS = {getattr, round, "size", "dim", "numel", "nelement", *(getattr(operator, name) for name in PURE)}


class TrainingOnly:
    """In the registry of rules: a module that is the identity in eval mode."""


def by_mode(training: bool, in_eval: float, in_training: float) -> float:
    """A number of the graph that is another one while the network trains."""
    return in_training if training else in_eval


def mark_training_only(module: nn.Module) -> None:
    """From now on a node of the graph, which runs the module's code."""
    module.__dict__["_training_only"] = True


def is_training_only(module: nn.Module) -> bool:
    return vars(module).get("_training_only", False)


def mark_alike(model: nn.Module, other: nn.Module) -> None:
    """Of two copies of a model, `other` in training mode: what was found in one holds for both."""
    for a, b in zip(model.modules(), other.modules()):
        if is_training_only(a):
            mark_training_only(b)
        if not b.training:
            a.__dict__[STAYS_IN_EVAL] = True


@contextmanager
def watched_draws() -> Iterator[Callable[[], bool]]:
    """Tells whether random numbers were drawn here, outside of the graph, and takes that back."""
    python, numpy, ours = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()

    def drawn() -> bool:
        same_numpy = str(np.random.get_state(legacy=False)) == text
        return not (random.getstate() == python and same_numpy and torch.equal(torch.get_rng_state(), ours))

    text = str(numpy)
    try:
        yield drawn
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(ours)


def detached(value: Any) -> Any:
    """Its tensors without their history: what a block under ``torch.no_grad()`` hands out."""
    return tree_map_only(torch.Tensor, torch.Tensor.detach, value)


def detach(graph: fx.Graph) -> None:
    """Put `detached` between what was recorded under ``torch.no_grad()`` and what uses it outside."""
    for node in list(graph.nodes):
        users = [user for user in node.users if not user.meta.get("no_grad")]
        if node.meta.get("no_grad") and users:
            with graph.inserting_after(node):
                new = graph.call_function(detached, (node,))
            new.meta = {name: value for name, value in node.meta.items() if name != "no_grad"}
            for user in users:
                user.replace_input_with(node, new)


def working(graph: fx.Graph) -> list[fx.Node]:
    """The nodes but those of which the forward only asked something."""
    found: dict[fx.Node, None] = {}
    for node in reversed(graph.nodes):
        if node.target not in READS or any(user in found for user in node.users):
            found[node] = None
    return [*reversed(found)]


def keep_training(model: nn.Module, graph: fx.Graph, other: nn.Module, training: fx.Graph) -> None:
    """Make the `graph` of `model` in eval mode that of both modes; `training` is that of an `other` copy in training.

    Raises:
        SplitError: they differ in more than numbers.
    """
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(working(graph), working(training)):
        twins[node] = twin
        try:
            if (node.op, node.target) != (twin.op, twin.target) or not _same_constant(node, model, other):
                raise _Unlike
            switch = partial(_switch, node)
            node.args = _in_both(node.args, twin.args, twins, switch)
            node.kwargs = _in_both(node.kwargs, twin.kwargs, twins, switch)
        except _Unlike:
            blamed = node if twin.op == "output" else twin
            message = f"{where(blamed)}: one of training and eval mode does this, the other not; {REMEDY}"
            raise SplitError(message) from None


class _Unlike(Exception):
    """Two nodes, one in each mode, that differ in more than numbers."""


def _same_constant(node: fx.Node, model: nn.Module, other: nn.Module) -> bool:
    """A tensor that the forward makes is the same in both; a parameter is, on the meta device."""
    if node.op != "get_attr":
        return True
    a, b = (attrgetter(node.target)(m) for m in (model, other))
    return not isinstance(a, torch.Tensor) or a.is_meta or torch.equal(a, b)


def _in_both(a: Any, b: Any, twins: dict[fx.Node, fx.Node], switch: Callable[[float, float], fx.Node]) -> Any:
    """The arguments of a node, from those of both modes. A flag or a fraction that differs is a `switch`: no rule needs
    to know more of it than its value in eval mode. Whole numbers are sizes."""
    if isinstance(a, fx.Node):
        same = twins[a] is b
    elif isinstance(a, (tuple, list)):
        same = isinstance(b, (tuple, list)) and len(a) == len(b)
        a = type(a)(_in_both(x, y, twins, switch) for x, y in zip(a, b)) if same else a
    elif isinstance(a, dict):
        same = isinstance(b, dict) and a.keys() == b.keys()
        a = {key: _in_both(a[key], b[key], twins, switch) for key in a} if same else a
    elif isinstance(a, slice):
        same = isinstance(b, slice)
        ends = ((s.start, s.stop, s.step) for s in (a, b))
        a = slice(*_in_both(*ends, twins, switch)) if same else a
    else:
        same = type(a) is type(b) and (a is b or a == b)
        if not same and {type(a), type(b)} in ({bool}, {float}, {float, int}):
            return switch(a, b)
    if not same:
        raise _Unlike
    return a


def _switch(node: fx.Node, in_eval: float, in_training: float) -> fx.Node:
    """A `by_mode` for an argument of `node`, by the mode of the module that the node was recorded in."""
    path, graph = module_path(node), node.graph
    owner = path.rpartition(".")[0] if node.op == "call_module" else path
    with graph.inserting_before(node):
        training = graph.create_node("get_attr", f"{owner}.training".lstrip("."))
        return graph.call_function(by_mode, (training, in_eval, in_training))


def line_of(frames: Iterable[tuple[FrameType, int]]) -> str:
    """The first line of `frames`, from the inside out, that is the model's code, neither torch's nor ours; if any."""
    for frame, number in frames:
        file = frame.f_code.co_filename
        if not file.startswith((*LIBRARIES, "<")):
            return f"{file}:{number} ({linecache.getline(file, number).strip()})"
    return ""


def line_here() -> str:
    """The line of the model's code that runs now."""
    return line_of(traceback.walk_stack(None))


def raised_at(error: Exception) -> str:
    """Where in the model's code, for messages."""
    line = line_of(reversed(list(traceback.walk_tb(error.__traceback__))))
    return f"{line}; " if line else ""


def where(node: fx.Node) -> str:
    """The module path of a node, and the line of the model's code that recorded it."""
    return " in ".join(filter(None, (module_path(node), node.meta.get("line")))) or node.name
