"""Recurrent networks: the hidden width is cut alike in the weights of the input and in those of the state, (2.27)."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from ...algebra.widths import Axis
from ..graphs import of_sequence
from .laws import Context, Relation, contract, cross_channel, pointwise
from .op import Op, Value, rule, unpacked

CELLS = {nn.RNNCell: 1, nn.LSTMCell: 4, nn.GRUCell: 3}
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "LSTM": 4, "GRU": 3}


@rule(nn.RNN, nn.LSTM, nn.GRU)
def recurrent(op: Op, x: Value, hx=None):
    """Of each layer and direction: weight_ih (gates · hidden, in), weight_hh (gates · hidden, out), their biases, and,
    where `out` is a projection of the hidden state, weight_hr (out, hidden)."""
    m = op.module
    in_axis, hidden = op.axis(x, -1), op.channels(m.hidden_size)
    out = op.channels(m.proj_size) if m.proj_size else hidden
    states = (out, hidden) if m.mode == "LSTM" else (out,)
    given = () if hx is None else unpacked([hx])
    for state, axis in zip(given, states):
        op.unify(state.axes[-1], axis)
    directions = 2 if m.bidirectional else 1
    both = Axis.of(directions, *out.terms[0])
    gates = Axis.of(GATES[m.mode], *hidden.terms[0])
    for layer, suffix in itertools.product(range(m.num_layers), ("", "_reverse")[:directions]):
        of, layer_in = f"_l{layer}{suffix}", in_axis if layer == 0 else both
        op.param(f"weight_ih{of}", gates, layer_in, fans=([layer_in], [hidden]))
        op.param(f"weight_hh{of}", gates, out, fans=([out], [hidden]))
        op.param(f"bias_ih{of}", gates)
        op.param(f"bias_hh{of}", gates)
        op.param(f"weight_hr{of}", out, hidden, fans=([hidden], [out]))
    op.set("input_size", in_axis)
    op.set("hidden_size", hidden)
    if m.proj_size:
        op.set("proj_size", out)

    op.resize = lambda t, *_, **__: of_sequence(m, t.new_empty(*t.shape[:-1], m.input_size))
    linear = contract(hidden, in_axis, *op.names("weight_ih_l0", "bias_ih_l0"))

    def steps(context: Context, x: Relation, *states: Relation) -> Relation:
        return pointwise(context, linear(context, x), *states)

    time = 1 if m.batch_first and len(x.axes) == 3 else 0
    op.reduces_over(x.axes[time])
    law = cross_channel([x.axes[time]], "reads channels one after another: each part sees only its own", steps)
    value = op.result((*x.axes[:-1], both), law, x, *given)
    batch = [a for d, a in enumerate(x.axes[:-1]) if d != time]
    ends = tuple(op.result((None, *batch, s), law, x, *given) for s in states)
    return value, ends if m.mode == "LSTM" else ends[0]


@rule(*CELLS)
def cell(op: Op, x: Value, hx=None):
    """One step: weight_ih (gates · hidden, in), weight_hh (gates · hidden, hidden)."""
    m = op.module
    in_axis, hidden = op.axis(x, -1), op.channels(m.hidden_size)
    given = () if hx is None else unpacked([hx])
    for state in given:
        op.unify(state.axes[-1], hidden)
    gates = Axis.of(CELLS[type(m)], *hidden.terms[0])
    op.param("weight_ih", gates, in_axis, fans=([in_axis], [hidden]))
    op.param("weight_hh", gates, hidden, fans=([hidden], [hidden]))
    op.param("bias_ih", gates)
    op.param("bias_hh", gates)
    op.set("input_size", in_axis)
    op.set("hidden_size", hidden)
    linear = contract(hidden, in_axis, *op.names("weight_ih", "bias_ih"))

    def law(context: Context, x: Relation, *states: Relation) -> Relation:
        return pointwise(context, linear(context, x), *states)

    if isinstance(op.out, torch.Tensor):
        return op.result((*x.axes[:-1], hidden), law, x, *given)
    return tuple(op.result((*x.axes[:-1], hidden), law, x, *given) for _ in op.out)
