"""What K packed learners do with their gradients: clip, scale, step and average, all of them at once where that gives
what each for itself would get."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from itertools import chain

import torch
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.func import vmap

from ...compat import foreach_copy_, foreach_lerp_, foreach_mul_, foreach_norm, overflows
from .clipping import clipped
from .learner import Learner
from .stacked import Differ, Stacked, TensorByTensor, Way
from .trial import find_way

EPS = 1e-6  # of `torch.nn.utils.clip_grad_norm_`


class Abreast:
    """Learners whose parameters are slices of those of `packed`, (K, *shape), as their gradients are of its gradients.

    Each for itself takes the update that makes the optimizers' states, and what one optimizer cannot take: with
    learning rates or numbers of updates that differ, or an overflow of some. Which it is follows from the states alone,
    so that a run that goes on from its checkpoints has the bits of one that was not interrupted.
    """

    def __init__(self, learners: Sequence[Learner], packed: nn.Module):
        self.learners, self.packed = list(learners), packed
        self.stacked: Stacked | None = None
        self._averages = _averaged(self.learners)

    @cached_property
    def way(self) -> Way | None:
        return find_way(self.learners[0].optimizer, len(self.learners))

    def apply_gradients(self, isolate_failures: bool) -> None:
        alone = None
        try:
            if not self._may_stack():
                alone = Learner.apply_gradients
            elif any(self._overflows()):
                alone = partial(Learner.apply_gradients, unscaled=True)
            else:
                self._step()
        except Exception as e:  # of all
            for n in self.learners:
                n.fail(e, isolate_failures)
        for n in self.learners if alone else ():
            n.guard(partial(alone, n), isolate_failures)

    def _step(self) -> None:
        first = self.learners[0]
        if first.args.clip_grad is not None:
            clip(self.learners, self.packed, first.args.clip_grad, first.args.clip_mode)
        self.stacked.step()
        for n in self.learners:
            n.scaler.update()

    def _may_stack(self) -> bool:
        """Whether one optimizer takes this update."""
        if self.way is None or any(n.around_step is not nullcontext for n in self.learners):
            return False
        if self.stacked is None or not self.stacked.holds:
            self.stacked = self._stack(self.way)
        return self.stacked is not None and self.stacked.takes_rates

    def _stack(self, way: Way) -> Stacked | None:
        own = [n.optimizer for n in self.learners]
        place = {id(p): t for p, t in zip(self.learners[0].net.parameters(), self.packed.parameters())}
        try:
            return Stacked(own, [place[id(p)] for group in own[0].param_groups for p in group["params"]], way)
        except Differ:
            return None

    def _overflows(self) -> Sequence[bool]:
        """Whose gradients, unscaled here, are not finite; read at once."""
        scaling = [n for n in self.learners if n.scaler.is_enabled()]
        for n in scaling:
            n.scaler.unscale_(n.optimizer)
        found = [overflows(n.scaler, n.optimizer) for n in scaling]
        return torch.stack(found).tolist() if found else []

    def average(self) -> None:
        """The moving averages of all, in one operation."""
        if self._averages is not None:
            means, values, counts, counted = self._averages
            first = self.learners[0]
            with torch.no_grad():
                foreach_lerp_(means, values, 1.0 - first.ema.get_decay(first.updates))
                foreach_copy_(counts, counted)


def _averaged(learners: Sequence[Learner]) -> tuple[list, list, list, list] | None:
    """(averages, what they are of, counts, what they are copies of); None without averages."""
    if any(n.ema is None for n in learners):
        return None
    pairs = list(
        chain.from_iterable(zip(n.result.state_dict().values(), n.net.state_dict().values()) for n in learners)
    )
    means, counts = ([p for p in pairs if p[0].is_floating_point() is kind] for kind in (True, False))
    return [a for a, _ in means], [b for _, b in means], [a for a, _ in counts], [b for _, b in counts]


def clip(learners: Sequence[Learner], packed: nn.Module, value: float, mode: str) -> None:
    """`clipping.clip` of each learner."""
    if mode == "norm":
        gradients = [[p.grad for p in n.net.parameters() if p.grad is not None] for n in learners]
        for n, above in zip(learners, _clip_norms(gradients, value)):
            n.sums.clipped += above
    elif mode == "value":
        dispatch_clip_grad(packed.parameters(), value, mode)
    else:
        moved = [p for p in clipped(packed, mode) if p.grad is not None]
        with TensorByTensor():
            vmap(partial(_clip_of_one, value, mode))([p.detach() for p in moved], [p.grad for p in moved])


def _clip_of_one(value: float, mode: str, slices: list, gradients: list) -> torch.Tensor:
    for p, gradient in zip(slices, gradients):
        p.grad = gradient
    dispatch_clip_grad(slices, value, mode)
    return gradients[0]


def _clip_norms(gradients: Sequence[Sequence[torch.Tensor]], largest: float) -> Sequence[torch.Tensor]:
    """As `torch.nn.utils.clip_grad_norm_` of each of the lists; whose norms were above the `largest`."""
    norms = torch.stack(foreach_norm(list(chain.from_iterable(gradients)))).view(len(gradients), -1)
    norms = torch.linalg.vector_norm(norms, dim=1)
    for some, factor in zip(gradients, (largest / (norms + EPS)).clamp(max=1.0)):
        foreach_mul_(some, factor)
    return (norms > largest).unbind()
