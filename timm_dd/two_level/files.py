"""A two-level network on disk.

two-level/
    two_level.json                             how they decide, where the parts are, checksums, versions
    coarse.safetensors                         the weights of the coarse net, sealed; of ``dnn`` alone
    plan.json, part-0000k-of-0000K.safetensors   as `Parts.save` writes them
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..errors import MergeError, headline, shown
from ..storage.atomic import output_folder
from ..storage.files import ANY_PART, PLAN, TWO_LEVEL, PartsFolder, is_file, local, part_name, reading, write_parts
from ..storage.tensorfile import SEAL, TensorFile, write_state
from ..surgery.parts import Parts
from ..text import json_text
from ..version import __version__
from .aggregate import TOGETHER, CoarseNet, check_coarse, check_how, check_names

FORMAT = 1
COARSE = "coarse.safetensors"
FILES = (TWO_LEVEL, COARSE)
LARGEST = 10 << 20  # bytes of two_level.json: names of classes
ORIGIN = ("run", "stage", "epoch", "top1")
STAGES = ("two_level", *TOGETHER)  # of a run, as its summary.json calls them
_AGAIN = "copy or write this network again"


@dataclass(frozen=True)
class Description:
    """What two_level.json says of the network; see `TwoLevel`."""

    how: str
    regression: bool
    classes: int
    widths: tuple[int, ...]
    dropout: float
    class_names: tuple[str, ...] | None

    @classmethod
    def from_json(cls, d: Mapping[str, Any]) -> Description:
        """KeyError, TypeError or ValueError if nothing is described."""
        names = d["class_names"]
        about = {f.name: d[f.name] for f in fields(cls)}
        about |= {"widths": tuple(d["widths"]), "class_names": None if names is None else tuple(names)}
        for name, kind in (("how", str), ("regression", bool), ("dropout", (int, float)), ("classes", int)):
            if not isinstance(about[name], kind):
                raise ValueError(f"unexpected {name} {shown(about[name])}")
        if not all(isinstance(name, str) for name in names or ()):
            raise ValueError(f"unexpected class_names {shown(names)}")
        check_how(about["how"], about["regression"])
        check_names(names, about["classes"])
        return cls(**about)


@dataclass(frozen=True)
class Place:
    """Where a two-level network lies: its folder, that of its parts, the checksums of their files, and which run made
    it."""

    folder: Path
    parts: Path
    checksums: Mapping[str, str]
    origin: Mapping[str, str]

    @property
    def about(self) -> Path:
        return self.folder / TWO_LEVEL


def save(
    folder: str | Path,
    parts: Parts,
    about: Description,
    coarse: nn.Module | None,
    linked: Path | None = None,
    origin: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a two-level network: all files, or none; errors as of `TwoLevel.save`.

    Args:
        linked: a folder that has the parts; without it they are written too.
        origin: the run that made it, its stage there, and the accuracy that it reached.
    """
    parts.check_complete()
    with output_folder(folder) as aside:
        if linked is None:
            states = [part.state_dict() for part in parts]
            written = write_parts(aside, parts.plan, states, parts.seed, parts.epoch)
        else:
            with PartsFolder(linked) as opened:
                written = {part_name(k, parts.plan.parts): opened.open(k).path for k in parts.members}
        if coarse is not None:
            written[COARSE] = aside(COARSE)
            about_file = {"timm_dd.format": str(FORMAT), "timm_dd": __version__}
            write_state(written[COARSE], coarse.state_dict(), about_file, sealed=True)
        checksums = {name: _checksum(path) for name, path in written.items()}
        head = {"format": FORMAT, "timm_dd": __version__, "timm": version("timm"), "parts": "."}
        if linked is not None:
            head["parts"] = os.path.relpath(linked, folder)
        text = json_text({**head, **asdict(about), **origin, "checksums": checksums})
        aside(TWO_LEVEL).write_text(text, encoding="utf-8")


