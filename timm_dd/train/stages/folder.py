"""The folder of a run: how it is named, what lies where, whether a run may begin or go on there, and what is done."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO

import yaml
from torch.utils.data import Dataset

from ...errors import FileError, TrainError
from ...planning.plan import Plan
from ...storage import files
from ...storage.atomic import output_folder, remove_temporaries, replace_json
from ...text import json_text
from ..epochs import checkpoints
from ..images import data
from ..ranks.meeting import Meeting
from ..ranks.sharing import LOCAL
from ..ranks.world import Ranks
from ..settings import options
from . import written

SUMMARY = {  # of a part
    "options": written.is_a(dict),
    "top1": written.is_number,
    "top5": lambda value: value is None or written.is_number(value),
    "seconds": written.is_number,
}
MODELS = ("last", "best")  # of a network: after which of its epochs
OPTIONS = {"part_threads": lambda value: value is None or (isinstance(value, int) and value > 0)}


@dataclass(frozen=True)
class PartsStage:
    """Where a stage of the parts keeps what it makes: part k's in folder k.

    Attributes:
        path: of the stage; once all its parts are done a folder of parts, to be merged.
        name: of the stage, see `options.stage_options`.
    """

    path: Path
    name: str
    args: argparse.Namespace

    def part(self, k: int) -> Path:
        return self.path / str(k)

    def file(self, k: int) -> Path:
        return self.part(k) / files.part_name(k, self.args.parts)

    @property
    def done(self) -> bool:
        return not self.missing()

    def missing(self) -> list[int]:
        """The parts that are not done."""
        return [k for k in range(self.args.parts) if not self.is_done(k)]

    def is_done(self, k: int) -> bool:
        """Whether part k is trained, and its file there; one that is lost comes from its checkpoint again, if any."""
        return (self.part(k) / "summary.json").exists() and files.is_whole(self.file(k))

    def summaries(self) -> list[dict]:
        return [self._summary(k) for k in range(self.args.parts)]

    def _summary(self, k: int) -> dict:
        return written.read(self.part(k) / "summary.json", checks=SUMMARY)

    def finish(self, k: int, summary: dict) -> None:
        replace_json(self.part(k) / "summary.json", summary)

    def check(self, k: int) -> None:
        """Raise TrainError if part k, which is done, was trained otherwise, or what is told of it is damaged."""
        before = self._summary(k)["options"]
        now = options.training_identity(options.stage_options(self.args, self.name, k))
        try:
            options.check_same({name: value for name, value in before.items() if name in now}, now)
        except ValueError as e:
            raise TrainError(
                f"part {k} is done, with other options (for the parts, {e}); use those, "
                f"or remove {self.part(k)} to train it again"
            ) from e

    def fail(self, k: int, reason: str) -> None:
        replace_json(self.part(k) / "failure.json", reason)

    def failure(self, k: int) -> str:
        return written.read(self.part(k) / "failure.json", str)

    def forget_failure(self, k: int) -> None:
        (self.part(k) / "failure.json").unlink(missing_ok=True)


@dataclass(frozen=True)
class RunFolder:
    """Where a run, or one of its cycles, keeps what it makes.

    Attributes:
        root: of the whole run.
        path: of this cycle; of the first one it is the root.
        goes_on: whether the first rank has said that the run goes on with what lies there.
        copy: whether this is a folder of a machine that does not see the first rank's.
    """

    root: Path
    path: Path
    cycle: int
    args: argparse.Namespace
    ranks: Ranks
    meeting: Meeting
    goes_on: bool = False
    copy: bool = False

    @classmethod
    def of_run(cls, args: argparse.Namespace, meeting: Meeting) -> RunFolder:
        """The first cycle's folder, which need not be there.

        Raises:
            TrainError: there is nothing to resume.
        """
        root = _choose(args, meeting)
        return cls(root, root, 1, args, meeting.ranks, meeting)

    @property
    def resuming(self) -> bool:
        """Whether the run goes on with what lies there."""
        return self.joins or self.args.resume is not None or self.goes_on or self.meeting.restarted

    @property
    def joins(self) -> bool:
        """Whether the run is done by several processes, each with some parts or with what follows them."""
        args = self.args
        return args.only_parts is not None or str(self.root) in map(os.path.normpath, args.from_parts or ())

    def next_cycle(self) -> RunFolder:
        return replace(self, path=self.root / f"cycle-{self.cycle + 1}", cycle=self.cycle + 1)

    # ---- what lies where

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def parts(self) -> PartsStage:
        return PartsStage(self.path / "parts", "part", self.args)

    @property
    def joint(self) -> PartsStage:
        return PartsStage(self.path / "joint", "joint", self.args)

    @property
    def stages_of_parts(self) -> tuple[PartsStage, ...]:
        return (self.parts, self.joint) if self.args.joint_epochs else (self.parts,)

    @property
    def trained(self) -> PartsStage:
        return self.stages_of_parts[-1]

    @property
    def start(self) -> Path | None:
        """The model that a later cycle was split from; the parts are merged onto it."""
        return self.path / "start" if self.cycle > 1 else None

    @property
    def composed(self) -> Path:
        return self.path / "composed"

    @property
    def two_level(self) -> Path:
        return self.path / "two-level"

    @property
    def together(self) -> Path:
        return self.path / "together"

    @property
    def tuned(self) -> Path:
        return self.path / "global"

    @property
    def baseline(self) -> Path:
        return self.path / "baseline"

    @property
    def decoded(self) -> Path:
        return self.root / "decoded"

    def remove_decoded(self) -> None:
        shutil.rmtree(self.decoded, ignore_errors=True)

    # ---- a run begins, or goes on

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While the block runs no other process trains here; with ``--only-parts`` none that trains these parts, or
        more than parts. Who was killed holds nothing.

        Raises:
            FileError: another does.
        """
        mine = self.args.only_parts
        with contextlib.ExitStack() as stack:
            who = f"{socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%F %T')}, {self._signature}"
            last = None if mine is None else self.remove_decoded
            stack.enter_context(_held(self.root, who, mine is None, last))
            for k in mine or ():
                stack.enter_context(_held(self.parts.part(k), who, True))
            yield

    @property
    def begun(self) -> bool:
        return (self.path / "args.yaml").exists()

    @property
    def threads(self) -> int | None:
        """Of an operation of a part in the run that this one goes on with: on them its last bits depend."""
        if not (self.begun and self.resuming):
            return None
        return written.read(self.path / "args.yaml", checks=OPTIONS, parse=written.yaml_of).get("part_threads")

    def check(self, plan: Plan, train: Dataset) -> None:
        """Whether a run on the images `train` may begin here, or go on.

        Raises:
            TrainError: the folder holds another run, or one that is not to be resumed.
        """
        if self.begun:
            self._check_run(plan)
            self._check_options(train)

    def open(self, plan: Plan, begun: float) -> None:
        """Write ``plan.json`` and ``args.yaml``, and remove what processes that were killed before `begun` left."""
        mine = self.args.only_parts
        if mine is None or not self.begun:
            given = yaml.safe_dump(options.of_a_run(self.args), default_flow_style=None)
            self.write_plan(self.parts, plan)
            with output_folder(self.path, wait=mine is not None) as aside:
                aside(files.PLAN).write_text(json_text(plan.to_json()), encoding="utf-8")
                aside("args.yaml").write_text(f"# {self._signature}\n{given}")  # the last to land: then there is a run
        for folder in [self.path] if mine is None else map(self.parts.part, mine):
            remove_temporaries(folder, begun)

    def _check_options(self, train: Dataset) -> None:
        """Raise TrainError if a part that is done, or a network that has a checkpoint, was trained with other options,
        or on other numbers of images; before anything is written."""
        for stage in self.stages_of_parts:
            for k in range(self.args.parts):
                if stage.is_done(k):
                    stage.check(k)
                else:
                    images = data.folds(self.args, train)[0] if stage.name == "part" else train
                    self._check_checkpoint(stage.part(k), stage.name, images, 1, k)
        shared = {self.together / name: name for name in self.args.together}
        for folder, name in {**shared, self.tuned: None, self.baseline: "baseline"}.items():
            self._check_checkpoint(folder, name, train, self.ranks.world)

    def _check_checkpoint(self, folder: Path, stage: str | None, train: Dataset, ranks: int, k: int = 0) -> None:
        args = options.stage_options(self.args, stage, k)
        checkpoints.check(folder, {**options.training_identity(args), **data.pace(args, train, ranks)})

    def write_plan(self, stage: PartsStage, plan: Plan) -> None:
        """Make a stage's folder, with the plan of its parts."""
        with output_folder(stage.path, wait=self.args.only_parts is not None) as aside:
            aside(files.PLAN).write_text(json_text(plan.to_json()), encoding="utf-8")

    def _check_run(self, plan: Plan) -> None:
        signature = written.read(self.path / "args.yaml", str, parse=str).split("\n", 1)[0]
        restarted = self.resuming and signature.startswith(f"# run {self.meeting.run}")
        if self.args.resume is None and not restarted and not self.joins:
            raise TrainError(f"{self.path} holds a run already; go on with --resume, or choose another --experiment")
        if files.PartsFolder(self.path).digest != plan.digest():
            raise TrainError(f"{self.path} holds a run of another model or split; choose another --experiment")

    @property
    def _signature(self) -> str:
        """Of the run: in the first line of args.yaml, by which torchrun's second start knows the run of its first."""
        return f"run {self.meeting.run}" + (", a copy" if self.copy else "")

    def digest(self, plan: Plan) -> str:
        """Names the run in its models and in its summary: of the plan, the cycle, and all options on which the models'
        weights depend. Whoever repeats the run, on however many ranks, gets the same."""
        stages = [options.stage_options(self.args, None)]
        stages += [
            options.stage_options(self.args, of.name, k) for of in self.stages_of_parts for k in range(self.args.parts)
        ]
        made_of = [plan.digest(), self.cycle, *map(options.training_identity, stages)]
        return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @property
    def done(self) -> bool:
        """Whether the cycle is done, and what it gives is there."""
        models = [self.tuned / name / files.MODEL for name in MODELS]
        return written.can_be_read(self.summary) and all(map(files.is_whole, models))


