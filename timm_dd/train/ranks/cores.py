"""How many threads a run takes: never more than the machine, its container and the user allow."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from ...machine import control

PROCESSES = Path("/proc")


def cores() -> int:
    """The CPU cores that this process may use: of its affinity and the quota of its container."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(found, _quota() or found))


def _quota() -> int | None:
    """The cores that the control groups above this process leave it, rounded up."""
    found = []
    for text in control("cpu.max"):
        with contextlib.suppress(ValueError):  # no limit: max
            limit, period = map(int, text.split())
            found.append(-(-limit // period))
    return min(found, default=None)


def cores_of_rank(local_world: int) -> int:
    """Of the machine's, which its ranks share; never more than OMP_NUM_THREADS."""
    share = max(1, cores() // max(local_world, 1))
    return min(share, _asked_for() or share)


def _asked_for() -> int | None:
    """OMP_NUM_THREADS, if somebody has set it: torchrun, who starts several ranks without it, sets it to 1."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not text.isdecimal() or int(text) < 1:
        return None
    if text == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            given = (PROCESSES / str(os.getppid()) / "environ").read_bytes().split(b"\0")
            return int(text) if any(word.startswith(b"OMP_NUM_THREADS=") for word in given) else None
    return int(text)


def share_cores(local_world: int) -> None:
    """Give each operation of this process all cores of its rank."""
    torch.set_num_threads(cores_of_rank(local_world))


def part_threads(name: str, parts: int, local_world: int) -> int:
    """Threads of an operation in the part stage: of a K-th of the cores, whatever the number of ranks, since sums over
    more threads are rounded otherwise, and a part would differ; of packed ones an operation is that of all."""
    return cores_of_rank(local_world if name == "packed" else parts)
