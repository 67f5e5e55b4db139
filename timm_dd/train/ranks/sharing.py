"""Ranks that see no common folder: what one of them makes is copied to the others, through the process group.

On each machine that does not see the first rank's folder one rank keeps a folder of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from ...storage.atomic import replacing

PIECE = 1 << 26  # bytes that are sent at a time
LOCAL = "lock"  # a file that says who trains here, and is no part of the run
ARGUMENTS = "args.yaml"


class Sharing:
    """How the folders of a run come to hold the same.

    Args:
        root: this rank's folder of the run.
        keeps: whether this rank keeps it: the first one, or one of a machine that does not see the first one's.

    Attributes:
        apart: whether any rank sees another folder than the first one; known once there is a process group.
    """

    def __init__(self, root: Path, keeps: bool):
        self.root, self.keeps, self.apart = root, keeps, False

    def begin(self) -> None:
        """In step with all ranks, as soon as they are a process group."""
        keeping = torch.tensor([int(self.keeps)])
        dist.all_reduce(keeping)
        self.apart = int(keeping) > 1

    def share(self, folder: Path, of_all: bool = False) -> None:
        """In step with all ranks: give each machine what the first rank has in a folder of the run, or with `of_all`
        what any of them has; what the first rank has goes before the others'."""
        if not self.apart:
            return
        mine = dict(self._found(folder)) if self.keeps else {}
        told: list = [None] * dist.get_world_size()
        dist.all_gather_object(told, mine if self.keeps else None)
        found: dict[str, tuple[int, str]] = {}  # by name: who sends it, and its digest
        for rank, names in enumerate(told if of_all else told[:1]):
            for name, digest in (names or {}).items():
                found.setdefault(name, (rank, digest))
        for name, (sender, digest) in sorted(found.items()):
            if any(digest != names.get(name) for names in told if names is not None):
                self._copy(name, sender, self.keeps and mine.get(name) != digest)

    def _found(self, folder: Path) -> Iterator[tuple[str, str]]:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".") and path.name != LOCAL:
                with open(path, "rb") as file:
                    digest = xxhash.xxh3_128()
                    while piece := file.read(PIECE):
                        digest.update(piece)
                yield str(path.relative_to(self.root)), digest.hexdigest()

    def _copy(self, name: str, sender: int, takes: bool) -> None:
        """One file, from one rank to those who take it; the others hear it too."""
        path = self.root / name
        size = torch.tensor([path.stat().st_size if dist.get_rank() == sender else 0])
        dist.broadcast(size, sender)
        if dist.get_rank() == sender:
            with open(path, "rb") as file:
                for _ in range(0, int(size), PIECE):
                    dist.broadcast(torch.frombuffer(bytearray(file.read(PIECE)), dtype=torch.uint8), sender)
            return
        pieces = (self._piece(min(PIECE, int(size) - at), sender) for at in range(0, int(size), PIECE))
        if not takes:
            for _ in pieces:
                pass
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece.numpy().tobytes())

    @staticmethod
    def _piece(size: int, sender: int) -> torch.Tensor:
        piece = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(piece, sender)
        return piece


def sees(root: Path, run: str) -> bool:
    """Whether the folder `root` is that of a run's first rank, not a copy: by what lies there while that one holds it,
    and from the time on when it has begun."""
    try:
        os.listdir(root)  # a network's file system looks again
    except OSError:
        return False
    return any(_first_line(root / name).endswith(run) for name in (LOCAL, ARGUMENTS))


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""
