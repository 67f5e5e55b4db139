"""Where a process stands among those of its run, and the device that it trains on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..errors import TrainError


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
        if name is not None and torch.device(name).type == "cuda" and not torch.cuda.is_available():
            raise TrainError(f"--device {name}: torch finds no GPU here; use --device cpu")
        if not torch.cuda.is_available() or (name is not None and torch.device(name).type == "cpu"):
            return torch.device("cpu")
        index = self.local_rank % max(torch.cuda.device_count(), 1)
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True  # as timm trains
        return torch.device("cuda", index)
