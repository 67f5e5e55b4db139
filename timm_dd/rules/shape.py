"""Operations that only move numbers: views, concatenations, slices; and reductions over dims.

Constants in the graph (sizes of a view, a split, a slice) are the global network's: each that counts channels
is replaced by the part's own.
"""

from __future__ import annotations

import functools
import math
import operator

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import fx, nn
from torchvision.ops import StochasticDepth

from ..errors import WidthError
from ..trace import pieces
from ..widths import Axis, Width, make_whole, split_axis, unify
from . import laws
from .pointwise import extremum
from .registry import Op, Value, rule

DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    DropPath,
    StochasticDepth,
)


@rule(*DROPOUTS, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def dropout(op: Op, x: Value, *args, **kwargs) -> Value:
    """The identity in eval mode."""
    return op.result(x.axes, laws.linear, x)


# ---- views


@rule(nn.Flatten)
def flatten_module(op: Op, x: Value) -> Value:
    return _view(op, x)


@rule(torch.flatten, "flatten", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze")
def flatten(op: Op, x: Value, *args, **kwargs) -> Value:
    """Their arguments are dims, not sizes: nothing to replace."""
    return _view(op, x)


@rule("view", "reshape", torch.reshape)
def reshape(op: Op, x: Value, *shape, **kwargs) -> Value:
    """Sizes that count channels or positions become the part's own; -1 and the batch stay."""
    value = _view(op, x)
    if len(op.node.all_input_nodes) > 2:  # sizes of its own, beside the batch: they are right at any image size
        op.resize = lambda t, *sizes, **named: t.reshape(*sizes, **named)
    first = kwargs.get("shape", shape[0] if shape else None)
    packed = isinstance(first, (tuple, list))
    base = (("kwargs", "shape") if "shape" in kwargs else ("args", 1)) if packed else None
    if packed and isinstance(_at(op.node, base), fx.Node):
        return value  # another tensor's shape, which is the part's
    for dim, size in enumerate(first if packed else shape):
        if size == -1 or dim == 0 and value.axes[0] is None:
            continue
        where = (*base, dim) if packed else ("args", 1 + dim)
        if value.axes[dim] is not None:
            op.arg(*where, value=value.axes[dim])
        elif not isinstance(_at(op.node, where), fx.Node):
            op.arg(*where, value=op.planner.sizes.extent(value, dim))
    return value


def _at(node: fx.Node, where: tuple):
    at = getattr(node, where[0])
    for step in where[1:]:
        at = at[step]
    return at


def _view(op: Op, x: Value) -> Value:
    """Axes of a view: runs of dims with equal products are joined and split (row-major)."""
    axes: list[Axis | None] = [None] * len(op.out.shape)
    groups = list(_groups(x.shape, op.out.shape))
    for ins, outs in groups:
        joined = _join(op, x, ins)
        if len(outs) == 1:
            axes[outs[0]] = joined
        elif joined is not None:
            for dim, axis in zip(outs, _separate(op, joined, [op.out.shape[d] for d in outs])):
                axes[dim] = axis

    def resize(t, *_, **__):
        sizes = list(op.out.shape)
        for ins, outs in groups:
            total = math.prod(t.shape[d] for d in ins)
            for d in outs[1:]:
                total //= sizes[d]
            if outs:
                sizes[outs[0]] = total
        return t.reshape(sizes)

    op.resize = resize
    return op.result(axes, laws.linear, x)


def _groups(before, after):
    """Pairs of runs of dims (in `before`, in `after`) with the same product; dims of size 1 are left out."""
    a = [d for d, n in enumerate(before) if n != 1]
    b = [d for d, n in enumerate(after) if n != 1]
    while a or b:
        ins, outs = [a.pop(0)], [b.pop(0)]
        m, n = before[ins[0]], after[outs[0]]
        while m != n:
            if m < n:
                ins.append(a.pop(0))
                m *= before[ins[-1]]
            else:
                outs.append(b.pop(0))
                n *= after[outs[-1]]
        yield ins, outs


def _join(op: Op, x: Value, dims: list[int]) -> Axis | None:
    """One axis for several dims: channels times the positions behind them, (2.13)."""
    if len(dims) == 1:
        return x.axes[dims[0]]
    if all(x.axes[d] is None for d in dims):
        return None
    if dims[0] == 0 and x.axes[0] is None:  # folded into the batch, which no part has less of
        for d in dims[1:]:
            if x.axes[d] is not None:
                make_whole(x.axes[d])
        return None
    joined = None
    for d in dims:
        axis = x.axes[d] if x.axes[d] is not None else Axis.of(op.window(x, d))
        if joined is None:
            joined = axis
        elif len(axis.resolve().terms) == 1:
            joined = joined.times(*axis.terms[0])
        else:
            raise op.refuse("joins a dim with a concatenation of channels behind another dim")
    return joined


def _separate(op: Op, axis: Axis, sizes: list[int]) -> list[Axis]:
    """One axis as several dims, one of which is cut; equal pieces of a concatenation (a channel shuffle) are unified
    first."""
    terms = axis.resolve().terms
    if len(terms) > 1:
        *others, rest = _apart(axis, [axis.size // sizes[0]] * sizes[0])
        for piece in others:
            rest = unify(rest, piece)
        return [Axis.of(sizes[0]), *(_separate(op, rest, sizes[1:]) if len(sizes) > 2 else [rest])]
    atoms = [Width(n, op.where(), active=False) if n > 1 else 1 for n in sizes]
    unify(axis, Axis.of(*atoms))
    axes = [Axis.of(a) for a in atoms]
    op.cut_one_of(axes)
    return axes


@rule("permute", torch.permute)
def permute(op: Op, x: Value, *dims) -> Value:
    dims = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return op.result([x.axes[d] for d in dims], laws.linear, x)


@rule("transpose", torch.transpose)
def transpose(op: Op, x: Value, dim0: int, dim1: int) -> Value:
    axes = list(x.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return op.result(axes, laws.linear, x)


@rule("t", torch.t)
def t(op: Op, x: Value) -> Value:
    return op.result(x.axes[::-1], laws.linear, x)


@rule(nn.PixelShuffle)
def pixel_shuffle_module(op: Op, x: Value) -> Value:
    return pixel_shuffle(op, x, op.module.upscale_factor)


@rule(F.pixel_shuffle)
def pixel_shuffle(op: Op, x: Value, upscale_factor: int) -> Value:
    """(B, C·r², H, W) to (B, C, H·r, W·r)."""
    channels = op.channels(op.out.shape[1])
    op.unify(x.axes[1], channels.times(upscale_factor**2))
    return op.result([None, channels, None, None], laws.linear, x)


@rule(nn.PixelUnshuffle)
def pixel_unshuffle_module(op: Op, x: Value) -> Value:
    return pixel_unshuffle(op, x, op.module.downscale_factor)


@rule(F.pixel_unshuffle)
def pixel_unshuffle(op: Op, x: Value, downscale_factor: int) -> Value:
    """(B, C, H·r, W·r) to (B, C·r², H, W)."""
    return op.result([None, x.axes[1].times(downscale_factor**2), None, None], laws.linear, x)


@rule(torch.flip, "flip")
def flip(op: Op, x: Value, *args, dims=()) -> Value:
    return _move(op, x, dims or (args[0] if isinstance(args[0], (tuple, list)) else args))


@rule(torch.roll, "roll")
def roll(op: Op, x: Value, shifts, dims=None) -> Value:
    if dims is None:
        raise op.refuse("rolls the channels of all images together; give it dims")
    return _move(op, x, dims if isinstance(dims, (tuple, list)) else [dims])


@rule(torch.cumsum, "cumsum")
def cumsum(op: Op, x: Value, dim: int) -> Value:
    return _move(op, x, [dim])


def _move(op: Op, x: Value, dims) -> Value:
    """Linear along positions; channels that are cut would meet others in each part."""
    law = laws.linear
    for dim in dims:
        law = laws.mixing(x.axes[dim], f"{op.name} along channels: each part sees only its own", law)
    return op.result(x.axes, law, x)


@rule("expand")
def expand(op: Op, x: Value, *sizes) -> Value:
    """A dim of size 1 repeated a fixed number of times may stand for channels: that shows once it meets them."""
    packed = isinstance(sizes[0], (tuple, list))
    like = packed and isinstance(op.node.args[1], fx.Node)  # another tensor's shape, which is the part's
    new = len(op.out.shape) - len(x.axes)
    axes = [None] * new + list(x.axes)
    for dim, (old, size) in enumerate(zip((1,) * new + x.shape, op.out.shape)):
        where = ("args", 1, dim) if packed else ("args", 1 + dim)
        given = None if like else _at(op.node, where)
        if old == 1 < size and dim and (like or isinstance(given, int)):
            axes[dim] = Axis.of(Width(size, active=False))
        if axes[dim] is not None and axes[dim].size == size and not like and given != -1:
            op.arg(*where, value=axes[dim])
    return op.result(axes, laws.linear, x)


@rule("expand_as")
def expand_as(op: Op, x: Value, other: Value) -> Value:
    """Dims of size 1 take what the other tensor has there."""
    new = len(other.axes) - len(x.axes)
    sizes, axes = (1,) * new + x.shape, [None] * new + list(x.axes)
    return op.result([o if n == 1 else a for a, o, n in zip(axes, other.axes, sizes)], laws.linear, x)


# ---- concatenations and pieces


@rule(torch.cat, torch.concat)
def cat(op: Op, tensors, dim: int = 0, *, axis: int | None = None) -> Value:
    """Along channels the axes are added; along any other dim the channels are unified."""
    dim = (dim if axis is None else axis) % len(op.out.shape)
    axes = list(tensors[0].axes)
    for d in range(len(axes)):
        for t in tensors[1:]:
            if d != dim:
                axes[d] = op.unify(axes[d], t.axes[d]) if axes[d] is not None or t.axes[d] is not None else None
    if any(t.axes[dim] is not None for t in tensors):
        joined = [t.axes[dim] if t.axes[dim] is not None else Axis.of(op.window(t, dim)) for t in tensors]
        axes[dim] = Axis(*(term for a in joined for term in a.terms))
    return op.result(axes, laws.linear, *tensors)


@rule(pieces)
def chunk(op: Op, x: Value, sizes: int, dim: int) -> tuple[Value, ...]:
    return _by_sizes(op, x, dim, ("args", 1))


@rule(torch.split, "split")
def split(op: Op, x: Value, split_size_or_sections, dim: int = 0) -> tuple[Value, ...]:
    keyword = "split_size_or_sections" if op.node.op == "call_function" else "split_size"
    return _by_sizes(op, x, dim, op.argument(1, keyword))


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


def _by_sizes(op: Op, x: Value, dim: int, where: tuple) -> tuple[Value, ...]:
    """Pieces along a dim, whose sizes in a part stand at `where`."""
    axis, sizes, law = x.axes[dim], [piece.shape[dim] for piece in op.out], laws.linear
    if axis is None:
        return tuple(op.result(x.axes, law, x) for _ in sizes)
    cuts = _cut(op, axis, sizes)
    if cuts is None:
        cuts = _cut_inner(axis, len(sizes))
        law = laws.mixing(axis, "cuts through channels that belong together: each part cuts its own", law)
    op.arg(*where, value=lambda k: [op.planner.part_size(cut, k) for cut in cuts])
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
        op.planner.thresholds.update(each)
        if min(each, default=op.divisor) < op.divisor:
            return None
    try:
        return _apart(axis, sizes)
    except WidthError:
        if tied:
            return None
        raise


def _apart(axis: Axis, sizes: list[int]) -> list[Axis]:
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
    items = list(index) if isinstance(index, tuple) else [index]
    places = [("args", 1, i) for i in range(len(items))] if isinstance(index, tuple) else [("args", 1)]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        missing = len(x.axes) - sum(i is not None and i is not Ellipsis for i in items)
        items[at : at + 1] = [slice(None)] * missing
        places[at : at + 1] = [None] * missing
    axes, dim = [], 0
    for item, where in zip(items, places):
        if item is None:
            axes.append(None)
            continue
        axis, size, dim = x.axes[dim], x.shape[dim], dim + 1
        if isinstance(item, slice):
            axes.append(axis if axis is None or item == slice(None) else _slice(op, axis, item, size, where))
        elif not isinstance(item, int):
            raise op.refuse(f"indexes with {type(item).__name__}, which is not known")
        elif axis is not None:
            make_whole(axis)
    return op.result(axes + list(x.axes[dim:]), laws.linear, x)


def _slice(op: Op, axis: Axis, item: slice, size: int, where: tuple) -> Axis:
    start, stop, step = item.indices(size)
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
    axes = list(tensors[0].axes)
    for d in range(len(axes)):
        for t in tensors[1:]:
            if axes[d] is not None or t.axes[d] is not None:
                axes[d] = op.unify(axes[d], t.axes[d])
    axes.insert(dim % len(op.out.shape), None)
    return op.result(axes, laws.linear, *tensors)


# ---- reductions


@rule("mean", torch.mean)
def mean(op: Op, x: Value, dim=None, keepdim: bool = False, *, dtype=None) -> Value:
    return _reduce(op, x, dim, keepdim, _mixing(op, laws.linear))


@rule("sum", torch.sum)
def sum_(op: Op, x: Value, dim=None, keepdim: bool = False, *, dtype=None) -> Value:
    """Over channels it is a sum over the parts."""
    return _reduce(
        op, x, dim, keepdim, lambda axes: functools.reduce(lambda law, a: laws.summed(a, law), axes, laws.linear)
    )


@rule("amax", torch.amax, "amin", torch.amin)
def amax(op: Op, x: Value, dim=None, keepdim: bool = False) -> Value:
    return _reduce(op, x, dim, keepdim, _mixing(op, laws.pointwise))


@rule("var", torch.var, "std", torch.std)
def var(op: Op, x: Value, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction=1) -> Value:
    return _reduce(op, x, dim, keepdim, _mixing(op, laws.pointwise))


@rule("norm", torch.norm)
def norm(op: Op, x: Value, p="fro", dim=None, keepdim: bool = False, dtype=None) -> Value:
    return _reduce(op, x, dim, keepdim, _mixing(op, laws.pointwise))


@rule(torch.max, torch.min, "max", "min")
def max_(op: Op, x: Value, dim=None, keepdim: bool = False):
    """Of two tensors, of all numbers, or (values, indices) along a dim."""
    if isinstance(dim, Value):
        return extremum(op, x, dim)
    law = _mixing(op, laws.pointwise)
    if dim is None:
        return _reduce(op, x, None, keepdim, law)
    return tuple(_reduce(op, x, dim, keepdim, law) for _ in op.out)


@rule(F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax")
def softmax(op: Op, x: Value, dim: int | None = None, *args, **kwargs) -> Value:
    op.mixes(x.axes[dim])
    law = laws.mixing(x.axes[dim], "a softmax over channels: each part normalises over its own", laws.pointwise)
    return op.result(x.axes, law, x)


@rule(nn.Softmax, nn.LogSoftmax)
def softmax_module(op: Op, x: Value) -> Value:
    return softmax(op, x, op.module.dim)


def _mixing(op: Op, law):
    """The law of a reduction that mixes the channels along the dims that it reduces."""
    reason = f"{op.name} over channels: each part sees only its own"
    return lambda axes: functools.reduce(lambda inner, a: laws.mixing(a, reason, inner), axes, law)


def _reduce(op: Op, x: Value, dim, keepdim: bool, law) -> Value:
    """`law` makes the law from the axes of the dims that are reduced."""
    dims = range(len(x.axes)) if dim is None else [dim] if isinstance(dim, int) else dim
    dims = {d % len(x.axes) for d in dims}
    op.mixes(*(x.axes[d] for d in dims))
    axes = [None if d in dims else a for d, a in enumerate(x.axes) if keepdim or d not in dims]
    return op.result(axes, law([x.axes[d] for d in sorted(dims)]), x)
