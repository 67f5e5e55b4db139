"""Products of two feature maps, attention, and gates along channels.

Heads are a Width like any other: with at least K of them each part gets whole heads. Where the cut runs through a
head, its scores are a sum over the parts, and the softmax of those is approximate.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import CecaModule, EcaModule
from timm.layers.non_local_attn import BilinearAttnTransform
from timm.layers.pos_embed import resample_abs_pos_embed

from ...algebra.widths import Axis
from . import laws
from .op import Op, Value, rule


@rule(operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
def matmul(op: Op, a: Value, b: Value) -> Value:
    """(…, n, m) by (…, m, p); a vector stands for a matrix of one row or column."""
    batch = [f"batch{i}" for i in range(max(len(a.shape), len(b.shape)) - 2)]
    left = [*batch[len(batch) - len(a.shape) + 2 :], "n", "m"] if len(a.shape) > 1 else ["m"]
    right = [*batch[len(batch) - len(b.shape) + 2 :], "m", "p"] if len(b.shape) > 1 else ["m"]
    return _einsum(op, [(a, left), (b, right)], [*batch, *(n for n in ("n", "p") if n in left + right)])


@rule(torch.einsum)
def einsum(op: Op, equation: str, *operands) -> Value:
    tensors = operands[0] if isinstance(operands[0], (tuple, list)) else operands
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow or "." in equation:
        raise op.refuse(f"write {equation!r} with all its letters and an arrow")
    return _einsum(op, list(zip(tensors, inputs.split(","))), output)


def _einsum(op: Op, operands: Sequence[tuple[Value, Sequence[str]]], output: Sequence[str]) -> Value:
    """Dims of one name are unified; those that the output lacks are summed."""
    axes: dict[str, Axis | None] = {}
    trained = [op.trained(value) for value, _ in operands]
    for (value, names), weight in zip(operands, trained):
        for dim, name in enumerate(names):
            if value.shape[dim] == 1:
                axes.setdefault(name, None)
                continue
            axis = value.axes[dim]
            if weight and name in output and axis is not None:
                op.activate(axis)
            axes[name] = op.unify(axes[name], axis) if axes.get(name) is not None else axis
    summed = [axes[name] for name in axes if name not in output and axes[name] is not None]
    op.reduces_over(*summed)
    params = frozenset(filter(None, trained)) or frozenset([laws.UNSCALABLE])
    law = functools.reduce(lambda inner, axis: laws.summed(axis, inner, params), summed, laws.product)
    return op.result([axes[name] for name in output], law, *(value for value, _ in operands))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    op: Op, query: Value, key: Value, value: Value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None
) -> Value:
    """softmax(Q·Kᵀ)·V of (…, heads, positions, channels of a head); one head of keys may serve all queries."""
    batch = [f"batch{i}" for i in range(len(query.shape) - 2)]
    scores = _einsum(op, [(query, [*batch, "l", "d"]), (key, [*batch, "s", "d"])], [*batch, "l", "s"])
    weights = op.result(scores.axes, laws.pointwise, scores, attn_mask)
    weights.at = [query.at[0] @ key.at[0].transpose(-2, -1)]
    return _einsum(op, [(weights, [*batch, "l", "s"]), (value, [*batch, "s", "v"])], [*batch, "l", "v"])


@rule(resample_abs_pos_embed)
def position_embedding(op: Op, posemb: Value, *args, **kwargs) -> Value:
    """(1, positions, channels), interpolated along the positions."""
    return op.result([None, None, posemb.axes[2]], laws.linear, posemb)


@rule(EcaModule, CecaModule)
def channel_gate(op: Op, x: Value) -> Value:
    """ECA: a convolution along the channels makes their gates."""
    params = op.names(*dict(op.module.named_parameters()))
    reason = "a convolution along channels: each part sees only its own"
    return op.result(x.axes, laws.cross_channel([x.axes[1]], reason, laws.per_channel(Axis.of(1), *params)), x)


@rule(BilinearAttnTransform)
def bilinear_attention(op: Op, x: Value) -> Value:
    """P·X·Q in every channel; the matrices P and Q are one pair for each group of channels."""
    groups, _ = op.grouped(op.module.groups, op.axis(x, 1))
    op.set("groups", groups)
    shared = op.call("conv1.bn", op.call("conv1.conv", x))
    op.unify(shared.axes[1], groups)
    maps = [op.call(name, shared) for name in ("conv_p", "conv_q")]
    for m in maps:
        op.unify(m.axes[1], groups.times(op.module.block_size**2))

    def law(context: laws.Context, x: laws.Relation, p: laws.Relation, q: laws.Relation) -> laws.Relation:
        return laws.product(context, x, laws.pointwise(context, p, q))

    y = op.result(x.axes, law, x, *maps)
    return op.call("conv2.bn", op.call("conv2.conv", y))
