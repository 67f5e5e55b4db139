"""Workers of loaders: who asks a run to stop may ask all its processes, and its first process needs the others until it
has saved; they end with it."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

REQUESTS, END = (signal.SIGTERM, signal.SIGINT), signal.SIGUSR1


class _Process(ForkProcess):
    """It is born with these signals blocked: until `begin` they would end it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (*REQUESTS, END))
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(ForkContext):
    Process = _Process


@atexit.register
def _end() -> None:
    """When Python exits it asks the workers that are left to end, by a signal that they ignore, and waits for them."""
    for process in multiprocessing.active_children():
        if isinstance(process, _Process):
            os.kill(process.pid, END)


def begin(info: Any) -> int:
    """What a worker does first; returns the seed that torch gave it, for timm."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END, lambda *_: os._exit(0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*REQUESTS, END))
    return info.seed


def shield(loader: DataLoader) -> DataLoader:
    """Give a loader workers that are born so; those that do not come from a fork have no state of this process."""
    if loader.num_workers and multiprocessing.get_start_method() == "fork":
        loader.multiprocessing_context = _Context()
    return loader


def each(dataset: Dataset, batch: int, collate: Callable[[list], Any], workers: int) -> DataLoader:
    """A loader of all images in their order, beside the random numbers that augmentation draws from."""
    generator = torch.Generator()
    given = dict(num_workers=workers, worker_init_fn=_begin, collate_fn=collate, generator=generator)
    return shield(DataLoader(dataset, batch, **given))


def _begin(_: int) -> None:
    begin(get_worker_info())
