"""Pooling, resampling and padding: they act on positions and leave channels as they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from ...algebra.widths import Axis, make_whole
from . import laws
from .op import Op, Value, rule

AVERAGE = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    AvgPool2dSame, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.avg_pool1d, F.avg_pool2d,
    F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.interpolate,
)  # fmt: skip
PADDING = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d,
    nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
MAXIMUM = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    MaxPool2dSame, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.max_pool2d,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
    F.lp_pool1d, F.lp_pool2d, nn.LPPool1d, nn.LPPool2d,
)  # fmt: skip


@rule(*dict.fromkeys(AVERAGE), *PADDING)
def average(op: Op, x: Value, *args, **kwargs) -> Value:
    axes, law = slide(op, x, laws.linear)
    return op.result((*x.axes[:2], *axes), law, x)


@rule(*dict.fromkeys(MAXIMUM))
def maximum(op: Op, x: Value, *args, **kwargs):
    """With ``return_indices`` also the position of each maximum, which counts within its channel."""
    axes, law = slide(op, x, laws.pointwise)
    if isinstance(op.out, torch.Tensor):
        return op.result((*x.axes[:2], *axes), law, x)
    return tuple(op.result((*x.axes[:2], *axes), law, x) for _ in op.out)


@rule(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
def max_unpool(op: Op, x: Value, indices: Value, *args, **kwargs) -> Value:
    channels = op.unify(x.axes[1], indices.axes[1])
    axes, law = slide(op, x, laws.pointwise)
    return op.result((x.axes[0], channels, *axes), law, x, indices)


@rule(F.affine_grid)
def affine_grid(op: Op, theta: Value, size, align_corners=None) -> Value:
    """(B, 2, 3) to the places (B, H, W, 2) from which a map is read."""
    for axis in filter(None, theta.axes):
        make_whole(axis)
    op.takes_sizes = True  # the channels among them say nothing
    return op.result([None] * len(op.out.shape), laws.linear, theta)


@rule(F.grid_sample)
def grid_sample(op: Op, x: Value, grid: Value, *args, **kwargs) -> Value:
    """Each channel at the places of `grid`."""
    for axis in filter(None, (*x.axes[2:], *grid.axes)):
        make_whole(axis)
    return op.result((*x.axes[:2], *(None,) * (len(op.out.shape) - 2)), laws.read_at, x, grid)


@rule(torch.gather, "gather")
def gather(op: Op, x: Value, dim: int, index: Value, *, sparse_grad: bool = False) -> Value:
    """Of each channel what `index` names among the positions; the channels among which it chooses are whole."""
    dim %= len(x.axes)
    if x.axes[dim] is not None:
        make_whole(x.axes[dim])
    axes = [None if d == dim else op.unify(a, b) for d, (a, b) in enumerate(zip(x.axes, index.axes))]
    return op.result(axes, laws.read_at, x, index)


def slide(op: Op, x: Value, law: laws.Law) -> tuple[list[Axis | None], laws.Law]:
    """The axes of the positions after a window slid over them, and the law: where they carry channels (a convolution
    along channels), those of different parts are mixed."""
    axes, out = list(x.axes[2:]), op.out if isinstance(op.out, torch.Tensor) else op.out[0]
    for i, (axis, size) in enumerate(zip(axes, out.shape[2:])):
        if axis is not None and axis.size != size:
            make_whole(axis)
            axes[i] = Axis.of(size)
    return axes, laws.cross_channel(axes, f"{op.name} along channels: each part sees only its own", law)


@rule(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
def constant_pad(op: Op, x: Value) -> Value:
    return op.result(x.axes, laws.pointwise if op.module.value else laws.linear, x)


@rule(F.pad)
def pad(op: Op, x: Value, pad, mode="constant", value=None) -> Value:
    """Zeros around positions; zeros around channels (a shortcut without weights) are new channels."""
    axes, where = list(x.axes), op.argument(1, "pad")
    for i in range(len(pad) // 2):
        dim = len(axes) - 1 - i
        if axes[dim] is None or not any(pad[2 * i : 2 * i + 2]):
            continue
        if mode != "constant":
            raise op.refuse(f"pads channels by {mode}; pad them with zeros, or concatenate")
        for side in (0, 1):
            if pad[2 * i + side]:
                zeros = op.channels(pad[2 * i + side])
                axes[dim] = axes[dim] + zeros if side else zeros + axes[dim]
                op.arg(*where, 2 * i + side, value=zeros)
    return op.result(axes, laws.pointwise if value else laws.linear, x)
