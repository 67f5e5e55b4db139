"""One optimizer on the stacked tensors of K networks, in the place of K optimizers.

Where an update is elementwise, the optimizer takes the stacked tensors as they are; where it has norms or factors of a
tensor, its step runs under vmap, which keeps the networks apart. Which of them gives what K optimizers give, if any
does, is tried once, see `trial`.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.func import debug_unwrap, vmap
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ...compat import has_vmap_rule

FACTORS = ("alpha", "value")  # of arguments, by name


class Differ(Exception):
    """The numbers of the K optimizers are not the same."""


@dataclass(frozen=True)
class Way:
    """How one optimizer does the work of K.

    Attributes:
        mapped: under vmap.
        names: of each parameter's states, once it has taken an update.
        varying: of states without dims that may differ from network to network.
        rates: whether learning rates may differ too.
    """

    mapped: bool
    names: tuple[frozenset[str], ...]
    varying: frozenset[str] = frozenset()
    rates: bool = False


class TensorByTensor(TorchFunctionMode):
    """What vmap has no rules for: functions of lists of tensors, as what they are of each; some that work in place;
    factors that are tensors."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        instead, of_lists = _without_rule(function)
        if kwargs and any(isinstance(kwargs.get(factor), torch.Tensor) for factor in FACTORS):
            args, kwargs = _multiplied(args, kwargs)
        if instead is None:
            return function(*args, **(kwargs or {}))
        if not of_lists:
            return args[0].copy_(instead(*args, **(kwargs or {})))
        rows = zip(*(a if isinstance(a, (list, tuple)) else [a] * len(args[0]) for a in args))
        with self:
            return [instead(*row, **(kwargs or {})) for row in rows]


@functools.cache
def _without_rule(function: Any) -> tuple[Any, bool]:
    """(what to call instead of a function that vmap has no rule for, or None; whether for each tensor of lists)."""
    name = getattr(function, "__name__", "")
    if name.startswith("_foreach_"):
        return getattr(torch.Tensor, name.removeprefix("_foreach_")), True
    in_place = name.endswith("_") and not name.endswith("__") and not has_vmap_rule(name)
    beside = getattr(torch.Tensor, name[:-1], None) if in_place else None
    return (beside if callable(beside) else None), False


