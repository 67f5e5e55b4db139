"""What this machine has, and what a container lets a process have of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory() -> int:
    """The main memory that this process may use, in bytes."""
    limits = [int(text) for text in control("memory.max") if text.isdecimal()]
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def control(file: str) -> list[str]:
    """What the control groups above this process, of version 2, say in such a file; "max" is no limit."""
    try:
        name = next(line for line in CGROUP.read_text().splitlines() if line.startswith("0::"))[4:]
    except (OSError, StopIteration):
        return []
    found = []
    for folder in (CGROUPS / name, *(CGROUPS / name).parents):
        with contextlib.suppress(OSError):
            found.append((folder / file).read_text().strip())
    return found
