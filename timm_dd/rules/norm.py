"""Normalisation layers. BatchNorm is exact: its statistics are per channel, so they go with the channels."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, GroupNormAct, LayerNorm2d
from timm.layers import GroupNorm as TimmGroupNorm
from timm.layers import LayerNorm as TimmLayerNorm
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from ..widths import Axis
from .laws import mixing, per_channel, pointwise
from .registry import Op, Value, rule


@rule(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d,
)  # fmt: skip
def batch_norm(op: Op, x: Value) -> Value:
    """Weight, bias and running statistics (C,); timm's BatchNormAct2d adds its activation."""
    axis, state = op.axis(x, 1), ("weight", "bias", "running_mean", "running_var")
    for name in state:
        op.param(name, axis)
    op.set("num_features", axis)
    op.resize = lambda t: t
    return op.result((x.axes[0], axis, *x.axes[2:]), per_channel(axis, *op.names(*state)), x)


@rule(nn.GroupNorm, TimmGroupNorm, GroupNormAct)
def group_norm(op: Op, x: Value) -> Value:
    """Weight and bias (C,). Exact where the cut runs between groups, that is with at least K of them."""
    op.param("weight", op.axis(x, 1))
    op.param("bias", op.axis(x, 1))
    op.set("num_channels", op.axis(x, 1))
    groups, value = _grouped(op, x, op.module.num_groups, per_channel(op.axis(x, 1), *op.names("weight", "bias")))
    op.set("num_groups", groups)
    return value


@rule(F.group_norm)
def functional_group_norm(op: Op, x: Value, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Value:
    for p in filter(None, (weight, bias)):
        op.unify(op.axis(x, 1), op.axis(p, 0))
    groups, value = _grouped(op, x, num_groups, pointwise, weight, bias)
    op.arg(*op.argument(1, "num_groups"), value=groups)
    return value


def _grouped(op: Op, x: Value, groups: int, law, *params) -> tuple[Axis, Value]:
    outer, _ = op.grouped(groups, op.axis(x, 1))
    if outer.is_whole():
        reason = f"{groups} groups, fewer than parts: the statistics of a group mix the channels of all parts"
        law = mixing(op.axis(x, 1), reason, law)
    return outer, op.result(x.axes, law, x, *params)


@rule(nn.LayerNorm, TimmLayerNorm)
def layer_norm(op: Op, x: Value) -> Value:
    """Weight and bias of `normalized_shape`, the last dims; approximate where one of them is cut."""
    return _layer_norm(op, x, x.axes[-len(op.module.normalized_shape) :])


@rule(LayerNorm2d)
def layer_norm_2d(op: Op, x: Value) -> Value:
    """timm's LayerNorm over the channels of NCHW."""
    return _layer_norm(op, x, x.axes[1:2])


@rule(F.layer_norm)
def functional_layer_norm(op: Op, x: Value, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Value:
    axes = x.axes[-len(normalized_shape) :]
    for p in filter(None, (weight, bias)):
        for a, b in zip(axes, p.axes):
            op.unify(a, b)
    op.arg(*op.argument(1, "normalized_shape"), value=_part_sizes(op, axes, normalized_shape))
    return op.result(x.axes, _over(axes, pointwise), x, weight, bias)


def _layer_norm(op: Op, x: Value, axes) -> Value:
    op.param("weight", *axes)
    op.param("bias", *axes)
    op.set("normalized_shape", _part_sizes(op, axes, op.module.normalized_shape))
    return op.result(x.axes, _over(axes, per_channel(axes[-1], *op.names("weight", "bias"))), x)


def _part_sizes(op: Op, axes, sizes):
    return lambda k: [n if a is None else op.planner.part_size(a, k) for a, n in zip(axes, sizes)]


def _over(axes, law):
    for axis in axes:
        law = mixing(axis, "normalises over channels: each part sees only its own", law)
    return law
