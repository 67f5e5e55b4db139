"""What a plan claims of every layer's feature maps: how the parts' maps give the global one's, and where."""

from __future__ import annotations

from dataclasses import dataclass

from timm.layers import ScaledStdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from timm.layers.std_conv import StdConv2dSame

from ..algebra.axes import FrozenAxis, Window
from ..errors import SplitError
from ..planning.planner import Planner
from ..planning.rules.laws import COPY, Kind
from ..planning.rules.op import Op, Value

SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame, AvgPool2dSame, MaxPool2dSame)


@dataclass(frozen=True)
class Claim:
    """An operation's maps in the parts.

    Attributes:
        node, path, operation: where.
        kind: they are the global map's channels (SHARD), or the global map (COPY), or it is their sum (PARTIAL).
        channels: part k's channels in each dim, None where it has all; without the batch.
        places: the positions of part k's box in each dim, None where it sees all; without the batch.
        exact: to rounding, every part seeing the whole image.
        aligned: what part k computes from its box are numbers of the global map, at `places`.
    """

    node: str
    path: str
    operation: str
    kind: Kind
    channels: tuple[FrozenAxis | None, ...]
    places: tuple[FrozenAxis | None, ...]
    exact: bool
    aligned: bool


def claims(planner: Planner) -> tuple[list[Claim], list[Claim]]:
    """The claims of the rows of a plan, and of its outputs; `planner` is from `analyse`."""
    misplaced: set[Value] = set()
    for value in planner.values:
        if not misplaced.isdisjoint(value.inputs) or not _is_aligned(planner, value):
            misplaced.add(value)
    rows = [_claim(planner, op, value, value in misplaced) for op, value, _ in planner.rows()]
    return rows, [_claim(planner, value.op, value, value in misplaced) for _, value in planner.outputs]


def _claim(planner: Planner, op: Op, value: Value, misplaced: bool) -> Claim:
    kind = planner.relations.get(value, COPY).kind
    channels = tuple(None if a is None else planner.frozen(a) for a in value.axes[1:])
    places = tuple(None if misplaced or a is not None else _place(planner, value, d) for d, a in _dims(value))
    summed_apart = kind is Kind.PARTIAL and any(places)  # each part has the sum of its own positions only
    return Claim(
        op.node.name,
        op.path,
        op.name,
        kind,
        channels,
        places,
        kind is not Kind.REPLICATED and value not in planner.doubtful,
        not misplaced and not summed_apart,
    )


def _dims(value: Value):
    return enumerate(value.axes[1:], start=1)


def _place(planner: Planner, value: Value, dim: int) -> FrozenAxis | None:
    window = planner.sizes.window(value, dim)
    return FrozenAxis(((window,),)) if isinstance(window, Window) else None


def _is_aligned(planner: Planner, value: Value) -> bool:
    """Whether boxes start at multiples of the map's stride, and no dim has a fixed number of positions, whatever the
    image's size."""
    if not value.at:  # a step inside an operation
        return True
    sizes = planner.sizes
    if sizes.boxed and not _looks_alike(planner, value):
        return False
    lost = set().union(*(sizes.moving(v) for v in value.inputs)) - sizes.moving(value)
    try:
        for dim in (d for d, axis in _dims(value) if axis is None):
            if _place(planner, value, dim) is None:
                if lost and value.shape[dim] != 1:
                    return False
            elif not sizes.aligned(value, dim):
                return False
    except SplitError:  # the pixels of a position are not known
        return False
    return True


def _looks_alike(planner: Planner, value: Value) -> bool:
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
    parts = (value.inputs[0].at[i] for i in planner.sizes.of_part)
    return all((n - m) % s == 0 for t in parts for n, m, s in zip(whole.shape[2:], t.shape[2:], stride))
