"""Gradients that are clipped: timm's ``--clip-grad``, and whether it did anything."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from timm.utils import dispatch_clip_grad


def clip(parameters: Iterable[torch.Tensor], args: argparse.Namespace) -> torch.Tensor | int:
    """Clip the gradients of a network; 1 where their norm was above the bound, 0 too in the modes that know no norm."""
    if args.clip_mode == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad) > args.clip_grad
    dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
    return 0
