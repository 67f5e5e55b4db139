"""Element-wise operations: activations, and sums and products of tensors under broadcasting."""

from __future__ import annotations

import operator
from functools import partial

import timm.layers as tl
import torch
import torch.nn.functional as F
from timm.layers import activations as ta
from torch import nn

from ...algebra.widths import Axis, Width
from ..functions import ElementwiseFunction
from ..memory import overlaid
from ..modes import detached
from . import laws
from .op import Op, Value, rule, shaped_as, tried

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid,
    nn.Tanh, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.RReLU, nn.Threshold,
    nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, ta.Swish, ta.Mish, ta.Sigmoid, ta.Tanh, ta.HardSwish, ta.HardSigmoid,
    ta.HardMish, ta.GELU, ta.GELUTanh, ta.QuickGELU,
)  # fmt: skip
NAMES = (
    "abs", "absolute", "acos", "acosh", "angle", "arctan2", "asin", "asinh", "atan", "atan2", "atanh", "bitwise_and",
    "bitwise_not", "bitwise_or", "bitwise_xor", "ceil", "clamp", "clamp_max", "clamp_min", "clip", "copysign", "cos",
    "cosh", "deg2rad", "digamma", "eq", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "fix", "float_power", "floor",
    "floor_divide", "fmod", "frac", "ge", "greater", "greater_equal", "gt", "heaviside", "hypot", "isfinite", "isinf",
    "isnan", "ldexp", "le", "less", "less_equal", "lgamma", "log", "log10", "log1p", "log2", "logaddexp", "logaddexp2",
    "logical_and", "logical_not", "logical_or", "logical_xor", "logit", "lt", "masked_fill", "maximum", "minimum",
    "nan_to_num", "ne", "not_equal", "pow", "rad2deg", "reciprocal", "relu", "remainder", "round", "rsqrt", "sgn",
    "sigmoid", "sign", "signbit", "sin", "sinc", "sinh", "sqrt", "square", "tan", "tanh", "trunc", "xlogy",
)  # fmt: skip
FUNCTIONS = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.logsigmoid, F.sigmoid, F.tanh, F.rrelu, F.threshold, F.tanhshrink, F.hardshrink,
    F.softshrink, F.leaky_relu_, F.elu_, F.selu_, F.celu_, F.rrelu_, F.hardtanh_, F.threshold_, operator.pow,
    operator.mod, operator.floordiv, operator.abs, operator.gt, operator.ge, operator.lt, operator.le, operator.eq,
    operator.ne, operator.invert, operator.and_, operator.or_, operator.xor, operator.ipow,
    operator.ifloordiv, operator.imod, operator.iand, operator.ior, operator.ixor,
    torch.polar, *(getattr(torch, name) for name in NAMES), *NAMES, *(f"{name}_" for name in NAMES),
    *(getattr(torch, f"{name}_") for name in NAMES if hasattr(torch, f"{name}_")),
)  # fmt: skip
SUMS = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, "add", "add_", "sub", "sub_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")


@rule(*dict.fromkeys(ACTIVATIONS), *dict.fromkeys(FUNCTIONS))
def activation(op: Op, *args, **kwargs) -> Value:
    """Of one tensor; a power's exponent or a clamp's bound may be another."""
    values = (*args, *kwargs.values())
    return op.result(broadcast(op, *values), laws.keeping_zero(partial(gives_zero, op)), *values)


@rule(ElementwiseFunction)
def elementwise_function(op: Op, x: Value) -> Value:
    """Of each element alone, or it would not be here."""
    return op.result(x.axes, laws.linear, x) if op.module.is_linear(len(x.axes)) else activation(op, x)


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


@rule(operator.neg, torch.neg, "neg", "contiguous", "clone", "detach", "cpu", "zero_", nn.Identity)
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
    law = laws.product if not isinstance(b, Value) else laws.quotient if isinstance(a, Value) else laws.pointwise
    return op.result(broadcast(op, a, b), law, a, b)


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
    return op.result(broadcast(op, *values), laws.keeping_zero(partial(gives_zero, op)), *values)


@rule("fill_")
def refilled(op: Op, x: Value, value) -> Value:
    return op.result(x.axes, laws.pointwise, x, value)


@rule("copy_")
def overwritten(op: Op, x: Value, src: Value, non_blocking: bool = False) -> Value:
    return op.result(broadcast(op, x, src), laws.linear, x, src)


@rule(overlaid)
def changed(op: Op, x: Value | tuple, change: Value) -> Value | tuple:
    """Of some of its numbers; which ones is not known."""
    if isinstance(x, tuple):
        return tuple(changed(op, piece, change) for piece in x)
    return op.result(x.axes, laws.linear, x, change)


@rule(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like)
def filled(op: Op, x: Value, *args, **kwargs) -> Value:
    """One number everywhere."""
    return _constant(op, x.axes)


@rule(torch.zeros, torch.ones, torch.empty, torch.full)
def made(op: Op, *given, size=None, **kwargs) -> Value:
    """One number everywhere; a dim may stand for channels, as in `expand`: that shows once it meets them."""
    return _made(op, given or (size,), 0)


@rule("new_zeros", "new_ones", "new_empty", "new_full")
def made_for(op: Op, x: Value, *given, size=None, **kwargs) -> Value:
    return _made(op, given or (size,), 1)


def _made(op: Op, given, position: int) -> Value:
    """Of the sizes `given` from an argument's `position` on, or by keyword."""
    like = shaped_as(op, op.argument(position, "size"))
    if like is not None:
        return _constant(op, like.axes)
    axes = [None] * len(op.out.shape)
    for dim, (n, place) in enumerate(op.listed(given, position, "size")):
        if place is not None and dim and n > 1:
            axes[dim] = Axis.of(Width(n, active=False))
            op.arg(*place, value=axes[dim])
    return _constant(op, axes)


def _constant(op: Op, axes) -> Value:
    def law(context: laws.Context) -> laws.Relation:
        dims = context.cut_dims(axes)
        return laws.Relation(laws.Kind.SHARD, blocks=dims if gives_zero(op) else 0) if dims else laws.COPY

    return op.result(axes, law)


def gives_zero(op: Op) -> bool:
    """Whether an operation gives zero where all of its tensors are zero."""
    try:
        return not tried(op, lambda t: torch.zeros((), dtype=t.dtype)).any()
    except Exception:  # any operation may refuse a single number in its own way
        return False


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
