"""The rules: all that is known of an operation stands in its one rule.

A rule is a function with the signature of the operation it describes, after an `Op`::

    @rule(nn.BatchNorm2d)
    def batch_norm(op, x):
        axis = x.axes[1]
        op.param("weight", axis)
        op.set("num_features", axis)
        return op.result(x.axes, per_channel(axis, "weight"), x)

It names the axes of the operation's parameters and results (`algebra.widths`), says which attributes and constants of
the global network become smaller in a part (`Op.set`, `Op.arg`), and which law relates the parts' results to the
global one (`laws`). Modules are looked up by type, functions by identity, methods by name. An operation without
a rule is a SplitError that names it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ...algebra.axes import Window
from ...algebra.widths import Axis, Width, freeze, make_whole, unify
from ...errors import SplitError
from ..graphs import given
from ..modes import TrainingOnly, is_training_only
from ..shapes import Sizes
from .laws import Law, linear, normed

RULES: dict[Any, Callable] = {}
NORMS_OF_ROWS = ".original0"
CHANGE_NOTHING = ("_check", "check", "flatten_parameters")  # methods of torch's modules, often replaced


def rule(*targets):
    """Register a rule for module types, functions, and methods by name."""

    def register(fn):
        for target in targets:
            assert target not in RULES, target
            RULES[target] = fn
        return fn

    return register


def module_rule(module: nn.Module) -> Callable | None:
    """The rule for a module's type, or for the nearest base, if neither the type nor the module itself has replaced its
    forward or what that calls."""
    if is_training_only(module):
        return RULES[TrainingOnly]
    for base in type(module).__mro__:
        if base in RULES:
            replaced = (m in vars(module) or getattr(type(module), m) is not getattr(base, m) for m in _methods(base))
            return None if any(replaced) else RULES[base]
    return None


@functools.cache
def _methods(kind: type[nn.Module]) -> frozenset[str]:
    """The names of forward, of the methods that it calls, and of those that these call."""
    found, left = set[str](), ["forward"]
    while left:
        name = left.pop()
        method = None if name in found or name.startswith(CHANGE_NOTHING) else getattr(kind, name, None)
        if isinstance(method, FunctionType) and method is not getattr(nn.Module, name, None):
            found.add(name)
            left.extend(method.__code__.co_names)
    return frozenset(found)


def has_rule(target: Any) -> bool:
    """Whether a module or a function has one."""
    return module_rule(target) is not None if isinstance(target, nn.Module) else target in RULES


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

    @property
    def numel(self) -> int:
        return self.at[0].numel()


@dataclass(frozen=True)
class Param:
    """A parameter's or buffer's axes; `fans` are the axes of its (fan-in, fan-out) if it is a weight; `outside` is what
    the global one has outside all blocks: ``zero``, or along its first axis the ``mean`` of the block."""

    axes: tuple[Axis | None, ...]
    fans: tuple[Sequence[Axis], Sequence[Axis]] | None = None
    outside: str = "zero"


@dataclass(frozen=True)
class Edit:
    """A number of the global network that differs in part k: there it is an axis' size, or any function of k."""

    node: str
    module: str | None
    where: tuple
    value: Axis | Callable[[int], Any]


@dataclass
class Notes:
    """What the rules say of a graph; each writes here through its `Op`.

    Attributes:
        divisor: of the widths.
        sizes: the shapes of the nodes visited so far.
        tensors: the model's parameters and buffers.
        alias: of each name in `tensors` the first name of the same tensor (tied parameters).
        env: what the rules gave for the nodes visited so far: a `Value`, a tuple of them, or no tensor.
        values: the operations' results, in the order of the graph.
        image: the first of them that a part sees its view of.
        params: the axes of parameters and buffers, by first name.
        edits: the numbers that differ in a part.
        choices: each the factors of one axis, of which one is to be cut.
        pairs: axes of which every part needs two channels.
        thresholds: divisors at which a rule begins to choose otherwise.
    """

    divisor: int
    sizes: Sizes
    tensors: dict[str, torch.Tensor]
    alias: dict[str, str]
    env: dict[fx.Node, Any] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    image: Value | None = None
    params: dict[str, Param] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    choices: list[Sequence[Axis]] = field(default_factory=list)
    pairs: list[Axis] = field(default_factory=list)
    thresholds: set[int] = field(default_factory=set)

    def is_trained(self, name: str | None) -> bool:
        return isinstance(self.tensors.get(name or ""), nn.Parameter)

    def add(self, name: str, axes: Sequence[Axis | None], fans=None, outside: str = "zero") -> None:
        """The axes of a parameter or buffer; those of a module that is called twice, or of tied ones, are one."""
        first = self.alias[name]
        if first not in self.params:
            self.params[first] = Param(tuple(axes), fans, outside)
            return
        for a, b in zip(self.params[first].axes, axes):
            if a is not None and b is not None:
                unify(a, b)


