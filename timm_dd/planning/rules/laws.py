"""How the parts' tensors relate to the global network's, and what an operation makes of that.

A `Relation` says how the tensors x_k of the K parts give the merged network's x, if every part sees the whole image,
in eval mode:

    Kind         the parts' tensors                                     torch.distributed
    SHARD        x_k is x on the channels of part k                     Shard
    COPY         x_k is x                                               Replicate
    PARTIAL      x = Σ x_k, (2.16)                                      Partial
    REPLICATED   x_k is part k's copy of a trained parameter,           -
                 which merge has to average

A law takes the relations of an operation's inputs to that of its output. Where no relation holds any more it
calls ``context.approximate(reason)``; the plan is exact if and only if no law did. Laws run in the second pass, when
it is known which axes are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from ...algebra.widths import Axis


class Kind(Enum):
    SHARD, COPY, PARTIAL, REPLICATED = range(4)


@dataclass(frozen=True)
class Relation:
    """`params`: for PARTIAL the weights and biases whose scaling scales the sum (`UNSCALABLE` among them where
    something else makes part of it), for REPLICATED the parameters. `blocks`: for SHARD, along how many cut dims the
    global tensor is zero wherever it belongs to no part, as a weight between the channels of two parts, (2.12)."""

    kind: Kind
    params: frozenset[str] = field(default=frozenset())
    blocks: int = 0


SHARD, COPY = Relation(Kind.SHARD), Relation(Kind.COPY)
UNSCALABLE = ""


class Context(Protocol):
    """What a law may ask and say of the one tensor whose relation it gives."""

    def is_cut(self, axis: Axis | None) -> bool:
        """Whether the parts have different channels of the axis."""

    def cut_dims(self, axes: Sequence[Axis | None] | None = None) -> int:
        """Along how many dims the parts have different channels, of axes or of the tensor itself."""

    def partly_sharded(self, axis: Axis) -> bool:
        """Whether some channels of the axis are cut and others are whole in every part."""

    def sum(self, param: str) -> None:
        """Merge adds the parts' tensors of this parameter."""

    def approximate(self, reason: str) -> Relation:
        """Note why the parts' tensors give this one only approximately; the relation with which to go on."""


Law = Callable[..., Relation]


def _union(inputs, kind: Kind) -> Relation:
    return Relation(kind, frozenset().union(*(r.params for r in inputs if r.kind is kind)))


def _replicated(context: Context) -> Relation:
    return context.approximate(
        "a parameter without channels to cut: each part trains its own copy, merge takes the mean"
    )


def _shard(context: Context, blocks: int) -> Relation:
    """Without the dims along which an operation has summed."""
    return Relation(Kind.SHARD, blocks=min(blocks, context.cut_dims()))


def linear(context: Context, *inputs: Relation) -> Relation:
    """Linear in all inputs together: sum, concatenation, view, average over positions."""
    kinds = {r.kind for r in inputs}
    if kinds == {Kind.PARTIAL}:
        return _union(inputs, Kind.PARTIAL)
    if kinds == {Kind.PARTIAL, Kind.REPLICATED}:  # a bias of a sum is itself summed
        for name in _union(inputs, Kind.REPLICATED).params:
            context.sum(name)
        every = frozenset().union(*(r.params for r in inputs))
        return Relation(Kind.PARTIAL, every)
    if Kind.PARTIAL in kinds:
        return context.approximate("adds a tensor that every part has to a sum over the parts")
    if Kind.REPLICATED in kinds and len(inputs) > 1:
        return _replicated(context)
    if Kind.REPLICATED in kinds:
        return _union(inputs, Kind.REPLICATED)
    return _shard(context, min(r.blocks for r in inputs)) if Kind.SHARD in kinds else COPY


def product(context: Context, *inputs: Relation) -> Relation:
    """Linear in each input: a gate, a scale, a matrix product."""
    kinds = [r.kind for r in inputs]
    if Kind.REPLICATED in kinds:
        return _replicated(context)
    if Kind.PARTIAL in kinds:
        if kinds.count(Kind.PARTIAL) == 1 and kinds.count(Kind.COPY) == len(kinds) - 1:
            return _union(inputs, Kind.PARTIAL)
        return context.approximate("multiplies a sum over the parts of which each part has only its own term")
    return _shard(context, max(r.blocks for r in inputs)) if Kind.SHARD in kinds else COPY


def read_at(context: Context, x: Relation, *places: Relation) -> Relation:
    """Linear in `x`, which is read at `places`, or by weights that they make."""
    return product(context, x, pointwise(context, *places))


def quotient(context: Context, a: Relation, b: Relation) -> Relation:
    """Of two tensors."""
    relation = pointwise(context, a, b)
    return replace(relation, blocks=a.blocks) if relation.kind is Kind.SHARD else relation


