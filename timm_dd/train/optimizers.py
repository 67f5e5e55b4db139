"""Optimizers: timm's, in torch's fused form where there is one, and their states as tensors by name and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn
from torch.optim import Optimizer


def create(model: nn.Module, args: argparse.Namespace, lr: float) -> Optimizer:
    """timm's, in torch's fused form where there is one: an update is one call for all tensors."""
    given = {**optimizer_kwargs(args), "lr": lr}
    plain = create_optimizer_v2(model, **given)
    return create_optimizer_v2(model, **given, fused=True) if "fused" in plain.defaults else plain


def state(optimizer: Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that `restore` needs: tensors by name, and JSON."""
    held = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict] = {"state": {}, "group": {}}
    for kind, entries in (("state", held["state"]), ("group", dict(enumerate(held["param_groups"])))):
        for i, values in entries.items():
            found = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
            tensors |= {f"{kind}.{i}.{name}": t for name, t in found.items()}
            numbers[kind][str(i)] = {name: v for name, v in values.items() if name not in found}
    return tensors, numbers


def restore(optimizer: Optimizer, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> None:
    """Go back to a `state`, whose tensors may be among others; ValueError or KeyError if it is of another optimizer."""
    held = {kind: {int(i): dict(v) for i, v in entries.items()} for kind, entries in numbers.items()}
    for key in (k for k in tensors if k.startswith(("state.", "group."))):
        kind, i, name = key.split(".", 2)
        held[kind][int(i)][name] = tensors[key]
    groups = [held["group"][i] for i in sorted(held["group"])]
    optimizer.load_state_dict({"state": held["state"], "param_groups": groups})
    for p, values in optimizer.state.items():  # a fused update goes through memory, whatever the strides
        alike = {k: t for k, t in values.items() if isinstance(t, torch.Tensor) and t.shape == p.shape}
        values.update((k, torch.empty_like(p, dtype=t.dtype).copy_(t)) for k, t in alike.items())
