"""The parts' optimizer states, carried through the merge: fine-tuning goes on where the parts stopped.

Without them Adam's first steps are of the size of the learning rate in every weight, whatever the gradient, and undo
what the parts have learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...planning.plan import Plan, TensorPlan
from ..epochs.checkpoints import read_newest
from ..updates import optimizers
from ..updates.learner import Learner
from .folder import PartsStage


def carry(learner: Learner, plan: Plan, stage: PartsStage, part: nn.Module) -> None:
    """Give the composed network's optimizer the states of the parts' last checkpoints, by weight as `merge_state` says;
    nothing if there are none, or if they are not by weight (Adafactor's are of rows and columns).

    Args:
        part: one of the parts, by whose parameters their states are numbered.
    """
    held = [read_newest(stage.part(k)) for k in range(plan.parts)]
    theirs = optimizers.names(optimizers.create(part, learner.args, 0.0), part)
    states = [optimizers.by_name(theirs, *h) for h in held if h is not None]
    if len(states) < plan.parts or not all(_is_by_weight(plan, k, s) for k, s in enumerate(states)):
        return
    merged = {}
    for name, values in states[0].items():
        merged[name] = dict(values)
        for kind, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                merged[name][kind] = merge_state(plan.tensors[name], [s[name][kind] for s in states])
    optimizers.take(learner.optimizer, learner.net, merged)


def merge_state(t: TensorPlan, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """A weight's state from its parts': each in its block; of a weight that several have, the mean, since each has the
    whole gradient. Between the blocks there is no momentum yet, and of what is nowhere negative, a second moment, the
    mean of that inside: from zero, Adam's first steps there would be three times the learning rate."""
    total, owners = torch.zeros(t.shape, dtype=states[0].dtype), torch.zeros(t.shape)
    for k, state in enumerate(states):
        at = t.block(k, len(states))
        total[at] += state.cpu()
        owners[at] += 1
    total /= owners.clamp_min(1).to(total.dtype)
    if not bool((total < 0).any()):
        total[owners == 0] = total[owners > 0].mean()
    return total


def _is_by_weight(plan: Plan, k: int, states: dict[str, dict]) -> bool:
    shapes = {name: plan.tensors[name].part_shape(k, plan.divisor) for name in states}
    tensors = ((name, v) for name, values in states.items() for v in values.values() if isinstance(v, torch.Tensor))
    return all(not v.ndim or tuple(v.shape) == shapes[name] for name, v in tensors)
