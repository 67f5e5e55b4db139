"""The rules: all that is known of an operation stands in its one rule.

A rule is a function with the signature of the operation it describes, after an `Op`::

    @rule(nn.BatchNorm2d)
    def batch_norm(op, x):
        axis = x.axes[1]
        op.param("weight", axis)
        op.set("num_features", axis)
        return op.result(x.axes, per_channel(axis, "weight"), x)

It names the axes of the operation's parameters and results (`widths`), says which attributes and constants of the
global network become smaller in a part (`Op.set`, `Op.arg`), and which law relates the parts' results to the
global one (`laws`). Modules are looked up by type, functions by identity, methods by name. An operation without
a rule is a SplitError that names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ...algebra.axes import Window
from ...algebra.widths import Axis, Width, make_whole, unify
from ...errors import SplitError
from .laws import Law

RULES: dict[Any, Callable] = {}


def rule(*targets):
    """Register a rule for module types, functions, and methods by name."""

    def register(fn):
        for target in targets:
            assert target not in RULES, target
            RULES[target] = fn
        return fn

    return register


def module_rule(module: nn.Module) -> Callable | None:
    """The rule for a module's type, or for the nearest base whose forward it has not replaced."""
    for base in type(module).__mro__:
        if base in RULES:
            return RULES[base] if base is type(module) or type(module).forward is base.forward else None
    return None


def has_rule(module: nn.Module) -> bool:
    return module_rule(module) is not None


@dataclass(eq=False)
class Value:
    """A tensor of the graph.

    Attributes:
        axes: one for each dim; None where a dim carries no channels (batch, positions).
        law, inputs, op: how the parts' tensors relate to it.
        at: its meta tensor at each size of `Sizes`, the global size first.
    """

    axes: tuple[Axis | None, ...]
    law: Law
    inputs: tuple[Value, ...]
    op: Op
    at: list[torch.Tensor] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.at[0].shape)


@dataclass(frozen=True)
class Param:
    """A parameter's or buffer's axes; `fans` are the axes of its (fan-in, fan-out) if it is a weight; `outside` is what
    the global one has outside all blocks: ``zero``, or along its first axis the ``mean`` of the block."""

    axes: tuple[Axis | None, ...]
    fans: tuple[Sequence[Axis], Sequence[Axis]] | None = None
    outside: str = "zero"


@dataclass(frozen=True)
class Edit:
    """A number of the global network that is another one in part k: an axis' size, or any function of k."""

    node: str
    module: str | None
    where: tuple
    value: Axis | Callable[[int], Any]