@contextlib.contextmanager
def _held(folder: Path, who: str, alone: bool, last: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a folder, and say `who` does; `alone`, or with others who are not. It is made, and removed if it is empty.

    Args:
        last: done by that one, unless it failed.

    Raises:
        FileError: others hold it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with output_folder(folder, wait=True):  # made, if it is not there, and writable
        pass
    try:
        with _locked(folder / LOCAL, who, alone, last):
            yield
    finally:
        for path in made:  # those of a run that was refused
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _locked(path: Path, who: str, alone: bool, last: Callable[[], None] | None) -> Iterator[None]:
    """Hold a file, which says by whom and is removed by the last to go; as `_held`."""
    with contextlib.ExitStack() as stack:
        while True:
            lock = stack.enter_context(open(path, "a+", encoding="utf-8"))
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError as e:
                lock.seek(0)
                raise FileError(f"another process trains here: {lock.read()}; {path.parent}") from e
            except OSError:  # a file system without locks
                break
            if _is_open_as(lock, path):  # and was not removed by its last holder just before
                break
        lock.truncate(0)
        lock.write(who)
        lock.flush()
        done = False
        try:
            yield
            done = True
        finally:
            with contextlib.suppress(OSError):  # others hold it too
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if done and last is not None:
                    last()
                path.unlink()


def _is_open_as(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _choose(args: argparse.Namespace, meeting: Meeting) -> Path:
    """``--experiment`` in ``--output``; by default a new name, or the last run that is not done if one is to go on, on
    which the ranks agree."""
    base, name = Path(args.output), f"{args.model}-{args.parts}"
    if args.resume not in (None, "auto"):
        if not (Path(args.resume) / "args.yaml").exists():
            raise TrainError(f"--resume {args.resume}: no run there; give a run's folder, or auto")
        return Path(args.resume)
    if args.experiment:
        return base / args.experiment
    return base / meeting.agree_for_good("folder", lambda: _last(args, base, name) or _new(base, name))


def _last(args: argparse.Namespace, base: Path, name: str) -> str | None:
    """The last run that is not done, if one is to go on."""
    if args.resume is None:
        return None
    begun = [p.parent for pattern in (name, f"{name}-*") for p in base.glob(f"{pattern}/args.yaml")]
    last = "." if args.cycles == 1 else f"cycle-{args.cycles}"
    begun = [p for p in begun if not (p / last / "summary.json").exists()]
    return max(begun, key=lambda p: p.stat().st_mtime).name if begun else None


def _new(base: Path, name: str) -> str:
    return next(n for i in itertools.count() if not (base / (n := f"{name}-{i}" if i else name)).exists())
