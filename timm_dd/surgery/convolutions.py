"""Ways to compute the convolutions of K parts at once, of one result; a device's timings tell which is the fastest.

x is (K, B, C, *size), w (K, O, C / groups, *kernel), b (K, O) or None; the result is (K, B, O, *out).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat import Convolution
from . import vectorized

CONVOLUTIONS: dict[int, Callable] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Geometry(NamedTuple):
    """Of one part's convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: Convolution) -> Geometry:
        return cls(module.stride, module.padding, module.dilation, module.groups)


Way = Callable[[Tensor, Tensor, Tensor | None, Geometry], Tensor]


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution padded with zeros, whose weights are what it holds."""
    plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return plain and module.padding_mode == "zeros" and {n for n, _ in module.named_parameters()} <= {"weight", "bias"}


def grouped(
    x: Tensor, w: Tensor, b: Tensor | None, at: Geometry, memory_format: torch.memory_format = torch.preserve_format
) -> Tensor:
    """One convolution with K times the groups, of images as they lie in memory."""
    of_all = x.movedim(0, 1).flatten(1, 2)
    if memory_format is not torch.preserve_format:
        of_all = of_all.contiguous(memory_format=memory_format)
    bias = None if b is None else b.flatten()
    y = _convolve(of_all, w.flatten(0, 1), bias, at._replace(groups=len(w) * at.groups))
    return y.unflatten(1, (len(w), -1)).movedim(1, 0)


def grouped_contiguous(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    return grouped(x, w, b, at, torch.contiguous_format)


def grouped_channels_last(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    return grouped(x, w, b, at, CHANNELS_LAST[x.ndim - 3])


def one_by_one(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    """K convolutions, one after another."""
    return vectorized.one_by_one(_convolve, len(w), x, w, b, at)


def on_streams(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    """K convolutions, each on a stream of the device of its own."""
    device = torch.get_device_module(x.device)
    here, streams = device.current_stream(), [device.Stream(x.device) for _ in w]
    results = []
    for k, stream in enumerate(streams):
        stream.wait_stream(here)
        with device.stream(stream):
            results.append(_convolve(x[k], w[k], None if b is None else b[k], at))
    for stream in streams:
        here.wait_stream(stream)
    return torch.stack(results)


def products(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    """Of 1×1 kernels: matrix products."""
    return _product(w, x.flatten(3), b).unflatten(3, x.shape[3:])


def unfolded(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    """In 2D: products with the windows of the image, of which each pixel is in several."""
    assert not isinstance(at.padding, str)
    columns = F.unfold(x.flatten(0, 1), w.shape[3:], at.dilation, at.padding, at.stride).unflatten(0, x.shape[:2])
    sizes = zip(x.shape[3:], w.shape[3:], at.stride, at.padding, at.dilation, strict=True)
    out = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilation in sizes
    ]
    return _product(w, columns, b).unflatten(3, out)


def ways(x: Tensor, w: Tensor, at: Geometry) -> list[Way]:
    """Those that can compute it, on its device."""
    dims = w.ndim - 3
    found: list[Way] = [grouped, grouped_contiguous, one_by_one]
    found += [grouped_channels_last] if dims in CHANNELS_LAST else []
    found += [on_streams] if hasattr(torch.get_device_module(x.device), "Stream") and x.device.type != "cpu" else []
    if at.groups == 1 and not isinstance(at.padding, str):
        pointwise = math.prod(w.shape[3:]) == 1 and set(at.stride) == {1} and not any(at.padding)
        found += [products] if pointwise else [unfolded] if dims == 2 else []
    return found


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, at: Geometry) -> Tensor:
    return CONVOLUTIONS[w.ndim - 2](x, w, b, *at)


def _product(w: Tensor, columns: Tensor, b: Tensor | None) -> Tensor:
    """(K, B, O, n) of columns (K, B, C · kernel, n)."""
    y = w.flatten(2)[:, None] @ columns
    return y if b is None else y + b[:, None, :, None]