class Op:
    """One node of the graph as a rule sees it."""

    def __init__(self, planner, node: fx.Node, module: nn.Module | None, path: str, out: Any):
        self.planner, self.node, self.module, self.path, self.out = planner, node, module, path, out
        self.divisor: int = planner.divisor
        self.resize: Callable | None = None

    @property
    def name(self) -> str:
        """What the operation is called: Conv2d, add, flatten."""
        if self.module is not None:
            return type(self.module).__name__
        return getattr(self.node.target, "__name__", str(self.node.target))

    # ---- axes

    def channels(self, size: int) -> Axis:
        """A new axis of `size` channels; a single channel (a spatial attention map) stays whole."""
        return Axis.of(Width(size, self.where()) if size > 1 else 1)

    def unify(self, a: Axis | None, b: Axis | None) -> Axis | None:
        if a is None or b is None:
            axis = b if a is None else a
            if axis is not None:
                make_whole(axis)
            return axis
        return unify(a, b)

    def axis(self, x: Value, dim: int) -> Axis:
        """The axis of a dim that the operation reads as channels, whatever it carries."""
        return x.axes[dim] if x.axes[dim] is not None else Axis.of(self.window(x, dim))

    def grouped(self, groups: int, axis: Axis) -> tuple[Axis, Axis]:
        """`axis` as groups · channels: the axes of the groups and of the channels in one, either of which is cut."""
        inner, pieces = axis.size // groups, len(axis.resolve().terms)
        if pieces == 1:
            outer, channels = self.channels(groups), self.channels(inner)
            unify(axis, outer.times(*channels.terms[0]))
            self.cut_one_of([outer, channels])
            return outer.resolve(), channels.resolve()
        # Pieces of a concatenation may end inside a group, so which of them is cut is chosen here.
        self.planner.thresholds.update((groups // pieces, inner))
        if groups >= self.divisor * pieces or inner == 1:
            outer = self.channels(groups)
            unify(axis, outer.times(inner))
            return outer.resolve(), Axis.of(inner)
        channels = self.channels(inner)
        unify(axis, Axis.of(groups, *channels.terms[0]))
        return Axis.of(groups), channels.resolve()

    def cut_one_of(self, axes: Sequence[Axis]) -> None:
        """`axes` are the factors of one: once all is read, only one of them is cut."""
        self.planner.choices.append(axes)
        self.planner.thresholds.update(a.size for a in axes)

    def needs_two(self, axis: Axis) -> None:
        """The operation works in a part only on two channels or more of `axis`."""
        self.planner.pairs.append(axis)

    def reduces_over(self, *axes: Axis | None) -> None:
        """The operation reads all entries of these axes together."""
        for w in (w for a in axes if a is not None for w in a.widths()):
            w.reduced_over = True

    def window(self, x: Value, dim: int) -> int | Window:
        """The positions of `x` along a dim without channels, and those that each part sees."""
        return self.planner.sizes.window(x, dim)

    # ---- what becomes smaller in a part

    def param(self, name: str, *axes: Axis | None, fans=None, outside: str = "zero") -> None:
        """The axes of the module's parameter or buffer `name`, None for a dim without channels."""
        if self.names(name)[0]:
            self.planner.add_param(self.names(name)[0], Param(axes, fans, outside))

    def names(self, *params: str) -> tuple[str | None, ...]:
        """The state dict keys of the module's parameters, None for one that it lacks."""
        return tuple(f"{self.path}.{p}" if self._has(p) else None for p in params)

    def _has(self, param: str) -> bool:
        owner, _, leaf = param.rpartition(".")
        return getattr(self.module.get_submodule(owner), leaf, None) is not None

    def set(self, attr: str, value) -> None:
        """The module's attribute `attr` (dotted for a submodule's) is `value` in a part."""
        self.planner.edits.append(Edit(self.node.name, self.path, tuple(attr.split(".")), value))

    def arg(self, *where, value) -> None:
        """The node's argument at `where`, as in ("args", 1) or ("kwargs", "size"), is `value` in a part."""
        self.planner.edits.append(Edit(self.node.name, None, where, value))

    def scale_input(self, value: Callable[[int], float]) -> None:
        """The operation's first argument is multiplied by `value` in a part."""
        self.planner.edits.append(Edit(self.node.name, None, ("args", 0, "*"), value))

    def call(self, name: str, *args) -> Value:
        """What the rule of the submodule `name` says, as a step of this operation."""
        module = self.module.get_submodule(name)
        op = Op(self.planner, self.node, module, f"{self.path}.{name}", self.out)
        found = module_rule(module)
        if found is None:
            raise op.refuse("has no rule")
        return bind(found, op, args, {})

    def argument(self, position: int, keyword: str) -> tuple:
        """Where a call's argument stands: by position or by keyword."""
        return ("kwargs", keyword) if keyword in self.node.kwargs else ("args", position)

    # ---- results

    def result(self, axes: Sequence[Axis | None], law: Law, *inputs) -> Value:
        """The operation's tensor; what is not a `Value` among `inputs` is a constant and has no say."""
        value = Value(tuple(axes), law, tuple(v for v in inputs if isinstance(v, Value)), self)
        self.planner.values.append(value)
        return value

    def where(self) -> str:
        """The operation, its module path and its node, for messages."""
        return (
            f"{self.name} {self.path} (node {self.node.name})" if self.path else f"{self.name} (node {self.node.name})"
        )

    def refuse(self, message: str) -> SplitError:
        return SplitError(f"{self.where()}: {message}")


def bind(fn: Callable, op: Op, args: tuple, kwargs: dict) -> Any:
    """Call a rule with the operation's own arguments."""
    try:
        inspect.signature(fn).bind(op, *args, **kwargs)
    except TypeError as e:
        raise op.refuse(f"called in a form that its rule does not know ({e})") from e
    return fn(op, *args, **kwargs)
