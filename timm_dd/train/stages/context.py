"""What the stages of a run share: where it is, and how a network of one rank or of all is trained in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from ... import models
from ...errors import TimmDDError, TrainError
from ...storage import files
from ...surgery.parts import Parts
from ..engines import Engine, engine_of_one
from ..epochs.checkpoints import CheckpointTimer, SharedTimer, read_newest, restore
from ..epochs.loop import TrainingLoop, measure
from ..epochs.trackers import Trackers
from ..images import data, resident
from ..ranks.cores import share_cores
from ..ranks.meeting import Meeting
from ..ranks.sharing import Sharing
from ..ranks.world import Ranks
from ..settings import options, views
from ..updates import metrics
from ..updates.learner import Learner
from . import origins, written
from .folder import MODELS, PartsStage, RunFolder
from .momenta import States


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        folder: of the run.
        seed: of the order of images, and of dropout.
        mine: the parts that this rank trains.
        done: those that the first rank has trained ones of.
        parts: as they were split; later as they were trained.
        whole: the same parts as they are on whole images, for the joint stage; None if there is none.
        model_args: for `timm.create_model`.
        class_names: in the order of their numbers; None if not known.
        sets: (train, validation).
        multiply_adds: see `summary.multiply_adds`.
        states: of the optimizer of the model that the parts were split from, if they are to keep them.
    """

    args: argparse.Namespace
    ranks: Ranks
    meeting: Meeting
    sharing: Sharing
    device: torch.device
    folder: RunFolder
    seed: int
    mine: Sequence[int]
    done: Sequence[int]
    parts: Parts
    whole: Parts | None
    model_args: dict
    class_names: Sequence[str] | None
    data_config: dict
    sets: Sequence[Dataset]
    timer: CheckpointTimer
    trackers: Trackers
    multiply_adds: dict
    states: States

    def loaders(
        self,
        args: argparse.Namespace,
        distributed: bool,
        train_size: Sequence[int] | None = None,
        images: Dataset | None = None,
    ) -> tuple:
        """(train, validation), on `images` instead of all to train on; see `data.loaders`, and on GPUs `resident`."""
        config, device = self.data_config, self.device
        sets = (self.sets[0] if images is None else images, self.sets[1])
        loaders = data.loaders(args, config, *sets, device, distributed, train_size)
        return tuple(resident.resident(loader, device) for loader in loaders)

    def stop_if_asked(self) -> None:
        """Raise TrainError if this process was asked to stop while nothing of it is to be saved."""
        self.timer.check("all is saved")

    def about(self, stage: str) -> dict[str, str]:
        """What a model's metadata say of where it comes from; `stage` is its name in the run's summary."""
        return {"run": self.folder.digest(self.parts.plan), "stage": stage}


def learner_of(run: Context, name, model, sees, args, updates, batch, stream, folder) -> Learner:
    seed, start = run.seed * 1000 + stream, origins.start_of(run.folder, folder)
    learner = Learner(name, model, sees, args, run.device, updates, batch, seed, folder, start)
    folder.mkdir(parents=True, exist_ok=True)
    return learner


def part_learner(run: Context, k: int, updates: int) -> Learner:
    args, view = options.stage_options(run.args, "part", k), run.parts.plan.views()[k]
    batch = data.images_of_an_update(args)
    learner = learner_of(run, f"part {k}", run.parts[k], view, args, updates, batch, k, run.folder.parts.part(k))
    learner.sight.draws = views.of_part(args, run.parts.plan, k)
    return learner


def global_learner(run: Context, name: str, model: nn.Module, args, updates: int, folder: Path) -> Learner:
    model = model.to(run.device)
    if run.ranks.world > 1:
        model = convert_sync_batchnorm(model) if args.sync_bn else model
        devices = None if run.device.type == "cpu" else [run.device.index]
        model = DistributedDataParallel(model, devices, broadcast_buffers=args.dist_bn != "reduce")
    batch, stream = data.images_of_an_update(args) * run.ranks.world, 999 - run.ranks.rank
    return learner_of(run, name, model, None, args, updates, batch, stream, folder)


def load_trained(stage: PartsStage, parts: Parts) -> None:
    """Give the parts the weights of a stage's files, which other ranks may have trained."""
    with files.PartsFolder(stage.path) as trained:
        for k, part in enumerate(parts):
            part.load_state_dict(trained.load(k))


