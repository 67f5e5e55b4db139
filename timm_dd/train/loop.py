"""Epochs: one decoded batch goes to every learner, each takes its own view of it.

Learners that go on from checkpoints may stand at different updates: a batch goes to those whose next it is.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from .. import files
from ..errors import headline
from .checkpoints import Keeper, save
from .data import seed_epoch
from .engines import Engine, Learner


def fit(
    learners: Sequence[Learner],
    loaders: tuple,
    epochs: int,
    seed: int,
    title: str,
    keeper: Keeper,
    engine: Engine,
    after_epoch: Callable[[], None] | None = None,
    primary: bool = True,
    apart: bool = False,
) -> None:
    """Train `learners` side by side until each has a history of `epochs`.

    Args:
        loaders: (train, validation).
        engine: of the learners' steps.
        after_epoch: called when an epoch's accuracies are known.
        primary: whether this process reports and writes.
        apart: whether one that fails leaves the others to go on; `Learner.failure` says why it did.
    """
    train, val = loaders
    for epoch in range(epochs):
        due, start = [n for n in _alive(learners) if len(n.history) <= epoch], time.perf_counter()
        if not due:
            continue
        _epoch(due, train, epoch, seed, f"{title} {epoch + 1}/{epochs}", keeper, engine, primary, apart)
        due = _alive(due)
        for learner, accuracy in zip(due, evaluate(due, val, engine, keeper=keeper if primary else None)):
            guard(learner, partial(learner.end_epoch, accuracy), apart)
        due, seconds = _alive(due), time.perf_counter() - start
        for learner in due:
            learner.seconds += seconds
        if after_epoch is not None:
            after_epoch()
        if primary:
            for learner in due:
                _write_summary(learner)
                save(learner)
            rates = " ".join(f"{n.name}: loss {n.history[-1]['loss']:.3f}, {n.history[-1]['top1']:.2f} %;" for n in due)
            tqdm.write(f"{title} {epoch + 1}/{epochs}  {rates} {seconds * (epochs - epoch - 1):.0f} s left", sys.stdout)
            sys.stdout.flush()


def _alive(learners: Sequence[Learner]) -> list[Learner]:
    return [n for n in learners if n.failure is None]


def guard(learner: Learner, work: Callable[[], None], apart: bool) -> None:
    """Do `work`; if it fails and learners are kept apart, note that in the learner."""
    try:
        work()
    except Exception as e:  # whatever ends one part must not end the others, but all need the loader
        if not apart or "DataLoader worker" in str(e):
            raise
        learner.failure = headline(e)
        tqdm.write(f"{learner.name} failed: {learner.failure}", sys.stdout)


def _write_summary(learner: Learner) -> None:
    """All epochs so far, in the form of timm's summary.csv."""
    with files.replacing(learner.folder / "summary.csv") as temporary, open(temporary, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["epoch", "train_loss", "eval_top1", "lr"])
        writer.writerows([i, row["loss"], row["top1"], row["lr"]] for i, row in enumerate(learner.history))


def _epoch(
    learners, loader, epoch: int, seed: int, title: str, keeper: Keeper, engine: Engine, primary: bool, apart: bool
) -> None:
    """The updates of an epoch that the learners have not taken yet."""
    first = epoch * len(loader)
    if all(n.updates >= first + len(loader) for n in learners):
        return  # interrupted while it was evaluated
    seed_epoch(seed, epoch)
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    for learner in learners:
        learner.model.train()
    bar = tqdm(loader, desc=title, leave=False, disable=not (primary and sys.stderr.isatty()))
    for i, (x, y) in enumerate(bar):
        due = [n for n in _alive(learners) if n.updates == first + i]
        engine.run([partial(guard, n, partial(n.step, x, y), apart) for n in due])
        if keeper.due and primary:
            for learner in _alive(learners):
                guard(learner, learner.check_finite, apart)
            keeper.keep(_alive(learners))


def evaluate(
    learners: Sequence[Learner], loader, engine: Engine, together: bool = False, keeper: Keeper | None = None
) -> list[float]:
    """Top-1 accuracies in %, each learner on its own view; with `together` also of the sum of their logits, last.

    Under a process group every rank counts its share of the images, each image once.
    """
    for learner in learners:
        learner.model.eval()
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    total, seen = len(loader.dataset), 0
    right = [torch.zeros((), dtype=torch.long) for _ in range(len(learners) + together)]
    for x, y in loader:
        mine = (torch.arange(seen, seen + len(y)) * ranks + rank < total).to(y.device)  # the sampler pads with repeats
        seen += len(y)
        outputs = engine.run([partial(n.logits, x) for n in learners])
        for i, logits in enumerate([*outputs, sum(outputs)] if together else outputs):
            right[i] += ((logits.argmax(1) == y) & mine).sum().cpu()
        if keeper is not None and keeper.due:
            keeper.keep(learners)
    counts = torch.stack(right)
    if dist.is_initialized():
        counts = counts.to(learners[0].device)
        dist.all_reduce(counts)
    return [100 * int(c) / total for c in counts]
