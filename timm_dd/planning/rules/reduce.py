"""Reductions over dims, and softmax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...algebra.widths import make_whole
from . import laws
from .op import Op, Value, rule, unpacked
from .pointwise import activation


@rule("mean", torch.mean)
def mean(op: Op, x: Value, dim=None, keepdim: bool = False, *, dtype=None) -> Value:
    return _reduce(op, x, dim, keepdim, _cross_channel(op, laws.linear))


@rule("sum", torch.sum)
def sum_(op: Op, x: Value, dim=None, keepdim: bool = False, *, dtype=None) -> Value:
    """Over channels it is a sum over the parts."""
    return _reduce(op, x, dim, keepdim, lambda axes: laws.summed(axes, laws.linear))


@rule("amax", torch.amax, "amin", torch.amin, "prod", torch.prod, "all", torch.all, "any", torch.any)
@rule("nansum", torch.nansum, "nanmean", torch.nanmean)
def amax(op: Op, x: Value, dim=None, keepdim: bool = False, *, dtype=None) -> Value:
    return _reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise))


@rule("var", torch.var, "std", torch.std)
def var(op: Op, x: Value, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction=1) -> Value:
    return _reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise))


@rule(torch.var_mean, torch.std_mean)
def var_mean(op: Op, x: Value, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction=1):
    """(variances, means)"""
    return tuple(_reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise)) for _ in op.out)


@rule("norm", torch.norm, torch.linalg.norm, torch.linalg.vector_norm)
def norm(op: Op, x: Value, p="fro", dim=None, keepdim: bool = False, dtype=None, *, ord=2) -> Value:
    return _reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise))


@rule(torch.quantile, "quantile", torch.nanquantile, "nanquantile")
def quantile(op: Op, x: Value, q, dim=None, keepdim: bool = False, *, interpolation="linear") -> Value:
    value = _reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise))
    return value if len(value.axes) == len(op.out.shape) else op.result((None, *value.axes), laws.linear, value)


@rule(torch.kthvalue, "kthvalue")
def kthvalue(op: Op, x: Value, k: int, dim: int = -1, keepdim: bool = False):
    """(values, indices)"""
    return tuple(_reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise)) for _ in op.out)


@rule(torch.aminmax, "aminmax")
def aminmax(op: Op, x: Value, *, dim=None, keepdim: bool = False):
    return tuple(_reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise)) for _ in op.out)


@rule(torch.logsumexp, "logsumexp", torch.argmax, "argmax", torch.argmin, "argmin")
def chosen(op: Op, x: Value, dim=None, keepdim: bool = False) -> Value:
    return _reduce(op, x, dim, keepdim, _cross_channel(op, laws.pointwise))


@rule(F.cosine_similarity)
def cosine_similarity(op: Op, a: Value, b: Value, dim: int = 1, eps: float = 1e-8) -> Value:
    if a.shape != b.shape:
        raise op.refuse(f"compares {a.shape} and {b.shape}; expand one to the other's shape")
    axes = [op.unify(x, y) for x, y in zip(a.axes, b.axes)]
    op.reduces_over(axes[dim])
    law = _cross_channel(op, laws.pointwise)([axes[dim]])
    return op.result([axis for d, axis in enumerate(axes) if d != dim % len(axes)], law, a, b)


@rule(torch.sort, "sort", torch.argsort, "argsort")
def sort(op: Op, x: Value, dim: int = -1, *args, **kwargs):
    """(values, indices), or the indices alone."""
    law = _cross_channel(op, laws.pointwise)([x.axes[dim]])
    if isinstance(op.out, torch.Tensor):
        return op.result(x.axes, law, x)
    return tuple(op.result(x.axes, law, x) for _ in op.out)


@rule(torch.topk, "topk")
def topk(op: Op, x: Value, k: int, dim: int = -1, *args, **kwargs):
    """(values, indices). The channels among which it chooses are whole: a part of them may have fewer than k."""
    if x.axes[dim] is not None:
        make_whole(x.axes[dim])
    axes = [None if d == dim % len(x.axes) else a for d, a in enumerate(x.axes)]
    return tuple(op.result(axes, laws.pointwise, x) for _ in op.out)


@rule(torch.max, torch.min, "max", "min", torch.median, "median", torch.nanmedian, "nanmedian", torch.mode, "mode")
def max_(op: Op, x: Value, dim=None, keepdim: bool = False):
    """Of two tensors, of all numbers, or (values, indices) along a dim."""
    if isinstance(dim, Value):
        return activation(op, x, dim)
    law = _cross_channel(op, laws.pointwise)
    if isinstance(op.out, torch.Tensor):
        return _reduce(op, x, None, keepdim, law)
    dim = -1 if dim is None else dim  # of mode
    return tuple(_reduce(op, x, dim, keepdim, law) for _ in op.out)


@rule(F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax")
def softmax(op: Op, x: Value, dim: int | None = None, *args, **kwargs) -> Value:
    """Without a dim torch takes the first or the second."""
    dim = int(len(x.axes) not in (0, 1, 3)) if dim is None else dim
    op.reduces_over(x.axes[dim])
    reason = "a softmax over channels: each part normalises over its own"
    return op.result(x.axes, laws.cross_channel([x.axes[dim]], reason, laws.pointwise), x)


@rule(nn.Softmax2d)
def softmax2d(op: Op, x: Value) -> Value:
    return softmax(op, x, -3)


@rule(nn.Softmax, nn.LogSoftmax)
def softmax_module(op: Op, x: Value) -> Value:
    return softmax(op, x, op.module.dim)


def _cross_channel(op: Op, law):
    """The law of a reduction that mixes the channels along the dims that it reduces."""
    reason = f"{op.name} over channels: each part sees only its own"
    return lambda axes: laws.cross_channel(axes, reason, law)


def _reduce(op: Op, x: Value, dim, keepdim: bool, law) -> Value:
    """`law` makes the law from the axes of the dims that are reduced."""
    dims = range(len(x.axes)) if dim is None else unpacked([dim])
    dims = {d % len(x.axes) for d in dims}
    op.reduces_over(*(x.axes[d] for d in dims))
    axes = [None if d in dims else a for d, a in enumerate(x.axes) if keepdim or d not in dims]
    return op.result(axes, law([x.axes[d] for d in sorted(dims)]), x)
