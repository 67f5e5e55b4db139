"""Convolutions, plain, grouped, depthwise and transposed, in 1D, 2D and 3D; weight-standardised and conditional ones;
timm's ConvMlp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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


class ConvAxes(NamedTuple):
    """The channels of a convolution, and those of one of its groups."""

    in_axis: Axis
    out_axis: Axis
    groups: Axis
    group_in: Axis
    group_out: Axis


def _axes(op: Op, x: Axis, groups: int, out: int) -> ConvAxes:
    """Of a convolution of `x` in `groups` to `out` channels."""
    if groups == 1:
        y = op.channels(out)
        return ConvAxes(x, y, Axis.of(1), x, y)
    group_out = op.channels(out // groups)
    if x.is_whole():  # the image: its groups are whole, what they give is cut inside every group
        y = Axis.of(groups, *group_out.terms[0])
        return ConvAxes(x, y, Axis.of(groups), Axis.of(x.size // groups), group_out)
    outer, group_in = op.grouped(groups, x)
    if outer.is_whole() or group_in.is_whole():  # which of them is cut is known
        group_out = group_out if outer.is_whole() and not group_in.is_whole() else Axis.of(out // groups)
    else:
        op.cut_one_of([outer, group_out])
    y = Axis(*((*s, *t) for s in outer.terms for t in group_out.terms))
    return ConvAxes(x.resolve(), y.resolve(), outer, group_in, group_out)


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
def conv(op: Op, x: Value) -> Value:
    """Weight (out, in / groups, *kernel): (2.11), (2.12), (2.14)."""
    return _layer(op, x, lambda axes: (axes.out_axis, axes.group_in))


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(op: Op, x: Value, output_size=None) -> Value:
    """Weight (in, out / groups, *kernel)."""
    return _layer(op, x, lambda axes: (axes.in_axis, axes.group_out))


@rule(StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
def std_conv(op: Op, x: Value) -> Value:
    """Each filter is standardised over its inputs, n in the global network and m in a part.

    Exact by a change of variables: merge fills a filter with its mean outside its block, so that the mean stays
    and the variance becomes m/n times the part's. Hence eps·n/m in the part, and its filters times √(n/m).
    """
    m = op.module
    axes = _axes(op, op.axis(x, 1), m.groups, m.out_channels)
    out_axis, group_in = axes.out_axis, axes.group_in

    def ratio(k: int) -> float:
        return group_in.size / op.part_size(group_in, k)

    op.param("weight", out_axis, group_in, None, None, outside="mean")
    op.param("bias", out_axis)
    op.param("gain", out_axis, None, None, None)
    _set_channels(op, axes)
    op.set("eps", lambda k: m.eps * ratio(k))
    op.scale_input(lambda k: math.sqrt(ratio(k)))
    if math.prod(m.kernel_size) == 1:
        op.needs_two(group_in)
    linear = contract(out_axis, axes.in_axis, *op.names("weight", "bias"))

    def law(context: Context, x: Relation) -> Relation:
        owned = context.is_cut(out_axis) and not context.partly_sharded(out_axis)
        if context.is_cut(group_in) and not owned:
            return context.approximate("standardises each filter over the input channels of all parts")
        return linear(context, x)

    return op.result((x.axes[0], out_axis, None, None), law, x)


@rule(CondConv2d)
def cond_conv(op: Op, x: Value, routing_weights: Value) -> Value:
    """Weight (experts, out · in / groups · kernel). The experts are cut too: a part chooses among its experts by its
    channels."""
    m = op.module
    axes = _axes(op, op.axis(x, 1), m.groups, m.out_channels)
    out_axis, group_in = axes.out_axis, axes.group_in
    experts = op.axis(routing_weights, 1)
    filters = out_axis.times(*group_in.resolve().terms[0], math.prod(m.kernel_size))
    op.param("weight", experts, filters, fans=([group_in, experts], [axes.group_out, experts]))
    op.param("bias", experts, out_axis)
    _set_channels(op, axes)
    law = contract(out_axis, axes.in_axis, *op.names("weight", "bias"))
    return op.result((x.axes[0], out_axis, None, None), lambda context, x, r: law(context, x), x, routing_weights)


def _set_channels(op: Op, axes: ConvAxes) -> None:
    op.set("in_channels", axes.in_axis)
    op.set("out_channels", axes.out_axis)
    op.set("groups", axes.groups)


def _layer(op: Op, x: Value, weight_axes: Callable[[ConvAxes], tuple[Axis, Axis]]) -> Value:
    """A convolution with a weight of `weight_axes` and the kernel."""
    m = op.module
    axes = _axes(op, op.axis(x, 1), m.groups, m.out_channels)
    kernel = (None,) * len(m.kernel_size)
    op.param("weight", *weight_axes(axes), *kernel, fans=([axes.group_in], [axes.group_out]))
    op.param("bias", axes.out_axis)
    _set_channels(op, axes)
    positions, law = slide(op, x, contract(axes.out_axis, axes.in_axis, *op.names("weight", "bias")))
    return op.result((x.axes[0], axes.out_axis, *positions), law, x)


@rule(F.conv1d, F.conv2d, F.conv3d)
def functional_conv(op: Op, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Value:
    """A convolution whose weight is a tensor of the graph: a fixed filter, or a parameter of the module around."""
    axes = _axes(op, op.axis(x, 1), groups, weight.shape[0])
    return _functional(op, x, weight, bias, axes, (axes.out_axis, axes.group_in))


@rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def functional_conv_transpose(
    op: Op, x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> Value:
    axes = _axes(op, op.axis(x, 1), groups, weight.shape[1] * groups)
    return _functional(op, x, weight, bias, axes, (axes.in_axis, axes.group_out))


def _functional(op: Op, x: Value, weight: Value, bias: Value | None, axes: ConvAxes, of_weight) -> Value:
    """A convolution with a weight of the axes `of_weight`, whose kernel is whole."""
    for dim, axis in enumerate(of_weight):
        op.unify(axis, op.axis(weight, dim))
    for axis in weight.axes[2:]:
        op.unify(axis, None)
    out_axis, in_axis = axes.out_axis.resolve(), axes.in_axis.resolve()
    if bias is not None:
        op.unify(out_axis, op.axis(bias, 0))
    if axes.groups.size > 1:
        op.arg(*op.argument(6, "groups"), value=axes.groups)
    positions, law = slide(op, x, contract(out_axis, in_axis, op.trained(weight), op.trained(bias), weight.axes))
    return op.result((x.axes[0], out_axis, *positions), law, x, weight, bias)


@rule(ConvMlp)
def conv_mlp(op: Op, x: Value) -> Value:
    """timm's fully connected layers of VGG as convolutions: the kernel of the first covers the whole map.

    A part's kernel is as large as the map of its box and has its place inside the global kernel, (2.13) and Table 2.1:
    3×3 inside 7×7 for VGG16 at 224 with 2×2 boxes. A map smaller than the kernel is upsampled by the module, so
    there the kernel stays whole.
    """
    m, size = op.module, op.module.input_kernel_size
    in_axis, mid, out_axis = op.axis(x, 1), op.channels(m.fc1.out_channels), op.channels(m.fc2.out_channels)
    kernel = [_kernel_window(op, x, dim, k) for dim, k in zip((2, 3), m.fc1.kernel_size)]
    window = [None if isinstance(k, int) else Axis.of(k) for k in kernel]
    fan = [in_axis, *(Axis.of(k) for k in kernel)]
    op.param("fc1.weight", mid, in_axis, *window, fans=(fan, [mid]))
    op.param("fc1.bias", mid)
    op.param("fc2.weight", out_axis, mid, None, None, fans=([mid], [out_axis]))
    op.param("fc2.bias", out_axis)
    for attr, axis in (
        ("fc1.in_channels", in_axis),
        ("fc1.out_channels", mid),
        ("fc2.in_channels", mid),
        ("fc2.out_channels", out_axis),
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
        return t.new_empty(t.shape[0], out_axis.size, *ends)

    op.resize = resize
    hidden = op.result((None, mid, None, None), contract(mid, in_axis, *op.names("fc1.weight", "fc1.bias")), x)
    hidden = op.result(hidden.axes, pointwise, hidden)
    out = op.result((None, out_axis, None, None), contract(out_axis, mid, *op.names("fc2.weight", "fc2.bias")), hidden)
    return op.result(out.axes, pointwise, out)


def _kernel_window(op: Op, x: Value, dim: int, kernel: int):
    """The places of a kernel that the parts' maps reach, where the global map fills the kernel."""
    seen = op.window(x, dim)
    if isinstance(seen, int) or seen.size < kernel:
        return kernel
    extent = tuple(min(e, kernel) for e in seen.extent)
    start = tuple(min(math.floor(s * (kernel / seen.size) + 0.5), kernel - e) for s, e in zip(seen.start, extent))
    return Window(kernel, start, extent)
