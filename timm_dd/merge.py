"""Prolongation: K parts become the model itself, each part's weights in its own blocks, zero between them.

`merge_tensor` makes one global tensor of its K parts, (2.11)–(2.14) and (2.22); everything else is a loop over it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from . import files, models
from .errors import MergeError
from .plan import Plan, TensorPlan
from .split import Parts, plan_model

HEADS = ("sum", "mean")


def merge(parts: Parts | str | Path, *, head: str = "sum", model: nn.Module | None = None) -> nn.Module:
    """The global model with the parts' weights, ready to train or to save.

    Args:
        parts: from `split`, or the folder that `Parts.save` wrote.
        head: ``sum`` the parts' logits, (2.16); ``mean`` for regression, (2.22).
        model: the module that was split, where parts on disk come from one.

    Raises:
        MergeError: a part is missing, damaged, not finite, or of another split.
    """
    if isinstance(parts, Parts):
        plan, states = parts.plan, [part.state_dict() for part in parts]
        model = parts.origin if model is None else model
        for k, state in enumerate(states):
            files.check_state(plan, k, state, f"part {k}")
    else:
        plan = files.load_plan(parts)
        states = [files.load_part(parts, plan, k) for k in range(plan.parts)]
    check_mergeable(plan, head)
    files.check_dtypes(states)
    merged = (
        models.create(plan.model, **plan.model_args)
        if plan.model is not None
        else copy.deepcopy(plan_model(plan, model))
    )
    _load(merged, dict(merge_tensors(plan, merged.state_dict(), lambda k, name: states[k][name], head)))
    return merged


def _load(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give `model` the tensors of `state`, each in its own dtype; what was tied stays tied."""
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    for name, own in model.named_buffers():
        if name not in state and own.is_floating_point():
            own.data = own.data.to(dtype)
    for name, own in model.state_dict(keep_vars=True).items():
        own.data = state[name].to(own.device)


def merge_files(
    folder: str | Path,
    output: str | Path,
    *,
    head: str = "sum",
    model: nn.Module | None = None,
    data: Mapping | None = None,
) -> None:
    """Merge parts on disk into ``model.safetensors`` and timm's ``config.json``, one tensor in memory at a time.

    Args:
        head, model: as for `merge`.
        data: of the images, for the config: mean, std, interpolation, crop_pct.

    Raises:
        MergeError: as `merge`; the output folder is left as it was.
    """
    plan = files.load_plan(folder)
    check_mergeable(plan, head)
    with files.open_parts(folder, plan) as read:
        empty = plan_model(plan, model)
        specs = {name: (t.shape, read(0, name).dtype) for name, t in plan.tensors.items() if name in empty.state_dict()}
        files.save_composed(
            output,
            empty,
            specs,
            merge_tensors(plan, specs, read, head),
            {"input_size": plan.input_size, **(data or {})},
        )


def check_mergeable(plan: Plan, head: str) -> None:
    """Raise MergeError unless K parts of a K-th of the width are to be merged, with a head that they have."""
    if plan.divisor != plan.parts:
        raise MergeError(
            f"{plan.parts} parts of a network whose width was divided by {plan.divisor} do not fill it; "
            f"only parts split with width_divisor={plan.parts}, the default, can be merged"
        )
    if head not in HEADS:
        raise MergeError(f"head is 'sum' (classification) or 'mean' (regression), got {head!r}")
    if head == "mean" and not plan.head:
        raise MergeError("the outputs of this model have no weights of their own to divide by K; use head='sum'")


def merge_tensors(
    plan: Plan, names, read: Callable[[int, str], torch.Tensor], head: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """The global tensors, one after another; ``read(k, name)`` gives part k's."""
    for name in names:
        t = plan.tensors[name]
        tensor = merge_tensor(t, [read(k, name) for k in range(plan.parts)])
        if head == "mean" and plan.parts > 1 and name in plan.head:
            tensor = tensor / plan.parts
        yield name, tensor


def merge_tensor(t: TensorPlan, blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """One global tensor: the blocks in their places, or their sum, or the mean of those that own an element."""
    if not blocks[0].is_floating_point() and t.reduce != "place":
        return torch.stack(list(blocks)).amax(0)  # a count of batches
    if t.reduce == "mean" and all(a is None for a in t.axes) and all(torch.equal(blocks[0], b) for b in blocks[1:]):
        return blocks[0].clone()
    out = blocks[0].new_zeros(t.shape, dtype=blocks[0].dtype if t.reduce == "place" else torch.float64)
    owners = torch.zeros(t.shape)
    for k, block in enumerate(blocks):
        at = t.block(k, len(blocks))
        if t.reduce == "place":
            rows = t.index(k, len(blocks))[0] if t.outside == "mean" else None
            if rows is not None:
                out[rows] = block.double().mean(tuple(range(1, block.ndim)), keepdim=True).to(block.dtype)
            out[at] = block
        else:
            out[at] += block
            owners[at] += 1
    return (out / owners.clamp(min=1) if t.reduce == "mean" else out).to(blocks[0].dtype)
