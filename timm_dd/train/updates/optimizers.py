"""Optimizers: timm's, in torch's fused form where there is one, and their states as tensors by name and JSON."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn
from torch.optim import Optimizer

from ... import models
from ...errors import TrainError
from ..settings import options
from .capture import has_graphs


def create(model: nn.Module, args: argparse.Namespace, lr: float) -> Optimizer:
    """timm's, in torch's fused form where there is one: an update is one call for all tensors. Not where gradients are
    scaled: if the first ones overflow, as they often do, torch's fused SGD goes on with momenta that nobody has set."""
    given = {**optimizer_kwargs(args), **args.opt_kwargs, "lr": lr}
    may_capture = has_graphs(next(model.parameters()).device)
    if args.layer_decay and not hasattr(model, "group_matcher"):
        model = Layered(model, args)
    plain = create_optimizer_v2(model, **given)
    if "fused" not in plain.defaults or scales(args):
        return plain
    graphs = {"capturable": True} if may_capture and "capturable" in plain.defaults else {}
    return create_optimizer_v2(model, **given, fused=True, **graphs)


class Layered(nn.Module):
    """A part as timm's ``--layer-decay`` sees a model: with the layers of the whole one, whose names it has."""

    def __init__(self, part: nn.Module, args: argparse.Namespace):
        super().__init__()
        whole = models.create_empty(args.model, **options.model_arguments(args, args.num_classes))
        if not hasattr(whole, "group_matcher"):
            raise TrainError(f"--layer-decay: {args.model} has no group_matcher, which tells layers; leave it out")
        self.group_matcher, self.no_weight_decay = whole.group_matcher, getattr(whole, "no_weight_decay", set)
        self.named_parameters = part.named_parameters  # type: ignore[method-assign]


def rate(args: argparse.Namespace, images: int) -> float:
    """The learning rate of updates of so many `images`, as timm scales it."""
    if args.lr is not None:
        return args.lr
    adaptive = any(kin in args.opt.lower() for kin in ("ada", "lamb"))
    scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
    ratio = images / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def scales(args: argparse.Namespace) -> bool:
    """Whether gradients are scaled, since those of float16 would vanish."""
    return args.amp and args.amp_dtype == "float16"


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


def restore(
    optimizer: Optimizer, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any], keep_rates: bool = False
) -> None:
    """Go back to a `state`, whose tensors may be among others; ValueError or KeyError if it is of another optimizer.

    Args:
        keep_rates: the learning rates stay as they are, where those of the state are of another schedule.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    held = {kind: {int(i): dict(v) for i, v in entries.items()} for kind, entries in numbers.items()}
    for key in (k for k in tensors if k.startswith(("state.", "group."))):
        kind, i, name = key.split(".", 2)
        held[kind][int(i)][name] = tensors[key]
    _load(optimizer, held["state"], [held["group"][i] for i in sorted(held["group"])])
    for group, rate in zip(optimizer.param_groups, rates if keep_rates else ()):
        group["lr"] = rate


def names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """The parameters of `model`, in the order in which the optimizer's states are numbered."""
    named = {id(p): name for name, p in model.named_parameters()}
    return [named[id(p)] for group in optimizer.param_groups for p in group["params"]]


def by_name(names: Sequence[str], tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> dict[str, dict]:
    """The states in what a checkpoint holds, by the parameter's name."""
    found: dict[str, dict] = {names[int(i)]: dict(v) for i, v in numbers["optimizer"]["state"].items()}
    for key in (k for k in tensors if k.startswith("state.")):
        _, i, kind = key.split(".", 2)
        found[names[int(i)]][kind] = tensors[key]
    return found


def take(optimizer: Optimizer, model: nn.Module, states: Mapping[str, dict]) -> None:
    """Go on with `states`, by the parameter's name."""
    numbered = {i: states[name] for i, name in enumerate(names(optimizer, model)) if name in states}
    _load(optimizer, numbered, optimizer.state_dict()["param_groups"])


def _load(optimizer: Optimizer, states: Mapping[int, dict], groups: list) -> None:
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    for p, values in optimizer.state.items():  # a fused update goes through memory, whatever the strides
        alike = {k: t for k, t in values.items() if isinstance(t, torch.Tensor) and t.shape == p.shape}
        values.update((k, torch.empty_like(p, dtype=t.dtype).copy_(t)) for k, t in alike.items())