def shared_loaders(run: Context, args: argparse.Namespace) -> tuple:
    """Of which each rank reads its share."""
    share_cores(run.ranks.local_world)
    return run.loaders(args, distributed=run.ranks.world > 1)


def fit(
    run: Context,
    learner: Learner,
    loaders: tuple,
    epochs: int,
    title: str,
    save: Callable[[str, dict[str, str]], None],
    check: Callable[[Path], None],
) -> float:
    """Train a network of all ranks; returns the last accuracy. What is lost of what it has given is written again.

    Args:
        save: what it gives, as ``last`` epoch's or ``best``, with the epoch and the accuracy that it reached.
        check: that what was saved can be read; TimmDDError otherwise.

    Raises:
        TrainError: the best epoch's is lost, and no checkpoint has it.
    """

    def keep() -> None:
        if not run.ranks.primary:
            return
        last = learner.history[-1]["top1"] if learner.history else None
        reached = {"epoch": str(len(learner.history)), **({} if last is None else {"top1": f"{last:.2f}"})}
        is_best = metrics.best(learner.history, learner.args) in (None, len(learner.history) - 1)
        for name in ["last", "best"] if is_best else ["last"]:
            save(name, reached)

    run.sharing.share(learner.folder)
    lost = _lost(learner.folder, check)
    _go_back(learner, "best" in lost)
    if lost and learner.history and _between_epochs(learner.updates, learner.history, learner.options):
        keep()
    with engine_of_one(run.args.engine, run.device) as by:
        timer = run.timer if run.ranks.world == 1 else SharedTimer(run.timer, writes=run.ranks.primary)
        shared = (run.seed, timer, by, run.trackers, keep, run.ranks.primary, run.ranks.primary)
        TrainingLoop(title, loaders, epochs, *shared).fit([learner])
    if epochs == 0:
        keep()
    return accuracy(learner, loaders, shared=True)


def _lost(folder: Path, check: Callable[[Path], None]) -> list[str]:
    """What cannot be read of what a network has given, as the first rank finds it."""
    lost = []
    for name in MODELS:
        try:
            check(folder / name)
        except TimmDDError:
            lost.append(name)
    told = [lost]
    if dist.is_initialized():
        dist.broadcast_object_list(told)
    return told[0]


def _go_back(learner: Learner, to_the_best: bool) -> None:
    """Go back to the newest checkpoint, if there is one; or to the newest that has the weights of the best epoch."""

    def has_the_best(numbers: dict) -> bool:
        history = numbers["history"]
        ended = _between_epochs(numbers["updates"], history, learner.options)
        return not history or (ended and metrics.best(history, learner.args) in (None, len(history) - 1))

    if restore(learner, has_the_best if to_the_best else lambda numbers: True) or not to_the_best:
        return
    if read_newest(learner.folder) is not None:
        raise TrainError(
            f"{learner.folder / 'best'} is lost, and no checkpoint has its weights; "
            f"remove {learner.folder} to train this network again"
        )


def _between_epochs(updates: int, history: Sequence, about: Mapping) -> bool:
    return updates == len(history) * about["updates_per_epoch"]


def check_global(run: Context, folder: Path) -> None:
    """Raise TimmDDError unless what `save_global` has written can be read."""
    with files.ModelFile(folder):
        pass
    if run.parts.plan.config is not None:
        described = {"architecture": written.is_a(str), "pretrained_cfg": written.is_a(dict)}
        written.read(folder / "config.json", checks=described)


def save_global(
    run: Context, learner: Learner, about: Mapping[str, Mapping[str, str]], name: str, reached: dict[str, str]
) -> None:
    """Write the global model with what is said `about` it."""
    config = models.config(learner.result, run.data_config, run.class_names)
    files.save_model(learner.folder / name, learner.result, config, {**about.get(name, {}), **reached})


def last_top5(learner: Learner) -> float | None:
    """After the last epoch; None if it was not evaluated."""
    return learner.history[-1].get("top5") if learner.history else None


def accuracy(learner: Learner, loaders: tuple, shared: bool) -> float:
    """The accuracy after the last epoch; now, if there was none."""
    if learner.history and learner.history[-1]["top1"] is not None:
        return learner.history[-1]["top1"]
    return measure([learner], loaders[1], Engine(), shared=shared)[0]["top1"]
