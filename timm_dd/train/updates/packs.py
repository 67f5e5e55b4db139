"""Learners that are alike as one network, and which of several are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...surgery.packed import alike, pack
from .abreast import Abreast
from .learner import Learner, compiled
from .timings import Timings


class Pack:
    """Learners of one shape, that see views of one size, as one network, whose slices their tensors are; see
    `surgery.packed`. The losses are summed, so that each has the gradients of its loss alone.

    Args:
        timings: by which convolutions are computed; None: as grouped ones.
    """

    def __init__(self, learners: Sequence[Learner], timings: Timings | None = None):
        self.learners, self.packed = list(learners), pack([n.net for n in learners])
        self.packed.share_storage(n.net for n in learners)
        if timings is not None and not learners[0].args.torchcompile:  # which chooses for itself
            self.packed.choose_convolutions(timings.fastest)
        self.forward, self.abreast = compiled(self.packed, learners[0].args), Abreast(learners, self.packed)

    def gradients(self, seen: Sequence[torch.Tensor], y: torch.Tensor) -> Sequence[torch.Tensor]:
        """The losses of a batch, of which each has `seen` its view."""
        first = self.learners[0]
        total = torch.zeros(len(self.learners), device=first.device)
        for i, (y_i, *seen_i) in enumerate(first.chunks(y, *seen)):
            logits = self.logits(seen_i, i)
            with first.autocast():
                losses = [n.criterion(z, y_i) * (len(y_i) / len(y)) for n, z in zip(self.learners, logits)]
            sum(n.scaler.scale(loss) for n, loss in zip(self.learners, losses)).backward()
            total += torch.stack(losses).detach()
        self.scatter_gradients()
        return total.unbind()

    def logits(self, seen: Sequence[torch.Tensor], micro_batch: int) -> Sequence[torch.Tensor]:
        first = self.learners[0]
        if micro_batch == 0:
            self.packed.zero_grad()
        with first.random(first.updates, micro_batch), first.autocast():
            return self.forward(torch.stack(list(seen))).unbind()

    def scatter_gradients(self) -> None:
        self.packed.scatter_gradients(n.net for n in self.learners)

    def scores(self, seen: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The logits, in eval mode."""
        self.packed.eval()
        try:
            with self.learners[0].autocast():
                return self.forward(torch.stack(list(seen))).float().unbind()
        finally:
            self.packed.train()


def groups(learners: Sequence[Learner]) -> list[list[Learner]]:
    """Those that can be one `Pack`: of the same shapes and numbers, that see as many pixels whenever they see some."""
    of_shape = alike([n.net for n in learners])
    keys = [(shape, n.sight.sizes) for shape, n in zip(of_shape, learners)]
    return [[n for n, key in zip(learners, keys) if key == this] for this in dict.fromkeys(keys)]
