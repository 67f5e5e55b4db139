"""Gradients that are clipped: timm's ``--clip-grad``, and whether it did anything."""

from __future__ import annotations

import argparse

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import nn


def clipped(model: nn.Module, mode: str) -> list[torch.Tensor]:
    """The parameters whose gradients are clipped: AGC leaves the classifier as it is, see timm's training script."""
    return list(model_parameters(model, exclude_head=mode == "agc"))


def clip(model: nn.Module, args: argparse.Namespace) -> torch.Tensor | int:
    """Clip the gradients of a network; 1 where their norm was above the bound, 0 too in the modes that know no norm."""
    parameters = clipped(model, args.clip_mode)
    if args.clip_mode == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad) > args.clip_grad
    dispatch_clip_grad(parameters, args.clip_grad, args.clip_mode)
    return 0
