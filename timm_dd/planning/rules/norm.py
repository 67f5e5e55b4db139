"""Normalisation layers of torch and timm, with their activations.

BatchNorm and its like are exact: their statistics are per channel, so they go with the channels, as long as the
positions carry none. Normalisation over groups of channels is exact where the cut runs between groups; over all of them
it never is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress

import torch.nn.functional as F
from timm.layers import evo_norm as evo
from timm.layers import filter_response_norm as frn
from timm.layers import norm as tn
from timm.layers import norm_act as ta
from timm.layers.grn import GlobalResponseNorm
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from ...algebra.widths import Axis
from ...errors import WidthError
from ..graphs import BATCH_NORMS
from .laws import Law, cross_channel, per_channel, pointwise
from .op import Op, Value, rule

EACH_CHANNEL = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, FrozenBatchNorm2d, ta.BatchNormAct2d, ta.SyncBatchNormAct, ta.FrozenBatchNormAct2d,
    evo.EvoNorm2dB0, evo.EvoNorm2dB1, evo.EvoNorm2dB2, frn.FilterResponseNormTlu2d, frn.FilterResponseNormAct2d,
)  # fmt: skip
GROUPS = (nn.GroupNorm, tn.GroupNorm, tn.GroupNorm1, ta.GroupNormAct, ta.GroupNorm1Act)
EVO_S = (
    evo.EvoNorm2dS0, evo.EvoNorm2dS0a, evo.EvoNorm2dS1, evo.EvoNorm2dS1a, evo.EvoNorm2dS2, evo.EvoNorm2dS2a,
)  # fmt: skip
LAST_DIMS = (
    nn.LayerNorm, nn.RMSNorm, tn.LayerNorm, tn.LayerNormFp32, tn.RmsNorm, tn.RmsNormFp32, tn.SimpleNorm,
    tn.SimpleNormFp32, ta.LayerNormAct, ta.LayerNormActFp32, ta.RmsNormAct, ta.RmsNormActFp32,
)  # fmt: skip
DIM_1 = (
    tn.LayerNorm2d, tn.LayerNorm2dFp32, tn.LayerNormExp2d, tn.RmsNorm2d, tn.RmsNorm2dFp32, tn.SimpleNorm2d,
    tn.SimpleNorm2dFp32, ta.LayerNormAct2d, ta.LayerNormAct2dFp32, ta.RmsNormAct2d, ta.RmsNormAct2dFp32,
)  # fmt: skip
OVER = "normalises over channels: each part sees only its own"


@rule(*EACH_CHANNEL)
def batch_norm(op: Op, x: Value) -> Value:
    """Weight, bias and running statistics (C,); without these it takes those of what it is given."""
    axis, m = op.axis(x, 1), op.module
    over = x.axes[:1] + x.axes[2:] if isinstance(m, BATCH_NORMS) else x.axes[2:]
    law = _over(op, over if getattr(m, "running_mean", None) is None else (), _vectors(op, axis))
    if hasattr(op.module, "num_features"):
        op.set("num_features", axis)
    return _activated(op, (x.axes[0], axis, *x.axes[2:]), law, x)


@rule(SplitBatchNorm2d)
def split_batch_norm(op: Op, x: Value) -> Value:
    """timm's AdvProp: while it trains, its copies take their shares of the batch."""
    for i in range(len(op.module.aux_bn)):
        op.call(f"aux_bn.{i}", x)
    return batch_norm(op, x)


@rule(F.batch_norm)
def functional_batch_norm(
    op: Op,
    x: Value,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    training: bool = False,
    *args,
    **kwargs,
) -> Value:
    over = x.axes[:1] + x.axes[2:] if training or running_mean is None else ()
    return _functional_vectors(op, x, over, running_mean, running_var, weight, bias)


@rule(F.instance_norm)
def functional_instance_norm(
    op: Op,
    x: Value,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats: bool = True,
    *args,
    **kwargs,
) -> Value:
    over = x.axes[2:] if use_input_stats else ()
    return _functional_vectors(op, x, over, running_mean, running_var, weight, bias)


def _functional_vectors(op: Op, x: Value, over: Sequence[Axis | None], *vectors: Value | None) -> Value:
    """Statistics, weight and bias (C,) as tensors of the graph; or statistics of `x` along the axes `over`."""
    for v in filter(None, vectors):
        op.unify(op.axis(x, 1), op.axis(v, 0))
    return op.result(x.axes, _over(op, over, pointwise), x, *vectors)


@rule(*GROUPS)
def group_norm(op: Op, x: Value) -> Value:
    """Weight and bias (C,). Exact where the cut runs between groups, that is with at least K of them."""
    op.set("num_channels", op.axis(x, 1))
    return _group_norm(op, x, "num_groups")


@rule(*EVO_S)
def evo_norm(op: Op, x: Value) -> Value:
    """As GroupNorm; some of them do not normalise without their activation."""
    m = op.module
    if not m.apply_act and not isinstance(m, (evo.EvoNorm2dS0a, evo.EvoNorm2dS1a, evo.EvoNorm2dS2a)):
        return batch_norm(op, x)
    return _group_norm(op, x, "groups")


