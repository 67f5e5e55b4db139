"""Normalisation layers. BatchNorm is exact: its statistics are per channel, so they go with the channels."""

from __future__ import annotations

from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNorm2d
from timm.layers import GroupNorm as TimmGroupNorm
from timm.layers import LayerNorm as TimmLayerNorm
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from .laws import mixing, per_channel
from .registry import Op, Value, rule


@rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d,
)  # fmt: skip
def batch_norm(op: Op, x: Value) -> Value:
    """Weight, bias and running statistics (C,); timm's BatchNormAct2d adds its activation."""
    axis = x.axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        op.param(name, axis)
    op.set("num_features", axis)
    op.resize = lambda t: t
    return op.result(x.axes, per_channel(axis, *filter(None, op.names("weight", "bias"))), x)


@rule(nn.GroupNorm, TimmGroupNorm, GroupNormAct)
def group_norm(op: Op, x: Value) -> Value:
    """Weight and bias (C,). Exact where the cut runs between groups, that is with at least K of them."""
    axis = x.axes[1]
    groups = op.grouped(op.module.num_groups, axis)
    op.param("weight", axis)
    op.param("bias", axis)
    op.set("num_channels", axis)
    op.set("num_groups", groups)
    reason = f"{op.module.num_groups} groups, fewer than parts: the statistics of a group mix the channels of all parts"
    law = per_channel(axis, *filter(None, op.names("weight", "bias")))
    return op.result(x.axes, mixing(axis, reason, law) if groups.is_whole() else law, x)


@rule(nn.LayerNorm, TimmLayerNorm)
def layer_norm(op: Op, x: Value) -> Value:
    """Weight and bias of `normalized_shape`, the last dims; approximate where one of them is cut."""
    return _layer_norm(op, x, x.axes[-len(op.module.normalized_shape) :])


@rule(LayerNorm2d)
def layer_norm_2d(op: Op, x: Value) -> Value:
    """timm's LayerNorm over the channels of NCHW."""
    return _layer_norm(op, x, x.axes[1:2])


def _layer_norm(op: Op, x: Value, axes) -> Value:
    op.param("weight", *axes)
    op.param("bias", *axes)
    sizes = op.module.normalized_shape
    op.set("normalized_shape", lambda k: [n if a is None else op.planner.part_size(a, k) for a, n in zip(axes, sizes)])
    law = per_channel(axes[-1], *filter(None, op.names("weight", "bias")))
    for axis in axes:
        law = mixing(axis, "normalises over channels: each part sees only its own", law)
    return op.result(x.axes, law, x)
