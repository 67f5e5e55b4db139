"""How networks take a training step. A `Learner` is one network with its optimizer, schedule and random state."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import dispatch_clip_grad
from torch import nn

from ..errors import TrainError
from . import schedule


class Learner:
    """One network in training; its dropout draws from a random state of its own, so that learners that share a
    process do not disturb each other.

    Args:
        crop: the view of a batch that the network sees.
        global_batch: images of an update over all ranks, for ``--lr-base``.
        seed: of the random state.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        crop: Callable[[torch.Tensor], torch.Tensor],
        args: argparse.Namespace,
        device: torch.device,
        updates_per_epoch: int,
        global_batch: int,
        seed: int,
    ):
        self.name, self.model, self.crop, self.args, self.device = name, model, crop, args, device
        lr = args.lr if args.lr is not None else args.lr_base * global_batch / 256
        self.optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), "lr": lr})
        self.schedule = schedule.create(args, self.optimizer, updates_per_epoch)
        self.loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
        self.dtype = getattr(torch, args.amp_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp and self.dtype is torch.float16)
        self.updates, self.seconds = 0, 0.0
        self.random = torch.Generator(device).manual_seed(seed).get_state()

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One update on a batch; returns the loss, detached."""
        with self._own_random():
            with torch.autocast(self.device.type, self.dtype, enabled=self.args.amp):
                loss = self.loss(self.model(self._view(x)), y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.args.clip_grad, self.args.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        self.schedule.step_update(self.updates)
        return loss.detach()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.args.amp):
            return self.model(self._view(x)).float()

    def _view(self, x: torch.Tensor) -> torch.Tensor:
        x = self.crop(x)
        return x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        module = torch.cuda if self.device.type == "cuda" else torch
        before = module.get_rng_state()
        module.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = module.get_rng_state()
            module.set_rng_state(before)


def check_finite(name: str, loss: float) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise TrainError(f"{name}: the loss is {loss}; use a smaller --lr, --clip-grad, or longer --warmup-epochs")
