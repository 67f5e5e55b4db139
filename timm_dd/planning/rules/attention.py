"""Products of two feature maps, attention, and gates along channels.

Heads are a Width like any other: with at least K of them each part gets whole heads. Where the cut runs through a
head, its scores are a sum over the parts, and the softmax of those is approximate.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import CecaModule, EcaModule
from timm.layers.attention import maybe_add_mask, resolve_self_attn_mask
from timm.layers.non_local_attn import BilinearAttnTransform
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from ...algebra.widths import Axis
from . import laws
from .op import Op, Value, rule
from .pointwise import ACTIVATIONS, FUNCTIONS, add, broadcast, same

ATTENDS = "attends to channels: each part sees only its own"


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


@rule(torch.tensordot)
def tensordot(op: Op, a: Value, b: Value, dims=2, out=None) -> Value:
    """Sums over pairs of dims: as many of the last and the first, or those that two lists name."""
    n = len(a.shape)
    lists = (range(n - dims, n), range(dims)) if isinstance(dims, int) else dims
    pairs = [(i % n, j % len(b.shape)) for i, j in zip(*lists)]
    left, right = ([f"{side}{d}" for d in range(len(v.shape))] for side, v in (("a", a), ("b", b)))
    for i, j in pairs:
        right[j] = left[i]
    summed = {left[i] for i, _ in pairs}
    return _einsum(op, [(a, left), (b, right)], [name for name in left + right if name not in summed])


@rule(torch.addmm, "addmm", torch.baddbmm, "baddbmm")
def addmm(op: Op, x: Value, a: Value, b: Value, *, beta=1, alpha=1) -> Value:
    """x + a · b"""
    product = matmul(op, a, b)
    product.at = [op.out]
    return op.result(broadcast(op, x, product), laws.linear, x, product)


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
    law = laws.summed(summed, laws.product, params)
    return op.result([axes[name] for name in output], law, *(value for value, _ in operands))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    op: Op,
    query: Value,
    key: Value,
    value: Value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> Value:
    """softmax(Q·Kᵀ)·V of (…, heads, positions, channels of a head); one head of keys may serve all queries. A mask has
    its own numbers for each head, or the same for all."""
    if enable_gqa:
        key, value = (_for_heads(op, query, x) for x in (key, value))
    batch = [f"batch{i}" for i in range(len(query.shape) - 2)]
    scores = _einsum(op, [(query, [*batch, "l", "d"]), (key, [*batch, "s", "d"])], [*batch, "l", "s"])
    axes = list(scores.axes)
    if isinstance(attn_mask, Value):
        for dim in range(-len(attn_mask.axes), 0):
            if attn_mask.shape[dim] != 1:
                axes[dim] = op.unify(axes[dim], attn_mask.axes[dim])
    op.reduces_over(axes[-1])
    weights = op.result(axes, laws.cross_channel(axes[-1:], ATTENDS, laws.pointwise), scores, attn_mask)
    weights.at = [query.at[0] @ key.at[0].transpose(-2, -1)]
    return _einsum(op, [(weights, [*batch, "l", "s"]), (value, [*batch, "s", "v"])], [*batch, "l", "v"])


def _for_heads(op: Op, query: Value, x: Value) -> Value:
    """Keys or values of fewer heads than the queries have, each for several in a row."""
    several = query.shape[-3] // x.shape[-3]
    axes = list(x.axes)
    axes[-3] = op.unify(query.axes[-3], None if axes[-3] is None else axes[-3].times(several))
    repeated = op.result(axes, laws.linear, x)
    repeated.at = [t.repeat_interleave(several, -3) for t in x.at]
    return repeated


@rule(maybe_add_mask)
def add_mask(op: Op, scores: Value, attn_mask: Value | None = None) -> Value:
    """timm's sum of scores and a mask, if there is one."""
    return same(op, scores) if attn_mask is None else add(op, scores, attn_mask)


@rule(resolve_self_attn_mask)
def self_attention_mask(op: Op, seq_len, attn: Value, attn_mask: Value | None = None, is_causal: bool = False) -> Value:
    """timm's mask as numbers to be added, or that of the order of the positions."""
    if attn_mask is None:
        return op.result([None] * op.out.ndim, lambda context: laws.COPY)
    return op.result(attn_mask.axes, laws.pointwise, attn_mask)


