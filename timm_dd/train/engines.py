"""How networks take a training step. A `Learner` is one network with its optimizer, schedule and progress; an `Engine`
takes the steps of several that share a device.
"""

from __future__ import annotations

import argparse
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..domain import Box
from ..errors import TrainError
from . import options, schedule

RANDOM = threading.Lock()  # torch has one random state for all threads


class Learner:
    """One network in training. The dropout of an update follows from `seed` and the update's number, so that learners
    that share a process do not disturb each other, and one that was interrupted goes on as if it had not been.

    Args:
        box: what the network sees of a batch; None for all of it. While it trains, ``--roam`` moves the box.
        global_batch: images of an update over all ranks, for ``--lr-base``.
        folder: for its ``summary.csv`` and its checkpoints.

    Attributes:
        updates: how many it has taken.
        options: what its weights depend on, the updates of an epoch and the images of an update among them.
        history: loss, top1 and lr of each epoch that ended.
        failure: why it cannot go on; None while it can.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        box: Box | None,
        args: argparse.Namespace,
        device: torch.device,
        updates_per_epoch: int,
        global_batch: int,
        seed: int,
        folder: Path,
    ):
        self.name, self.model, self.box, self.args, self.device = name, model, box, args, device
        self.seed, self.folder = seed, folder
        self.options = {**options.of_training(args), "updates_per_epoch": updates_per_epoch, "images": global_batch}
        lr = args.lr if args.lr is not None else args.lr_base * global_batch / 256
        self.optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(args), "lr": lr})
        self.schedule = schedule.create(args, self.optimizer, updates_per_epoch)
        self.loss = LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()
        self.dtype = getattr(torch, args.amp_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp and self.dtype is torch.float16)
        self._draws = True
        self.updates, self.seconds = 0, 0.0
        self.history: list[dict[str, float]] = []
        self.failure: str | None = None
        self._total, self._images = torch.zeros((), device=device), 0  # loss of the epoch so far

    @property
    def net(self) -> nn.Module:
        """The network itself, without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One update on a batch."""
        with self._own_random():
            with torch.autocast(self.device.type, self.dtype, enabled=self.args.amp):
                loss = self.loss(self.model(self._view(x, self._place(x))), y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if self.args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.args.clip_grad, self.args.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        self.schedule.step_update(self.updates)
        self._total = self._total + loss.detach() * len(y)
        self._images += len(y)

    def check_finite(self) -> float:
        """The mean loss of the epoch so far.

        Raises:
            TrainError: it is not finite.
        """
        loss = float(self._total) / max(self._images, 1)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TrainError(
                f"{self.name}: the loss is {loss}; use a smaller --lr, --clip-grad, or longer --warmup-epochs"
            )
        return loss

    def end_epoch(self, accuracy: float) -> None:
        """Note the epoch's loss and validation accuracy, and go on to the next."""
        self.history.append({"loss": self.check_finite(), "top1": accuracy, "lr": self.lr})
        self._total, self._images = torch.zeros_like(self._total), 0
        self.schedule.step(len(self.history), accuracy)

    @torch.no_grad()
    def logits(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.args.amp):
            return self.model(self._view(x, self.box)).float()

    def _place(self, x: torch.Tensor) -> Box | None:
        """The box of this update: its own, or with the probability ``--roam`` one anywhere in the image."""
        random = Random((self.seed << 32) + self.updates)
        if self.box is None or random.random() >= self.args.roam:
            return self.box
        return self.box.anywhere(x.shape[2:], random)

    def _view(self, x: torch.Tensor, box: Box | None) -> torch.Tensor:
        x = x if box is None else box.crop(x)
        return x.contiguous(memory_format=torch.channels_last) if self.args.channels_last else x

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Random numbers of its own, while no other learner draws any; nothing of that once it drew none in a step."""
        if not self._draws:
            yield
            return
        module = torch.cuda if self.device.type == "cuda" else torch
        with RANDOM:
            before = module.get_rng_state()
            module.manual_seed((self.seed << 32) + self.updates)
            seeded = module.get_rng_state()
            try:
                yield
            finally:
                self._draws = not torch.equal(seeded, module.get_rng_state())
                module.set_rng_state(before)

    # ---- what a checkpoint holds

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """All that `restore` needs: tensors by name, and JSON. The schedule follows from the history."""
        tensors = {f"model.{name}": t for name, t in self.net.state_dict().items()} | {"total": self._total}
        optimizer, numbers = self.optimizer.state_dict(), {"state": {}, "group": {}}
        for kind, entries in (("state", optimizer["state"]), ("group", dict(enumerate(optimizer["param_groups"])))):
            for i, values in entries.items():
                found = {name: v for name, v in values.items() if isinstance(v, torch.Tensor)}
                tensors |= {f"{kind}.{i}.{name}": t for name, t in found.items()}
                numbers[kind][str(i)] = {name: v for name, v in values.items() if name not in found}
        return tensors, {
            "options": self.options,
            "updates": self.updates,
            "images": self._images,
            "seconds": self.seconds,
            "history": self.history,
            "optimizer": numbers,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Go back to a `state`; RuntimeError, ValueError or KeyError if it is of another network or optimizer."""
        optimizer = {k: {int(i): dict(v) for i, v in e.items()} for k, e in numbers["optimizer"].items()}
        for key in (k for k in tensors if k.startswith(("state.", "group."))):
            kind, i, name = key.split(".", 2)
            optimizer[kind][int(i)][name] = tensors[key]
        options.check_same(numbers["options"], self.options)
        self.net.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
        self.history, self.updates = numbers["history"], numbers["updates"]
        for epoch, row in enumerate(self.history, start=1):
            self.schedule.step(epoch, row["top1"])
        self.schedule.step_update(self.updates)
        groups = [optimizer["group"][i] for i in sorted(optimizer["group"])]
        self.optimizer.load_state_dict({"state": optimizer["state"], "param_groups": groups})
        self.scaler.load_state_dict(numbers["scaler"])
        self.seconds, self._images = numbers["seconds"], numbers["images"]
        self._total = tensors["total"].to(self.device)


class Engine:
    """Does the work of several learners that share a device: one after another, or, on a CPU with cores to spare, in
    threads of as many cores as each would have otherwise, which gives the same bits.

    Args:
        name: ``sequential``, ``threads`` or ``auto``, threads where they can run at the same time.
        cores: of this process.
    """

    def __init__(self, name: str = "sequential", learners: int = 1, device: torch.device | None = None, cores: int = 1):
        own, on_cpu = torch.get_num_threads(), device is None or device.type == "cpu"
        if name == "threads" and not on_cpu:
            raise TrainError("--engine threads is for CPUs; use auto")
        workers = min(learners, cores // own) if on_cpu and name != "sequential" else 1
        start = functools.partial(torch.set_num_threads, own)
        self.pool = ThreadPoolExecutor(workers, initializer=start) if workers > 1 else None

    def run(self, works: Sequence[Callable[[], Any]]) -> list:
        """The results of all `works`, in their order."""
        return [work() for work in works] if self.pool is None else list(self.pool.map(lambda work: work(), works))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(among: int) -> None:
    """Give each operation of this process its share of the cores. In the part stage that is one among K, whatever the
    number of ranks: sums over more threads are rounded otherwise, and a part would differ."""
    torch.set_num_threads(max(1, cores() // max(among, 1)))
