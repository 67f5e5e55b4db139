"""Fully connected layers, as modules and as functions of parameters."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Linear as TimmLinear
from torch import nn

from .laws import contract
from .op import Op, Value, rule


@rule(nn.Linear, TimmLinear)
def linear(op: Op, x: Value) -> Value:
    """Weight (out, in). The first one after a flatten is (2.13): `in` runs over channels and positions."""
    m = op.module
    over, into = op.axis(x, -1), op.channels(m.out_features)
    op.param("weight", into, over, fans=([over], [into]))
    op.param("bias", into)
    op.set("in_features", over)
    op.set("out_features", into)
    op.resize = lambda t: t.new_empty(*t.shape[:-1], m.out_features)
    return op.result((*x.axes[:-1], into), contract(into, over, *op.names("weight", "bias")), x)


@rule(F.linear)
def functional_linear(op: Op, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """The same with parameters of the module around: timm's own Linear classes, hand-written heads."""
    over = op.unify(op.axis(x, -1), op.axis(weight, 1))
    into = op.axis(weight, 0)
    op.activate(into)
    if bias is not None:
        into = op.unify(into, op.axis(bias, 0))
    op.resize = lambda t, w, b=None: t.new_empty(*t.shape[:-1], w.shape[0])
    law = contract(into, over, op.trained(weight), op.trained(bias))
    return op.result((*x.axes[:-1], into), law, x, weight, bias)
