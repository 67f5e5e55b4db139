"""How many threads and how much memory a run takes: never more than the machine, its container and the user allow."""

import os

import pytest
import torch
import yaml
from conftest import RUN

import timm_dd.machine
from timm_dd.cli import main
from timm_dd.train.ranks import cores
from timm_dd.train.run import Run
from timm_dd.train.settings import options


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Sixteen cores without a quota, nobody has set OMP_NUM_THREADS; functions that change that."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(timm_dd.machine, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(timm_dd.machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(cores, "PROCESSES", tmp_path / "proc")
    (tmp_path / "cgroup").write_text("1:cpu:/other\n0::/pod/container\n")
    (tmp_path / "fs" / "pod" / "container").mkdir(parents=True)
    (tmp_path / "proc" / str(os.getppid())).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("where", ["", "pod", "pod/container"])
@pytest.mark.parametrize("text, expected", [("max 100000", 16), ("250000 100000", 3), ("50000 100000", 1), ("x", 16)])
def test_a_containers_quota_is_seen(where, text, expected, machine):
    """Of its control group and of those above it."""
    (machine / "fs" / where / "cpu.max").write_text(text)
    assert cores.cores() == expected


@pytest.mark.parametrize("where", ["", "pod", "pod/container"])
def test_a_containers_memory_is_seen(where, machine):
    physical = timm_dd.machine.memory()
    for text, expected in (("max", physical), ("x", physical), ("1048576", 2**20), (str(2 * physical), physical)):
        (machine / "fs" / where / "memory.max").write_text(text + "\n")
        assert timm_dd.machine.memory() == expected


def test_without_control_groups_the_cores_are_those_of_the_affinity(machine):
    (machine / "cgroup").write_text("1:cpu:/other\n")
    assert cores.cores() == 16
    (machine / "cgroup").unlink()
    assert cores.cores() == 16


@pytest.mark.parametrize(
    "asked, ranks, whole, part", [(None, 1, 16, 4), (None, 4, 4, 4), ("2", 1, 2, 2), ("64", 2, 8, 4), ("3,2", 1, 3, 3)]
)
def test_threads_are_those_that_the_user_set(asked, ranks, whole, part, machine, monkeypatch):
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert cores.cores_of_rank(ranks) == whole and cores.part_threads("auto", 4, ranks) == part


@pytest.mark.parametrize("environment, expected", [(b"A=1", 4), (b"A=1\0OMP_NUM_THREADS=1", 1), (None, 1)])
def test_what_torchrun_sets_by_itself_is_not_the_users(environment, expected, machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if environment is not None:
        (machine / "proc" / str(os.getppid()) / "environ").write_bytes(environment)
    assert cores.part_threads("auto", 4, 2) == expected


def test_a_run_takes_no_more_threads_and_says_so(machine, monkeypatch):
    """In both stages; the threads of a part, which its last bits depend on, are among the run's options."""
    taken = []
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    given = [*RUN, "--part-epochs", "1", "--parts", "2", "--output", str(machine / "runs"), "--experiment", "run"]
    assert main(["train", *given]) == 0
    assert max(taken) == 2
    assert yaml.safe_load((machine / "runs" / "run" / "args.yaml").read_text())["part_threads"] == 2


@pytest.mark.parametrize("given, quota, expected", [([], "200000", 2), ([], "max", 4), (["-j", "3"], "100000", 3)])
def test_workers_are_no_more_than_the_cores_unless_the_user_says_so(given, quota, expected, machine):
    (machine / "fs" / "cpu.max").write_text(f"{quota} 100000")
    args = options.parse(["--dataset", "digits", "--model", "test_resnet", "--output", str(machine / "runs"), *given])
    Run(args)
    assert args.workers == expected


def test_a_run_goes_on_with_the_threads_that_it_began_with(machine):
    """On a machine of other cores too: the last bits of the parts depend on them."""
    given = ["--dataset", "digits", "--model", "test_resnet", "--output", str(machine / "runs"), "--experiment", "run"]
    (machine / "runs" / "run").mkdir(parents=True)
    (machine / "runs" / "run" / "args.yaml").write_text("# torchrun None\n{part_threads: 3}\n")
    for more, expected in ([], 4), (["--resume"], 3), (["--resume", "--part-threads", "2"], 2):
        args = options.parse([*given, *more])
        Run(args)
        assert args.part_threads == expected
