"""Parts that were trained elsewhere (``--from-parts``): which have arrived, whether they are of this run, and how they
come into its folder."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import TrainError
from ...planning.plan import Plan
from ...storage import files
from ...storage.atomic import replacing
from ..epochs import checkpoints
from .folder import PartsStage


@dataclass(frozen=True)
class Part:
    """One that has arrived.

    Attributes:
        file: its weights.
        same: whether its plan is that of the run, byte for byte.
        epoch: how many it was trained for, if known.
    """

    k: int
    source: files.PartsFolder
    file: Path
    same: bool
    epoch: int | None


class Arrived:
    """The parts that have arrived in some folders: of runs, of parts, or on the Hub.

    Raises:
        TrainError: one is of another network, split, seed or options, or there twice with different weights.
        MergeError: a folder or a file that cannot be read.
    """

    def __init__(self, folders: Sequence[str], plan: Plan, stage: PartsStage, seed: int):
        self.folders, self.plan, self.stage, self.seed = folders, plan, stage, seed
        self.parts: dict[int, Part] = {}
        for folder in folders:
            for part in self._found(folder):
                before = self.parts.setdefault(part.k, part)
                if before is not part and not filecmp.cmp(before.file, part.file, shallow=False):
                    raise TrainError(f"part {part.k} has arrived twice: {before.file} and {part.file}; leave one out")

    def _found(self, folder: str) -> Iterator[Part]:
        inside = Path(folder) / "parts"
        source = files.PartsFolder(inside if (inside / files.PLAN).is_file() else folder)
        same = source.digest == self.plan.digest()
        if not same:
            self._check_plan(folder, source.plan)
        stage = replace(self.stage, path=source.path)
        for k in filter(source.has, range(self.plan.parts)):
            file = source.open(k)
            seed, epoch = source.history(k)
            if seed not in (None, self.seed):
                raise TrainError(f"{file.path} was trained with --seed {seed}, this run has {self.seed}; use that one")
            if stage.is_done(k):
                stage.check(k)
            yield Part(k, source, file.path, same, epoch)

    def _check_plan(self, folder: str, theirs: Plan) -> None:
        """Raise TrainError unless it is this run's, but for what a run says of its data and a split alone does not."""
        told = {"K": ("parts",), "model": ("model", "model_args"), "domain": ("domain",)}
        for what, names in told.items():
            mine, other = ([str(getattr(plan, name)) for name in names] for plan in (self.plan, theirs))
            if mine != other:
                raise TrainError(
                    f"{folder} has parts of another {what}, {' '.join(other)}, this run has {' '.join(mine)}; "
                    "use those of this run's options"
                )
        if theirs.config is not None or replace(theirs, config=self.plan.config).digest() != self.plan.digest():
            raise TrainError(f"{folder} has parts of another plan, or of other data; use those of this run's options")

    def check_complete(self) -> None:
        """Raise TrainError if parts have neither arrived nor been trained here."""
        missing = [k for k in range(self.plan.parts) if k not in self.parts and not self.stage.is_done(k)]
        if missing:
            have = [k for k in range(self.plan.parts) if k not in missing]
            raise TrainError(
                f"of {self.plan.parts} parts {numbers(missing)} have not arrived in {', '.join(self.folders)}, "
                f"{numbers(have) or 'none'} have; train what is missing with --only-parts "
                f"{' '.join(map(str, missing))}, and copy it there"
            )

    def take(self) -> list[Part]:
        """Copy what has arrived into the run's folder, but for parts that are done there; those of them of which it is
        not known what they reach."""
        unknown = []
        for part in self.parts.values():
            if self.stage.is_done(part.k):
                continue
            _copy(part, self.plan, self.stage.part(part.k), self.seed)
            if not self.stage.is_done(part.k):
                unknown.append(part)
        return unknown


def _copy(part: Part, plan: Plan, folder: Path, seed: int) -> None:
    """A part's files; that it is done is the last to be there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not part.same:
        files.save_part(folder, plan, part.k, part.source.load(part.k), seed, part.epoch)
    else:
        part.source.check(part.k)
    theirs = part.file.parent
    about = [*checkpoints.found(theirs)[:1], theirs / "summary.csv", theirs / "summary.json"]
    for path in [*([part.file] if part.same else []), *(about if theirs.name == str(part.k) else [])]:
        if path.is_file():
            with replacing(folder / path.name) as temporary:
                shutil.copyfile(path, temporary)


def numbers(parts: Iterable[int]) -> str:
    return ", ".join(map(str, parts))
