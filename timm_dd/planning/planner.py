"""The planner: runs the rules over a traced graph and makes its `Plan`.

Two passes. `Planner.read` goes through the graph node by node: each rule names axes and unifies them, so that at the
end every channel axis is a sum of products of Widths. Then the Widths are cut, and `Planner.plan` evaluates the laws,
which say how the parts' tensors give the merged network's, where that is not exact, and so how merge treats each
parameter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from ..algebra.axes import FrozenAxis
from ..algebra.domain import Domain, spatial
from ..algebra.widths import Axis, Width, freeze, make_whole, unify
from ..errors import SplitError, WidthError
from .graphs import float_type, module_path
from .plan import EditPlan, Layer, OutputPlan, Plan, TensorPlan
from .rules.laws import COPY, UNSCALABLE, Kind, Relation
from .rules.op import RULES, Edit, Op, Param, Value, bind, module_rule
from .shapes import Sizes


def make_plan(
    gm: fx.GraphModule,
    divisor: int,
    domain: Domain,
    input_size: Sequence[int],
    model: str | None = None,
    model_args: dict | None = None,
    *,
    output: str = "logits",
    replicate: bool = False,
) -> Plan:
    """Plan the split of a traced `skeleton`; arguments and errors of `analyse`, and timm's name and arguments."""
    return analyse(gm, divisor, domain, input_size, output=output, replicate=replicate).plan(model, model_args or {})


def analyse(
    gm: fx.GraphModule,
    divisor: int,
    domain: Domain,
    input_size: Sequence[int],
    *,
    output: str = "logits",
    replicate: bool = False,
) -> Planner:
    """All that the rules say of a traced `skeleton`.

    Args:
        gm: from `trace.trace`.
        divisor: of the widths: K, unless the parts are not to be merged.
        input_size: the whole image, (C, *size), or (F,).
        output: ``logits``, whole in every part; ``features``, of which each part gives its own channels; ``boxes``, of
            the input's shape, of which each part gives its box.
        replicate: keep Widths smaller than K whole in every part.

    Raises:
        SplitError: an operation without a rule, a layer narrower than `divisor`, a box on which the network does not
            run.
    """
    planner = Planner(gm, divisor, domain, input_size, output)
    try:
        planner.read()
    except _Inexpressible as e:
        raise SplitError(f"{e}; the largest K that works here is {_largest(planner)}") from e
    if replicate:
        planner.replicate()
    width, most = planner.narrowest()
    if most < divisor:
        fewer = "fewer than" if width.size < divisor else "and needs two in each of"
        raise SplitError(
            f"{width.origin} has {width.size} channels to cut, {fewer} {divisor} parts; narrow='replicate' keeps them "
            f"whole in every part; otherwise the largest K that works here is {_largest(planner)}"
        )
    planner.relate()
    return planner


class _Inexpressible(SplitError):
    """An operation ties channels together in a way that no sum of products expresses."""


def _largest(planner: Planner) -> int:
    """The largest K below the planner's that works. How Widths arise changes with K only at the numbers of groups that
    `Op.grouped` met, so one reading serves all K between two of those."""
    parts, failed = planner.divisor, planner
    while parts > 1:
        planner = Planner(failed.gm, parts, Domain.full(parts), failed.input_size, failed.output)
        below = parts - 1
        try:
            planner.read()
            (_, size), below = planner.narrowest(), max((t for t in planner.thresholds if t < parts), default=1)
            if size > below:
                return min(size, parts)
        except _Inexpressible:
            pass
        parts = below
    return 1


def fresh_scale(fan_in: float, fan_out: float) -> float:
    """Factor on a slice of a fresh weight whose fans are `fan_in` and `fan_out` times smaller in the part.

    A layer whose fans both shrink K times keeps the variance of its outputs and of its gradients with weights of K
    times the variance. The first layer (2.11) and the last (2.14) have one fan of full size and cannot keep both:
    with s times the variance in each, features get s, the gradients of features s, the logits s²/K. s = K^(1/3)
    makes the largest of the three deviations smallest, K^(1/3): below 2 up to K = 7.
    """
    small, large = sorted((fan_in, fan_out))
    return math.sqrt(small ** (2 / 3) * large ** (1 / 3))


