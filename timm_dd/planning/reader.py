"""The first pass: the rules over the nodes of a graph, which make every channel axis a sum of products of Widths.

`read` gives a `Reading`: the graph's tensors with their axes, the parameters', and the numbers that differ in a
part. The second pass, `relations`, begins once it is settled which Widths are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..algebra.domain import Domain, spatial
from ..algebra.widths import Axis, Width, freeze, make_whole, unify
from ..compat import tree_knows
from ..errors import SplitError, WidthError, reporting
from .graphs import Graph, float_type, module_path, source_line
from .inputs import Like, leaves, zipped
from .rules.laws import COPY, Context, Kind, Relation, pointwise
from .rules.op import RULES, Notes, Op, Param, Value, bind, fits, module_rule
from .shapes import Sizes


class Inexpressible(SplitError):
    """An operation ties channels together in a way that no sum of products expresses."""


@dataclass(frozen=True)
class Reading:
    """What the first pass found.

    Attributes:
        gm, domain, input_size, output: as given to `planner.analyse`.
        notes: what the rules said.
        operations: each node as its rule saw it, with the result: a `Value`, a tuple of them, or no tensor.
        outputs: the network's, with their nodes.
    """

    gm: Graph
    domain: Domain
    input_size: tuple[int, ...]
    output: str
    notes: Notes
    operations: list[tuple[Op, Any]]
    outputs: list[tuple[str, Value]]

    @property
    def divisor(self) -> int:
        return self.notes.divisor

    @property
    def sizes(self) -> Sizes:
        return self.notes.sizes

    @property
    def image_dims(self) -> range:
        """The dims of the input tensor that are its size: pixels, or time."""
        ndim = len(self.input_size) + 1
        return range(ndim - len(spatial(self.input_size)), ndim)

    @property
    def outputs_tiled(self) -> bool:
        """Whether the parts' outputs are put side by side, as their boxes are in the image."""
        outputs = self.outputs if self.output == "boxes" else []
        return any(value.axes[dim] is not None for _, value in outputs for dim in self.image_dims)

    def limits(self) -> list[tuple[Width, int]]:
        """The Widths that will be cut, each with the largest K that it allows."""
        notes = self.notes
        pairs = {a.terms[0][0] for a in notes.pairs if a.resolve().size == sum(w.size for w in a.widths())}
        axes = [a for owner in (*notes.values, *notes.params.values()) for a in owner.axes]
        cut = [w for a in axes if a is not None for w in a.widths() if w.active]
        return [(w, w.size // 2 if w in pairs else w.size) for w in cut]

    def narrowest(self) -> tuple[Width, int]:
        """The Width that allows the fewest parts, and how many."""
        return min(self.limits(), key=lambda limit: limit[1], default=(Width(self.divisor), self.divisor))

    def replicate_narrow(self) -> tuple[tuple[str, int], ...]:
        """Keep Widths that are too narrow for K parts whole in every part; the place and size of each."""
        narrow = dict.fromkeys(width for width, most in self.limits() if most < self.divisor)
        for width in narrow:
            make_whole(Axis.of(width))
        _give_owners(self.notes.params.values())
        return tuple(dict.fromkeys((width.origin, width.size) for width in narrow))


def read(gm: Graph, divisor: int, domain: Domain, input_size: Sequence[int], output: str) -> Reading:
    """Run the rules over a traced `skeleton`; arguments as of `planner.analyse`.

    Raises:
        Inexpressible: the channels cannot be cut into `divisor` parts; fewer may do.
        WidthError: an axis has no normal form, once all is read.
        SplitError: an operation without a rule, a box on which the network does not run.
    """
    reader = _Reader(gm, divisor, domain, input_size, output)
    for node in gm.graph.nodes:
        reader.visit(node)
    reading = reader.reading
    _choose(reading.notes.choices, divisor)
    _give_owners(reading.notes.params.values())
    return reading


class _Reader:
    """Goes through the graph node by node and fills a `Reading`."""

    def __init__(self, gm: Graph, divisor: int, domain: Domain, input_size: Sequence[int], output: str):
        tensors = {
            **dict(gm.named_buffers(remove_duplicate=False)),
            **dict(gm.named_parameters(remove_duplicate=False)),
        }
        first: dict[int, str] = {}
        alias = {name: first.setdefault(id(t), name) for name, t in tensors.items()}
        self.sizes = Sizes(gm, input_size, domain.views(spatial(input_size)))
        self.notes = Notes(divisor, self.sizes, tensors, alias)
        self.reading = Reading(gm, domain, tuple(input_size), output, self.notes, [], [])
        self.env, self.stored = self.notes.env, gm.state_dict().keys()
        self.dtype = float_type(gm)

    def visit(self, node: fx.Node) -> None:
        module = self.reading.gm.get_submodule(node.target) if node.op == "call_module" else None
        op = Op(self.notes, node, module, module_path(node), self.sizes.first(node, self.dtype))
        try:
            with reporting(op.where):
                value = self._value(op)
        except WidthError as e:
            raise Inexpressible(f"{op.where()} cannot be cut into {op.divisor} parts: {e}") from e
        self.sizes.others(node, op.resize, op.where())
        _place(value, self.sizes.at(node))
        self.env[node] = value
        self.reading.operations.append((op, value))

    def _value(self, op: Op) -> Any:
        node = op.node
        if node.op == "placeholder":
            tree = self.reading.gm.inputs.named(self.reading.gm.signature)[node.target]
            return zipped(lambda like, t, _: self._input(op, like, t), tree, op.out)
        if node.op == "get_attr":
            return self._attribute(op)
        if node.op == "output":
            return self._output(node)
        if isinstance(node.target, type) and any(isinstance(self.env[n], Value) for n in node.all_input_nodes):
            return self._made(op, node.target)
        if not any(isinstance(v, torch.Tensor) for v in leaves(op.out)):
            return op.out  # a size, a dtype
        if op.divisor == 1 and not self.sizes.boxed:
            return _uncut(op.out, op)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.env[n])
        of_tensors = any(isinstance(v, Value) for v in leaves((args, tuple(kwargs.values()))))
        if not of_tensors and node.target not in RULES:
            return op.result([None] * op.out.ndim, _same_in_all)  # made from nothing: arange, linspace
        found = module_rule(op.module) if op.module is not None else RULES.get(node.target)
        if (found is None or not fits(found, op, args, kwargs)) and _is_of_no_channels(op, args, kwargs):
            values = leaves((args, tuple(kwargs.values())))
            made = [op.result([None] * t.ndim, pointwise, *values) for t in leaves(op.out)]
            return made[0] if isinstance(op.out, torch.Tensor) else tuple(made)
        if found is None:
            raise SplitError(
                f"{op.where()} has no rule, so nothing is known of its channels; "
                "leave this operation out of the model, or add a rule in timm_dd/planning/rules"
            )
        return bind(found, op, args, kwargs)

    def _input(self, op: Op, like: Any, tensor: Any) -> Any:
        """A tensor of an argument, whose channels, or features if it is no image, every part has."""
        if not isinstance(like, Like):
            return like
        image = self.reading.gm.inputs.is_image(like)
        axes = [None] * tensor.ndim
        if tensor.ndim > 2 or (tensor.ndim == 2 and not image):
            axes[1] = Axis.of(tensor.shape[1])
        value = op.result(axes, _same_in_all)
        if image and self.notes.image is None:
            self.notes.image = value
        return value

    def _made(self, op: Op, kind: type) -> tuple | dict:
        """An object that the model makes of tensors: the entries of a named tuple, or of a class that trees look
        into."""
        if not issubclass(kind, tuple) and not tree_knows(kind):
            raise SplitError(
                f"{self.reading.gm._get_name()} puts tensors into a {kind.__name__}{source_line(op.node)}, of which "
                "nothing is known; expected a tensor, or a tuple, list or dict of tensors"
            )
        args, kwargs = fx.node.map_arg((op.node.args, op.node.kwargs), lambda n: self.env[n])
        return (*args, *kwargs.values()) if issubclass(kind, tuple) else {**(args[0] if args else {}), **kwargs}

    def _attribute(self, op: Op) -> Any:
        """A parameter in the graph: its axes wait for what they will be unified with."""
        if not isinstance(op.out, torch.Tensor):
            return op.out
        name, params = self.notes.alias.get(op.node.target, op.node.target), self.notes.params
        if name not in params:
            params[name] = Param(tuple(Axis.of(Width(n, active=False) if n > 1 else 1) for n in op.out.shape))
        trained, axes, merged = self.notes.is_trained(name), params[name].axes, name in self.stored

        def law(context: Context) -> Relation:
            if any(context.is_cut(a) for a in axes):
                return Relation(
                    Kind.SHARD, blocks=context.cut_dims(axes) if merged and params[name].outside == "zero" else 0
                )
            return Relation(Kind.REPLICATED, frozenset([name])) if trained else COPY

        return op.result(axes, law)

    def _output(self, output: fx.Node) -> None:
        """Every part gives all logits, of features its channels, of an image the positions of its box."""
        for node in output.all_input_nodes:
            values = [v for v in leaves(self.env[node]) if isinstance(v, Value)]
            self.reading.outputs.extend((node.name, v) for v in values)
            if self.reading.output == "features" and isinstance(self.env[node], Value):
                continue
            for v in values:
                if self.reading.output == "boxes":
                    self._reconstruct(v)
                for axis in (a for a in v.axes if a is not None):
                    make_whole(axis)

    def _reconstruct(self, value: Value) -> None:
        """The positions of an output of the input's shape are the input's."""
        image = self.notes.image
        if value.shape != image.shape:
            raise SplitError(
                f"{value.op.where()}: reconstruct expects an output of the input's shape {image.shape[1:]}, "
                f"got {value.shape[1:]}"
            )
        for dim in self.reading.image_dims:
            if value.axes[dim] is not None:
                unify(value.axes[dim], Axis.of(self.sizes.window(image, dim)))
                continue
            for i in self.sizes.of_part:
                if value.at[i].shape[dim] != image.at[i].shape[dim]:
                    raise SplitError(
                        f"{value.op.where()}: of a box of {image.at[i].shape[dim]} pixels comes an output of "
                        f"{value.at[i].shape[dim]}; use boxes whose sizes the strides divide"
                    )


def _is_of_no_channels(op: Op, args: tuple, kwargs: dict) -> bool:
    """Whether a function makes tensors of tensors without channels to cut, so that nothing has to be known of it."""
    values = [v for v in leaves((args, tuple(kwargs.values()))) if isinstance(v, Value)]
    carried = any(a is not None and any(True for _ in a.widths()) for v in values for a in v.axes)
    made = op.out if isinstance(op.out, (tuple, list)) else [op.out]
    return op.module is None and all(isinstance(t, torch.Tensor) for t in made) and not carried


def _same_in_all(context: Context, *inputs: Relation) -> Relation:
    return COPY


def _uncut(out: Any, op: Op) -> Any:
    """K = 1 needs no algebra: the part is the model."""
    if isinstance(out, (tuple, list)):
        return tuple(_uncut(o, op) for o in out)
    return op.result([None] * out.ndim, _same_in_all)


def _place(value: Any, at: list) -> None:
    """Give the Values of a node their tensors at each size."""
    if isinstance(value, Value):
        value.at = value.at or at
    elif isinstance(value, (tuple, list, dict)):
        for i, v in value.items() if isinstance(value, dict) else enumerate(value):
            _place(v, [a[i] if isinstance(a, (tuple, list, dict)) else getattr(a, str(i), a) for a in at])


def _choose(choices: Iterable[Sequence[Axis]], divisor: int) -> None:
    """Of the factors of an axis (a view of channels as several dims) cut one: one that is cut elsewhere, else the
    first with at least K entries, preferably one whose entries no operation mixes."""
    chosen: set[Width] = set()
    for axes in choices:
        free = [a for a in axes if any(w.active for w in a.widths())]
        rank = [
            (
                chosen.isdisjoint(a.widths()),
                -min(divisor, *(w.size for w in a.widths())),
                any(w.reduced_over for w in a.widths()),
            )
            for a in free
        ]
        best = min(range(len(free)), key=rank.__getitem__, default=0)
        chosen.update(*(a.widths() for a in free[best : best + 1]))
        for a in free[:best] + free[best + 1 :]:
            make_whole(a)


def _give_owners(params: Iterable[Param]) -> None:
    """A parameter of which some elements would have several owners (its channels are in part those of the image,
    which every part has) is whole in every part."""
    for param in params:
        frozen = [freeze(a) for a in param.axes if a is not None]
        if any(a.is_cut for a in frozen) and not any(a.is_owned for a in frozen):
            for axis in filter(None, param.axes):
                make_whole(axis)
