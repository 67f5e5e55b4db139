"""How long a training takes: lines for where there is no terminal, and what is ahead."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import fx, nn

from ...text import duration
from ..settings import options
from ..updates import schedule

FIRST = 10  # batches, after which the pace is known
IMAGES = 16  # to compare networks with


class Progress:
    """Lines about a stage that takes `epochs` of so many `batches`.

    Args:
        interval: batches from line to line; None: no lines but the estimate.
        later: what follows the stage, as a multiple of its own work; None: not known.
    """

    def __init__(
        self,
        title: str,
        epochs: int,
        batches: int,
        interval: int | None,
        later: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.title, self.epochs, self.batches, self.interval = title, epochs, batches, interval
        self.later, self.clock = later, clock
        self.begun: tuple[int, float] | None = None  # the first batch, which makes things ready, and when it ended
        self.estimated = later is None

    def line(self, epoch: int, batch: int) -> str | None:
        """After a batch, counted from 0 as epochs are; None if nothing is due."""
        now, done = self.clock(), epoch * self.batches + batch
        if self.begun is None:
            self.begun = done, now
            return None
        pace = (now - self.begun[1]) / (done - self.begun[0])
        due = self.interval is not None and (batch + 1) % self.interval == 0
        known = done - self.begun[0] >= FIRST or batch + 1 == self.batches
        if not due and (self.estimated or not known):
            return None
        left = pace * (self.epochs * self.batches - done - 1)
        text = f"{self.title} {epoch + 1}/{self.epochs}, batch {batch + 1}/{self.batches}: {duration(left)} left"
        if known and not self.estimated:
            self.estimated = True
            whole = pace * self.epochs * self.batches * (1 + (self.later or 0))
            text += f" of this stage; the whole run takes about {duration(whole)}"
        return text


def seconds_of(network: nn.Module, size: Sequence[int], device: torch.device, threads: int) -> float:
    """Of a step on a few images of this (C, *size), on one core: the shorter of two, after one that makes things ready.
    The network's statistics change, and no random numbers are drawn from outside."""
    before, taken = torch.get_num_threads(), []
    network = network.to(device).train()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            x = torch.rand(IMAGES, *size, device=device)
            for _ in range(3):
                start = time.perf_counter()
                network(x).sum().backward()
                float(next(network.parameters()).grad.sum())  # a GPU is done
                taken.append((time.perf_counter() - start) * threads)
    finally:
        torch.set_num_threads(before)
    return min(taken[1:])


def filled(graph: fx.GraphModule, device: torch.device) -> nn.Module:
    """A network of this graph, which has no numbers, with small ones that only take time."""
    network = copy.deepcopy(graph).to_empty(device=device)
    with torch.no_grad():
        for t in chain(network.parameters(), network.buffers()):  # an index need not be in the state dict
            t.fill_(0.01 if t.is_floating_point() else 0)
    return network


def after_parts(
    args: argparse.Namespace, macs: Mapping, whole: float, trained: Iterable[int], ranks: int
) -> float | None:
    """The work of all stages that follow the parts, as a multiple of a rank's own for those that it `trained`.

    Args:
        macs: multiply-adds, see `summary.multiply_adds`.
        whole: seconds of a multiply-add of the whole model, as a multiple of those of a part, which is slower for its
            size.
    """

    def epochs(stage: str | None) -> int:
        return schedule.epochs(options.stage_options(args, stage))

    mine, shared = sum(macs["parts"][k] for k in trained), whole * macs["composed"] / ranks
    parts = epochs("part") * mine
    if not parts:
        return None
    joint = epochs("joint") * macs.get("joint", 0) * mine / sum(macs["parts"])
    together = sum(epochs(how) * macs["two_level"][how] / ranks for how in args.together)
    baseline = epochs("baseline") * shared if args.baseline else 0
    cycle = joint + together + epochs(None) * shared
    return (args.cycles * (parts + cycle) - parts + baseline) / parts