def _multiplied(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """With the factors that are tensors taken into what they multiply."""
    rest = {name: v for name, v in kwargs.items() if name not in FACTORS or not isinstance(v, torch.Tensor)}
    for name in kwargs.keys() - rest.keys():
        args = (args[0], args[1] * kwargs[name], *args[2:])
    return args, rest


class Stacked:
    """The optimizer of K networks whose parameters are slices of `tensors`, (K, *shape). The states of their `own`
    optimizers become slices of its states, so that checkpoints are theirs; numbers that all have are shared.

    Args:
        tensors: in the order of the optimizers' parameters, with gradients.

    Raises:
        Differ: their numbers are not the same, or some have no states yet.
    """

    def __init__(self, own: Sequence[Optimizer], tensors: Sequence[torch.Tensor], way: Way):
        self.own, self.tensors, self.way = list(own), list(tensors), way
        self._rows = list(zip(*(parameters(o) for o in own)))
        for row, t, names in zip(self._rows, self.tensors, way.names):
            if t.grad is not None and any(o.state.get(p, {}).keys() != names for o, p in zip(own, row)):
                raise Differ(names)
        groups = [_common([_numbers(g) for g in row], way) for row in zip(*(o.param_groups for o in own))]
        states = [_common([o.state.get(p, {}) for o, p in zip(own, row)], way) for row in self._rows]
        state: defaultdict[torch.Tensor, dict] = defaultdict(dict, zip(self.tensors, states))
        memo: dict[int, Any] = {id(own[0].state): state}
        memo |= {id(p): t for (p, *_), t in zip(self._rows, self.tensors)}
        self.optimizer = copy.deepcopy(own[0], memo)
        for group, numbers in zip(self.optimizer.param_groups, groups):
            group.update(numbers)
        self._bound: list[dict[str, Any]] = [{} for _ in self.tensors]
        self._tell([{} for _ in groups])
        self._left: list[bool] = []  # by those that went on alone
        for o in own:
            _unshare_when_alone(o, self._left)

    @property
    def holds(self) -> bool:
        """Whether nobody has taken an update with its own optimizer, or loaded another state."""
        return not self._left

    @property
    def takes_rates(self) -> bool:
        """Whether it can go by the learning rates that the optimizers have now."""
        return self.way.rates or self._agree()

    def _agree(self) -> bool:
        """Whether they have the same; tensors are the same if they are one."""
        rows = (zip(*(rates_of(g).values() for g in row)) for row in zip(*(o.param_groups for o in self.own)))
        rates = [values for row in rows for values in row]
        return all(r is v[0] or not isinstance(r, torch.Tensor) and r == v[0] for v in rates for r in v)

    def step(self) -> None:
        """One update of all networks, along the gradients of `tensors`."""
        for mine, theirs in zip(self.optimizer.param_groups, self.own[0].param_groups):
            mine.update(rates_of(theirs))
        before = [dict(group) for group in self.optimizer.param_groups]
        if self.way.mapped:
            self._step_of_each([] if self._agree() else self._own_rates())
        else:
            self.optimizer.step()
        self._tell(before)

    def _own_rates(self) -> list[dict[str, torch.Tensor]]:
        """(K,) by name, of each group."""
        rows = (list(map(rates_of, row)) for row in zip(*(o.param_groups for o in self.own)))
        return [{n: torch.tensor([r[n] for r in row]).to(self.tensors[0]) for n in row[0]} for row in rows]

    @torch.no_grad()
    def _step_of_each(self, rates: Sequence[dict[str, torch.Tensor]]) -> None:
        """The optimizer's step of a network, under vmap, with its learning rates if they are not all the same."""
        mine, groups, state = self.optimizer, [g["params"] for g in self.optimizer.param_groups], self.optimizer.state
        moving = [t for t in self.tensors if t.grad is not None]
        of_each = [{n: v for n, v in state[t].items() if self._is_stacked(v, t)} for t in moving]
        shared = [{n: v for n, v in state[t].items() if n not in each} for t, each in zip(moving, of_each)]
        found: list[tuple[int, str, Any]] = []
        names = [(i, name) for i, each in enumerate(of_each) for name in each]
        made: list[tuple[int, str]] = []

        def of_one(*flat: torch.Tensor) -> list[torch.Tensor]:
            given = iter(flat)
            slices = list(islice(given, len(moving)))
            for s in slices:
                s.grad = next(given)
            held = [dict(each) for each in shared]
            for i, name in names:
                held[i][name] = next(given)
            mine.state = defaultdict(dict, zip(slices, held))
            place = {id(t): s for t, s in zip(moving, slices)}
            for group, whole in zip(mine.param_groups, groups):
                group["params"] = [place[id(t)] for t in whole if id(t) in place]
            for group, own in zip(mine.param_groups, rates):
                group.update(zip(own, given))
            mine.step()
            after = [(i, name, v) for i, s in enumerate(slices) for name, v in mine.state[s].items()]
            found.extend((i, name, v) for i, name, v in after if not _is_batched(v))
            made.extend((i, name) for i, name, v in after if _is_batched(v))
            return [v for _, _, v in after if _is_batched(v)]

        given = [of_each[i][name] for i, name in names], [r for own in rates for r in own.values()]
        try:
            with TensorByTensor():
                stacked = vmap(of_one)(*(t.detach() for t in moving), *(t.grad for t in moving), *chain(*given))
        finally:
            mine.state = state
            for group, whole in zip(mine.param_groups, groups):
                group["params"] = whole
        for t in moving:
            state[t] = {}
        for i, name, value in found:
            state[moving[i]][name] = value
        for (i, name), value in zip(made, stacked):
            state[moving[i]][name] = _in_place(value, of_each[i].get(name))

    def _is_stacked(self, value: Any, t: torch.Tensor) -> bool:
        """Whether a state has a slice for each network."""
        return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == len(t)

    def _tell(self, before: Sequence[dict]) -> None:
        """Give the networks' optimizers what has changed: slices of new states, and numbers."""
        for j, (group, old) in enumerate(zip(self.optimizer.param_groups, before)):
            changed = {n: v for n, v in _numbers(group).items() if old.get(n, self) is not v}
            for o in self.own:
                o.param_groups[j].update(changed)
        for t, row, bound in zip(self.tensors, self._rows, self._bound):
            for name, value in self.optimizer.state.get(t, {}).items():
                if bound.get(name, self) is not value:
                    bound[name] = value
                    sliced = self._is_stacked(value, t)
                    for k, (o, p) in enumerate(zip(self.own, row)):
                        o.state[p][name] = value[k] if sliced else value


def _in_place(value: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """`value` where it was before, if it was."""
    if before is None:
        return value.contiguous()
    return before if value.data_ptr() == before.data_ptr() else before.copy_(value)


def parameters(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _numbers(group: dict) -> dict:
    return {name: value for name, value in group.items() if name != "params" and name not in rates_of(group)}


def rates_of(group: dict) -> dict:
    """The learning rate, and what groups hold besides it of the schedule."""
    return {name: value for name, value in group.items() if "lr" in name}


def _is_batched(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and debug_unwrap(value) is not value


def _common(rows: Sequence[dict], way: Way) -> dict:
    """States of K networks as those of the stacked tensors; Differ if their numbers are not the same."""
    if any(row.keys() != rows[0].keys() for row in rows):
        raise Differ(rows[0].keys())
    return {n: _one(n, [row[n] for row in rows], way) for n in rows[0]}


def _one(name: str, values: list, way: Way) -> Any:
    first = values[0]
    if not isinstance(first, torch.Tensor):
        if any(v != first for v in values):
            raise Differ(name)
        return first
    if first.ndim > 0:  # in the memory format that each has
        return torch.cat(values).unflatten(0, (len(values), -1))
    if name in way.varying:
        return torch.stack(values)
    if not all(torch.equal(v, first) for v in values):
        raise Differ(name)
    return first.clone()


def _unshare_when_alone(optimizer: Optimizer, left: list[bool]) -> None:
    """Before it takes an update for itself, give `optimizer` its own numbers, and note that it did; so too when it has
    loaded a state."""

    def leave(*_: Any) -> None:
        left.append(True)
        for handle in handles:
            handle.remove()
        for values in (*optimizer.state.values(), *optimizer.param_groups):
            values.update((n, v.clone()) for n, v in values.items() if isinstance(v, torch.Tensor) and not v.ndim)

    handles = [optimizer.register_step_pre_hook(leave), optimizer.register_load_state_dict_post_hook(leave)]
