"""What the ranks of a run say to each other without a process group, and how they come to have one: through the store
that torchrun keeps.

That store outlives a restart, and ranks are started again in any order, all of them or one node's. So nobody reads a
number of attempts, of which ranks could have different ones: each process notes in the store that its rank lives anew,
and the first rank, when all are there at once, calls them to a group under a name that nobody has used before. Whoever
died since it came does not answer that call; whoever was replaced ends. What a dead process said of a group, such as
its address, stands under the name of that group, where nobody looks.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from ...errors import TrainError, headline
from .world import Ranks

STORE = timedelta(minutes=10)  # to find torchrun's store, or the first rank's without torchrun
ASKING = 0.1  # seconds between two looks at the store
ANSWER = 20.0  # seconds in which a rank that lives answers the call to a group
PATIENT, SAID = 1.0, 60.0  # seconds before the first line about ranks that others wait for, and between two of them


class Meeting:
    """The ranks of a run, as they meet in a store; the store is looked for when it is needed first.

    Args:
        store: instead of torchrun's.

    Attributes:
        group: the name of the process group that the ranks are in; None before.
    """

    def __init__(self, ranks: Ranks, store: dist.Store | None = None):
        self.ranks, self._given, self.group = ranks, store, None
        self._changes, self._gates = 0, 0

    @cached_property
    def _store(self) -> dist.Store:
        with _kept():
            store = self._given or _store(self.ranks)
            self.life = store.add(f"{self.ranks.rank}/lives", 1)  # of this rank, the first is 1
            store.add("changes", 1)
        return store

    @property
    def run(self) -> str:
        """What all processes of a run have in common, and its restarts, and no other run has."""
        return self._store.compare_set("run", "", uuid.uuid4().hex).decode()

    @property
    def restarted(self) -> bool:
        """Whether this rank has been here before, in a process that ended."""
        return self._store is not None and self.life > 1

    # ---- before there is a group

    def agree(self, name: str, find: Callable[[], Any], check: Callable[[], None] = lambda: None) -> Any:
        """What the first rank finds, for all; as JSON. One that is started again finds it again."""
        if self.ranks.primary:
            found = find()
            self._set(f"{self._first}/{name}", found)
            return found
        while not self._has(key := f"{self._first}/{name}"):
            self._wait(check)
        return self._get(key)

    def agree_for_good(self, name: str, find: Callable[[], str]) -> str:
        """As `agree`, and it stays so over restarts."""
        if self.ranks.primary and not self._has(name):
            self._set(name, find())
        while not self._has(name):
            self._wait(lambda: None)
        return self._get(name)

    def tell(self, progress: str) -> None:
        """Say how far this rank is, for those who wait for it."""
        if self.ranks.world > 1:
            self._set(f"{self.ranks.rank}/progress", progress)

    def join(self, device: torch.device, check: Callable[[], None]) -> None:
        """Make all ranks a process group, once they `meet`."""
        self.meet(check)
        where = dist.PrefixStore(self.group, self._store)
        backend = dist.get_default_backend_for_device(device)
        if device.type != "cpu":
            backend = f"cpu:{dist.get_default_backend_for_device('cpu')},{device.type}:{backend}"
        with _kept():
            dist.init_process_group(backend, store=where, rank=self.ranks.rank, world_size=self.ranks.world)

    def meet(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks are here.

        Args:
            check: raises when this rank is to wait no longer.
        """
        self.group = self._call(check) if self.ranks.primary else self._called(check)
        self._changes = self._get(f"{self.group}/go")

    def _call(self, check: Callable[[], None]) -> str:
        """Of the first rank: the name of a group whose ranks are all here."""
        while True:
            for patience in (None, ANSWER):  # they may come days apart; then all answer at once
                name = f"{self._first}.{self._store.add(f'{self._first}/calls', 1)}"
                self._set(f"{name}/here/0", True)
                if not self._all(f"{name}/here", check, patience):
                    break
            else:
                self._set(f"{name}/go", self._count("changes"))
                return name

    def _called(self, check: Callable[[], None]) -> str:
        """Of the others."""
        answered = None
        while True:
            first = self._first
            name = f"{first}.{self._count(f'{first}/calls')}"
            if name != answered:
                self._set(f"{name}/here/{self.ranks.rank}", True)
                answered = name
            if self._has(f"{name}/go") and self._store.add(f"{name}/joined/{self.ranks.rank}", 1) == 1:
                return name
            self._wait(check)

    # ---- beside the group

    def gate(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until all ranks have come to the same gate, however long that takes: a group would give up."""
        if self.group is None:
            return
        self._gates += 1
        name = f"{self.group}/gate/{self._gates}"
        self._set(f"{name}/{self.ranks.rank}", True)
        self._all(name, check, None)

    def end(self) -> None:
        """Come to the end of the run; the first rank, who may be the one that keeps the store, is the last to go."""
        if self.group is not None:
            self._set(f"{self.group}/end/{self.ranks.rank}", True)
            if self.ranks.primary:
                self._all(f"{self.group}/end", lambda: None, ANSWER)

    def leave(self) -> None:
        """Tell those who wait that this rank will not come."""
        if self.group is not None:
            with suppress(TrainError), _kept():
                self._store.add("changes", 1)

    def _all(self, name: str, check: Callable[[], None], patience: float | None) -> bool:
        """Whether all ranks have set their key under `name`, within so many seconds."""
        keys = [f"{name}/{rank}" for rank in range(self.ranks.world)]
        begun, before = time.monotonic(), ""
        due = begun + PATIENT
        while not self._has(*keys):
            now = time.monotonic()
            if patience is not None and now - begun > patience:
                return False
            if self.ranks.primary and now > due:
                text = self._waits_for([rank for rank, key in enumerate(keys) if not self._has(key)])
                if text != before:
                    tqdm.write(text)
                    sys.stdout.flush()
                due, before = now + SAID, text
            self._wait(check)
        return True

    def _waits_for(self, ranks: Sequence[int]) -> str:
        told = {rank: self._get(key) for rank in ranks if self._has(key := f"{rank}/progress")}
        return "waiting for " + "; ".join(told.get(rank, f"rank {rank}, which has not begun") for rank in ranks)

    # ---- the store

    @property
    def _first(self) -> str:
        """The first rank's life, under which it says what it says."""
        return f"first-{self._count('0/lives')}"

    def _wait(self, check: Callable[[], None]) -> None:
        check()
        if self._count(f"{self.ranks.rank}/lives") != self.life:
            raise TrainError(f"another process has taken the place of rank {self.ranks.rank}; this one ends")
        if self.group is not None and self._count("changes") != self._changes:
            raise TrainError("another rank has ended, or was started again; this one ends with it")
        time.sleep(ASKING)

    def _count(self, key: str) -> int:
        with _kept():
            return self._store.add(key, 0)

    def _set(self, key: str, value: Any) -> None:
        with _kept():
            self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        with _kept():
            return json.loads(self._store.get(key))

    def _has(self, *keys: str) -> bool:
        with _kept():
            return self._store.check([*keys])


def _store(ranks: Ranks) -> dist.Store:
    """torchrun's, or without torchrun the first rank's; of a process alone, its own."""
    if ranks.world > 1 and "MASTER_ADDR" not in os.environ:
        raise TrainError(f"WORLD_SIZE is {ranks.world}, and MASTER_ADDR does not say where ranks meet; use torchrun")
    if "MASTER_ADDR" not in os.environ or (ranks.world == 1 and "TORCHELASTIC_RUN_ID" not in os.environ):
        return dist.HashStore()
    store, *_ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=STORE))
    return dist.PrefixStore("timm_dd", store)


@contextmanager
def _kept() -> Iterator[None]:
    """While the block asks whoever keeps the store."""
    try:
        yield
    except dist.DistError as e:
        raise TrainError(f"the ranks cannot meet, the store is gone or was not found: {headline(e)}") from e