class Planner:
    """One reading of the graph: `read` unifies axes node by node, `plan` cuts them and evaluates the laws."""

    def __init__(
        self, gm: fx.GraphModule, divisor: int, domain: Domain, input_size: Sequence[int], output: str = "logits"
    ):
        self.gm, self.divisor, self.domain, self.input_size = gm, divisor, domain, tuple(input_size)
        self.output, self.outputs_tiled = output, False  # whether the parts' outputs are put side by side
        self.sizes = Sizes(gm, input_size, domain.boxes(spatial(input_size)))
        self.tensors = {
            **dict(gm.named_buffers(remove_duplicate=False)),
            **dict(gm.named_parameters(remove_duplicate=False)),
        }
        first: dict[int, str] = {}
        self.alias = {name: first.setdefault(id(t), name) for name, t in self.tensors.items()}  # tied parameters
        self.params: dict[str, Param] = {}
        self.values: list[Value] = []
        self.edits: list[Edit] = []
        self.choices: list[Sequence[Axis]] = []
        self.pairs: list[Axis] = []
        self.thresholds: set[int] = set()
        self.outputs: list[tuple[str, Value]] = []
        self.ops: list[tuple[Op, Any]] = []
        self.summed: set[str] = set()
        self.approximations: dict[tuple[str, str, str], None] = {}  # in the order of the graph
        self.relations: dict[Value, Relation] = {}
        self.doubtful: set[Value] = set()  # approximate, or computed from what is
        self.head: set[str] = set()
        self.current: Value | None = None
        self._frozen: dict[int, tuple[Axis, FrozenAxis]] = {}

    # ---- first pass: axes

    def read(self) -> None:
        dtype = float_type(self.gm)
        env: dict[fx.Node, Any] = {}
        for node in self.gm.graph.nodes:
            module = self.gm.get_submodule(node.target) if node.op == "call_module" else None
            op = Op(self, node, module, module_path(node), self.sizes.first(node, dtype))
            try:
                env[node] = self._value(op, env)
            except WidthError as e:
                raise _Inexpressible(f"{op.where()} cannot be cut into {self.divisor} parts: {e}") from e
            self.sizes.others(node, op.resize, op.where())
            self._place(env[node], self.sizes.at(node))
            self.ops.append((op, env[node]))
        self._choose()
        self._give_owners()

    def _value(self, op: Op, env: dict) -> Any:
        node = op.node
        if node.op == "placeholder":
            whole = [None, Axis.of(op.out.shape[1]), *[None] * (op.out.ndim - 2)] if op.out.ndim > 2 else [None, None]
            return op.result(whole, lambda context: COPY)
        if node.op == "get_attr":
            return self._attribute(op)
        if node.op == "output":
            return self._output(node, env)
        if not _tensors(op.out):
            self._pin(op, env)
            return op.out  # a size, a dtype
        if self.divisor == 1 and not self.sizes.boxed:
            return self._uncut(op.out, op)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
        if not any(isinstance(v, Value) for v in _flat((args, tuple(kwargs.values())))):
            return op.result([None] * op.out.ndim, lambda context: COPY)  # made from nothing: arange, zeros
        found = module_rule(op.module) if op.module is not None else RULES.get(node.target)
        if found is None:
            raise SplitError(
                f"{op.where()} has no rule, so nothing is known of its channels; "
                "leave this operation out of the model, or add a rule in timm_dd/rules"
            )
        return bind(found, op, args, kwargs)

    def _uncut(self, out: Any, op: Op) -> Any:
        """K = 1 needs no algebra: the part is the model."""
        if isinstance(out, (tuple, list)):
            return tuple(self._uncut(o, op) for o in out)
        return op.result([None] * out.ndim, lambda context, *_: COPY)

    def _pin(self, op: Op, env: dict) -> None:
        """A number of channels in the graph stays the global one: what counts channels in a part is an edit, and all
        else (a scale by the square root of the width) is the global network's."""
        node = op.node
        source, dim = None, None
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            shape = node.args[0]
            if shape.target is getattr and shape.args[1] == "shape" or shape.target == "size" and len(shape.args) == 1:
                source, dim = env[shape.args[0]], node.args[1]
        elif node.op == "call_method" and node.target == "size" and len(node.args) == 2:
            source, dim = env[node.args[0]], node.args[1]
        if isinstance(source, Value) and isinstance(dim, int) and source.axes[dim] is not None:
            self.edits.append(Edit(node.name, None, (), lambda k: op.out))

    def _choose(self) -> None:
        """Of the factors of an axis (a view of channels as several dims) cut one: one that is cut elsewhere, else the
        first with at least K entries, preferably one whose entries no operation mixes."""
        chosen: set[Width] = set()
        for axes in self.choices:
            free = [a for a in axes if any(w.active for w in a.widths())]
            rank = [
                (
                    chosen.isdisjoint(a.widths()),
                    -min(self.divisor, *(w.size for w in a.widths())),
                    any(w.reduced_over for w in a.widths()),
                )
                for a in free
            ]
            best = min(range(len(free)), key=rank.__getitem__, default=0)
            chosen.update(*(a.widths() for a in free[best : best + 1]))
            for a in free[:best] + free[best + 1 :]:
                make_whole(a)

    def _give_owners(self) -> None:
        """A parameter of which some elements would have several owners (its channels are in part those of the image,
        which every part has) is whole in every part."""
        for param in self.params.values():
            frozen = [a if a is None else freeze(a) for a in param.axes]
            if any(a is not None and a.is_cut for a in frozen) and not any(
                a is not None and a.is_owned for a in frozen
            ):
                for axis in filter(None, param.axes):
                    make_whole(axis)

    def _attribute(self, op: Op) -> Any:
        """A parameter in the graph: its axes wait for what they will be unified with."""
        if not isinstance(op.out, torch.Tensor):
            return op.out
        name = self.alias.get(op.node.target, op.node.target)
        if name not in self.params:
            self.params[name] = Param(tuple(Axis.of(Width(n, active=False) if n > 1 else 1) for n in op.out.shape))
        trained, axes = isinstance(self.tensors.get(name), torch.nn.Parameter), self.params[name].axes

        def law(context):
            if any(context.is_cut(a) for a in axes):
                return Relation(Kind.SHARD)
            return Relation(Kind.REPLICATED, frozenset([name])) if trained else COPY

        return op.result(axes, law)

    def _output(self, output: fx.Node, env: dict) -> None:
        """Logits are whole, every part gives all of them; of features it gives its own, of boxes those of its box."""
        for node in output.all_input_nodes:
            values = [v for v in _flat(env[node]) if isinstance(v, Value)]
            self.outputs += [(node.name, v) for v in values]
            if self.output == "features" and isinstance(env[node], Value):
                continue
            for v in values:
                if self.output == "boxes":
                    self._reconstruct(v)
                for axis in (a for a in v.axes if a is not None):
                    make_whole(axis)

    def _reconstruct(self, value: Value) -> None:
        """The positions of an output of the input's shape are the input's."""
        image = self.values[0]
        if value.shape != image.shape:
            raise SplitError(
                f"{value.op.where()}: reconstruct expects an output of the input's shape {image.shape[1:]}, "
                f"got {value.shape[1:]}"
            )
        for dim in range(len(image.shape) - len(spatial(self.input_size)), len(image.shape)):
            if value.axes[dim] is not None:
                unify(value.axes[dim], Axis.of(self.sizes.window(image, dim)))
                self.outputs_tiled = True
                continue
            for i in self.sizes.of_part:
                if value.at[i].shape[dim] != image.at[i].shape[dim]:
                    raise SplitError(
                        f"{value.op.where()}: of a box of {image.at[i].shape[dim]} pixels comes an output of "
                        f"{value.at[i].shape[dim]}; use boxes whose sizes the strides divide"
                    )

    def _place(self, value: Any, at: list) -> None:
        if isinstance(value, Value):
            value.at = value.at or at
        elif isinstance(value, (tuple, list)):
            for i, v in enumerate(value):
                self._place(v, [a[i] if isinstance(a, (tuple, list)) else a for a in at])

    def add_param(self, name: str, param: Param) -> None:
        name = self.alias[name]
        known = self.params.get(name)
        if known is None:
            self.params[name] = param
            return
        for a, b in zip(known.axes, param.axes):  # a module that is called twice, or a tied parameter
            if a is not None and b is not None:
                unify(a, b)

    def trained(self, value: Value | None) -> str | None:
        """The name of a parameter that is read from the graph, None for anything computed or fixed."""
        if value is None or value.op.node.op != "get_attr":
            return None
        name = self.alias.get(value.op.node.target)
        return name if isinstance(self.tensors.get(name), torch.nn.Parameter) else None

    def _cut(self) -> list[Width]:
        """The Widths that will be cut."""
        axes = [a for v in self.values for a in v.axes] + [a for p in self.params.values() for a in p.axes]
        return [w for a in axes if a is not None for w in a.widths() if w.active]

    def narrowest(self) -> tuple[Width, int]:
        """The Width that allows the fewest parts, and how many."""
        return min(self._limits(), key=lambda limit: limit[1], default=(Width(self.divisor), self.divisor))

    def replicate(self) -> None:
        """Keep Widths that are too narrow for K parts whole in every part."""
        for width, most in self._limits():
            if most < self.divisor:
                make_whole(Axis.of(width))
        self._give_owners()

    def _limits(self) -> list[tuple[Width, int]]:
        """The Widths that will be cut, each with the largest K that it allows."""
        pairs = {a.terms[0][0] for a in self.pairs if a.resolve().size == sum(w.size for w in a.widths())}
        return [(w, w.size // 2 if w in pairs else w.size) for w in self._cut()]

    # ---- second pass: cuts and laws (this object is the laws' Context)

    def frozen(self, axis: Axis) -> FrozenAxis:
        if id(axis) not in self._frozen:
            self._frozen[id(axis)] = axis, freeze(axis)  # the axis too, so that its id stays its own
        return self._frozen[id(axis)][1]

    def part_size(self, axis: Axis, k: int) -> int:
        return self.frozen(axis).part_size(k, self.divisor)

    def is_cut(self, axis: Axis | None) -> bool:
        return axis is not None and self.divisor > 1 and self.frozen(axis).is_cut

    def partly_sharded(self, axis: Axis) -> bool:
        """Whether some channels of the axis are cut and others are whole in every part."""
        return len({any(not isinstance(a, int) for a in t) for t in self.frozen(axis).terms}) > 1

    def sum(self, param: str) -> None:
        self.summed.add(self.alias[param])

    def approximate(self, reason: str) -> Relation:
        cut = any(self.is_cut(a) for a in self.current.axes)
        self.approximations[self.current.op.node.name, self.current.op.path, reason] = None
        self.doubtful.add(self.current)
        return Relation(Kind.SHARD if cut else Kind.COPY)

    def plan(self, model: str | None, model_args: dict) -> Plan:
        head = {self.alias.get(n, n) for n in self.head} if self.divisor > 1 else set(self.alias.values())
        stored = self.gm.state_dict().keys()
        return Plan(
            model=model,
            model_args=model_args,
            parts=self.domain.parts,
            divisor=self.divisor,
            input_size=self.input_size,
            output=self.output,
            domain=self.domain,
            tensors={name: self._tensor(name, t) for name, t in self.tensors.items() if name in stored},
            constants={name: self._tensor(name, t) for name, t in self.tensors.items() if name not in stored},
            edits=tuple(self._edits()),
            outputs=tuple(dict.fromkeys(self._outputs())),
            head=()
            if UNSCALABLE in head or self.outputs_tiled
            else tuple(n for n in self.tensors if self.alias[n] in head),
            approximations=tuple(self.approximations),
            layers=tuple(self._layers()),
        )

    def relate(self) -> None:
        """Run the laws in the order of the graph; the head's parameters are those of the outputs' sums."""
        if self.divisor == 1:
            return
        for value in self.values:
            self.current = value
            self.relations[value] = value.law(self, *(self.relations[v] for v in value.inputs))
            if not self.doubtful.isdisjoint(value.inputs):
                self.doubtful.add(value)
        for _, value in self.outputs:
            self.current = value
            if self.relations[value].kind is Kind.PARTIAL:
                self.head |= self.relations[value].params
            elif self.relations[value].kind is not Kind.SHARD and not self.approximations:
                self.approximate("every part gives this output whole, so it is not the sum over the parts")

    def _tensor(self, name: str, tensor: torch.Tensor) -> TensorPlan:
        shape = tuple(tensor.shape)
        name = self.alias[name]
        param = self.params.get(name, Param((None,) * len(shape)))
        axes = tuple(None if a is None else self.frozen(a) for a in param.axes)
        axes = tuple(None if a is None or a.is_whole else a for a in axes)
        cut = self.divisor == 1 or any(a is not None and a.is_owned for a in axes)
        scale: tuple[float, ...] = ()
        if param.fans:
            ratios = [[self._ratio(fan, k) for k in range(self.domain.parts)] for fan in param.fans]
            scale = tuple(fresh_scale(i, o) for i, o in zip(*ratios))
        reduce = "sum" if name in self.summed else "place" if cut else "mean"
        trained = isinstance(tensor, torch.nn.Parameter)
        return TensorPlan(shape, axes, reduce, trained, () if set(scale) == {1.0} else scale, param.outside)

    def _ratio(self, fan: Sequence[Axis], k: int) -> float:
        return math.prod(a.size / self.part_size(a, k) for a in fan)

    def _edits(self):
        for e in self.edits:
            value = (lambda k, a=e.value: self.part_size(a, k)) if isinstance(e.value, Axis) else e.value
            yield EditPlan(e.node, e.module, e.where, tuple(value(k) for k in range(self.domain.parts)))

    def _outputs(self):
        for node, value in self.outputs:
            for dim, axis in enumerate(value.axes):
                if self.is_cut(axis):
                    yield OutputPlan(node, dim, self.frozen(axis))

    def rows(self) -> Iterator[tuple[Op, Value, tuple[str, ...]]]:
        """The operations with parameters, or with reasons why they are approximate; of several results the first."""
        reasons: dict[str, list[str]] = {}
        for node, _, reason in self.approximations:
            reasons.setdefault(node, []).append(reason)
        paths = (name.split(".") for name in self.params)
        owners = {".".join(path[:i]) for path in paths for i in range(1, len(path))}
        for op, value in self.ops:
            own, why = op.module is not None and op.node.target in owners, tuple(reasons.get(op.node.name, ()))
            value = next((v for v in _flat(value) if isinstance(v, Value)), None)
            if value is not None and (own or why):
                yield op, value, why

    def _layers(self) -> Iterator[Layer]:
        for op, value, why in self.rows():
            shapes = tuple(self._part_shape(value, k)[1:] for k in range(self.domain.parts))
            yield Layer(op.path, op.name, value.shape[1:], shapes, why)

    def _part_shape(self, value: Value, k: int) -> tuple[int, ...]:
        at = value.at[self.sizes.of_part[k]].shape
        return tuple(n if a is None else self.part_size(a, k) for n, a in zip(at, value.axes))


def _flat(value: Any) -> list:
    if isinstance(value, (tuple, list)):
        return [leaf for v in value for leaf in _flat(v)]
    if isinstance(value, dict):
        return _flat(list(value.values()))
    return [value]


def _tensors(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in _flat(value))
