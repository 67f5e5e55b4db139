"""Element-wise operations: activations, and sums and products of tensors under broadcasting."""

from __future__ import annotations

import operator

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers import activations as ta
from torch import nn

from ...algebra.widths import Axis
from ..modes import detached
from . import laws
from .op import Op, Value, rule

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.RReLU, nn.Threshold,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, ta.Swish, ta.Mish, ta.Sigmoid, ta.Tanh, ta.HardSwish, ta.HardSigmoid,
    ta.HardMish, ta.GELU, ta.GELUTanh, ta.QuickGELU,
)  # fmt: skip
FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.logsigmoid, F.sigmoid, F.tanh, F.rrelu, F.threshold, F.tanhshrink, F.hardshrink,
    F.softshrink, torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.square,
    torch.abs, torch.clamp, operator.pow, torch.pow, "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "exp", "log",
    "sqrt", "rsqrt", "square", "abs", "clamp", "clamp_", "pow", operator.gt, operator.ge, operator.lt, operator.le,
    operator.eq, operator.ne, torch.gt, torch.ge, torch.lt, torch.le, "gt", "ge", "lt", "le", "sqrt_", torch.relu_,
    F.leaky_relu_, F.elu_, F.selu_, F.celu_, F.rrelu_, F.hardtanh_, F.threshold_, torch.sigmoid_, torch.tanh_, "tanh_",
    torch.clamp_, operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not", operator.and_,
    operator.or_, operator.xor, torch.logical_and, torch.logical_or, "logical_and", "logical_or", torch.sin,
    torch.cos, torch.tan, torch.sinh, torch.cosh, torch.asin, torch.acos, torch.atan, torch.erf, torch.log2,
    torch.log10, torch.log1p, torch.exp2, torch.expm1, torch.sign, torch.reciprocal, torch.floor, torch.ceil,
    torch.round, torch.trunc, torch.logit, torch.isnan, torch.isinf, torch.isfinite, "sin", "cos", "tan", "sinh",
    "cosh", "asin", "acos", "atan", "erf", "log2", "log10", "log1p", "exp2", "expm1", "sign", "reciprocal", "floor",
    "ceil", "round", "trunc", "logit", "isnan", "isinf", "isfinite", torch.masked_fill, "masked_fill", "masked_fill_",
    operator.floordiv, torch.floor_divide, torch.remainder, operator.mod, "floor_divide", "remainder",
)  # fmt: skip
SUMS = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")


@rule(*dict.fromkeys(ACTIVATIONS), *dict.fromkeys(FUNCTIONS))
def activation(op: Op, *args, **kwargs) -> Value:
    """Of one tensor; a power's exponent or a clamp's bound may be another."""
    values = (*args, *kwargs.values())
    return op.result(broadcast(op, *values), laws.pointwise, *values)


@rule(nn.PReLU, tl.PReLU)
def prelu(op: Op, x: Value) -> Value:
    """Slope (C,), or one for all channels, of which every part trains a copy."""
    shared = op.module.num_parameters == 1 if hasattr(op.module, "num_parameters") else op.module.weight.numel() == 1
    axis = Axis.of(1) if shared else op.axis(x, 1)
    op.param("weight", axis)
    op.set("num_parameters", axis)
    return op.result(x.axes, laws.per_channel(axis, *op.names("weight")), x)


@rule(torch.prelu)
def functional_prelu(op: Op, x: Value, weight: Value) -> Value:
    if weight.shape[-1] > 1:
        op.unify(op.axis(x, 1), op.axis(weight, 0))
    return op.result(x.axes, laws.pointwise, x, weight)


@rule(operator.neg, torch.neg, "neg", "contiguous", "clone", "detach", nn.Identity)
def same(op: Op, x: Value, *args, **kwargs) -> Value:
    return op.result(x.axes, laws.linear, x)


@rule("float", "half", "double", "bfloat16", "int", "long", "bool", "to", "type", "type_as")
def cast(op: Op, x: Value, *args, **kwargs) -> Value:
    """Linear where no digit is lost: the terms of a sum are rounded each by itself."""
    keeps = op.out.dtype == torch.promote_types(op.out.dtype, x.at[0].dtype)
    return op.result(x.axes, laws.linear if keeps else laws.pointwise, x)


@rule(detached)
def without_history(op: Op, x):
    """A tensor, or several among other things."""
    if isinstance(x, (tuple, list)):
        return tuple(without_history(op, v) for v in x)
    return same(op, x) if isinstance(x, Value) else x


@rule(*SUMS)
def add(op: Op, a, b, *, alpha=1) -> Value:
    """x + y; a number added to a sum over the parts would be added K times, but not the 0 that `sum` begins with."""
    is_linear = _tensors(a, b) == 2 or any(isinstance(n, (int, float)) and n == 0 for n in (a, b))
    return op.result(broadcast(op, a, b), laws.linear if is_linear else _shifted, a, b)


@rule(*PRODUCTS)
def mul(op: Op, a, b) -> Value:
    return op.result(broadcast(op, a, b), laws.product, a, b)


@rule(*QUOTIENTS)
def div(op: Op, a, b) -> Value:
    """Linear in the numerator alone."""
    return op.result(broadcast(op, a, b), laws.pointwise if isinstance(b, Value) else laws.product, a, b)


@rule(torch.maximum, torch.minimum)
def extremum(op: Op, a: Value, b: Value) -> Value:
    return op.result(broadcast(op, a, b), laws.pointwise, a, b)


@rule(torch.addcmul, "addcmul")
def addcmul(op: Op, a, b, c, *, value=1) -> Value:
    """a + b · c"""
    return op.result(
        broadcast(op, a, b, c), lambda context, a, b, c: laws.linear(context, a, laws.product(context, b, c)), a, b, c
    )


@rule(torch.where, "where", torch.lerp, "lerp")
def choice(op: Op, *args, **kwargs) -> Value:
    """Element by element of three tensors."""
    values = (*args, *kwargs.values())
    return op.result(broadcast(op, *values), laws.pointwise, *values)


@rule(torch.zeros_like, torch.ones_like, torch.full_like)
def filled(op: Op, x: Value, *args, **kwargs) -> Value:
    """One number everywhere."""
    return op.result(x.axes, lambda context: laws.SHARD if any(map(context.is_cut, x.axes)) else laws.COPY)


def _shifted(context, *inputs):
    return laws.linear(context, *inputs, laws.COPY)


def _tensors(*args) -> int:
    return sum(isinstance(a, Value) for a in args)


def broadcast(op: Op, *args) -> tuple[Axis | None, ...]:
    """The axes of an element-wise result: dims are aligned from the right, and what meets is unified."""
    values = [a for a in args if isinstance(a, Value)]
    axes = []
    for dim in range(-len(op.out.shape), 0):
        size, axis, plain = op.out.shape[dim], None, False
        for v in values:
            if len(v.shape) < -dim or v.shape[dim] != size:
                continue
            plain |= v.axes[dim] is None and size > 1
            if v.axes[dim] is not None:
                axis = v.axes[dim] if axis is None else op.unify(axis, v.axes[dim])
        axes.append(op.unify(axis, None) if plain else axis)
    return tuple(axes)