def describe(folder: str | Path) -> tuple[Description, Place]:
    """What two_level.json says.

    Raises:
        MergeError: no such file, damaged, or of another format.
    """
    path = local(folder, TWO_LEVEL, COARSE, PLAN, ANY_PART) / TWO_LEVEL
    if not is_file(path):
        raise MergeError(f"no {TWO_LEVEL} in {folder}; expected a folder written by TwoLevel.save")
    with reading(path, _AGAIN):
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        d = json.loads(path.read_bytes())
    if not isinstance(d, dict) or d.get("format") != FORMAT:
        found = d.get("format") if isinstance(d, dict) else type(d).__name__
        raise MergeError(f"{path} has format {shown(found)}, timm_dd {__version__} reads format {FORMAT}")
    try:
        parts, checksums = Path(d["parts"]), dict(d["checksums"])
        origin = {name: str(d[name]) for name in ORIGIN if name in d}
        _check_origin(origin)
        about = Description.from_json(d)
        check_coarse(len(checksums.keys() - {COARSE}), about.classes, about.widths, about.dropout)
        return about, Place(path.parent, path.parent / parts, checksums, origin)
    except (KeyError, TypeError, ValueError) as e:
        raise MergeError(f"{path} is not whole ({type(e).__name__}: {headline(e)}); {_AGAIN}") from e


def _check_origin(said: Mapping[str, str]) -> None:
    if not math.isfinite(float(said.get("top1", "0"))):
        raise ValueError(f"top1 is {shown(said['top1'])}")
    if said.get("stage", STAGES[0]) not in STAGES or not said.get("epoch", "0").isdecimal():
        raise ValueError(f"no stage of a run: {shown(dict(said))}")


def seals(folder: Path) -> list[str | None]:
    """The checksums of a folder's parts, as their files say."""
    with PartsFolder(folder) as opened:
        return [opened.open(k).metadata.get(SEAL) for k in range(opened.plan.parts)]


def check_parts(place: Place, members: Iterable[int]) -> None:
    """Raise MergeError unless these are the parts that the network was made of."""
    with PartsFolder(place.parts) as opened:
        for k in members:
            file = opened.open(k)
            if place.checksums.get(part_name(k, opened.plan.parts)) != file.metadata.get(SEAL):
                raise MergeError(
                    f"{file.path} is not the part that {place.about} was made of; use the parts that go with it"
                )


def load_coarse(place: Place, coarse: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a coarse net, for `coarse`.

    Raises:
        MergeError: missing, damaged, or of other sizes.
    """
    path, expected = place.folder / COARSE, {name: tuple(t.shape) for name, t in coarse.state_dict().items()}
    with reading(path, _AGAIN), TensorFile(path) as file:
        sealed, infinite = file.scan()
        found = {name: entry.shape for name, entry in file.tensors.items()}
        state, seal = file.state(), file.metadata.get(SEAL)
    if found != expected:
        raise MergeError(f"{path} is of a coarse net of other sizes than {TWO_LEVEL} says; {_AGAIN}")
    if not sealed or seal != place.checksums.get(COARSE):
        raise MergeError(f"{path} is damaged or was changed: it has another checksum; {_AGAIN}")
    if infinite is not None:
        raise MergeError(f"{path}: {shown(infinite)} is not finite; train the coarse net again")
    return state


def gather(folder: str | Path) -> tuple[str, dict[str, Path]]:
    """The text of two_level.json and the other files by their names, as they lie in one folder; each of them checked.

    Raises:
        MergeError: one is missing, damaged, or of another network.
    """
    about, place = describe(folder)
    with PartsFolder(place.parts) as opened:
        members = range(opened.plan.parts)
        found = {part_name(k, len(members)): opened.open(k).path for k in members}
        for k in members:
            opened.check(k)
    check_parts(place, members)
    found[PLAN] = opened.path / PLAN
    if about.how == "dnn":
        with torch.device("meta"):
            load_coarse(place, CoarseNet(len(members), about.classes, about.widths))
        found[COARSE] = place.folder / COARSE
    return json_text({**json.loads(place.about.read_bytes()), "parts": "."}), found


def check(folder: str | Path, about: Description) -> None:
    """Raise MergeError unless a network that is as `about` says lies there, all of it whole."""
    found, place = describe(folder)
    if found != about:
        raise MergeError(f"{place.about} describes another network; {_AGAIN}")
    gather(folder)


def _checksum(path: Path) -> str:
    with TensorFile(path) as file:
        return file.metadata[SEAL]
