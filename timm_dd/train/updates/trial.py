"""How one optimizer can do the work of K, if it can: tried once, on random tensors of the same shapes."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from ...compat import TorchDispatchMode
from .stacked import Stacked, Way, parameters, rates_of

SAME = 1e-4  # of the largest element: how near the updates in the trial are
TRIED = 3  # updates in the trial, the first of which makes the states


def find_way(optimizer: Optimizer, networks: int) -> Way | None:
    """How one optimizer can do the work of several like this, in fewer operations; None if it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as of what vmap does slice after slice
        for mapped in (False, True):
            with contextlib.suppress(Exception):  # whatever its code does not do with stacked tensors
                trial = Trial(optimizer, networks, mapped)
                if trial.succeeds():
                    return replace(trial.way, rates=mapped and trial.takes_rates())
    return None


class Trial:
    """Networks with random weights and gradients take updates by their own optimizers, and others by one."""

    def __init__(self, optimizer: Optimizer, networks: int, mapped: bool):
        self.networks = networks
        self.expected, self.found = _random_copies(optimizer, networks), _random_copies(optimizer, networks)
        self.tensors = [torch.stack(row) for row in zip(*map(parameters, self.found))]
        self.start = [t.clone() for t in self.tensors]
        for k, o in enumerate(self.found):
            for p, t in zip(parameters(o), self.tensors):
                p.data = t[k]
        self._draw(0)
        for o in (*self.expected, *self.found):
            o.step()
        names = tuple(frozenset(self.found[0].state.get(p, ())) for p in parameters(self.found[0]))
        self.way = Way(mapped, names, _varying(self.found) if mapped else frozenset())
        self.stacked = Stacked(self.found, self.tensors, self.way)
        self.theirs, self.its = _Operations(), _Operations()

    def _draw(self, seed: int) -> None:
        """Random gradients, larger from network to network."""
        generator = torch.Generator().manual_seed(seed)
        for t, *row in zip(self.tensors, *map(parameters, (*self.expected, *self.found))):
            t.grad = torch.stack([(1 + k) * _like(t[k], generator) for k in range(self.networks)])
            for i, p in enumerate(row):
                p.grad = t.grad[i % self.networks].clone()

    def succeeds(self) -> bool:
        """Whether weights and states are the same after some updates, and operations less."""
        for seed in range(1, TRIED):
            self._draw(seed)
            with self.theirs:
                for o in self.expected:
                    o.step()
            with self.its:
                self.stacked.step()
        if self.its.count >= self.theirs.count:
            return False
        for t, first, *row in zip(self.tensors, self.start, *map(parameters, self.expected)):
            if not _near(torch.stack(row) - first, t - first):
                return False
        states = ((o.state[p], q.state[r]) for o, q in zip(self.expected, self.found) for p, r in _pairs(o, q))
        return all(_near(value, found[name]) for own, found in states for name, value in own.items())

    def takes_rates(self) -> bool:
        """Whether they are still, with learning rates of their own."""
        for k, (o, other) in enumerate(zip(self.expected, self.found)):
            for group in (*o.param_groups, *other.param_groups):
                group.update((name, rate / (1 + k)) for name, rate in rates_of(group).items())
        try:
            return self.succeeds()
        except Exception:  # as `math.sqrt` of a tensor
            return False


class _Operations(TorchDispatchMode):
    """Counts those that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def _near(expected: Any, found: Any) -> bool:
    """Numbers are the same; tensors differ by no more than rounding."""
    if not isinstance(expected, torch.Tensor):
        return expected == found
    return bool((expected - found).abs().max() <= SAME * expected.abs().max())


def _pairs(o: Optimizer, other: Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(parameters(o), parameters(other))


def _varying(own: Sequence[Optimizer]) -> frozenset[str]:
    """The states without dims that differ after an update."""
    rows = ([o.state[p] for o, p in zip(own, row)] for row in zip(*map(parameters, own)))
    scalars = ((n, [s[n] for s in states]) for states in rows for n, v in states[0].items() if _is_scalar(v))
    return frozenset(name for name, values in scalars if any(not torch.equal(v, values[0]) for v in values))


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.ndim


def _random_copies(optimizer: Optimizer, networks: int) -> list[Optimizer]:
    """Some like it, with random weights of different size, and no states."""
    generator, copies = torch.Generator().manual_seed(0), []
    for k in range(networks):
        memo: dict[int, Any] = {id(optimizer.state): defaultdict(dict)}
        for p in parameters(optimizer):
            memo[id(p)] = torch.nn.Parameter((1 + 2 * k) * _like(p, generator))
        copies.append(copy.deepcopy(optimizer, memo))
        for group in copies[-1].param_groups:
            group["lr"] = 0.1
    return copies


def _like(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(t.shape, generator=generator).to(t)
