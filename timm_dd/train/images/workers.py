"""Workers of loaders: who asks a run to stop may ask all its processes, and its first process needs the others until it
has saved. They end when that one says so, or has died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ...compat import end_with_parent

REQUESTS = (signal.SIGTERM, signal.SIGINT)


class _Process(ForkProcess):
    """It is born with these signals blocked: until `begin` they would end it."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(ForkContext):
    Process = _Process


def begin(info: Any) -> int:
    """What a worker does first; returns the seed that torch gave it, for timm."""
    first = multiprocessing.parent_process().pid
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which macOS lacks: there nobody knows who asks
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(first,), daemon=True).start()
    end_with_parent()
    if os.getppid() != first:
        os._exit(0)  # it has died before
    return info.seed


def _end_when_told(first: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != first:
        pass
    os._exit(0)


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
