"""How ranks meet: in any order, started again at any time, all or some of them, and always in one new group."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from conftest import MODULE, RUN

from timm_dd.errors import TrainError
from timm_dd.train.epochs.checkpoints import CheckpointTimer, SharedTimer
from timm_dd.train.ranks import meeting
from timm_dd.train.ranks.meeting import Meeting
from timm_dd.train.ranks.world import Ranks

WORLD = 3


class Killed(Exception):
    pass


class Process:
    """One of a rank, in a thread: it comes to the meeting, and stays there until it is killed."""

    def __init__(self, rank, store, dies=False):
        """One that `dies` does so when it first waits, whoever runs meanwhile."""
        self.meeting, self.killed, self.error = Meeting(Ranks(rank, 0, WORLD, 1), store), threading.Event(), None
        if dies:
            self.killed.set()
        self.restarted = self.meeting.restarted
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        try:
            self.meeting.meet(self._check)
        except (Killed, TrainError) as e:
            self.error = e

    def _check(self):
        if self.killed.is_set():
            raise Killed

    def kill(self):
        self.killed.set()
        self.thread.join(10)

    @property
    def group(self):
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.meeting.group


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(meeting, "ASKING", 0.001)
    monkeypatch.setattr(meeting, "ANSWER", 0.2)
    return dist.HashStore()


@pytest.mark.parametrize("order", [*itertools.permutations(range(WORLD))])
def test_ranks_meet_in_any_order_and_again_in_another_group(order, store):
    """After a restart of all of them too, though what the dead have said still stands in the store."""
    found = []
    for start in range(3):
        ranks = [Process(rank, store) for rank in order]
        assert [r.restarted for r in ranks] == [start > 0] * WORLD
        (group,) = {r.group for r in ranks}
        found.append(group)
    assert len(set(found)) == 3


@pytest.mark.parametrize("victim", range(WORLD))
def test_a_rank_that_died_while_it_waited_is_waited_for(victim, store):
    """Twice; the others go on waiting, nobody takes the dead for one who is there."""
    others = [Process(rank, store) for rank in range(1, WORLD) if rank != victim]
    for _ in range(2):
        Process(victim, store, dies=True).kill()
    if victim:
        others.append(Process(0, store))  # by then all have said that they are there, the dead too
    for r in others:
        r.thread.join(0.5)
        assert r.thread.is_alive() and r.meeting.group is None
    ranks = [*others, Process(victim, store)]
    assert len({r.group for r in ranks}) == 1


def test_who_answered_and_died_is_not_taken_for_one_who_is_there(store):
    """Though its answer stands in the store when the last rank comes."""
    first, victim = Process(0, store), Process(1, store)
    while not store.check(["first-1.1/here/1"]):
        time.sleep(0.001)
    victim.kill()
    last = Process(2, store)
    last.thread.join(0.5)
    assert first.thread.is_alive() and last.thread.is_alive()
    assert len({r.group for r in (first, Process(1, store), last)}) == 1


def test_some_ranks_never_came_before_the_others_were_started_again(store):
    """Rank 0 lives for the third time, rank 1 for the second, rank 2 for the first."""
    for rank in (0, 1, 0):
        Process(rank, store, dies=True).kill()
    ranks = [Process(rank, store) for rank in range(WORLD)]
    assert len({r.group for r in ranks}) == 1
    assert [r.restarted for r in ranks] == [True, True, False]


def test_ranks_that_are_killed_at_random_meet_in_the_end(store):
    draw = random.Random(0)
    ranks = [Process(rank, store) for rank in range(WORLD - 1)]
    for _ in range(20):
        rank = draw.randrange(WORLD - 1)
        ranks[rank].kill()
        ranks[rank] = Process(rank, store)
    ranks.append(Process(WORLD - 1, store))
    assert len({r.group for r in ranks}) == 1


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_slow_process_ends_when_another_takes_its_place(rank, store):
    old = Process(rank, store)
    ranks = [Process(r, store) for r in range(WORLD)]
    assert old.group is None
    assert str(old.error) == f"another process has taken the place of rank {rank}; this one ends"
    assert len({r.group for r in ranks}) == 1


def test_who_waits_at_a_gate_hears_that_another_has_ended(store):
    ranks = [Process(rank, store) for rank in range(WORLD)]
    assert len({r.group for r in ranks}) == 1
    gates = [threading.Thread(target=r.meeting.gate) for r in ranks]
    for thread in gates:
        thread.start()
    for thread in gates:
        thread.join(10)
    ranks[1].meeting.leave()
    for r in (ranks[0], ranks[2]):
        with pytest.raises(TrainError, match="another rank has ended"):
            r.meeting.gate()


def test_what_the_first_rank_finds_is_for_all(store):
    """A name for good, the rest in each of its lives."""
    first, other = (Meeting(Ranks(rank, 0, 2, 1), store) for rank in (0, 1))
    assert first.agree_for_good("folder", lambda: "run") == other.agree_for_good("folder", lambda: "other") == "run"
    assert first.agree("cycle-1", lambda: [1]) == other.agree("cycle-1", lambda: [2]) == [1]
    again = Meeting(Ranks(0, 0, 2, 1), store)
    assert again.agree_for_good("folder", lambda: "new") == "run" and again.run == first.run == other.run
    assert again.agree("cycle-1", lambda: [3]) == other.agree("cycle-1", lambda: [2]) == [3]


def test_who_waits_says_for_what(store, capsys, monkeypatch):
    monkeypatch.setattr(meeting, "PATIENT", 0.01)
    first, second = Process(0, store), Process(1, store)
    third = Meeting(Ranks(2, 0, WORLD, 1), store)
    third.tell("part 3 of rank 2: epoch 40 of 100")
    said = []
    while not said:
        said = [line for line in capsys.readouterr().out.splitlines() if "rank 2:" in line]
        time.sleep(0.01)
        third.tell("part 3 of rank 2: epoch 40 of 100")
    assert said == ["waiting for part 3 of rank 2: epoch 40 of 100"]
    first.kill(), second.kill()


def test_ranks_without_a_place_to_meet(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(TrainError, match="use torchrun"):
        Meeting(Ranks(1, 1, 2, 2)).tell("here")


# ---- a request to stop


def stops_of_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = CheckpointTimer(None)
    timer, found = SharedTimer(own, writes=False), None
    for step in range(20):
        if rank == 1 and step == 7:
            own.signal = signal.SIGTERM
        if timer.due:
            try:
                timer.keep([])
            except TrainError as e:
                found = step, str(e)
                break
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_in_step_stop_at_one_step(tmp_path):
    """Whichever of them was asked."""
    torch.multiprocessing.spawn(stops_of_a_rank, (tmp_path,), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and found[0][0] in (7, 8)
    assert "stopped by SIGTERM; all is saved" in found[0][1]


LONGER = [*RUN, "--parts", "2", "--joint-epochs", "0", "--part-epochs", "1", "--epochs", "20"]


def ranks_without_torchrun(arguments, port):
    """Two processes that find each other by the environment alone; what they print."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for rank in range(2):
        given = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        yield subprocess.Popen([sys.executable, *MODULE, *arguments], env=given, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_that_is_asked_to_stop_in_the_second_stage_takes_the_others_with_it(asked, tmp_path, free_port):
    """All is saved, all end with the same status and one line, and the run goes on from there."""
    arguments = [*LONGER, "--output", str(tmp_path), "--experiment", "run"]
    ranks = list(ranks_without_torchrun(arguments, free_port()))
    next(line for line in ranks[0].stdout if "fine-tuning 1/20" in line)
    ranks[asked].send_signal(signal.SIGTERM)
    errors = [r.communicate(timeout=120)[1] for r in ranks]
    assert [r.returncode for r in ranks] == [1, 1], errors
    assert all(e.splitlines()[-1].startswith("timm-dd train: stopped by SIGTERM; all is saved") for e in errors)
    assert len(list((tmp_path / "run" / "global").glob("checkpoint-*"))) == 2
