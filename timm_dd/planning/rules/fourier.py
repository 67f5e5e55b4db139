"""Fourier transforms, which are linear along positions, and complex numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...algebra.widths import Axis
from . import laws
from .op import Op, Value, rule, unpacked
from .pointwise import broadcast
from .view import over_positions


@rule(*(getattr(torch.fft, name) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")))
def fft(op: Op, x: Value, n=None, dim: int = -1, norm=None) -> Value:
    return _transform(op, x, [dim])


@rule(*(getattr(torch.fft, name) for name in ("fft2", "ifft2", "rfft2", "irfft2", "hfft2", "ihfft2")))
def fft2(op: Op, x: Value, s=None, dim=(-2, -1), norm=None) -> Value:
    return _transform(op, x, unpacked([dim]))


@rule(*(getattr(torch.fft, name) for name in ("fftn", "ifftn", "rfftn", "irfftn", "hfftn", "ihfftn")))
def fftn(op: Op, x: Value, s=None, dim=None, norm=None) -> Value:
    if dim is None:
        raise op.refuse("transforms images and channels together; give it the dims of positions")
    return _transform(op, x, unpacked([dim]))


def _transform(op: Op, x: Value, dims: Sequence[int]) -> Value:
    """A dim may change its size; channels that it meets are whole."""
    axes = list(x.axes)
    law = over_positions(op, x, [axes[d] for d in dims])
    for d in dims:
        axes[d] = None if axes[d] is None else Axis.of(op.out.shape[d])
    return op.result(axes, law, x)


@rule(torch.view_as_complex)
def view_as_complex(op: Op, x: Value) -> Value:
    """(*, 2) to (*): the last dim is no channel's."""
    law = over_positions(op, x, x.axes[-1:])
    return op.result(x.axes[:-1], law, x)


@rule(torch.view_as_real)
def view_as_real(op: Op, x: Value) -> Value:
    return op.result((*x.axes, None), laws.linear, x)


@rule(torch.real, torch.imag, torch.conj, torch.resolve_conj, "conj", "resolve_conj")
def of_complex(op: Op, x: Value) -> Value:
    """Linear over the real numbers."""
    return op.result(x.axes, laws.linear, x)


@rule(torch.complex)
def complex_(op: Op, real: Value, imag: Value) -> Value:
    return op.result(broadcast(op, real, imag), laws.linear, real, imag)
