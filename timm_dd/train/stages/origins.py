"""What the networks of a run start from: parts, or the model of the cycle before. A checkpoint has the checksums of
these files, so that none goes on, or is kept, beside parts that it does not come from."""

from __future__ import annotations

import functools
from hashlib import sha256
from pathlib import Path

from ...errors import TrainError
from ...storage import files
from ...storage.tensorfile import SEAL, TensorFile
from ..epochs import checkpoints
from .folder import PartsStage, RunFolder

Start = dict[str, str | None]  # checksums by name; None of what is not there yet
NAMES = {"part": "parts", "joint": "joint parts", "last": "model of the cycle before"}


def start_of(folder: RunFolder, network: Path) -> Start:
    """What a network of a run, by its folder, starts from."""
    stages = {folder.tuned: folder.trained, folder.together / "transfer": folder.parts, folder.joint.path: folder.parts}
    stage = stages.get(network) or stages.get(network.parent)
    return {**_model_before(folder), **({} if stage is None else _parts(stage))}


def check(folder: RunFolder) -> None:
    """Raise TrainError if a network that has a checkpoint started from others than lie here now; those of earlier
    versions do not say from which."""
    of_parts = [stage.part(k) for stage in folder.stages_of_parts for k in range(folder.args.parts)]
    for network in (*of_parts, *(folder.together / how for how in folder.args.together), folder.tuned):
        before = checkpoints.start(network)
        if before is None or _may_be(before, now := start_of(folder, network)):
            continue
        what = " and ".join(dict.fromkeys(NAMES[name.split()[0]] for name in now))
        again = network.parent if network.parent == folder.joint.path else network
        raise TrainError(f"{network} was not trained from the present {what}; remove {again} to train it again")


def _parts(stage: PartsStage) -> Start:
    return {f"{stage.name} {k}": _seal(stage.file(k)) if stage.is_done(k) else None for k in range(stage.args.parts)}


def _seal(path: Path) -> str | None:
    with TensorFile(path) as file:
        return file.metadata.get(SEAL)


def _model_before(folder: RunFolder) -> Start:
    """Models are not sealed."""
    if folder.cycle == 1:
        return {}
    path = folder.root if folder.cycle == 2 else folder.root / f"cycle-{folder.cycle - 1}"
    model = path / "global" / "last" / files.MODEL
    return {"last": _digest(model, model.stat().st_mtime_ns)}


@functools.lru_cache(maxsize=1)  # every network of a cycle asks
def _digest(path: Path, changed: int) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _may_be(before: Start, now: Start) -> bool:
    """Whether what a network started from is what there is now, of which some may be yet to come."""
    return before.keys() == now.keys() and all(seal in (None, before[name]) for name, seal in now.items())