class Op:
    """One node of the graph as a rule sees it.

    Attributes:
        node, module, path: the node, its module if it calls one, and the path of that or of the module around.
        out: the result at the global size, on the meta device.
        given_for: what the rules gave for earlier nodes.
        resize: set by a rule, stands in for an operation that cannot run at a part's sizes with the global parameters.
        takes_sizes: set by a rule, if all numbers that it is given are sizes.
    """

    def __init__(self, notes: Notes, node: fx.Node, module: nn.Module | None, path: str, out: Any):
        self._notes, self.node, self.module, self.path, self.out = notes, node, module, path, out
        self.given_for = notes.env
        self.resize: Callable | None = None
        self.takes_sizes = False
        self._rows: list[Sequence[Axis | None]] = []  # the axes of weights whose rows are normalised

    @property
    def divisor(self) -> int:
        """Of the widths: K, unless the parts are not to be merged."""
        return self._notes.divisor

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
        """`widths.unify`, where a dim may carry no channels; channels that meet such a dim stay whole."""
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
        inner, terms = axis.size // groups, len(axis.resolve().terms)
        if terms == 1:
            outer, channels = self.channels(groups), self.channels(inner)
            unify(axis, outer.times(*channels.terms[0]))
            self.cut_one_of([outer, channels])
            return outer.resolve(), channels.resolve()
        # A concatenation may be joined inside a group, so which of the two is cut is chosen here.
        self.threshold(groups // terms, inner)
        if groups >= self.divisor * terms or inner == 1:
            outer = self.channels(groups)
            unify(axis, outer.times(inner))
            return outer.resolve(), Axis.of(inner)
        channels = self.channels(inner)
        unify(axis, Axis.of(groups, *channels.terms[0]))
        return Axis.of(groups), channels.resolve()

    def cut_one_of(self, axes: Sequence[Axis]) -> None:
        """`axes` are the factors of one: once all is read, only one of them is cut."""
        self._notes.choices.append(axes)
        self.threshold(*(a.size for a in axes))

    def threshold(self, *divisors: int) -> None:
        """Above these divisors the rule names other Widths than below."""
        self._notes.thresholds.update(divisors)

    def needs_two(self, axis: Axis) -> None:
        """The operation works in a part only on two channels or more of `axis`."""
        self._notes.pairs.append(axis)

    def activate(self, axis: Axis) -> None:
        """What a parameter of the graph gives along `axis` are channels, to be cut."""
        for w in axis.widths():
            w.active, w.origin = True, w.origin or self.where()

    def reduces_over(self, *axes: Axis | None) -> None:
        """The operation reads all entries of these axes together."""
        for w in (w for a in axes if a is not None for w in a.widths()):
            w.reduced_over = True

    def window(self, x: Value, dim: int) -> int | Window:
        """The positions of `x` along a dim without channels, and those that each part sees."""
        return self._notes.sizes.window(x, dim)

    def extent(self, x: Value, dim: int) -> Callable[[int], int]:
        """The size in part k of a dim without channels."""
        return self._notes.sizes.extent(x, dim)

    def part_size(self, axis: Axis, k: int) -> int:
        """The size of `axis` in part k; known once all is read."""
        return freeze(axis).part_size(k, self.divisor)

    # ---- parameters

    def param(self, name: str, *axes: Axis | None, fans=None, outside: str = "zero") -> None:
        """The axes of the module's parameter or buffer `name`, None for a dim without channels."""
        (full,) = self.names(name)
        if full is None:
            return
        if full not in self._notes.alias:
            raise self.refuse(f"its {name} is neither a parameter nor a buffer; make one of it")
        if not full.endswith(NORMS_OF_ROWS):
            return self._notes.add(full, axes, fans, outside)
        if outside != "zero":
            raise self.refuse(f"standardises a {name} that weight_norm scales; use one of them")
        self._notes.add(full, (axes[0], *(None for _ in axes[1:])))
        self._notes.add(f"{full[:-1]}1", axes)
        self._rows.append(axes)

    def trained(self, value: Value | None) -> str | None:
        """The name of a parameter that the graph reads, however arranged; None for anything computed or fixed."""
        value = _as_given(value)
        if value is None or value.op.node.op != "get_attr":
            return None
        name = self._notes.alias.get(value.op.node.target)
        return name if self._notes.is_trained(name) else None

    def names(self, *params: str) -> tuple[str | None, ...]:
        """The state dict keys of the module's parameters, None for one that it lacks."""
        keys = (_key(self.module, p) for p in params)
        return tuple(None if key is None else f"{self.path}.{key}" for key in keys)

    # ---- numbers that differ in a part

    def set(self, attr: str, value: Axis | Callable[[int], Any]) -> None:
        """The module's attribute `attr` (dotted for a submodule's) is `value` in a part."""
        self._notes.edits.append(Edit(self.node.name, self.path, tuple(attr.split(".")), value))

    def arg(self, *where: str | int, value: Axis | Callable[[int], Any]) -> None:
        """The node's argument at `where`, as in ("args", 1) or ("kwargs", "size"), is `value` in a part; without
        `where` the node itself is."""
        self._notes.edits.append(Edit(self.node.name, None, where, value))

    def scale_input(self, value: Callable[[int], float]) -> None:
        """The operation's first argument is multiplied by `value` in a part."""
        self.arg("args", 0, "*", value=value)

    def argument(self, position: int, keyword: str) -> tuple:
        """Where a call's argument stands: by position or by keyword."""
        return ("kwargs", keyword) if keyword in self.node.kwargs else ("args", position)

    def given(self, where: Sequence[str | int]) -> Any:
        """The argument at `where` as the graph has it: a number, or the node that computes it."""
        return given(self.node, where)

    def example(self, node: fx.Node) -> Any:
        """What an earlier node gives at the global size, on the meta device."""
        return self._notes.sizes.envs[0][node]

    def listed(self, given: Sequence, position: int = 1, keyword: str = "") -> list[tuple[Any, tuple | None]]:
        """Sizes or dims (see `unpacked`), each with its place in the call; the place is None where they are another
        tensor's shape, which in a part is already the part's."""
        numbers = unpacked(given)
        if numbers is given:
            return [(n, ("args", position + i)) for i, n in enumerate(numbers)]
        where = self.argument(position, keyword)
        computed = isinstance(self.given(where), fx.Node)
        return [(n, None if computed else (*where, i)) for i, n in enumerate(numbers)]

    # ---- results

    def call(self, name: str, *args) -> Value:
        """What the rule of the submodule `name` says, as a step of this operation."""
        module = self.module.get_submodule(name)
        op = Op(self._notes, self.node, module, f"{self.path}.{name}", self.out)
        found = module_rule(module)
        if found is None:
            raise op.refuse("has no rule")
        return bind(found, op, args, {})

    def result(self, axes: Sequence[Axis | None], law: Law, *inputs: Any) -> Value:
        """The operation's tensor; what is not a `Value` among `inputs` is a constant and has no say."""
        for rows, *columns in self._rows:
            law = normed(rows, columns, law)
        value = Value(tuple(axes), law, tuple(v for v in inputs if isinstance(v, Value)), self)
        self._notes.values.append(value)
        return value

    def where(self) -> str:
        """The operation, its module path and its node, for messages."""
        return (
            f"{self.name} {self.path} (node {self.node.name})" if self.path else f"{self.name} (node {self.node.name})"
        )

    def refuse(self, message: str) -> SplitError:
        return SplitError(f"{self.where()}: {message}")


def _key(module: nn.Module, param: str) -> str | None:
    """The key of a module's parameter, None if it lacks it. Of a weight under weight_norm, whose rows (original1) are
    scaled to the norms in original0, it is that of these."""
    owner, _, leaf = param.rpartition(".")
    of = module.get_submodule(owner)
    if getattr(of, leaf, None) is None:
        return None
    return f"{owner}.parametrizations.{leaf}{NORMS_OF_ROWS}".lstrip(".") if is_parametrized(of, leaf) else param


def _as_given(value: Value | None) -> Value | None:
    """A tensor before its dims were arranged otherwise."""
    while value is not None and value.law is linear and len(value.inputs) == 1:
        if value.numel != value.inputs[0].numel:
            break
        (value,) = value.inputs
    return value


def shaped_as(op: Op, where: Sequence[str | int]) -> Value | None:
    """The tensor whose whole shape an operation's argument at `where` is: ``x.shape`` or ``x.size()``."""
    given = op.given(where)
    if isinstance(given, fx.Node) and (given.target, *given.args[1:]) in ((getattr, "shape"), ("size",)):
        tensor = op.given_for[given.args[0]]
        return tensor if isinstance(tensor, Value) else None
    return None


def tried(op: Op, other: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What an operation gives in eval mode for `other` tensors, made of those on the meta device that it gets."""

    def value(node: fx.Node) -> Any:
        found = op.example(node)
        return other(found) if isinstance(found, torch.Tensor) else found

    args, kwargs = fx.node.map_arg((op.node.args, op.node.kwargs), value)
    call = op.module if op.module is not None else op.node.target
    if op.node.op == "call_method":
        call = getattr(torch.Tensor, call)
    with torch.no_grad():
        return call(*args, **kwargs)


def unpacked(given: Sequence) -> Sequence:
    """Sizes or dims that a call takes one by one, ``x.permute(0, 2, 1)``, or as one tuple, ``x.permute((0, 2, 1))``."""
    return given[0] if given and isinstance(given[0], (tuple, list)) else given


def fits(fn: Callable, op: Op, args: tuple, kwargs: dict) -> bool:
    """Whether a rule knows the form in which the operation is called."""
    try:
        inspect.signature(fn).bind(op, *args, **_given(kwargs))
    except TypeError:
        return False
    return True


def _given(kwargs: dict) -> dict:
    """Without ``out=None``, which torch's own functions hand on."""
    return {name: value for name, value in kwargs.items() if name != "out" or value is not None}


def bind(fn: Callable, op: Op, args: tuple, kwargs: dict) -> Any:
    """Call a rule with the operation's arguments."""
    kwargs = _given(kwargs)
    try:
        inspect.signature(fn).bind(op, *args, **kwargs)
    except TypeError as e:
        raise op.refuse(f"called in a form that its rule does not know ({e})") from e
    return fn(op, *args, **kwargs)
