"""Convolutions, plain, grouped, depthwise and transposed, in 1D, 2D and 3D; weight-standardised and conditional ones;
timm's ConvMlp."""

from __future__ import annotations

import math

import torch.nn.functional as F
from timm.layers import CondConv2d, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import StdConv2dSame
from timm.models.vgg import ConvMlp
from torch import nn

from ...algebra.axes import Window
from ...algebra.widths import Axis
from .laws import Context, Relation, contract, pointwise
from .op import Op, Value, rule
from .pool import slide


def _group_axes(op: Op, x: Axis, groups: int, out: int) -> tuple[Axis, Axis, Axis, Axis, Axis]:
    """The axes of (input, output, groups, input of one group, output of one group)."""
    if groups == 1:
        y = op.channels(out)
        return x, y, Axis.of(1), x, y
    inside = op.channels(out // groups)
    if x.is_whole():  # the image: its groups are whole, what they give is cut inside every group
        return x, Axis.of(groups, *inside.terms[0]), Axis.of(groups), Axis.of(x.size // groups), inside
    g, group_in = op.grouped(groups, x)
    if g.is_whole() or group_in.is_whole():  # which of them is cut is known
        inside = inside if g.is_whole() and not group_in.is_whole() else Axis.of(out // groups)
    else:
        op.cut_one_of([g, inside])
    into = Axis(*((*outer, *inner) for outer in g.terms for inner in inside.terms))
    return x.resolve(), into.resolve(), g, group_in, inside


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
def conv(op: Op, x: Value) -> Value:
    """Weight (out, in / groups, *kernel): (2.11), (2.12), (2.14)."""
    return _layer(op, x, lambda over, into, group_in, group_out: (into, group_in))


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(op: Op, x: Value, output_size=None) -> Value:
    """Weight (in, out / groups, *kernel)."""
    return _layer(op, x, lambda over, into, group_in, group_out: (over, group_out))


@rule(StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
def std_conv(op: Op, x: Value) -> Value:
    """Each filter is standardised over its inputs, n in the global network and m in a part.

    Exact by a change of variables: merge fills a filter with its own mean outside its block, so that the mean stays
    and the variance becomes m/n times the part's. Hence eps·n/m in the part, and its filters times √(n/m).
    """
    m = op.module
    over, into, groups, group_in, _ = _group_axes(op, op.axis(x, 1), m.groups, m.out_channels)

    def ratio(k: int) -> float:
        return group_in.size / op.part_size(group_in, k)

    op.param("weight", into, group_in, None, None, outside="mean")
    op.param("bias", into)
    op.param("gain", into, None, None, None)
    _shape(op, over, into, groups)
    op.set("eps", lambda k: m.eps * ratio(k))
    op.scale_input(lambda k: math.sqrt(ratio(k)))
    if math.prod(m.kernel_size) == 1:
        op.needs_two(group_in)
    linear = contract(into, over, *op.names("weight", "bias"))

    def law(context: Context, x: Relation) -> Relation:
        if context.is_cut(group_in) and not context.is_cut(into):
            return context.approximate("standardises each filter over the input channels of all parts")
        return linear(context, x)

    return op.result((x.axes[0], into, None, None), law, x)


@rule(CondConv2d)
def cond_conv(op: Op, x: Value, routing_weights: Value) -> Value:
    """Weight (experts, out · in / groups · kernel). A part has its own experts, chosen by its own channels."""
    m = op.module
    over, into, groups, group_in, group_out = _group_axes(op, op.axis(x, 1), m.groups, m.out_channels)
    experts = op.axis(routing_weights, 1)
    filters = into.times(*group_in.resolve().terms[0], math.prod(m.kernel_size))
    op.param("weight", experts, filters, fans=([group_in, experts], [group_out, experts]))
    op.param("bias", experts, into)
    _shape(op, over, into, groups)
    weight, bias = op.names("weight", "bias")
    law = contract(into, over, weight, bias)
    return op.result((x.axes[0], into, None, None), lambda context, x, r: law(context, x), x, routing_weights)


def _shape(op: Op, over: Axis, into: Axis, groups: Axis) -> None:
    op.set("in_channels", over)
    op.set("out_channels", into)
    op.set("groups", groups)


def _layer(op: Op, x: Value, weight_axes) -> Value:
    m = op.module
    over, into, groups, group_in, group_out = _group_axes(op, op.axis(x, 1), m.groups, m.out_channels)
    kernel = (None,) * len(m.kernel_size)
    op.param("weight", *weight_axes(over, into, group_in, group_out), *kernel, fans=([group_in], [group_out]))
    op.param("bias", into)
    _shape(op, over, into, groups)
    positions, law = slide(op, x, contract(into, over, *op.names("weight", "bias")))
    return op.result((x.axes[0], into, *positions), law, x)


@rule(F.conv1d, F.conv2d, F.conv3d)
def functional_conv(op: Op, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Value:
    """A convolution whose weight is a tensor of the graph: a fixed filter, or a parameter of the module around."""
    over, into, g, group_in, _ = _group_axes(op, op.axis(x, 1), groups, weight.shape[0])
    into = op.unify(into, op.axis(weight, 0))
    op.unify(group_in, op.axis(weight, 1))
    if bias is not None:
        op.unify(into, op.axis(bias, 0))
    if groups > 1:
        op.arg(*op.argument(6, "groups"), value=g)
    positions, law = slide(op, x, contract(into, over, op.trained(weight), op.trained(bias)))
    return op.result((x.axes[0], into, *positions), law, x, weight, bias)


@rule(ConvMlp)
def conv_mlp(op: Op, x: Value) -> Value:
    """timm's fully connected layers of VGG as convolutions: the kernel of the first covers the whole map.

    A part's kernel is as large as the map of its box and has its place inside the global kernel, (2.13) and Table 2.1:
    3×3 inside 7×7 for VGG16 at 224 with 2×2 boxes. A map smaller than the kernel is upsampled by the module, so
    there the kernel stays whole.
    """
    m, size = op.module, op.module.input_kernel_size
    over, mid, into = op.axis(x, 1), op.channels(m.fc1.out_channels), op.channels(m.fc2.out_channels)
    kernel = [_kernel_window(op, x, dim, k) for dim, k in zip((2, 3), m.fc1.kernel_size)]
    window = [None if isinstance(k, int) else Axis.of(k) for k in kernel]
    fan = [over, *(Axis.of(k) for k in kernel)]
    op.param("fc1.weight", mid, over, *window, fans=(fan, [mid]))
    op.param("fc1.bias", mid)
    op.param("fc2.weight", into, mid, None, None, fans=([mid], [into]))
    op.param("fc2.bias", into)
    for attr, axis in (
        ("fc1.in_channels", over),
        ("fc1.out_channels", mid),
        ("fc2.in_channels", mid),
        ("fc2.out_channels", into),
    ):
        op.set(attr, axis)

    def part_kernel(k: int) -> list[int]:
        return [w if isinstance(w, int) else w.extent[k] for w in kernel]

    if any(isinstance(w, Window) for w in kernel):
        op.set("fc1.kernel_size", part_kernel)
        op.set("input_kernel_size", lambda k: min(part_kernel(k)))

    def resize(t):
        ends = [
            max(n, size) - size + 1 if isinstance(w, int) else max(n - w.size, 0) + 1
            for n, w in zip(t.shape[2:], kernel)
        ]
        return t.new_empty(t.shape[0], into.size, *ends)

    op.resize = resize
    hidden = op.result((None, mid, None, None), contract(mid, over, *op.names("fc1.weight", "fc1.bias")), x)
    hidden = op.result(hidden.axes, pointwise, hidden)
    out = op.result((None, into, None, None), contract(into, mid, *op.names("fc2.weight", "fc2.bias")), hidden)
    return op.result(out.axes, pointwise, out)


def _kernel_window(op: Op, x: Value, dim: int, kernel: int):
    """The places of a kernel that the parts' maps reach, where the global map fills the kernel."""
    seen = op.window(x, dim)
    if isinstance(seen, int) or seen.size < kernel:
        return kernel
    extent = tuple(min(e, kernel) for e in seen.extent)
    start = tuple(min(math.floor(s * (kernel / seen.size) + 0.5), kernel - e) for s, e in zip(seen.start, extent))
    return Window(kernel, start, extent)
