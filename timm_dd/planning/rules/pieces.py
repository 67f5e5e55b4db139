"""Concatenations, chunks and slices: axes that are added, and axes that are cut."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...algebra.journal import transaction
from ...algebra.widths import Axis, Width, make_whole, split_axis, unify
from ...errors import WidthError
from ..symbols import assign_
from ..trace import chunk_or_split
from . import laws
from .op import Op, Value, rule

OF_THE_WHOLE = "selects among the positions of the whole image, of which a part's box lacks some; use Domain.full"


@rule(torch.cat, torch.concat)
def cat(op: Op, tensors, dim: int = 0, *, axis: int | None = None) -> Value:
    """Along channels the axes are added; along any other dim the channels are unified."""
    dim = (dim if axis is None else axis) % len(op.out.shape)
    axes = _unified(op, tensors, [d for d in range(len(op.out.shape)) if d != dim])
    if any(t.axes[dim] is not None for t in tensors):
        axes[dim] = Axis(*(term for t in tensors for term in op.axis(t, dim).terms))
    return op.result(axes, laws.linear, *tensors)


@rule(torch.hstack, torch.column_stack)
def hstack(op: Op, tensors) -> Value:
    if any(len(t.shape) < 2 for t in tensors):
        raise op.refuse("joins vectors; use torch.cat")
    return cat(op, tensors, 1)


@rule(torch.vstack)
def vstack(op: Op, tensors) -> Value:
    if any(len(t.shape) < 2 for t in tensors):
        raise op.refuse("joins vectors; use torch.stack")
    return cat(op, tensors, 0)


@rule(chunk_or_split)
def chunk(op: Op, x: Value, sizes: int, dim: int) -> tuple[Value, ...]:
    return _by_sizes(op, x, dim, ("args", 1))


@rule(torch.split, "split")
def split(op: Op, x: Value, split_size_or_sections, dim: int = 0) -> tuple[Value, ...]:
    keyword = "split_size_or_sections" if op.node.op == "call_function" else "split_size"
    return _by_sizes(op, x, dim, op.argument(1, keyword))


@rule(torch.tensor_split, "tensor_split")
def tensor_split(op: Op, x: Value, indices_or_sections, dim: int = 0) -> tuple[Value, ...]:
    """By a count, or by where pieces begin."""

    def begins(sizes: list[int]) -> list[int]:
        return [*itertools.accumulate(sizes[:-1])]

    return _by_sizes(op, x, dim, op.argument(1, "indices_or_sections"), begins)


@rule(torch.narrow, "narrow")
def narrow(op: Op, x: Value, dim: int, start: int, length: int) -> Value:
    axes = list(x.axes)
    if axes[dim] is not None:
        bounds = [0, start % x.shape[dim], start % x.shape[dim] + length, x.shape[dim]]
        sizes = [b - a for a, b in itertools.pairwise(bounds)]
        pieces = iter(split_into(axes[dim], [n for n in sizes if n]))
        before, axes[dim] = (next(pieces) if n else None for n in sizes[:2])
        op.arg(*op.argument(2, "start"), value=before if before is not None else lambda k: 0)
        op.arg(*op.argument(3, "length"), value=axes[dim])
    return op.result(axes, laws.linear, x)


@rule(torch.select, "select")
def select(op: Op, x: Value, dim: int, index: int) -> Value:
    if x.axes[dim] is not None:
        make_whole(x.axes[dim])
    return op.result([a for d, a in enumerate(x.axes) if d != dim % len(x.axes)], laws.linear, x)


@rule(F.glu)
def glu(op: Op, x: Value, dim: int = -1) -> Value:
    """The first half of a dim, gated by the second."""
    axes = list(x.axes)
    if axes[dim] is not None:
        axes[dim] = unify(*split_axis(axes[dim], op.out.shape[dim]))
    return op.result(axes, laws.pointwise, x)


@rule(nn.GLU)
def glu_module(op: Op, x: Value) -> Value:
    return glu(op, x, op.module.dim)


@rule(torch.unbind, "unbind")
def unbind(op: Op, x: Value, dim: int = 0) -> tuple[Value, ...]:
    if x.axes[dim] is not None:
        make_whole(x.axes[dim])
    axes = [a for d, a in enumerate(x.axes) if d != dim % len(x.axes)]
    return tuple(op.result(axes, laws.linear, x) for _ in op.out)


def _by_sizes(op: Op, x: Value, dim: int, where: tuple, told: Callable = list) -> tuple[Value, ...]:
    """Pieces along a dim, whose sizes in a part stand at `where`, as they are `told` there."""
    axis, sizes, law = x.axes[dim], [piece.shape[dim] for piece in op.out], laws.linear
    if axis is None:
        return tuple(op.result(x.axes, law, x) for _ in sizes)
    cuts = _cut(op, axis, sizes)
    if cuts is None:
        cuts = _cut_inner(axis, len(sizes))
        law = laws.cross_channel([axis], "cuts through channels that belong together: each part cuts its own", law)
    op.arg(*where, value=lambda k: told([op.part_size(cut, k) for cut in cuts]))
    dim %= len(x.axes)
    return tuple(op.result((*x.axes[:dim], cut, *x.axes[dim + 1 :]), law, x) for cut in cuts)


def _cut(op: Op, axis: Axis, sizes: list[int]) -> list[Axis] | None:
    """The pieces, exactly; None where shuffle after shuffle has tied so many channels together that a cut would part
    them, or leave a piece with less than one for each part."""
    tied = len(set(sizes)) == 1 and all(
        isinstance(t[-1], int) and t[-1] % len(sizes) == 0 for t in axis.resolve().terms
    )
    if tied:
        each = [w.size // len(sizes) for w in axis.widths()]
        op.threshold(*each)
        if min(each, default=op.divisor) < op.divisor:
            return None
    try:
        return split_into(axis, sizes)
    except WidthError:
        if tied:
            return None
        raise


@transaction()
def split_into(axis: Axis, sizes: list[int]) -> list[Axis]:
    """The pieces of a concatenation."""
    cuts, rest = [], axis
    for size in sizes[:-1]:
        cut, rest = split_axis(rest, size)
        cuts.append(cut)
    return [*cuts, rest]


def _cut_inner(axis: Axis, n: int) -> list[Axis]:
    """n equal pieces of the innermost factor, which every part has whole."""
    return [Axis(*((*t[:-1], t[-1] // n) for t in axis.terms))] * n


@rule(operator.getitem)
def getitem(op: Op, x, index) -> Value:
    if not isinstance(x, Value):
        return x[index]
    items = _items(x, index)
    indices = [item for item, _ in items if isinstance(item, Value)]
    return op.result(_indexed(op, x, items), laws.read_at if indices else laws.linear, x, *indices)


@rule(assign_)
def assigned(op: Op, x: Value, index, value) -> Value:
    """``x[index] = value``; what is assigned has the channels of the place where it goes. By a mask one number is."""
    if isinstance(index, Value) and index.at[0].dtype == torch.bool:
        if isinstance(value, Value) and value.shape:
            raise op.refuse("assigns as many numbers as a mask has; use torch.where")
        place = [op.unify(a, b) for a, b in zip(x.axes, index.axes)]
        return op.result((*place, *x.axes[len(place) :]), laws.pointwise, x, index, value)
    items = _items(x, index)
    place, indices = _indexed(op, x, items), [item for item, _ in items if isinstance(item, Value)]
    if isinstance(value, Value):
        for axis, given, n in zip(place[::-1], value.axes[::-1], value.shape[::-1]):
            if n > 1:
                op.unify(axis, given)
    is_linear = not indices and (isinstance(value, Value) or value == 0)
    return op.result(x.axes, laws.linear if is_linear else laws.pointwise, x, value, *indices)


def _items(x: Value, index) -> list[tuple[Any, tuple | None]]:
    """What an index, the second argument of the call, says of each dim, and where that stands."""
    items = list(index) if isinstance(index, tuple) else [index]
    places = [("args", 1, i) for i in range(len(items))] if isinstance(index, tuple) else [("args", 1)]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(x.axes) - sum(i is not None and i is not Ellipsis for i in items)
        items[at : at + 1] = [slice(None)] * missing
        places[at : at + 1] = [None] * missing
    return list(zip(items, places))


def _indexed(op: Op, x: Value, items: Sequence[tuple[Any, tuple | None]]) -> list[Axis | None]:
    """The axes of ``x[index]``, whose index says `items`."""
    if any(isinstance(item, Value) for item, _ in items):
        return _looked_up(op, x, [item for item, _ in items])
    axes, dim, lists = [], 0, sum(isinstance(item, list) for item, _ in items)
    for item, where in items:
        if item is None:
            axes.append(None)
            continue
        axis, size, dim = x.axes[dim], x.shape[dim], dim + 1
        if isinstance(item, slice):
            axes.append(axis if axis is None or item == slice(None) else _slice(op, axis, item, size, where))
        elif isinstance(item, list) and _are_indices(item):
            if lists > 1:
                raise op.refuse("indexes with several lists; index with one after another")
            if axis is None and not isinstance(op.window(x, dim - 1), int):
                raise op.refuse(OF_THE_WHOLE)
            axes.append(axis if axis is None else _select(op, axis, [i % size for i in item], where))
        elif not isinstance(item, int):
            raise op.refuse(f"indexes with {type(item).__name__}, which is not known")
        elif axis is not None:
            make_whole(axis)
    return axes + list(x.axes[dim:])


def _looked_up(op: Op, x: Value, items: list) -> list[Axis | None]:
    """Of a table that is read at the places that tensors name, as a position bias for each head is: the dims at which
    it is read are whole in every part, and in their place come those of the tensors."""
    axes, dim, read, first = [], 0, [], None
    for item in items:
        if item is None:
            axes.append(None)
            continue
        axis, dim = x.axes[dim], dim + 1
        if isinstance(item, slice) and item == slice(None):
            axes.append(axis)
        elif isinstance(item, (int, Value)):
            if isinstance(item, Value) and item.at[0].dtype in (torch.bool, torch.uint8):
                raise op.refuse("selects by a mask, as many as its values say; use torch.where")
            if axis is None and not isinstance(op.window(x, dim - 1), int):
                raise op.refuse(OF_THE_WHOLE)
            read.append(axis)
            if first is not None and len(axes) > first:
                first = 0  # apart from one another: their dims come first
            first = len(axes) if first is None else first
        else:
            raise op.refuse("indexes with a tensor and something else; index with one after another")
    indices = [item for item in items if isinstance(item, Value)]
    for axis in filter(None, (*read, *(a for index in indices for a in index.axes))):
        make_whole(axis)
    axes[first:first] = [None] * max(len(index.shape) for index in indices)
    return [*axes, *x.axes[dim:]]


def _are_indices(item: list) -> bool:
    return all(isinstance(i, int) and not isinstance(i, bool) for i in item)


def _select(op: Op, axis: Axis, index: list[int], where: tuple) -> Axis:
    """Entries of an axis, in any order: its pieces between the ends of their runs, one after another."""
    starts = [i for i, before in zip(index, [None, *index]) if before is None or i != before + 1]
    ends = [i + 1 for i, after in zip(index, [*index[1:], None]) if after != i + 1]
    bounds = sorted({0, axis.size, *starts, *ends})
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    try:
        pieces = split_into(axis, sizes)
    except WidthError:  # of a product: whole in every part
        make_whole(axis)
        pieces = split_into(axis, sizes)
    chosen = [bounds.index(i) for i in index if i in bounds]

    def part(k: int) -> list[int]:
        sizes = [op.part_size(piece, k) for piece in pieces]
        first = [sum(sizes[:i]) for i in range(len(sizes))]
        return [n for i in chosen for n in range(first[i], first[i] + sizes[i])]

    op.arg(*where, value=part)
    return Axis(*(t for i in chosen for t in pieces[i].terms))


@rule(torch.index_select, "index_select")
def index_select(op: Op, x: Value, dim: int, index: Value) -> Value:
    """The values of a tensor are not known here, so that every part has all channels among which it selects."""
    axes = list(x.axes)
    if axes[dim] is not None:
        make_whole(axes[dim])
    elif not isinstance(op.window(x, dim), int):
        raise op.refuse(OF_THE_WHOLE)
    for axis in filter(None, index.axes):
        make_whole(axis)
    axes[dim] = None if axes[dim] is None else Axis.of(op.out.shape[dim])
    return op.result(axes, laws.read_at, x, index)


def _slice(op: Op, axis: Axis, item: slice, size: int, where: tuple) -> Axis:
    start, stop, step = item.indices(size)
    if stop <= start:
        return Axis()  # nothing
    if step == 1:
        before, rest = split_axis(axis, start) if start else (None, axis)
        kept, _ = split_axis(rest, stop - start) if stop < size else (rest, None)
        if before is not None:
            op.arg(*where, "start", value=before)
        if stop < size:
            op.arg(*where, "stop", value=kept if before is None else before + kept)
        return kept
    if start < step and stop == size and size % step == 0:  # every step-th channel: one of each `step`
        kept = Axis.of(Width(size // step, op.where()))
        unify(axis, kept.times(step))
        return kept.resolve()
    make_whole(axis)
    return Axis.of(len(range(start, stop, step)))


@rule(torch.stack)
def stack(op: Op, tensors, dim: int = 0) -> Value:
    axes = _unified(op, tensors, range(len(tensors[0].axes)))
    axes.insert(dim % len(op.out.shape), None)
    return op.result(axes, laws.linear, *tensors)


def _unified(op: Op, tensors: Sequence[Value], dims: Iterable[int]) -> list[Axis | None]:
    """The axes of the first tensor, along `dims` unified with those of the others."""
    axes = list(tensors[0].axes)
    for d in dims:
        for t in tensors[1:]:
            axes[d] = op.unify(axes[d], t.axes[d])
    return axes
