"""What a plan claims of every layer's feature maps: how the parts' maps give the global one's, and where."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import ScaledStdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame

from ..algebra.axes import FrozenAxis, Window
from ..errors import SplitError
from ..planning.assemble import rows
from ..planning.planner import Analysis
from ..planning.rules.laws import Kind
from ..planning.rules.op import Op, Value
from ..planning.shapes import Sizes

SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, AvgPool2dSame, MaxPool2dSame)


@dataclass(frozen=True)
class Claim:
    """An operation's maps in the parts.

    Attributes:
        node, path, operation: where.
        kind: they are the global map's channels (SHARD), or the global map (COPY), or it is their sum (PARTIAL).
        channels: part k's channels in each dim, None where it has all; without the batch.
        places: the positions of part k's box in each dim, None where it sees all, or another grid; without the batch.
        exact: to rounding, every part seeing the whole image.
        aligned: what part k computes from its box are numbers of the global map, at `places`; never of scaled views.
    """

    node: str
    path: str
    operation: str
    kind: Kind
    channels: tuple[FrozenAxis | None, ...]
    places: tuple[FrozenAxis | None, ...]
    exact: bool
    aligned: bool


def claims(analysis: Analysis) -> tuple[list[Claim], list[Claim]]:
    """The claims of the rows of a plan, and of its outputs; `analysis` is from `analyse`."""
    reading, misplaced = analysis.reading, set[Value]()
    for value in reading.notes.values:
        moved = reading.sizes.scaled or not misplaced.isdisjoint(value.inputs)
        if moved or not _is_aligned(reading.sizes, value):
            misplaced.add(value)
    layers = rows(reading, analysis.relations)
    return (
        [_claim(analysis, op, value, value in misplaced) for op, value, _ in layers],
        [_claim(analysis, value.op, value, value in misplaced) for _, value in reading.outputs],
    )


def _claim(analysis: Analysis, op: Op, value: Value, misplaced: bool) -> Claim:
    sizes, relations = analysis.reading.sizes, analysis.relations
    kind = relations.kind(value)
    channels = tuple(None if a is None else relations.cuts.frozen(a) for a in value.axes[1:])
    places = tuple(None if misplaced or a is not None else _place(sizes, value, d) for d, a in _dims(value))
    sums_of_boxes = kind is Kind.PARTIAL and any(places)  # each part has the sum over the positions of its box only
    return Claim(
        op.node.name,
        op.path,
        op.name,
        kind,
        channels,
        places,
        kind is not Kind.REPLICATED and value not in relations.doubtful,
        not misplaced and not sums_of_boxes,
    )


def _dims(value: Value):
    return enumerate(value.axes[1:], start=1)


def _place(sizes: Sizes, value: Value, dim: int) -> FrozenAxis | None:
    window = sizes.window(value, dim)
    return FrozenAxis(((window,),)) if isinstance(window, Window) else None


def _is_aligned(sizes: Sizes, value: Value) -> bool:
    """Whether boxes start at multiples of the map's stride, and no dim has a fixed number of positions, whatever the
    image's size."""
    if not value.at:  # a step inside an operation
        return True
    if sizes.boxed and not _looks_alike(sizes, value):
        return False
    lost = set().union(*(sizes.moving(v) for v in value.inputs)) - sizes.moving(value)
    try:
        for dim in (d for d, axis in _dims(value) if axis is None):
            if _place(sizes, value, dim) is None:
                if lost and value.shape[dim] != 1:
                    return False
            elif not sizes.aligned(value, dim):
                return False
    except SplitError:  # the pixels of a position are not known
        return False
    return True


def _looks_alike(sizes: Sizes, value: Value) -> bool:
    """Whether an operation at the size of a part's map computes what it does at that of the global one: padding as
    TensorFlow's depends on the size, and so does a resampling that aligns corners."""
    op = value.op
    settings = {**(vars(op.module) if op.module is not None else {}), **op.node.kwargs}
    if settings.get("align_corners"):
        return False
    if not isinstance(op.module, SAME):
        return True
    stride = op.module.stride if isinstance(op.module.stride, tuple) else (op.module.stride,) * 2
    whole, *_ = value.inputs[0].at
    parts = (value.inputs[0].at[i] for i in sizes.of_part)
    return all((n - m) % s == 0 for t in parts for n, m, s in zip(whole.shape[2:], t.shape[2:], stride))
