"""A loader's processes: they end with the first process, not before it, and read files that they have opened."""

from __future__ import annotations

import os
import signal
import threading

from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import Dataset, Subset


def begin_worker(info) -> int:
    """What a worker does first. Who asks a run to stop may ask all its processes, and the first one needs the others
    until it has saved: they end when that one says so, or has died. Returns the seed that torch gave it, for timm."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    _open_tars_anew(info.dataset)
    return info.seed


def _end_when_told(first: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != first:
        pass
    os._exit(0)


def _open_tars_anew(dataset: Dataset) -> None:
    """Processes that inherit an open file share the place in it that they read at, and would read each other's
    images."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    states = getattr(getattr(dataset, "reader", None), "tar_state", {})  # of one tar, or by the name of several
    left = list(states.values()) if isinstance(states, dict) else [states]
    while left:
        state = left.pop()
        state.tf = None
        left += state.children.values()