def _group_norm(op: Op, x: Value, attr: str) -> Value:
    axis = op.axis(x, 1)
    groups, law = _grouped(op, x, getattr(op.module, attr), _vectors(op, axis))
    op.set(attr, groups)
    return _activated(op, x.axes, law, x)


def _vectors(op: Op, axis: Axis) -> Law:
    """The law of an operation with the module's parameters and buffers (C,), without those of its submodules."""
    tensors = (*op.module.named_parameters(recurse=False), *op.module.named_buffers(recurse=False))
    names = [name for name, t in tensors if t.ndim == 1]
    for name in names:
        op.param(name, axis)
    return per_channel(axis, *op.names(*names))


def _activated(op: Op, axes, law: Law, x: Value) -> Value:
    """The result, after the activation that is part of some of timm's norms; one that has a slope has a rule."""
    value = op.result(axes, law, x)
    act = getattr(op.module, "act", None)
    return op.call("act", value) if isinstance(act, nn.Module) and list(act.parameters()) else value


@rule(F.group_norm)
def functional_group_norm(op: Op, x: Value, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Value:
    for p in filter(None, (weight, bias)):
        op.unify(op.axis(x, 1), op.axis(p, 0))
    groups, law = _grouped(op, x, num_groups, pointwise)
    op.arg(*op.argument(1, "num_groups"), value=groups)
    return op.result(x.axes, law, x, weight, bias)


def _grouped(op: Op, x: Value, groups: int, law: Law):
    """The number of groups in a part, and the law: exact where every part gets whole groups."""
    axis, law = op.axis(x, 1), _over(op, x.axes[2:], law)
    reason = f"{groups} groups do not divide among the parts: the statistics of a group mix channels of several"
    if groups >= op.divisor * len(axis.resolve().terms):
        with suppress(WidthError):  # a group has channels of two pieces of a concatenation
            outer, inside = op.grouped(groups, axis)
            return outer, cross_channel([inside], reason, law)
    op.threshold(groups)
    op.reduces_over(axis)
    return (lambda k: math.gcd(groups // op.divisor or 1, op.part_size(axis, k))), cross_channel([axis], reason, law)


@rule(*LAST_DIMS)
def layer_norm(op: Op, x: Value) -> Value:
    """Weight and bias of `normalized_shape`, the last dims; approximate where one of them is cut."""
    return _layer_norm(op, x, x.axes[-len(op.module.normalized_shape) :])


@rule(*DIM_1)
def layer_norm_2d(op: Op, x: Value) -> Value:
    """timm's norms over the channels of NCHW."""
    return _layer_norm(op, x, x.axes[1:2])


@rule(F.layer_norm)
def functional_layer_norm(op: Op, x: Value, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Value:
    axes = x.axes[-len(normalized_shape) :]
    for p in filter(None, (weight, bias)):
        for a, b in zip(axes, p.axes):
            op.unify(a, b)
    op.arg(*op.argument(1, "normalized_shape"), value=_part_sizes(op, axes, normalized_shape))
    return op.result(x.axes, _over(op, axes, pointwise), x, weight, bias)


@rule(F.rms_norm)
def functional_rms_norm(op: Op, x: Value, normalized_shape, weight=None, eps=None) -> Value:
    return functional_layer_norm(op, x, normalized_shape, weight)


def _layer_norm(op: Op, x: Value, axes) -> Value:
    op.param("weight", *axes)
    op.param("bias", *axes)
    op.set("normalized_shape", _part_sizes(op, axes, op.module.normalized_shape))
    return _activated(op, x.axes, _over(op, axes, per_channel(axes[-1], *op.names("weight", "bias"))), x)


def _part_sizes(op: Op, axes, sizes):
    return lambda k: [n if a is None else op.part_size(a, k) for a, n in zip(axes, sizes)]


def _over(op: Op, axes: Sequence[Axis | None], law: Law) -> Law:
    op.reduces_over(*axes)
    return cross_channel(axes, OVER, law)


@rule(GlobalResponseNorm)
def global_response_norm(op: Op, x: Value) -> Value:
    """GRN: the norm of each channel over the positions, divided by their mean over channels."""
    axis = op.axis(x, op.module.channel_dim)
    return op.result(x.axes, _over(op, x.axes[1:], _vectors(op, axis)), x)


@rule(nn.LocalResponseNorm, F.local_response_norm)
def local_response_norm(op: Op, x: Value, *args, **kwargs) -> Value:
    """Each channel is divided by its neighbours."""
    return op.result(x.axes, _over(op, x.axes[1:2], pointwise), x)


@rule(F.normalize)
def normalize(op: Op, x: Value, p: float = 2.0, dim: int = 1, *args, **kwargs) -> Value:
    return op.result(x.axes, _over(op, [x.axes[dim]], pointwise), x)
