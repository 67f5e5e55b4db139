"""Operations that only move numbers: views, permutations, shuffles.

Constants in the graph (sizes of a view, a split, a slice) are the global network's: each that counts channels
is replaced by the part's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import fx, nn
from torchvision.ops import StochasticDepth, drop_block2d, drop_block3d, stochastic_depth

from ...algebra.widths import Axis, Width, make_whole, unify
from ..modes import TrainingOnly
from . import laws
from .op import Op, Value, rule, shaped_as, tried, unpacked
from .pieces import split_into

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
DROPPING = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, stochastic_depth,
    drop_block2d, drop_block3d,
)  # fmt: skip


@rule(*DROPOUTS, *DROPPING)
def dropout(op: Op, x: Value, *args, **kwargs) -> Value:
    """The identity in eval mode, but where it was left switched on: ``F.dropout(x)``."""
    return op.result(x.axes, _random if _drops(op) else laws.linear, x)


def _random(context: laws.Context, x: laws.Relation) -> laws.Relation:
    return context.approximate("draws random numbers in eval mode too")


def _drops(op: Op) -> bool:
    """Whether in eval mode it does not give back its input."""
    with torch.random.fork_rng(devices=[]):
        return bool((tried(op, lambda t: torch.ones((2, 8, 7, 7, 7)[: t.ndim], device="cpu")) != 1).any())


@rule(TrainingOnly)
def training_only(op: Op, x: Value, *args, **kwargs) -> Value:
    """A module of the model that is the identity in eval mode: in training it runs in a part as it is, if it takes
    another number of channels."""
    wider = [n if axis is None else 2 * n for n, axis in zip(x.shape, x.axes)]
    if _trains_on(op.module, x.shape) and not _trains_on(op.module, wider):
        raise op.refuse("in training it takes only the whole network's channels; let it go by the shape of its input")
    return op.result(x.axes, laws.linear, x)


def _trains_on(module: nn.Module, shape) -> bool:
    """Whether a module gives in training a tensor of its input's shape, on the meta device."""
    module.train()
    try:
        with torch.device("meta"), torch.no_grad():
            return module(torch.empty(shape)).shape == torch.Size(shape)
    except Exception:  # any code of the model
        return False
    finally:
        module.eval()


# ---- views


@rule(nn.Flatten)
def flatten_module(op: Op, x: Value) -> Value:
    return _view(op, x)


