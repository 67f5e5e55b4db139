"""What devices can be trusted with: the memory layout of a network in training (``--channels-last``), and float64."""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import nn

NARROW = 16  # floats of the widest vector of a CPU


def precise(device: torch.device) -> torch.dtype:
    """The most precise numbers that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def layout(model: nn.Module, args: argparse.Namespace, device: torch.device) -> torch.memory_format:
    """Channels-last if asked for; contiguous, with a warning, for a network of which CPUs would write beyond a kernel's
    memory: the weight gradient of a strided 1x1 convolution of few channels, as narrow parts have it
    (https://github.com/uxlfoundation/oneDNN/issues/6035)."""
    if not args.channels_last:
        return torch.contiguous_format
    unsafe = next((path for path, m in model.named_modules() if device.type == "cpu" and _overruns(m)), None)
    if unsafe is None:
        return torch.channels_last
    warnings.warn(
        f"--channels-last: not for networks that have {unsafe} on a CPU; in that layout the weight gradient of a "
        f"strided 1x1 convolution of fewer than {NARROW} channels overruns its memory (oneDNN issue 6035)",
        stacklevel=2,
    )
    return torch.contiguous_format


def _overruns(m: nn.Module) -> bool:
    return (
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.in_channels // m.groups < NARROW
        and m.weight.requires_grad
    )
