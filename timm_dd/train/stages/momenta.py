"""Optimizer states that stay with their weights: through the merge, fine-tuning goes on where the parts stopped, and
through the split of a later cycle the parts where fine-tuning did.

Without them Adam's first steps are of the size of the learning rate in every weight, whatever the gradient, and undo
what has been learned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ... import models
from ...planning.plan import Plan, TensorPlan
from ..epochs.checkpoints import read_newest
from ..updates import optimizers
from ..updates.learner import Learner
from .folder import PartsStage

States = Mapping[str, Mapping[str, object]]  # by weight, then by kind: tensors of the weight's shape, and numbers


def carry(learner: Learner, plan: Plan, stage: PartsStage, part: nn.Module, before: States) -> None:
    """Give the composed network's optimizer the states of the parts' last checkpoints, by weight as `merge_state` says;
    nothing if there are none, or if they are not by weight (Adafactor's are of rows and columns).

    Args:
        part: one of the parts, by whose parameters their states are numbered.
        before: of the model that the parts were split from, which the weights between the blocks keep.
    """
    shapes = [{name: t.part_shape(k, plan.divisor) for name, t in plan.tensors.items()} for k in range(plan.parts)]
    names = _names(part, learner.args)
    states = [_by_weight(stage.part(k), names, shapes[k]) for k in range(plan.parts)]
    if not all(states):
        return
    merged: dict[str, dict] = {}
    for name, values in states[0].items():
        merged[name] = dict(values)
        for kind, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                onto = before[name][kind] if name in before else None
                merged[name][kind] = merge_state(plan.tensors[name], [s[name][kind] for s in states], onto)
    optimizers.take(learner.optimizer, learner.net, merged)


def merge_state(t: TensorPlan, states: Sequence[torch.Tensor], onto: torch.Tensor | None = None) -> torch.Tensor:
    """A weight's state from its parts': each in its block; of a weight that several have, the mean, since each has the
    whole gradient. Between the blocks it is what it was, `onto`. Where it was nothing there is no momentum yet, and of
    what is nowhere negative, a second moment, the mean of that inside: from zero, Adam's first steps there would be
    three times the learning rate."""
    total, owners = torch.zeros(t.shape, dtype=states[0].dtype), torch.zeros(t.shape)
    for k, state in enumerate(states):
        at = t.block(k, len(states))
        total[at] += state.cpu()
        owners[at] += 1
    total /= owners.clamp_min(1).to(total.dtype)
    if onto is not None:
        return torch.where(owners > 0, total, onto.to(total.dtype))
    if not bool((total < 0).any()):
        total[owners == 0] = total[owners > 0].mean()
    return total


def of_tuned(folder: Path, args: argparse.Namespace, plan: Plan) -> States:
    """Of the last checkpoint of a fine-tuned model; none if there is none, or if they are not by weight."""
    model = models.create(plan.model, **plan.model_args)
    return _by_weight(folder, _names(model, args), {name: t.shape for name, t in plan.tensors.items()})


def changed(states: States, change: Callable[[str, torch.Tensor], torch.Tensor]) -> States:
    """The same of weights that were changed likewise: `change` is given each weight's name and state."""
    return {
        name: {k: change(name, v) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in values.items()}
        for name, values in states.items()
    }


def hand_down(learner: Learner, plan: Plan, k: int, states: States) -> None:
    """Give part k's optimizer the states of the model that it was split from."""
    restricted = changed(states, lambda name, state: state[plan.tensors[name].block(k, plan.divisor)].contiguous())
    optimizers.take(learner.optimizer, learner.net, restricted)


def _names(model: nn.Module, args: argparse.Namespace) -> list[str]:
    """Its parameters, in the order in which their states are numbered."""
    return optimizers.names(optimizers.create(model, args, 0.0), model)


def _by_weight(folder: Path, names: Sequence[str], shapes: Mapping[str, tuple]) -> dict:
    """The states of the newest checkpoint of a model, if each has its weight's shape."""
    held = read_newest(folder)
    if held is None:
        return {}
    states = optimizers.by_name(names, *held)
    tensors = ((name, v) for name, values in states.items() for v in values.values() if isinstance(v, torch.Tensor))
    return states if all(not v.ndim or tuple(v.shape) == tuple(shapes[name]) for name, v in tensors) else {}
