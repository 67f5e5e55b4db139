"""Epochs: one decoded batch goes to every learner, each takes its view of it.

Learners that go on from checkpoints may stand at different updates: a batch goes to those whose next it is.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..storage.atomic import replacing
from .checkpoints import CheckpointTimer, save
from .data import seed_epoch
from .engines import Engine
from .learner import Learner
from .trackers import Trackers


@dataclass
class TrainingLoop:
    """Epochs of some learners on one data set.

    Attributes:
        loaders: (train, validation).
        engine: of the learners' steps.
        after_epoch: called when an epoch's accuracies are known.
        primary: whether this process writes.
        reports: whether it prints.
        shared: whether the ranks share the images.
        isolate_failures: whether one that fails leaves the others to go on; `Learner.failure` says why it did.
    """

    title: str
    loaders: tuple
    epochs: int
    seed: int
    timer: CheckpointTimer
    engine: Engine
    trackers: Trackers
    after_epoch: Callable[[], None] = lambda: None
    primary: bool = True
    reports: bool = True
    shared: bool = True
    isolate_failures: bool = False

    def fit(self, learners: Sequence[Learner]) -> None:
        """Train `learners` side by side until each has a history of all epochs."""
        for epoch in range(self.epochs):
            due, start = [n for n in _alive(learners) if len(n.history) <= epoch], time.perf_counter()
            if not due:
                continue
            speed, waited = self._epoch(due, epoch)
            due = _alive(due)
            if not due:
                return
            for learner in due:
                _share_averages(learner)
            timer, trained = self.timer if self.primary else None, time.perf_counter()
            accuracies = evaluate(due, self.loaders[1], self.engine, timer=timer, shared=self.shared)
            seconds = time.perf_counter() - start
            spent = {"waiting": waited, "evaluation": time.perf_counter() - trained}
            for learner, accuracy in zip(due, accuracies):
                learner.guard(partial(learner.end_epoch, accuracy, seconds, spent), self.isolate_failures)
            due = _alive(due)
            self.after_epoch()
            if self.primary:
                self._keep(due)
            if self.reports:
                self._say(due, epoch, f"{speed}, {seconds * (self.epochs - epoch - 1):.0f} s left")

    def _keep(self, learners: Sequence[Learner]) -> None:
        for learner in learners:
            _write_summary(learner)
            save(learner)
        for learner in learners:
            self.trackers.log(learner.name, len(learner.history), learner.history[-1])
        if learners:
            self.trackers.end_epoch(len(learners[0].history))

    def _say(self, learners: Sequence[Learner], epoch: int, speed: str) -> None:
        names: dict[str, list[str]] = {}  # by their figures: those of parts that decide together are the same
        for n in learners:
            names.setdefault(f"loss {n.history[-1]['loss']:.3f}, {n.history[-1]['top1']:.2f} %;", []).append(n.name)
        rates = " ".join(f"{', '.join(who)}: {figures}" for figures, who in names.items())
        tqdm.write(f"{self.title} {epoch + 1}/{self.epochs}  {rates} {speed}", sys.stdout)
        sys.stdout.flush()

    def _epoch(self, learners: Sequence[Learner], epoch: int) -> tuple[str, float]:
        """The updates of an epoch that the learners have not taken yet; returns how fast they were, and the seconds
        that they waited for data."""
        train, start, waited, images = self.loaders[0], time.perf_counter(), 0.0, 0
        first = epoch * len(train)
        if all(n.updates >= first + len(train) for n in learners):
            return "done before", 0.0  # interrupted while it was evaluated
        seed_epoch(self.seed, epoch)
        sampler = getattr(train, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        for learner in learners:
            learner.model.train()
        bar = self._bar(learners, epoch)
        asked = time.perf_counter()
        for i, (x, y) in enumerate(bar):
            waited += time.perf_counter() - asked
            images += len(y)
            due = [n for n in _alive(learners) if n.updates == first + i]
            if due:
                self.engine.step(due, x, y, self.isolate_failures)
            if self.timer.due and self.primary:
                for learner in _alive(learners):
                    learner.guard(learner.check_finite, self.isolate_failures)
                self.timer.keep(_alive(learners))
            asked = time.perf_counter()
        seconds = time.perf_counter() - start
        return f"{images / seconds:.0f} images/s, {100 * waited / seconds:.0f} % of it waiting for data", waited

    def _bar(self, learners: Sequence[Learner], epoch: int) -> tqdm:
        """The batches of an epoch; on a terminal as one bar of all learners over all epochs, with images/s, the time
        that is left, and the last accuracies."""
        train, title = self.loaders[0], f"{self.title} {epoch + 1}/{self.epochs}"
        known = " ".join(f"{n.history[-1]['top1']:.1f}" for n in learners if n.history)
        return tqdm(
            train,
            title,
            total=self.epochs * len(train),
            initial=epoch * len(train),
            unit=" images",
            unit_scale=learners[0].options["images"],
            postfix=f"top-1 {known} %" if known else None,
            dynamic_ncols=True,
            leave=False,
            disable=not (self.reports and sys.stderr.isatty()),
        )


def _alive(learners: Sequence[Learner]) -> list[Learner]:
    return [n for n in learners if n.failure is None]


def _share_averages(learner: Learner) -> None:
    """Under DistributedDataParallel each rank has other BatchNorm statistics; it takes those of the first for all, and
    so do the averages."""
    if learner.ema is not None and learner.distributed:
        for statistics in learner.ema.module.buffers():
            dist.broadcast(statistics, 0)


def _write_summary(learner: Learner) -> None:
    """All epochs so far, in the form of timm's summary.csv; and what of their seconds was no training."""
    columns = {"train_loss": "loss", "eval_top1": "top1", "lr": "lr", "seconds": "seconds"}
    for name, of in ("summary.csv", columns), ("times.csv", {kind: kind for kind in ("waiting", "evaluation")}):
        with replacing(learner.folder / name) as temporary, open(temporary, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["epoch", *of])
            writer.writerows([i, *(row.get(key, "") for key in of.values())] for i, row in enumerate(learner.history))


def evaluate(
    learners: Sequence[Learner],
    loader,
    engine: Engine,
    together: bool = False,
    timer: CheckpointTimer | None = None,
    shared: bool = True,
) -> list[float]:
    """Top-1 accuracies in %, each learner on its view; with `together` also of the sum of their logits, last.

    What is `shared` by the ranks of a process group, each of them counts its share of, each image once.
    """
    for learner in learners:
        learner.model.eval()
    shared = shared and dist.is_initialized()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    total, seen = len(loader.dataset), 0
    right = [torch.zeros((), dtype=torch.long) for _ in range(len(learners) + together)]
    for x, y in loader:
        mine = (torch.arange(seen, seen + len(y)) * ranks + rank < total).to(y.device)  # the sampler pads with repeats
        seen += len(y)
        outputs = engine.run([partial(n.logits, x) for n in learners])
        for i, logits in enumerate([*outputs, sum(outputs)] if together else outputs):
            right[i] += ((logits.argmax(1) == y) & mine).sum().cpu()
        if timer is not None and timer.due:
            timer.keep(learners)
    counts = torch.stack(right)
    if shared:
        counts = counts.to(learners[0].device)
        dist.all_reduce(counts)
    return [100 * int(c) / total for c in counts]
