"""Checkpoints: of each network in training, one safetensors file with weights and optimizer, its numbers as JSON in the
header. Written aside, synced, renamed; the last ones are kept, two unless ``--checkpoint-hist`` says it, so that one is
whole whatever happens.

Random numbers need no place in it: those of an update follow from the seed, the network and the update's number, those
of the data from the seed and the epoch.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from ...errors import TrainError, headline
from ...storage import tensorfile
from ...storage.atomic import replacing
from ..settings import options
from ..updates.learner import Learner

NUMBERS = {  # of a checkpoint, see `Learner.state`
    "options": dict,
    "updates": int,
    "images": int,
    "seconds": (int, float),
    "history": list,
    "optimizer": dict,
    "scaler": dict,
}
ROW = {"loss", "top1", "lr", "seconds"}  # of a history, among others
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError)  # of numbers that are another's


def save(learner: Learner) -> None:
    """Write a checkpoint of `learner` into its folder, and remove all but the last ones, ``--checkpoint-hist``."""
    tensors, numbers = learner.state()
    path = learner.folder / f"checkpoint-{learner.updates:09d}.safetensors"
    try:
        text = json.dumps(numbers)
    except TypeError as e:
        raise TrainError(f"--opt {learner.args.opt} has a state that is not saved ({e}); choose another") from e
    with replacing(path) as temporary:
        tensorfile.write_state(temporary, tensors, {"learner": text}, sealed=True)
    newest_first = found(learner.folder)
    first = newest_first.index(path)  # what is later is damaged: the one before was gone on from
    for old in newest_first[:first] + newest_first[first + learner.args.checkpoint_hist :]:
        old.unlink(missing_ok=True)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


def read_newest(folder: Path) -> tuple[dict, dict] | None:
    """(tensors, numbers) of the newest checkpoint in a folder that can be read; None if there is none."""
    return next(filter(None, map(_read, found(folder))), None)


def restore(learner: Learner, usable: Callable[[dict], bool] = lambda numbers: True) -> bool:
    """Go back to the newest checkpoint that can be read, and whose numbers are `usable`; whether there was one.

    Raises:
        TrainError: it is of another network or optimizer.
    """
    for path in found(learner.folder):
        held = _read(path)
        if held is not None and usable(held[1]):
            _restore(learner, path, held)
            return True
    return False


def restore_together(learners: Sequence[Learner], common: Callable[[set], set]) -> None:
    """Go back to the newest state of which all `learners` have a checkpoint that can be read: the same number of
    updates, and of epochs that ended.

    Args:
        common: of the states that a rank has found, those that all ranks have.

    Raises:
        TrainError: as `restore`.
    """
    theirs = [_readable(n.folder) for n in learners]
    shared = common(set.intersection(*map(set, theirs)))
    if shared:
        for learner, states in zip(learners, theirs):
            _restore(learner, *states[max(shared)])


def _readable(folder: Path) -> dict[tuple[int, int], tuple[Path, tuple[dict, dict]]]:
    """The checkpoints in a folder that can be read, with what they hold, by updates and epochs that ended."""
    held = {path: _read(path) for path in found(folder)}
    return {(h[1]["updates"], len(h[1]["history"])): (path, h) for path, h in held.items() if h is not None}


def _read(path: Path) -> tuple[dict, dict] | None:
    """(tensors, numbers); None of half a file, from a disk that lost power, or of one that was changed: the one before
    it is whole."""
    numbers = _numbers(path)
    try:
        with tensorfile.TensorFile(path) as file:
            whole = tensorfile.SEAL not in file.metadata or file.scan()[0]  # older ones have none
        return (load_file(path), numbers) if whole and numbers is not None else None
    except tensorfile.READ_ERRORS:
        return None


def _numbers(path: Path) -> dict | None:
    """Of a checkpoint, without its tensors."""
    try:
        with safe_open(path, "pt") as f:
            numbers = json.loads((f.metadata() or {})["learner"])
        whole = all(isinstance(numbers[name], kind) for name, kind in NUMBERS.items())
        return numbers if whole and all(map(_is_row, numbers["history"])) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_row(row: Any) -> bool:
    numbers = isinstance(row, dict) and all(v is None or isinstance(v, (int, float)) for v in row.values())
    return numbers and ROW <= row.keys()


def check(folder: Path, now: dict) -> None:
    """Raise TrainError if the newest checkpoint in a folder that can be read is of other options than `now`."""
    for path in found(folder):
        numbers = _numbers(path)
        if numbers is not None:
            try:
                return options.check_same({k: v for k, v in numbers["options"].items() if k in now}, now, longer=True)
            except MISFITS as e:
                raise _misfit(path, e) from e


def start(folder: Path) -> dict | None:
    """By what the network in a folder is known to have started, see `Learner`; None if no checkpoint says it."""
    known = (numbers.get("start") for numbers in filter(None, map(_numbers, found(folder))))
    return next((told for told in known if isinstance(told, dict)), None)


def _restore(learner: Learner, path: Path, held: tuple[dict, dict]) -> None:
    """Go back to what a checkpoint holds."""
    try:
        learner.restore(*held)
    except MISFITS as e:
        raise _misfit(path, e) from e
    before, now = held[1]["options"]["epochs"], learner.options["epochs"]
    if before < now:
        tqdm.write(
            f"{learner.name}: {before} epochs before, {now} now; after {len(learner.history)} of them the learning "
            f"rate goes on at {learner.lr:.3g}, where a schedule of {now} epochs is by then",
            sys.stdout,
        )


def _misfit(path: Path, why: Exception) -> TrainError:
    return TrainError(
        f"{path} does not fit ({headline(why)}); resume with the options it was trained with, "
        f"or remove {path.parent} to train this network again"
    )


class CheckpointTimer:
    """Says when checkpoints are due: every `every` seconds, and at once when the process is asked to stop.

    As a context it takes SIGTERM and Ctrl-C as requests; workers of loaders go on, see `workers`.
    """

    def __init__(self, every: float | None):
        self.every, self.last, self.signal = every, time.monotonic(), None

    def __enter__(self) -> CheckpointTimer:
        try:
            self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: whoever runs it there takes the signals
            self._before = {}
        return self

    def __exit__(self, *_) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _stop(self, number: int, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:  # asked twice; SIGTERM also comes twice of itself
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def due(self) -> bool:
        return self.signal is not None or (self.every is not None and time.monotonic() - self.last >= self.every)

    def keep(self, learners: list[Learner]) -> None:
        """Save `learners`; stop here if the process was asked to."""
        for learner in learners:
            save(learner)
        self.last = time.monotonic()
        self.check("all is saved")

    def check(self, state: str) -> None:
        """Raise TrainError if the process was asked to stop."""
        if self.signal is not None:
            raise TrainError(f"stopped by {self.signal.name}; {state}, the same command with --resume goes on")


class SharedTimer(CheckpointTimer):
    """A `CheckpointTimer` of ranks that train in step: when one of them is due or is asked to stop, all are, at one
    update. They ask each other in step too, and read the answer at the next question, so that nobody waits for it.

    Args:
        writes: whether this rank saves what is due.
    """

    def __init__(self, timer: CheckpointTimer, group: dist.ProcessGroup | None = None, writes: bool = True):
        self.timer, self.group, self.writes = timer, group, writes
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    @property
    def due(self) -> bool:
        before, asked = self._asked, torch.tensor([self.timer.due, self.timer.signal or 0], dtype=torch.int32)
        self._asked = asked, dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return before is not None and self._answered(before)

    def _answered(self, asked: tuple[torch.Tensor, dist.Work]) -> bool:
        asked[1].wait()
        due, number = asked[0].tolist()
        if number:
            self.timer.signal = signal.Signals(number)
        return bool(due)

    def keep(self, learners: list[Learner]) -> None:
        """Of all ranks together: nobody stops before what is due is saved."""
        for learner in learners if self.writes else ():
            save(learner)
        self.timer.last = time.monotonic()
        self._answered(self._asked)
        self._asked = None
        dist.all_reduce(torch.zeros(()), group=self.group)  # all have saved
        self.check("all is saved")

    def check(self, state: str) -> None:
        self.timer.check(state)
