"""The numbers of a graph that depend on a cut axis: sizes read from shapes, in whatever spelling, and what is computed
from them.

Which do is found by evaluating them at the parts' sizes. A single number keeps in the parts the global network's value,
as a constant; where a rule knows that it counts the part's channels, the rule's own edit stands in its place. What is
more than one number (a shape), or depends on the batch as well, can only be what the part makes of it: that is right
where it says the size of a tensor, and refused where it is used as a value.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from ..algebra.widths import Axis
from ..compat import tree_map_only
from ..errors import SplitError
from .graphs import ancestors, argument, evaluate_node, float_type, source_line
from .inputs import leaves
from .plan import SHARE
from .reader import Reading
from .relations import Cuts
from .rules.op import Edit, Op, Value


def settle(reading: Reading, cuts: Cuts) -> None:
    """Add the edits that keep numbers as they are in the global network.

    Raises:
        SplitError: a number that cannot be kept is used as a value.
    """
    counts = [(op, out) for op, out in reading.operations if _counts(op, out)]
    if reading.divisor == 1 or not counts:
        return
    batch, kept = _Batch(reading), dict[fx.Node, dict[int, Any]]()
    parts = [_Part(reading, cuts, batch, k) for k in range(reading.domain.parts)]
    for part in parts:
        for node, value in part.kept().items():
            kept.setdefault(node, {})[part.k] = value
    reading.notes.edits[:] = [*_sizes(reading, cuts, batch, parts)]
    for node, values in kept.items():
        at_box = [env[node] for env in reading.sizes.envs]
        every = [values.get(k, at_box[i]) for k, i in enumerate(reading.sizes.of_part)]
        # First, so that what rules say of its uses comes after.
        reading.notes.edits.insert(0, Edit(node.name, None, (), every.__getitem__))


def _sizes(reading: Reading, cuts: Cuts, batch: _Batch, parts: Sequence[_Part]) -> Iterator[Edit]:
    """The edits, of which those of computed sizes are looked at once more. Where the part computes what the rule says,
    no constant takes its place: it may depend on the batch, or on the image. What depends on the batch and is the whole
    network's becomes a share of that.

    Raises:
        SplitError: a size of another kind that depends on the batch and is cut.
    """
    ops = {op.node.name: op for op, _ in reading.operations}
    for edit in reading.notes.edits:
        given = _computed(ops[edit.node], edit)
        if given is None:
            yield edit
            continue
        wanted, found = [cuts.part_size(edit.value, p.k) for p in parts], [p.of_part[given] for p in parts]
        if cuts.frozen(edit.value).is_whole or wanted == found:
            continue
        if not batch.changes(given):
            yield edit
        elif batch.doubles(given) and all(p.of_part[given] == p.of_global[given] for p in parts):
            shares = [[*Fraction(n, edit.value.size).as_integer_ratio()] for n in wanted]
            yield Edit(edit.node, None, (*edit.where, SHARE), shares.__getitem__)
        else:
            raise _refusal(ops[edit.node], given)


def _computed(op: Op, edit: Edit) -> fx.Node | None:
    """The node that computes the size in whose place an edit puts an axis' size."""
    if edit.module is not None or not edit.where or "*" in edit.where or not isinstance(edit.value, Axis):
        return None
    given = op.given(edit.where)
    return given if isinstance(given, fx.Node) else None


def _counts(op: Op, out: Any) -> bool:
    return op.node.op.startswith("call") and not any(isinstance(v, Value) for v in leaves(out))


class _Part:
    """Evaluates the numbers of the graph at the sizes of part k."""

    def __init__(self, reading: Reading, cuts: Cuts, batch: _Batch, k: int):
        self.reading, self.cuts, self.batch, self.k = reading, cuts, batch, k
        self.of_global = reading.sizes.envs[reading.sizes.of_part[k]]  # the global network on the part's view
        self.of_part: dict[fx.Node, Any] = {}
        self.differ: set[fx.Node] = set()  # not kept, and of another value than in the global network

    def kept(self) -> dict[fx.Node, Any]:
        """The numbers to be kept, with their values."""
        found = {}
        for op, out in self.reading.operations:
            node = op.node
            if not _counts(op, out):
                self.of_part[node] = self._tensors(out)
                carried = [n for n in node.all_input_nodes if n in self.differ]
                if carried and not (op.takes_sizes or self._is_size(node, carried)):
                    raise _refusal(op, carried[0])
                continue
            value, ours = self.of_global[node], evaluate_node(self.reading.gm, node, self.of_part)
            if isinstance(value, numbers.Number) and value != ours and not self.batch.changes(node):
                found[node] = ours = value
            elif not _same(value, ours):
                self.differ.add(node)
            self.of_part[node] = ours
        return found

    def _tensors(self, out: Any) -> Any:
        """Meta tensors of the part's shapes."""
        return tree_map_only(Value, self._tensor, out)

    def _tensor(self, value: Value) -> torch.Tensor:
        at = value.at[self.reading.sizes.of_part[self.k]]
        shape = self.cuts.part_shape(value.axes, at.shape, self.k)
        return torch.empty(shape, dtype=at.dtype, device="meta")

    def _is_size(self, node: fx.Node, carried: list[fx.Node]) -> bool:
        """Whether the operation takes the numbers `carried` as sizes: with those of the global network in the place of
        the part's it gives another shape, or does not run."""
        if node.op == "output":
            return False
        own = {n: self.of_part[n] for n in node.all_input_nodes}
        try:
            other = evaluate_node(self.reading.gm, node, own | {n: self.of_global[n] for n in carried})
        except Exception:  # any operation may refuse a size in its own way
            return True
        return other.shape != self.of_part[node].shape if isinstance(other, torch.Tensor) else True


class _Batch:
    """The global network at another batch, as far as it is asked for."""

    def __init__(self, reading: Reading):
        self.reading = reading
        self.env: dict[fx.Node, Any] = {}

    def changes(self, node: fx.Node) -> bool:
        """Whether the number `node` depends on the batch."""
        try:
            for n in ancestors(node, self.env):
                self.env[n] = self._value(n)
        except Exception:  # any operation may refuse a batch in its own way
            return True
        return self.env[node] != self.reading.sizes.envs[0][node]

    def doubles(self, node: fx.Node) -> bool:
        """Whether the number `node`, which depends on the batch, is a multiple of it."""
        value = self.reading.sizes.envs[0][node]
        return isinstance(value, int) and self.env.get(node) == 2 * value

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            gm = self.reading.gm
            return argument(gm, node.target, 2 * gm.batch, self.reading.input_size, float_type(gm))
        return evaluate_node(self.reading.gm, node, self.env)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _refusal(op: Op, number: fx.Node) -> SplitError:
    return SplitError(
        f"{op.where()}{source_line(op.node)}: uses {number.name}{source_line(number)} as a value, which counts "
        "channels that are cut together with other sizes; multiply single sizes such as x.shape[1] instead"
    )
