"""Distillation: the composed model learns from the parts' common decision too, a teacher that was trained already.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015), at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from ...two_level.network import TwoLevel
from ..updates.learner import Learner

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def distilled(learner: Learner, folder: Path, share: float) -> Loss:
    """A learner's loss, of which `share` is the cross entropy against the probabilities of the two-level network in
    `folder`, on the same crops."""
    teacher = TwoLevel.load(folder).to(learner.device).eval()

    def loss(logits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            taught = teacher.probabilities(x)
        return (1 - share) * learner.criterion(logits, y) + share * F.cross_entropy(logits.float(), taught)

    return loss
