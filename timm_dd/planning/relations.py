"""The second pass: the Widths are cut, and the laws say how the parts' tensors relate to the global network's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..algebra.axes import FrozenAxis
from ..algebra.widths import Axis, freeze
from ..errors import reporting
from .reader import Reading
from .rules.laws import COPY, Kind, Relation
from .rules.op import Value


class Cuts:
    """The axes of a graph, cut into `divisor` runs; looked up by identity, as an `Axis` is not hashable."""

    def __init__(self, divisor: int):
        self.divisor = divisor
        self._frozen: dict[int, tuple[Axis, FrozenAxis]] = {}

    def frozen(self, axis: Axis) -> FrozenAxis:
        if id(axis) not in self._frozen:
            self._frozen[id(axis)] = axis, freeze(axis)  # with the axis, so that no other can get its id
        return self._frozen[id(axis)][1]

    def part_size(self, axis: Axis, k: int) -> int:
        return self.frozen(axis).part_size(k, self.divisor)

    def part_shape(self, axes: Sequence[Axis | None], shape: Sequence[int], k: int) -> tuple[int, ...]:
        """A tensor's in part k, whose global network has `shape` at the part's view."""
        return tuple(n if a is None or self.frozen(a).is_whole else self.part_size(a, k) for n, a in zip(shape, axes))

    def is_cut(self, axis: Axis | None) -> bool:
        """Whether the parts have different channels of the axis."""
        return axis is not None and self.divisor > 1 and self.frozen(axis).is_cut

    def cut_dims(self, axes: Sequence[Axis | None]) -> int:
        """Along how many dims the parts have different channels; a product of two is two."""
        terms = (self.frozen(a).terms for a in axes if self.is_cut(a))
        return sum(max(sum(not isinstance(atom, int) for atom in t) for t in of_axis) for of_axis in terms)

    def partly_sharded(self, axis: Axis) -> bool:
        """Whether some channels of the axis are cut and others are whole in every part."""
        return len({any(not isinstance(a, int) for a in t) for t in self.frozen(axis).terms}) > 1


@dataclass(frozen=True)
class Relations:
    """What the second pass found.

    Attributes:
        cuts: the axes as they are cut.
        of_value: each tensor's relation; empty if the widths are not cut.
        doubtful: tensors that are approximate, or computed from such.
        summed: the parameters that merge adds.
        head: the parameters whose scaling scales the outputs, as `laws.Relation.params`.
        approximations: (node, module path, reason) as the keys of a dict, in the order of the graph.
    """

    cuts: Cuts
    of_value: dict[Value, Relation] = field(default_factory=dict)
    doubtful: set[Value] = field(default_factory=set)
    summed: set[str] = field(default_factory=set)
    head: set[str] = field(default_factory=set)
    approximations: dict[tuple[str, str, str], None] = field(default_factory=dict)

    def kind(self, value: Value) -> Kind:
        return self.of_value.get(value, COPY).kind


@dataclass(frozen=True)
class ValueContext:
    """The `laws.Context` of one tensor."""

    found: Relations
    value: Value

    def is_cut(self, axis: Axis | None) -> bool:
        return self.found.cuts.is_cut(axis)

    def cut_dims(self, axes: Sequence[Axis | None] | None = None) -> int:
        return self.found.cuts.cut_dims(self.value.axes if axes is None else axes)

    def partly_sharded(self, axis: Axis) -> bool:
        return self.found.cuts.partly_sharded(axis)

    def sum(self, param: str) -> None:
        self.found.summed.add(param)

    def approximate(self, reason: str) -> Relation:
        op = self.value.op
        self.found.approximations[op.node.name, op.path, reason] = None
        self.found.doubtful.add(self.value)
        return Relation(Kind.SHARD if any(map(self.is_cut, self.value.axes)) else Kind.COPY)


def relate(reading: Reading) -> Relations:
    """Run the laws in the order of the graph; the head's parameters are those of the outputs' sums."""
    found, first = Relations(Cuts(reading.divisor)), reading.notes.alias
    if reading.divisor == 1:
        return replace(found, head=set(first.values()))
    for value in reading.notes.values:
        inputs = (found.of_value[v] for v in value.inputs)
        with reporting(value.op.where):
            found.of_value[value] = value.law(ValueContext(found, value), *inputs)
        if not found.doubtful.isdisjoint(value.inputs):
            found.doubtful.add(value)
    for _, value in reading.outputs:
        relation = found.of_value[value]
        if relation.kind is Kind.PARTIAL:
            found.head.update(relation.params)
        elif relation.kind is not Kind.SHARD and not found.approximations:
            reason = "every part gives this output whole, so it is not the sum over the parts"
            ValueContext(found, value).approximate(reason)
    return replace(
        found,
        summed={first[name] for name in found.summed},
        head={first.get(name, name) for name in found.head},  # among them may be `UNSCALABLE`
    )
