"""What a model does only while it trains, which its graph in eval mode lacks: a part does the same, or it is refused.

A module that only adds noise in training stays a module, `is_training_only`; of what else differs between the graphs
of both modes, see `training`. What is computed under ``torch.no_grad()`` is `detached`.
"""

from __future__ import annotations

import linecache
import operator
import os
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from ..compat import tree_map_only
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
