"""Prolongation: K parts become the model itself, each part's weights in its blocks. Outside them are zeros or, for a
correction, the weights of a model.

`merge` gives a model in memory; `merge_files` does the same from disk to disk. Both are loops over `merge_rows`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import models
from ..errors import MergeError, SplitError, public
from ..planning.graphs import first_float, memory_format
from ..planning.plan import Plan
from ..storage import files
from ..storage.merge_files import Base, check_mergeable, count_rows, merge_rows, zeros
from ..storage.tensorfile import from_raw, to_raw
from .parts import Parts
from .source import plan_model


@public
def merge(
    parts: Parts | str | Path,
    *,
    head: str = "sum",
    model: nn.Module | None = None,
    onto: nn.Module | None = None,
) -> nn.Module:
    """The global model with the parts' weights, ready to train or to save; channels-last as the model or the parts are.

    With `onto`, whose weights are θ, it is a correction: θ + Σ_k P_k (θ_k − R_k θ), additive Schwarz, where R_k is
    what `split` does and P_k what merging does to part k. So θ stays outside the blocks, θ_k is inside; standardised
    filters move with the mean of their blocks; sums and means are those of the parts alone, since Σ_k P_k R_k θ = θ.
    ``merge(split(model), onto=model)`` is the model, bit for bit; with a mean head, which `split` does not undo, all
    of it but the head.

    Args:
        parts: from `split`, or the folder that `Parts.save` wrote, or ``hf-hub:USER/REPO``.
        head: ``sum`` the parts' logits, (2.16); ``mean`` for regression, (2.22).
        model: the module that was split, where parts on disk come from one.
        onto: of the model that was split, in the parts' dtypes; it is not changed.

    Raises:
        MergeError: a part is missing, damaged, not finite, or of another split; `onto` is of another architecture or
            dtype, or not finite.
    """
    if isinstance(parts, Parts):
        parts.check_complete()
        plan, states = parts.plan, [part.state_dict() for part in parts]
        model = parts.origin if model is None else model
        for k, state in enumerate(states):
            files.check_state(plan, k, state)
    else:
        with files.PartsFolder(parts) as folder:
            plan, states = folder.plan, [folder.load(k) for k in range(folder.plan.parts)]
    check_mergeable(plan, head)
    dtypes = files.common_dtypes([{name: t.dtype for name, t in state.items()} for state in states])
    pieces = [{name: to_raw(t) for name, t in state.items()} for state in states]

    def rows(k: int, name: str, first: int, last: int) -> np.ndarray:
        return np.atleast_1d(pieces[k][name])[first:last]

    base = zeros(plan, dtypes) if onto is None else _weights(plan, dtypes, onto)
    state = {}
    for name, t in plan.tensors.items():
        value = merge_rows(plan, name, dtypes[name], rows, base, 0, count_rows(t), head)
        state[name] = from_raw(value, dtypes[name]).reshape(t.shape)
    merged = _blank(plan, onto if model is None else model)
    _load(merged, state, [*states, {} if onto is None else onto.state_dict()])
    return merged


def _weights(plan: Plan, dtypes: Mapping[str, torch.dtype], model: nn.Module) -> Base:
    """Of a model in memory, once it is found to be the plan's."""
    if not isinstance(model, nn.Module):
        raise MergeError(f"onto: expected a torch module, got {type(model).__name__}; merge_files takes a folder")
    state = model.state_dict()
    files.check_onto(plan, dtypes, state)

    def rows(name: str, first: int, last: int) -> np.ndarray:
        return np.atleast_1d(to_raw(state[name]))[first:last].copy()

    return rows


def _blank(plan: Plan, model: nn.Module | None) -> nn.Module:
    """The global model, to be given its weights."""
    if plan.model is None:
        return copy.deepcopy(plan_model(plan, model))
    models.check_known(plan.model, plan.model_args)
    try:
        return models.create(plan.model, **plan.model_args)
    except SplitError as e:
        raise MergeError(f"the plan does not fit its model: {e}") from e


def _load(model: nn.Module, state: Mapping[str, torch.Tensor], sources: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Give `model` the tensors of `state`, in their dtypes, channels-last where it or one of their `sources` is; what
    was tied stays tied."""
    dtype = first_float(state.values())
    for name, buffer in model.named_buffers():
        if name not in state and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    for name, old in model.state_dict(keep_vars=True).items():
        if name not in state or state[name].shape != old.shape:
            found = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
            raise MergeError(f"the plan does not fit its model: {name}, {tuple(old.shape)} in the model, is {found}")
        held_in = memory_format(old, *(source[name] for source in sources if name in source))
        old.data = state[name].to(old.device, memory_format=held_in)
