"""What lies in a folder that a report is about, as plain tables: a run, parts, or a composed model alone."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ReportError, headline, looking_into
from ..planning.plan import Plan
from ..storage import files
from ..storage.tensorfile import READ_ERRORS, TensorFile
from ..text import is_number
from ..two_level.aggregate import TOGETHER
from ..two_level.files import describe

COLUMNS = {"epoch": "epoch", "train_loss": "loss", "eval_top1": "top1", "seconds": "seconds"}  # of summary.csv
NUMBERS = {"coarse_epochs", "cycles"}  # of the options that a report reads
STAGES = ("composed", "tuned", "best")  # the models of a run, as its summary.json calls them
SPENT = ("waiting", "evaluation")  # seconds of an epoch that are no training


@dataclass(frozen=True)
class Curve:
    """A network's epochs, as its ``summary.csv`` has them.

    Attributes:
        name: ``part 0``, ``joint``, ``composed``, ``coherent``, ``transfer`` or ``baseline``.
        stage: the name without the number.
        rows: of each epoch, numbered from 1: epoch, loss, top1 in % (NaN where it was not evaluated), and seconds
            since the stage began; where it is known what it waited for data and what its evaluation took, in seconds,
            and of how many updates the gradients were clipped, in %.
    """

    name: str
    stage: str
    rows: tuple[dict[str, float], ...]

    @property
    def seconds(self) -> float:
        return self.rows[-1]["seconds"]


@dataclass(frozen=True)
class Record:
    """What a report is made of; None and empty for what is not there.

    Attributes:
        args: of a training run, by name.
        summary: of a run that is done.
        failures: why parts failed, by number.
        own: the folder of the parts after the stage of their own.
        trained: that of the parts which were composed: `own`, or the joint stage's.
        models: the folders of ``composed``, ``tuned`` and ``baseline``, those that are there.
        two_level: the folder of the parts' common decision.
        about: the metadata of the composed model.
    """

    folder: Path
    plan: Plan | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    curves: tuple[Curve, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    own: Path | None = None
    trained: Path | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    two_level: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def parts(self) -> int | None:
        """K, where anything says it."""
        return self.plan.parts if self.plan is not None else int(self.about.get("parts", 0)) or None

    def epochs(self) -> dict[str, int]:
        """Of each stage that has begun."""
        found = {curve.stage: len(curve.rows) for curve in self.curves}
        return {**found, "dnn": int(self.args.get("coarse_epochs", 0))}


def read(folder: str | Path) -> Record:
    """What lies in `folder`.

    Raises:
        ReportError: nothing to show, or damaged.
        MergeError: a plan or a two-level network is damaged.
    """
    with looking_into(folder, ReportError):
        return _read(Path(folder))


def _read(folder: Path) -> Record:
    if not folder.is_dir():
        raise ReportError(f"no folder {folder}; expected a run's folder, parts, or a composed model")
    args = _yaml(folder / "args.yaml")
    own = next((p for p in (folder / "parts", folder) if (p / files.PLAN).is_file() and _has_parts(p)), None)
    two = next((p for p in (folder / "two-level", folder) if (p / files.TWO_LEVEL).is_file()), None)
    if own is None and two is not None:
        own = describe(two)[1].parts
    described = next((p for p in (folder, own) if p is not None and (p / files.PLAN).is_file()), None)
    models, joint = _models(folder), folder / "joint"
    if described is None and not models:
        raise ReportError(
            f"{folder} holds neither a run nor parts nor a composed model: no args.yaml, {files.PLAN} or {files.MODEL}"
        )
    plan, done = None if described is None else _plan(described), folder / "summary.json"
    return Record(
        folder=folder,
        plan=plan,
        args=args,
        summary=read_summary(done, None if plan is None else plan.parts) if args and done.is_file() else None,
        curves=_curves(folder, plan),
        failures=_failures(folder / "parts"),
        own=own,
        trained=joint if own is not None and _has_parts(joint) else own,
        models=models,
        two_level=two,
        about=_about(models),
    )


def _plan(folder: Path) -> Plan:
    with files.PartsFolder(folder) as opened:
        return opened.plan


def _has_parts(folder: Path) -> bool:
    return any(folder.glob("part-*.safetensors")) or any(folder.glob("*/part-*.safetensors"))


def _models(folder: Path) -> dict[str, Path]:
    places = {
        "composed": (folder / "composed", folder),
        "tuned": (folder / "global" / "last",),
        "baseline": (folder / "baseline" / "last",),
    }
    found = {name: next((p for p in paths if (p / files.MODEL).is_file()), None) for name, paths in places.items()}
    return {name: path for name, path in found.items() if path is not None}


def _about(models: Mapping[str, Path]) -> dict[str, str]:
    if "composed" not in models:
        return {}
    path = models["composed"] / files.MODEL
    try:
        with TensorFile(path) as file:
            about = dict(file.metadata)
        int(about.get("parts", 0))
        return about
    except (*READ_ERRORS, ValueError) as e:
        raise ReportError(f"{path} cannot be read ({headline(e)}); compose the parts again") from e


# ---- what a run writes


def _curves(folder: Path, plan: Plan | None) -> tuple[Curve, ...]:
    own = _numbered(folder / "parts")[: None if plan is None else plan.parts]
    paths = [(f"part {p.name}", "part", p) for p in own]
    paths += [("joint", "joint", folder / "joint" / "0")]
    paths += [(how, how, folder / "together" / how) for how in TOGETHER]
    paths += [("composed", "composed", folder / "global"), ("baseline", "baseline", folder / "baseline")]
    found = ((name, stage, path / "summary.csv") for name, stage, path in paths)
    curves = []
    for name, stage, path in found:
        with _readable(path):
            curves.append(Curve(name, stage, _rows(path)))
    return tuple(curve for curve in curves if curve.rows)


def _numbered(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("*") if p.is_dir() and p.name.isdecimal()), key=lambda p: int(p.name))


def _rows(path: Path) -> tuple[dict[str, float], ...]:
    table = _csv(path)
    found = [{ours: float(row[theirs] or "nan") for theirs, ours in COLUMNS.items()} for row in table]
    if not all(math.isfinite(row[column]) for row in found for column in ("epoch", "seconds")):
        raise ValueError("a row without its epoch or its seconds")
    for row, said in zip(found, table):
        row |= {"clipped": float(said["clipped"])} if said.get("clipped") else {}
    for row, spent in zip(found, _csv(path.with_name("times.csv"))):
        row |= {kind: float(spent[kind]) for kind in SPENT if spent[kind]}
    return tuple({**row, "epoch": row["epoch"] + 1} for row in found)


def _csv(path: Path) -> list[dict[str, str]]:
    """No rows where there is no such file, as older runs have no times.csv."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def _failures(parts: Path) -> dict[int, str]:
    found = {}
    for path in _numbered(parts):
        if (path / "failure.json").is_file():
            found[int(path.name)] = str(read_json(path / "failure.json"))
    return found


