"""The learning rate: timm's schedules, and gu2022's, with a rate for each of its steps (section 3.1.1)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler

from ...errors import TrainError
from . import metrics


class Steps(Scheduler):
    """The rate times ``rates[i]`` from epoch ``milestones[i]`` on, after `warmup` epochs that rise linearly."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        milestones: Sequence[int],
        rates: Sequence[float],
        warmup: int,
        warmup_lr: float,
    ):
        super().__init__(optimizer, "lr")
        self.steps, self.warmup, self.warmup_lr = list(zip(milestones, rates)), warmup, warmup_lr
        self.update_groups(self._get_lr(0))

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup:
            return [self.warmup_lr + t * (v - self.warmup_lr) / self.warmup for v in self.base_values]
        factor = math.prod(rate for milestone, rate in self.steps if t >= milestone)
        return [v * factor for v in self.base_values]


class Plateau:
    """Divides what a schedule says by √10 each time `patience` epochs brought no better accuracy (section 3.1.1).

    Args:
        sign: -1 where a smaller figure is the better one.
    """

    def __init__(self, schedule: Scheduler, patience: int, sign: int = 1):
        self.schedule, self.patience, self.sign = schedule, patience, sign
        self.best, self.waited, self.factor = -math.inf, 0, 1.0

    def step(self, epoch: int, metric: float) -> None:
        better = self.sign * metric
        self.waited = 0 if better > self.best else self.waited + 1
        self.best = max(self.best, better)
        if self.waited >= self.patience:
            self.waited, self.factor = 0, self.factor / math.sqrt(10)
        self.schedule.step(epoch, metric)
        for group in self.schedule.optimizer.param_groups:
            group["lr"] *= self.factor

    def step_update(self, updates: int) -> None:
        self.schedule.step_update(updates)


def epochs(args: argparse.Namespace) -> int:
    """Of a stage: with --warmup-prefix, --cooldown-epochs and --lr-cycle-limit more than --epochs, as in timm."""
    if args.decay_rates or not args.epochs:
        return args.epochs
    optimizer = torch.optim.SGD([torch.zeros(())], lr=1.0)
    return create_scheduler_v2(optimizer, **_arguments(args) | {"step_on_epochs": True})[1]


def _arguments(args: argparse.Namespace) -> dict:
    milestones = args.decay_milestones or []
    return {**scheduler_kwargs(args), "num_epochs": max(args.epochs, 1), "decay_milestones": milestones}


def create(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """The schedule of a stage; `step` after every epoch, `step_update` after every update."""
    if args.decay_rates:
        schedule: Scheduler = Steps(
            optimizer, args.decay_milestones, args.decay_rates, args.warmup_epochs, args.warmup_lr
        )
    else:
        schedule, _ = create_scheduler_v2(optimizer, **_arguments(args), updates_per_epoch=updates_per_epoch)
        if schedule is None:
            raise TrainError(
                f"--sched {args.sched}: timm has no such schedule; cosine, step and poly are some that it has"
            )
    return Plateau(schedule, args.plateau_epochs, metrics.sign(args)) if args.plateau_epochs else schedule
