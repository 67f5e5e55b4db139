"""Epochs: one decoded batch goes to every learner, each takes its own view of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import update_summary
from tqdm import tqdm

from .data import seed_epoch
from .engines import Learner, check_finite


def fit(
    learners: Sequence[Learner],
    loaders: tuple,
    epochs: int,
    seed: int,
    title: str,
    folders: Sequence[Path],
    after_epoch: Callable[[int, list[float]], None] | None = None,
    primary: bool = True,
) -> list[float]:
    """Train `learners` side by side; returns their last validation accuracies in %.

    Args:
        loaders: (train, validation).
        folders: where each learner's ``summary.csv`` goes.
        after_epoch: called with the epoch and the accuracies.
        primary: whether this process reports and writes.
    """
    train, val = loaders
    accuracies = evaluate(learners, val) if epochs == 0 else []
    for epoch in range(epochs):
        start = time.perf_counter()
        losses = _epoch(learners, train, epoch, seed, f"{title} {epoch + 1}/{epochs}", primary)
        accuracies = evaluate(learners, val)
        for learner, loss, accuracy, folder in zip(learners, losses, accuracies, folders):
            check_finite(learner.name, loss)
            if primary:
                update_summary(epoch, {"loss": loss}, {"top1": accuracy}, str(folder / "summary.csv"), lr=learner.lr)
            learner.schedule.step(epoch + 1, accuracy)
        if after_epoch is not None:
            after_epoch(epoch, accuracies)
        if primary:
            rates = " ".join(
                f"{n.name}: loss {loss:.3f}, {a:.2f} %;" for n, loss, a in zip(learners, losses, accuracies)
            )
            left = (time.perf_counter() - start) * (epochs - epoch - 1)
            tqdm.write(f"{title} {epoch + 1}/{epochs}  {rates} {left:.0f} s left", file=sys.stdout)
            sys.stdout.flush()
    return accuracies


def _epoch(learners, loader, epoch: int, seed: int, title: str, primary: bool) -> list[float]:
    seed_epoch(seed, epoch)
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    for learner in learners:
        learner.model.train()
    totals, images = [0.0] * len(learners), 0
    bar = tqdm(loader, desc=title, leave=False, disable=not (primary and sys.stderr.isatty()))
    for x, y in bar:
        for i, learner in enumerate(learners):
            totals[i] = totals[i] + learner.step(x, y) * len(y)
        images += len(y)
    return [float(t) / max(images, 1) for t in totals]


@torch.no_grad()
def evaluate(learners: Sequence[Learner], loader, together: bool = False) -> list[float]:
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
        outputs = [learner.logits(x) for learner in learners]
        for i, logits in enumerate([*outputs, sum(outputs)] if together else outputs):
            right[i] += ((logits.argmax(1) == y) & mine).sum().cpu()
    counts = torch.stack(right)
    if dist.is_initialized():
        counts = counts.to(learners[0].device)
        dist.all_reduce(counts)
    return [100 * int(c) / total for c in counts]