@rule(nn.MultiheadAttention)
def multihead_attention(
    op: Op,
    query: Value,
    key: Value,
    value: Value,
    key_padding_mask=None,
    need_weights: bool = True,
    attn_mask=None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
):
    """Channels in, channels out and those of all heads are one axis, heads · channels of a head: torch has one number
    for the three; keys and values may have others. The second result, if anybody reads it, is the softmax."""
    if attn_mask is not None and len(attn_mask.shape) > 2:
        raise op.refuse("has a mask for each head, of which a part has fewer; use one for all, (L, S)")
    axis, inputs = op.axis(query, -1), [op.axis(x, -1) for x in (query, key, value)]
    if op.module.in_proj_weight is not None:  # one for all three
        inputs = [axis := op.unify(axis, a) for a in inputs]
    heads, inside = op.grouped(op.module.num_heads, axis)
    inputs, axis = [a.resolve() for a in inputs], axis.resolve()
    _attention_tensors(op, axis, inputs, heads, inside)
    op.reduces_over(inside)
    tokens = [a for x in (key, value) for a in x.axes[:-1]]
    weights = op.names("in_proj_weight" if op.module.in_proj_weight is not None else "q_proj_weight", "in_proj_bias")
    project = laws.contract(axis, axis, *op.names("out_proj.weight", "out_proj.bias"))

    def scores(context: laws.Context, *given: laws.Relation) -> laws.Relation:
        if context.is_cut(inside):
            return context.approximate("fewer heads than parts: the scores of a head are a sum over the parts")
        if any(map(context.is_cut, tokens)):
            return context.approximate(ATTENDS)
        read = (laws.contract(axis, a, *weights)(context, x) for a, x in zip(inputs, given))
        return laws.pointwise(context, *read, *given[3:])

    def law(context: laws.Context, *given: laws.Relation) -> laws.Relation:
        return project(context, scores(context, *given))

    given = (query, key, value, key_padding_mask, attn_mask)
    result = op.result((*query.axes[:-1], axis), law, *given)
    read = need_weights and any(u.target is not operator.getitem or u.args[1] != 0 for u in op.node.users)
    if not read:
        return result, None
    batch = [None] * (len(query.shape) - 2)
    if not average_attn_weights:
        return result, op.result((*batch, heads, None, None), scores, *given)
    averaged = laws.cross_channel([heads], "a mean over heads: each part sees only its own", scores)
    return result, op.result((*batch, None, None), averaged, *given)


def _attention_tensors(op: Op, axis: Axis, inputs: Sequence[Axis], heads: Axis, inside: Axis) -> None:
    """The parameters and numbers of nn.MultiheadAttention with queries, keys and values of the channels `inputs`."""
    three, fans = Axis(*((3, *t) for t in axis.terms)), ([axis], [axis])
    if len(axis.terms) > 1:
        three = Axis(*(axis.terms * 3))
    op.param("in_proj_weight", three, axis, fans=fans)
    op.param("in_proj_bias", three)
    for name, given in zip("qkv", inputs):
        op.param(f"{name}_proj_weight", axis, given, fans=([given], [axis]))
    op.param("out_proj.weight", axis, axis, fans=fans)
    for name in ("bias_k", "bias_v"):
        op.param(name, None, None, axis)
    op.param("out_proj.bias", axis)
    for attr in ("embed_dim", "out_proj.in_features", "out_proj.out_features"):
        op.set(attr, axis)
    op.set("kdim", inputs[1])
    op.set("vdim", inputs[2])
    op.set("num_heads", heads)
    op.set("head_dim", inside)


@rule(nn.TransformerEncoderLayer)
def encoder_layer(op: Op, src: Value, src_mask=None, src_key_padding_mask=None, is_causal: bool = False) -> Value:
    """Attention and two fully connected layers, each with its residual sum and its norm, before or after."""
    m = op.module

    def attend(x: Value) -> Value:
        return op.call("self_attn", x, x, x, src_key_padding_mask, False, src_mask)[0]

    def feed(x: Value) -> Value:
        hidden = op.call("linear1", x)
        if m.activation not in FUNCTIONS and not isinstance(m.activation, ACTIVATIONS):
            raise op.refuse(f"its activation {m.activation} has no rule")
        return op.call("linear2", op.result(hidden.axes, laws.pointwise, hidden))

    x = src
    for step, norm in ((attend, "norm1"), (feed, "norm2")):
        y = step(op.call(norm, x) if m.norm_first else x)
        axes = [op.unify(a, b) if a is not b else a for a, b in zip(x.axes, y.axes)]
        x = op.result(axes, laws.linear, x, y)
        x = x if m.norm_first else op.call(norm, x)
    return x


@rule(nn.TransformerEncoder)
def encoder(op: Op, src: Value, mask=None, src_key_padding_mask=None, is_causal: bool | None = None) -> Value:
    for i in range(len(op.module.layers)):
        src = op.call(f"layers.{i}", src, mask, src_key_padding_mask)
    return src if op.module.norm is None else op.call("norm", src)


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
    y = op.result(x.axes, laws.read_at, x, *maps)
    return op.call("conv2.bn", op.call("conv2.conv", y))
