"""What is added up over an epoch; it stays on the device until somebody asks."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

import torch

from ...errors import TrainError


class EpochSums:
    """Of the epoch so far.

    Attributes:
        loss: of all images.
        images: how many.
        clipped: updates whose gradients were.
    """

    def __init__(self, device: torch.device):
        self.loss, self.clipped = (torch.zeros((), device=device) for _ in range(2))
        self.images = 0

    def add(self, loss: torch.Tensor, images: int) -> None:
        """A batch, whose mean loss was `loss`."""
        self.loss, self.images = self.loss + loss * images, self.images + images

    def mean(self, name: str) -> float:
        """The loss of an image.

        Raises:
            TrainError: that of the network of this `name` is not finite.
        """
        loss = float(self.loss) / max(self.images, 1)
        if not math.isfinite(loss):
            raise TrainError(f"{name}: the loss is {loss}; use a smaller --lr, --clip-grad, or longer --warmup-epochs")
        return loss

    def clipping(self, args: argparse.Namespace, updates: int) -> dict[str, float]:
        """In how many of an epoch's `updates` the gradients were clipped, in %, where that is counted."""
        counted = args.clip_grad is not None and args.clip_mode == "norm"
        return {"clipped": 100 * float(self.clipped) / updates} if counted else {}

    def clear(self) -> None:
        self.loss, self.images = torch.zeros_like(self.loss), 0
        self.clipped.zero_()  # where a CUDA graph knows it

    def state(self) -> dict[str, torch.Tensor]:
        return {"total": self.loss, "clipped": self.clipped}

    def restore(self, tensors: Mapping[str, torch.Tensor], images: int) -> None:
        self.loss, self.images = tensors["total"].to(self.loss.device), images
        self.clipped.copy_(tensors.get("clipped", torch.zeros(())))  # older checkpoints have none
