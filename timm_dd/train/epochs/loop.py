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
import torch.nn.functional as F
from timm.utils import distribute_bn
from tqdm import tqdm

from ...storage.atomic import replacing
from ...text import duration
from ..engines import Engine
from ..images.data import begin_epoch
from ..updates.layout import precise
from ..updates.learner import Learner
from .checkpoints import CheckpointTimer, save
from .progress import Progress
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
        later: what follows them, see `Progress`.
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
    later: float | None = None

    def fit(self, learners: Sequence[Learner]) -> None:
        """Train `learners` side by side until each has a history of all epochs."""
        interval = None if sys.stderr.isatty() else learners[0].args.log_interval
        progress = Progress(self.title, self.epochs, len(self.loaders[0]), interval, self.later)
        for epoch in range(self.epochs):
            due, start = [n for n in _alive(learners) if len(n.history) <= epoch], time.perf_counter()
            if not due:
                continue
            speed, waited = self._epoch(due, epoch, progress)
            due = _alive(due)
            if not due:
                return
            for learner in due:
                _share_statistics(learner)
            trained = time.perf_counter()
            found = self._evaluated(due, epoch)
            seconds = time.perf_counter() - start
            spent = {"seconds": seconds, "waiting": waited, "evaluation": time.perf_counter() - trained}
            for learner, figures in zip(due, found):
                learner.guard(partial(learner.end_epoch, **spent, **figures), self.isolate_failures)
            due = _alive(due)
            self.after_epoch()
            if self.primary:
                self._keep(due)
            if self.reports:
                self._say(due, epoch, f"{speed}, {duration(seconds * (self.epochs - epoch - 1))} left")

    def _evaluated(self, learners: Sequence[Learner], epoch: int) -> list[dict]:
        """What each is worth after an epoch; nothing between those of --val-interval."""
        if (epoch + 1) % learners[0].args.val_interval and epoch + 1 < self.epochs:
            return [{"accuracy": None}] * len(learners)
        found = measure(learners, self.loaders[1], self.engine, timer=self.timer, shared=self.shared)
        return [{"accuracy": f["top1"], "top5": f["top5"], "eval_loss": f["loss"]} for f in found]

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
            names.setdefault(_figures(n.history[-1]), []).append(n.name)
        rates = " ".join(f"{', '.join(who)}: {figures}" for figures, who in names.items())
        tqdm.write(f"{self.title} {epoch + 1}/{self.epochs}  {rates} {speed}")
        sys.stdout.flush()

    def _epoch(self, learners: Sequence[Learner], epoch: int, progress: Progress) -> tuple[str, float]:
        """The updates of an epoch that the learners have not taken yet; returns how fast they were, and the seconds
        that they waited for data."""
        train, start, waited, images = self.loaders[0], time.perf_counter(), 0.0, 0
        first = epoch * len(train)
        if all(n.updates >= first + len(train) for n in learners):
            return "done before", 0.0  # interrupted while it was evaluated
        begin_epoch(train, self.seed, epoch)
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
            if self.timer.due:
                for learner in _alive(learners):
                    learner.guard(learner.check_finite, self.isolate_failures)
                self.timer.keep(_alive(learners))
            if self.reports and (line := progress.line(epoch, i)):
                tqdm.write(line)
                sys.stdout.flush()
            asked = time.perf_counter()
        seconds = time.perf_counter() - start
        return f"{images / seconds:.0f} images/s, {100 * waited / seconds:.0f} % of it waiting for data", waited

    def _bar(self, learners: Sequence[Learner], epoch: int) -> tqdm:
        """The batches of an epoch; on a terminal as one bar of all learners over all epochs, with images/s, the time
        that is left, and the last accuracies."""
        train, title = self.loaders[0], f"{self.title} {epoch + 1}/{self.epochs}"
        last = (n.history[-1]["top1"] for n in learners if n.history)
        known = " ".join(f"{top1:.1f}" for top1 in last if top1 is not None)
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


def _figures(row: dict) -> str:
    """Of an epoch, for a line."""
    known = "" if row["top1"] is None else f", {row['top1']:.2f} %, top-5 {row['top5']:.2f} %"
    return f"loss {row['loss']:.3f}{known};"


def _alive(learners: Sequence[Learner]) -> list[Learner]:
    return [n for n in learners if n.failure is None]


def _share_statistics(learner: Learner) -> None:
    """Under DistributedDataParallel each rank may have other BatchNorm statistics; evaluated are those of the first, of
    averages too."""
    if learner.distributed and learner.args.dist_bn == "broadcast":
        distribute_bn(learner.net, dist.get_world_size())
    if learner.ema is not None and learner.distributed:
        for statistics in learner.ema.module.buffers():
            dist.broadcast(statistics, 0)


def _write_summary(learner: Learner) -> None:
    """All epochs so far, in the form of timm's summary.csv; and what of their seconds was no training. Where gradients
    are clipped, summary.csv says in how many of an epoch's updates, in %."""
    columns = {"train_loss": "loss", **{f"eval_{name}": name for name in ("top1", "top5")}, "eval_loss": "eval_loss"}
    columns |= {"lr": "lr", "seconds": "seconds"}
    columns |= {"clipped": "clipped"} if any("clipped" in row for row in learner.history) else {}
    for name, of in ("summary.csv", columns), ("times.csv", {kind: kind for kind in ("waiting", "evaluation")}):
        with replacing(learner.folder / name) as temporary, open(temporary, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["epoch", *of])
            writer.writerows([i, *map(row.get, of.values())] for i, row in enumerate(learner.history))


def measure(
    learners: Sequence[Learner],
    loader,
    engine: Engine,
    together: bool = False,
    timer: CheckpointTimer | None = None,
    shared: bool = True,
) -> list[dict[str, float]]:
    """Top-1 and top-5 accuracies in %, and the cross entropy, of each learner on its view; with `together` also of the
    sum of their logits, last.

    What is `shared` by the ranks of a process group, each of them counts its share of, each image once. The sums stay
    on the device until all is counted.
    """
    for learner in learners:
        learner.model.eval()
    shared = shared and dist.is_initialized()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    total, device = len(loader.dataset), learners[0].device
    left = -(-(total - rank) // ranks)  # of this rank's images; the sampler pads with repeats
    sums = torch.zeros(len(learners) + together, 3, dtype=precise(device), device=device)
    for x, y in loader:
        outputs = engine.scores(learners, x)
        mine, left = min(len(y), left), max(left - len(y), 0)
        sums += torch.stack([_sums(z[:mine], y[:mine]) for z in ([*outputs, sum(outputs)] if together else outputs)])
        if timer is not None and timer.due:
            timer.keep(learners)
    if shared:
        dist.all_reduce(sums)
    return [{"top1": 100 * a / total, "top5": 100 * b / total, "loss": c / total} for a, b, c in sums.tolist()]


def _sums(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Images whose class is the first, or among the first five, and the cross entropy of all."""
    five = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
    loss = F.cross_entropy(logits, y, reduction="sum")
    return torch.stack([n.to(precise(y.device)) for n in ((logits.argmax(1) == y).sum(), five.any(1).sum(), loss)])
