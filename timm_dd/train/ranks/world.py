"""Where a process stands among those of its run, and the device that it trains on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import TrainError


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started."""

    rank: int
    local_rank: int
    world: int
    local_world: int

    @classmethod
    def from_environment(cls) -> Ranks:
        names = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
        return cls(*(int(os.environ.get(name, default)) for name, default in names))

    @property
    def primary(self) -> bool:
        return self.rank == 0

    def device(self, name: str | None) -> torch.device:
        """This rank's: by default of this machine's accelerators the one with its number, the CPU if there are none.

        Raises:
            TrainError: there is no such device, or not one for each rank.
        """
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        asked = torch.device(name) if name is not None else here or torch.device("cpu")
        if asked.type == "cpu":
            return torch.device("cpu")
        if here is None or asked.type != here.type:
            raise TrainError(f"--device {name}: torch finds none here; use --device {here.type if here else 'cpu'}")
        count = torch.accelerator.device_count()
        if asked.index is not None and self.local_world > 1:
            raise TrainError(
                f"--device {name} is one for {self.local_world} ranks; use --device {asked.type}, of which each has one"
            )
        if asked.index is not None and asked.index >= count:
            raise TrainError(f"--device {name}: torch finds {count} here, from {asked.type}:0 on")
        if self.local_world > count:
            raise TrainError(
                f"{self.local_world} ranks on this machine and {count} {asked.type} device(s): each rank needs one; "
                f"use --nproc-per-node {count}, or --device cpu"
            )
        found = torch.device(asked.type, self.local_rank if asked.index is None else asked.index)
        torch.accelerator.set_device_index(found.index)
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as timm trains
        return found


@contextlib.contextmanager
def alone(device: torch.device, run: str) -> Iterator[None]:
    """While the block runs no other rank of the run trains on this accelerator: two on one would not find each other,
    after all parts were trained.

    Raises:
        TrainError: another one does.
    """
    if device.type == "cpu":
        yield
        return
    about = torch.get_device_module(device).get_device_properties(device)
    path = Path(tempfile.gettempdir()) / f"timm_dd-{run}-{getattr(about, 'uuid', device.index)}"
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise TrainError(f"another rank of this run trains on {device} of this machine; give each its own") from e
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