@rule(torch.flatten, "flatten", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze")
def flatten(op: Op, x: Value, *args, **kwargs) -> Value:
    """Their arguments are dims, not sizes: nothing to replace."""
    return _view(op, x)


@rule("reshape_as", "view_as")
def reshape_as(op: Op, x: Value, other: Value) -> Value:
    """Its sizes are another tensor's, in a part the part's."""
    value = _view(op, x)
    _match_sizes(op, value, other)
    op.resize = None
    return value


@rule("view", "reshape", torch.reshape)
def reshape(op: Op, x: Value, *shape, **kwargs) -> Value:
    """Sizes that count channels or positions become the part's; -1 and the batch stay."""
    value = _view(op, x)
    given = [kwargs["shape"]] if "shape" in kwargs else shape
    like = shaped_as(op, op.argument(1, "shape"))
    if like is not None or len(op.node.all_input_nodes) > 2:  # more than the batch is computed: right at any image size
        op.resize = lambda t, *sizes, **named: t.reshape(*sizes, **named)
    if like is not None:
        _match_sizes(op, value, like)
    for dim, (size, where) in enumerate(op.listed(given, keyword="shape")):
        if where is None or size == -1 or dim == 0 and value.axes[0] is None:
            continue
        if value.axes[dim] is not None:
            op.arg(*where, value=value.axes[dim])
        elif not isinstance(op.given(where), fx.Node):
            op.arg(*where, value=op.extent(value, dim))
    return value


def _match_sizes(op: Op, value: Value, like: Value) -> None:
    """Dims that take their sizes from another tensor have as many channels as that in every part. Shuffled ones do, and
    are not to be those of the other."""
    for axis, other in zip(value.axes, like.axes):
        if axis is None or other is None or {*axis.widths()} != {*other.widths()}:
            op.unify(axis, other)


@rule("unflatten", torch.unflatten)
def unflatten(op: Op, x: Value, dim: int, sizes) -> Value:
    value, first = _view(op, x), dim % len(x.axes)
    if len(op.node.all_input_nodes) > 1:  # the graph computes the sizes: right at any image size
        op.resize = None
    for i, (size, where) in enumerate(op.listed([sizes], position=2, keyword="sizes")):
        if where is not None and size != -1 and value.axes[first + i] is not None:
            op.arg(*where, value=value.axes[first + i])
        elif where is not None and size != -1 and not isinstance(op.given(where), fx.Node):
            op.arg(*where, value=op.extent(value, first + i))
    return value


@rule(nn.Unflatten)
def unflatten_module(op: Op, x: Value) -> Value:
    value, m = _view(op, x), op.module
    first = m.dim % len(x.axes)
    sizes = [
        op.extent(value, first + i) if a is None else a
        for i, a in enumerate(value.axes[first:][: len(m.unflattened_size)])
    ]
    op.set("unflattened_size", lambda k: [op.part_size(s, k) if isinstance(s, Axis) else s(k) for s in sizes])
    return value


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
        axis = op.axis(x, d)
        if joined is None:
            joined = axis
        elif len(axis.resolve().terms) == 1:
            joined = joined.times(*axis.terms[0])
        else:
            joined = _times_sum(op, joined, axis)
    return joined


def _times_sum(op: Op, outer: Axis, inner: Axis) -> Axis:
    """outer · (a + b): one of the two is whole, the inner one if the outer has an entry for each part (heads, of which
    rotations join halves)."""
    op.threshold(outer.size)
    cut = [any(w.active for w in axis.widths()) for axis in (outer, inner)]
    if not cut[1] or (cut[0] and outer.size >= op.divisor):
        make_whole(inner)
        return outer.times(inner.size)
    make_whole(outer)
    return Axis(*(inner.resolve().terms * outer.size))


def _separate(op: Op, axis: Axis, sizes: list[int]) -> list[Axis]:
    """One axis as several dims, one of which is cut; equal pieces of a concatenation (a channel shuffle) are unified
    first."""
    terms = axis.resolve().terms
    if len(terms) > 1:
        *others, rest = split_into(axis, [axis.size // sizes[0]] * sizes[0])
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
    return op.result([x.axes[d] for d in unpacked(dims)], laws.linear, x)


@rule("movedim", torch.movedim, "moveaxis", torch.moveaxis)
def movedim(op: Op, x: Value, source, destination) -> Value:
    """Those named go to their places, the others keep their order."""
    n = len(x.axes)
    sources, places = ([d % n for d in ([dims] if isinstance(dims, int) else dims)] for dims in (source, destination))
    axes, others = [None] * n, [x.axes[d] for d in range(n) if d not in sources]
    for d, place in zip(sources, places):
        axes[place] = x.axes[d]
    for place, axis in zip((d for d in range(n) if d not in places), others):
        axes[place] = axis
    return op.result(axes, laws.linear, x)


@rule("transpose", torch.transpose, "swapaxes", torch.swapaxes, "swapdims", torch.swapdims)
def transpose(op: Op, x: Value, dim0: int, dim1: int) -> Value:
    axes = list(x.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return op.result(axes, laws.linear, x)


@rule("t", torch.t)
def t(op: Op, x: Value) -> Value:
    return op.result(x.axes[::-1], laws.linear, x)


@rule(getattr)
def attribute(op: Op, x, name: str) -> Value:
    """A tensor's transpose, or its data; of a named tuple, as operations with several results give it, an entry."""
    if not isinstance(x, Value):
        entries = op.example(op.node.args[0])
        return next(v for v, entry in zip(x, entries) if entry is getattr(entries, name))
    if name == "T":
        return t(op, x)
    if name in ("mT", "mH"):
        return transpose(op, x, -2, -1)
    if name in ("data", "real", "imag"):
        return op.result(x.axes, laws.linear, x)
    raise op.refuse(f"reads {name} of a tensor, of whose channels nothing is known; write it as a function")


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
    return op.result([None, op.axis(x, 1).times(downscale_factor**2), None, None], laws.linear, x)


@rule(nn.ChannelShuffle)
def channel_shuffle_module(op: Op, x: Value) -> Value:
    value, groups = _shuffled(op, x, op.module.groups)
    op.set("groups", groups)
    return value


@rule(torch.channel_shuffle)
def channel_shuffle(op: Op, x: Value, groups: int) -> Value:
    value, axis = _shuffled(op, x, groups)
    op.arg(*op.argument(1, "groups"), value=axis)
    return value


def _shuffled(op: Op, x: Value, groups: int) -> tuple[Value, Axis]:
    """Groups · channels become channels · groups; also the axis of the groups."""
    axis = op.axis(x, 1)
    outer, inner = _separate(op, axis, [groups, axis.size // groups])
    shuffled = Axis(*((*i, *o) for i in inner.terms for o in outer.terms))
    return op.result((x.axes[0], shuffled, *x.axes[2:]), laws.linear, x), outer


@rule(nn.Unfold)
def unfold_module(op: Op, x: Value) -> Value:
    return unfold(op, x)


@rule(F.unfold)
def unfold(op: Op, x: Value, *args, **kwargs) -> Value:
    """(B, C, H, W) to (B, C · kernel, positions)."""
    patches = op.axis(x, 1).times(op.out.shape[1] // x.shape[1])
    return op.result((x.axes[0], patches, None), over_positions(op, x, x.axes[2:]), x)


@rule("unfold")
def windows(op: Op, x: Value, dimension: int, size: int, step: int) -> Value:
    """Overlapping windows along a dim: their numbers become a last dim."""
    axes = list(x.axes)
    law = over_positions(op, x, [axes[dimension]])
    axes[dimension] = None if axes[dimension] is None else Axis.of(op.out.shape[dimension])
    return op.result((*axes, None), law, x)


@rule(nn.Fold)
def fold_module(op: Op, x: Value) -> Value:
    return fold(op, x)


@rule(F.fold)
def fold(op: Op, x: Value, *args, **kwargs) -> Value:
    """(B, C · kernel, positions) to (B, C, H, W)."""
    channels = op.channels(op.out.shape[1])
    op.unify(x.axes[1], channels.times(x.shape[1] // op.out.shape[1]))
    return op.result((x.axes[0], channels, None, None), over_positions(op, x, x.axes[2:]), x)


def over_positions(op: Op, x: Value, axes) -> laws.Law:
    """The law of an operation that is linear along the dims of `axes`, which it makes others of."""
    for axis in axes:
        if axis is not None:
            make_whole(axis)
    return laws.linear


@rule("repeat", "tile", torch.tile)
def repeat(op: Op, x: Value, *repeats) -> Value:
    """Channels repeated are concatenated; a dim of size 1 repeated may stand for channels, as in `expand`."""
    counts = op.listed(repeats)
    missing = len(op.out.shape) - len(counts)
    sizes = (1,) * (len(op.out.shape) - len(x.axes)) + x.shape
    axes = [None] * (len(op.out.shape) - len(x.axes)) + list(x.axes)
    for dim, (n, where) in enumerate(counts, start=missing):
        if sizes[dim] == 1 < n:
            axes[dim] = None
            if dim and where is not None and isinstance(op.given(where), int):
                axes[dim] = Axis.of(Width(n, active=False))
                op.arg(*where, value=axes[dim])
        elif axes[dim] is not None and n != 1:
            axes[dim] = Axis(*(axes[dim].resolve().terms * n))
    return op.result(axes, laws.linear, x)


@rule(torch.repeat_interleave, "repeat_interleave")
def repeat_interleave(op: Op, x: Value, repeats: int, dim: int | None = None, **kwargs) -> Value:
    if dim is None or not isinstance(repeats, int):
        raise op.refuse("repeats all numbers, or each its own number of times; give it one number and a dim")
    axes = list(x.axes)
    if axes[dim] is not None:
        axes[dim] = axes[dim].times(repeats)
    return op.result(axes, laws.linear, x)


@rule(torch.flip, "flip")
def flip(op: Op, x: Value, *args, dims=()) -> Value:
    return _move(op, x, dims or unpacked(args))


@rule(torch.roll, "roll")
def roll(op: Op, x: Value, shifts, dims=None) -> Value:
    if dims is None:
        raise op.refuse("rolls the channels of all images together; give it dims")
    return _move(op, x, unpacked([dims]))


@rule(torch.cumsum, "cumsum")
def cumsum(op: Op, x: Value, dim: int, *, dtype=None) -> Value:
    return _move(op, x, [dim])


@rule(torch.tril, "tril", torch.triu, "triu")
def tril(op: Op, x: Value, diagonal: int = 0) -> Value:
    return op.result(x.axes, over_positions(op, x, x.axes[-2:]), x)


def _move(op: Op, x: Value, dims) -> Value:
    """Linear along positions; channels that are cut would meet others in each part."""
    reason = f"{op.name} along channels: each part sees only its own"
    return op.result(x.axes, laws.cross_channel([x.axes[d] for d in dims], reason, laws.linear), x)


@rule("expand")
def expand(op: Op, x: Value, *sizes) -> Value:
    """A dim of size 1 repeated a fixed number of times may stand for channels: that shows once it meets them."""
    new = len(op.out.shape) - len(x.axes)
    axes = [None] * new + list(x.axes)
    for dim, (old, size, (_, where)) in enumerate(zip((1,) * new + x.shape, op.out.shape, op.listed(sizes))):
        if old == 1 < size:
            counts = dim and (where is None or isinstance(op.given(where), int))
            axes[dim] = Axis.of(Width(size, active=False)) if counts else None
        if where is not None and axes[dim] is not None and axes[dim].size == size and op.given(where) != -1:
            op.arg(*where, value=axes[dim])
    return op.result(axes, laws.linear, x)


@rule("expand_as")
def expand_as(op: Op, x: Value, other: Value) -> Value:
    """Dims of size 1 take what the other tensor has there."""
    new = len(other.axes) - len(x.axes)
    sizes, axes = (1,) * new + x.shape, [None] * new + list(x.axes)
    return op.result([o if n == 1 else a for a, o, n in zip(axes, other.axes, sizes)], laws.linear, x)
