"""Fully connected layers and tables of vectors, as modules and as functions of parameters."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Linear as TimmLinear
from torch import nn

from ...algebra.widths import make_whole
from .laws import contract, per_channel, pointwise
from .op import Op, Value, rule


@rule(nn.Linear, TimmLinear)
def linear(op: Op, x: Value) -> Value:
    """Weight (out, in). The first one after a flatten is (2.13): `in` runs over channels and positions."""
    m = op.module
    in_axis, out_axis = op.axis(x, -1), op.channels(m.out_features)
    op.param("weight", out_axis, in_axis, fans=([in_axis], [out_axis]))
    op.param("bias", out_axis)
    op.set("in_features", in_axis)
    op.set("out_features", out_axis)
    op.resize = lambda t: t.new_empty(*t.shape[:-1], m.out_features)
    return op.result((*x.axes[:-1], out_axis), contract(out_axis, in_axis, *op.names("weight", "bias")), x)


@rule(F.linear)
def functional_linear(op: Op, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """The same with tensors of the graph: timm's other Linear classes, hand-written heads."""
    in_axis = op.unify(op.axis(x, -1), op.axis(weight, 1))
    out_axis = op.axis(weight, 0)
    if op.trained(weight) or weight.op.node.op != "get_attr":  # a fixed one makes no channels
        op.activate(out_axis)
    if bias is not None:
        out_axis = op.unify(out_axis, op.axis(bias, 0))
    op.resize = lambda t, w, b=None: t.new_empty(*t.shape[:-1], w.shape[0])
    law = contract(out_axis, in_axis, op.trained(weight), op.trained(bias), weight.axes)
    return op.result((*x.axes[:-1], out_axis), law, x, weight, bias)


@rule(nn.Embedding)
def embedding(op: Op, x: Value) -> Value:
    """Weight (indices, channels): an index reads its row of each part."""
    m = op.module
    if m.max_norm is not None:
        raise op.refuse("max_norm divides rows by their norms over the channels of all parts; leave it out")
    axis = op.channels(m.embedding_dim)
    op.param("weight", None, axis)
    op.set("embedding_dim", axis)
    return op.result((*x.axes, axis), per_channel(axis, *op.names("weight")), x)


@rule(F.embedding)
def functional_embedding(
    op: Op,
    x: Value,
    weight: Value,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
) -> Value:
    if max_norm is not None:
        raise op.refuse("max_norm divides rows by their norms over the channels of all parts; leave it out")
    if weight.axes[0] is not None:
        make_whole(weight.axes[0])
    axis = op.axis(weight, 1)
    op.activate(axis)
    return op.result((*x.axes, axis), pointwise, x, weight)