def read_json(path: Path) -> Any:
    """What a file of a run holds; ReportError if it is damaged."""
    with _readable(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _yaml(path: Path) -> dict[str, Any]:
    """Of a training run, empty for what is none."""
    if not path.is_file():
        return {}
    with _readable(path):
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError("no options and values")
        for name in NUMBERS & found.keys():
            int(found[name])
        return {"parts": None, **found}


def read_summary(path: Path, parts: int | None = None) -> dict[str, Any]:
    """The ``summary.json`` of a run of so many `parts`; ReportError if it is damaged."""
    with _readable(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        macs, seconds, two = found["multiply_adds"], found["seconds"], found.get("two_level", {})
        stages = [name for name in ("joint", "updated", "baseline") if name in found]
        numbers = [found[name] for name in (*STAGES, *stages, "together")]
        numbers += [*found["parts"], *two.values(), *seconds.values(), seconds["parts"], seconds["composed"]]
        numbers += [*macs["parts"], macs["composed"], *(macs["two_level"][how] for how in two)]
        numbers += [macs["joint"]] if "joint" in found else []
        numbers += [seconds["two_level" if how == "dnn" else how] for how in ("dnn", *TOGETHER) if how in two]
        numbers += [seconds[name] for name in ("joint", "baseline") if name in found]
        numbers += _known(found.get("top5", {}), len(found["parts"]))
        if not all(map(is_number, numbers)) or type(found.get("best_epoch", 0)) is not int:
            raise ValueError("a stage has no number")
        if not len(found["parts"]) == len(macs["parts"]) == (len(found["parts"]) if parts is None else parts):
            raise ValueError(f"not the figures of {parts or len(found['parts'])} parts")
        texts = [found[name] for name in ("dataset", "split", "run", "command")]
        if not all(isinstance(text, str) for text in texts) or not isinstance(macs["uncounted"], list):
            raise ValueError("it does not say what was trained on what")
        return found


def _known(top5: Mapping[str, Any], parts: int) -> list[Any]:
    """The figures that are there: of a network with few classes there are none."""
    found = [n for n in (*top5.get("parts", ()), *(n for name, n in top5.items() if name != "parts")) if n is not None]
    if len(top5.get("parts", range(parts))) != parts:
        raise ValueError(f"not the figures of {parts} parts")
    return found


class _readable:
    """What is wrong with a file of a run, in one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        wrong = (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError, RecursionError)
        if isinstance(error, wrong):
            raise ReportError(
                f"{self.path} is damaged ({type(error).__name__}: {headline(error)}); let the run write it again"
            ) from error