def pointwise(context: Context, *inputs: Relation) -> Relation:
    """Not linear, each channel by itself: activations, max pooling, batch statistics."""
    kinds = {r.kind for r in inputs}
    if Kind.PARTIAL in kinds:
        return context.approximate("not linear on a sum over the parts of which each part has only its own term")
    if Kind.REPLICATED in kinds:
        return _replicated(context)
    return SHARD if Kind.SHARD in kinds else COPY


def keeping_zero(gives_zero: Callable[[], bool]) -> Law:
    """`pointwise`, and zero where all inputs are, if the operation `gives_zero` there."""

    def law(context: Context, *inputs: Relation) -> Relation:
        relation, blocks = pointwise(context, *inputs), min((r.blocks for r in inputs), default=0)
        return replace(relation, blocks=blocks) if relation.kind is Kind.SHARD and blocks and gives_zero() else relation

    return law


def per_channel(axis: Axis, *params: str | None) -> Law:
    """`pointwise` with parameters `params` along `axis`: BatchNorm's weight and bias, PReLU's slope."""
    names = frozenset(filter(None, params))

    def law(context: Context, *inputs: Relation) -> Relation:
        whole = not context.is_cut(axis) or context.partly_sharded(axis)
        copies = [Relation(Kind.REPLICATED, names)] if names and whole else []
        return pointwise(context, *inputs, *copies)

    return law


def contract(
    out_axis: Axis, in_axis: Axis, weight: str | None, bias: str | None, of_weight: Sequence[Axis | None] = ()
) -> Law:
    """A weight (out, in): block-diagonal (2.12) where both axes are cut, (2.11) where only `out_axis` is, and (2.14), a
    sum over the parts, where only `in_axis` is.

    `weight` and `bias` name trained parameters. Where they are tensors of the graph, the weight with the axes
    `of_weight`, their relations follow that of the input.
    """
    names = frozenset(n for n in (weight if weight is not None else UNSCALABLE, bias) if n is not None)

    def law(context: Context, x: Relation, w: Relation | None = None, b: Relation | None = None) -> Relation:
        given = [r for r in (x, w) if r is not None]
        if any(r.kind is Kind.PARTIAL for r in given):
            return context.approximate("reads a sum over the parts of which each part has only its own term")
        if x.kind is Kind.REPLICATED:
            return _replicated(context)
        if w is not None and context.cut_dims(of_weight) > max(1, w.blocks):
            return context.approximate("computes a weight that is not zero between the channels of different parts")
        if context.is_cut(out_axis):
            return _replicated(context) if context.partly_sharded(out_axis) else SHARD
        if not context.is_cut(in_axis):
            trained = w is None or w.kind is Kind.REPLICATED
            return _replicated(context) if trained else product(context, *given)
        if context.partly_sharded(in_axis):
            return context.approximate("sums input channels that every part has once for each part")
        total = Relation(Kind.PARTIAL, names)
        if b is not None:
            return linear(context, total, b)
        if bias is not None:
            context.sum(bias)
        return total

    return law


def summed(axes: Sequence[Axis | None], otherwise: Law, params: frozenset[str] = frozenset([UNSCALABLE])) -> Law:
    """A sum along `axes`: over channels that are cut it is a sum over the parts, or, of a tensor that is zero between
    the channels of different parts, a part's own. `params` as in `Relation`."""

    def law(context: Context, *inputs: Relation) -> Relation:
        cut = [a for a in axes if context.is_cut(a)]
        if not cut:
            return otherwise(context, *inputs)
        left, before = context.cut_dims(), context.cut_dims(cut) + context.cut_dims()
        if before > 1 and not any(x.blocks >= before for x in inputs):
            return context.approximate("sums the channels of all parts")
        if left:
            return otherwise(context, *inputs)
        if all(x.kind is Kind.SHARD for x in inputs) and not any(map(context.partly_sharded, cut)):
            return Relation(Kind.PARTIAL, params)
        return context.approximate("sums channels that every part has once for each part")

    return law


def cross_channel(axes: Sequence[Axis | None], reason: str, otherwise: Law) -> Law:
    """An operation along `axes` that would mix the channels of different parts if one of them is cut."""

    def law(context: Context, *inputs: Relation) -> Relation:
        return context.approximate(reason) if any(map(context.is_cut, axes)) else otherwise(context, *inputs)

    return law


def normed(rows: Axis | None, columns: Sequence[Axis | None], otherwise: Law) -> Law:
    """An operation with a weight whose rows are divided by their norms: zeros outside a part's block change no norm, as
    long as the row is that part's alone."""

    def law(context: Context, *inputs: Relation) -> Relation:
        relation = otherwise(context, *inputs)
        owned = rows is not None and context.is_cut(rows) and not context.partly_sharded(rows)
        if not owned and any(map(context.is_cut, columns)):
            context.approximate("divides each row of a weight by its norm over the input channels of all parts")
        return relation

    return law
