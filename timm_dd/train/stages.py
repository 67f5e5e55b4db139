"""The stages of a run: the parts, each rank some of them without communication; the composed model, all ranks together;
and the baseline.

Ranks meet once, when their parts are done, and exchange the parts through the run's folder, which all of them see. The
first rank composes the parts there; every rank reads what it needs, and DistributedDataParallel gives all the first
one's weights.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset

from .. import models
from ..errors import TrainError
from ..planning.graphs import BATCH_NORMS
from ..planning.plan import Plan
from ..storage import files
from ..storage.merge_files import write_merged
from ..surgery.parts import Parts
from . import data, options, views
from .checkpoints import CheckpointTimer, restore
from .composed import add_noise, between, calibrate, rate_between, some
from .engines import Engine, cores, engine, share_cores, share_cores_for_parts
from .folder import Ranks, RunFolder
from .learner import Learner
from .loop import TrainingLoop, evaluate
from .trackers import Trackers

WAIT = datetime.timedelta(days=7)  # the first rank to finish its parts waits for the last


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        folder: of the run.
        seed: of the order of images, and of dropout.
        parts: as they were split; in the second stage, as they were trained.
        model_args: for `timm.create_model`.
        sets: (train, validation).
    """

    args: argparse.Namespace
    ranks: Ranks
    device: torch.device
    folder: RunFolder
    seed: int
    parts: Parts
    model_args: dict
    data_config: dict
    sets: Sequence[Dataset]
    timer: CheckpointTimer
    trackers: Trackers

    def loaders(self, args: argparse.Namespace, distributed: bool, train_size: tuple[int, ...] | None = None) -> tuple:
        """(train, validation)."""
        return data.loaders(
            args, self.data_config, *self.sets, self.device, distributed=distributed, train_size=train_size
        )

    def about(self, stage: str) -> dict[str, str]:
        """What a model's metadata say of where it comes from; `stage` is its name in the run's summary."""
        return {"run": self.folder.digest(self.parts.plan), "stage": stage}


# ---- stage 1: the parts


def train_parts(run: Context) -> None:
    """Train part k on rank k mod world size, those that are not done. One that fails does not stop the others."""
    of_this_rank = range(run.ranks.rank, run.args.parts, run.ranks.world)
    due = [k for k in of_this_rank if not run.folder.part_is_done(k)]
    for k in set(of_this_rank) - set(due):
        run.folder.check_part(k)
    if not due:
        return
    args = options.stage_options(run.args, "part")
    share_cores_for_parts(args.engine, args.parts, run.ranks.local_world)
    loaders = run.loaders(args, distributed=False, train_size=views.loader_size(args, run.parts.plan))
    learners = [_part_learner(run, k, len(loaders[0])) for k in due]
    if run.folder.resuming:
        for k, learner in zip(due, learners):
            run.folder.forget_failure(k)
            learner.guard(partial(restore, learner), isolate_failures=True)
    with engine(args.engine, learners, run.device, cores() // run.ranks.local_world) as by:
        shared = (run.seed, run.timer, by, run.trackers)
        TrainingLoop("parts", loaders, args.epochs, *shared, isolate_failures=True).fit(learners)
    for k, learner in zip(due, learners):
        _finish_part(run, k, learner, loaders, args.epochs)


def _finish_part(run: Context, k: int, learner: Learner, loaders: tuple, epochs: int) -> None:
    if learner.failure is not None:
        run.folder.fail_part(k, learner.failure)
        return
    files.save_part(learner.folder, run.parts.plan, k, learner.result.state_dict(), run.seed, epochs)
    summary = {
        "part": k,
        "top1": _accuracy(learner, loaders, shared=False),
        "epochs": epochs,
        "updates": learner.updates,
        "seconds": learner.seconds,
        "options": learner.options,
    }
    run.folder.finish_part(k, summary)


def _part_learner(run: Context, k: int, updates: int) -> Learner:
    args, plan = options.stage_options(run.args, "part", k), run.parts.plan
    batch = data.images_of_an_update(args)
    learner = _learner(run, f"part {k}", run.parts[k], plan.views()[k], args, updates, batch, k, run.folder.part(k))
    learner.views = views.of_part(args, plan, k)
    return learner


def _learner(run: Context, name, model, view, args, updates, batch, stream, folder) -> Learner:
    model = model.to(run.device, memory_format=torch.channels_last) if args.channels_last else model.to(run.device)
    learner = Learner(name, model, view, args, run.device, updates, batch, run.seed * 1000 + stream, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return learner


def meet(run: Context) -> None:
    """Wait until every rank has trained its parts.

    Raises:
        TrainError: some failed.
    """
    if run.ranks.world > 1:
        with run.timer.away():
            if not dist.is_initialized():
                dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo", timeout=WAIT)
            dist.barrier()
    failed = [k for k in range(run.args.parts) if not run.folder.part_is_done(k)]
    if failed and not run.ranks.primary:
        raise SystemExit(1)  # the first rank says why
    if failed:
        raise TrainError(
            f"{'; '.join(f'part {k} failed ({run.folder.failure(k)})' for k in failed)}; "
            f"{run.args.parts - len(failed)} of {run.args.parts} parts are done and kept: --resume {run.folder.path} "
            f"goes on with what failed, from its last checkpoint, or from the start and with other options if "
            f"{run.folder.parts}/k is removed"
        )


# ---- stage 2: the composed model


def tune(run: Context) -> dict[str, float]:
    """Compose, re-estimate the BatchNorm statistics, and fine-tune; returns the accuracies of the parts together and
    of the composed model after each step, and the seconds of the last."""
    if run.ranks.primary:
        write_merged(run.folder.parts, run.folder.composed, "sum", run.about("composed"))
    if run.ranks.world > 1:
        dist.barrier()
    plan, args = run.parts.plan, options.stage_options(run.args, None)
    loaders = _shared_loaders(run, args)
    _load_trained(run)
    learners = [_part_learner(run, k, 1) for k in range(len(run.parts))]
    together = evaluate(learners, loaders[1], Engine(), together=True)[-1]  # each part on its view
    model = models.create(plan.model, **plan.model_args)
    files.load_composed(run.folder.composed, model)
    learner = _global_learner(run, "composed model", model, args, len(loaders[0]), run.folder.tuned)
    found = {"together": together, "composed": evaluate([learner], loaders[1], Engine())[0]}
    start = time.perf_counter()
    data.seed_epoch(run.seed, args.epochs)
    changed = _prepare(run, learner, plan, loaders[0], args)
    learner.seconds = time.perf_counter() - start
    if changed:
        found["updated"] = evaluate([learner], loaders[1], Engine())[0]
    made_of = files.summary(plan, plan.digest())
    about = {name: {**made_of, **run.about(stage)} for name, stage in (("last", "tuned"), ("best", "best"))}
    found["tuned"] = _fit(run, learner, loaders, args.epochs, "fine-tuning", about)
    found["best"] = max((row["top1"] for row in learner.history), default=found["tuned"])
    return {**found, "seconds": learner.seconds}


def _shared_loaders(run: Context, args: argparse.Namespace) -> tuple:
    """Of which each rank reads its share."""
    share_cores(run.ranks.local_world)
    return run.loaders(args, distributed=run.ranks.world > 1)


def _load_trained(run: Context) -> None:
    """Give the parts the weights of their files, which other ranks may have trained."""
    with files.PartsFolder(run.folder.parts) as trained:
        for k, part in enumerate(run.parts):
            part.load_state_dict(trained.load(k))


def _global_learner(run: Context, name: str, model: nn.Module, args, updates: int, folder: Path) -> Learner:
    model = model.to(run.device)
    if run.ranks.world > 1:
        model = DistributedDataParallel(model, device_ids=[run.device.index] if run.device.type == "cuda" else None)
    batch, stream = data.images_of_an_update(args) * run.ranks.world, 999 - run.ranks.rank
    return _learner(run, name, model, None, args, updates, batch, stream, folder)


def _prepare(run: Context, learner: Learner, plan: Plan, loader, args: argparse.Namespace) -> bool:
    """Make the composed model ready to be fine-tuned; whether its accuracy may be another."""
    weights = list(between(plan, learner.net)) if args.off_diagonal_noise or args.off_diagonal_lr != 1 else []
    if args.off_diagonal_noise:
        add_noise(weights, args.off_diagonal_noise, run.seed)
    if args.off_diagonal_lr != 1:
        learner.around_step = partial(rate_between, weights, args.off_diagonal_lr)
    re_estimate = args.update_bn and any(isinstance(m, BATCH_NORMS) for m in learner.net.modules())
    if re_estimate:
        update_bn(some(loader), learner.model, run.device)
    calibrate(learner.net, plan, args.calibrate, loader, run.device)
    if learner.ema is not None:
        learner.ema.set(learner.net)
    return re_estimate or bool(args.off_diagonal_noise)


def _fit(
    run: Context, learner: Learner, loaders: tuple, epochs: int, title: str, about: Mapping[str, Mapping[str, str]]
) -> float:
    """Train the global model, keeping the ``last`` epoch's weights and the ``best``, with what is said `about` them;
    returns the last accuracy."""

    def keep() -> None:
        if not run.ranks.primary:
            return
        *before, last = [row["top1"] for row in learner.history] or [0.0]
        config = models.config(learner.result, run.data_config)
        reached = {"epoch": str(len(learner.history)), "top1": f"{last:.2f}"}
        for name in ["last", "best"] if last > max(before, default=-1.0) else ["last"]:
            files.save_model(learner.folder / name, learner.result, config, {**about.get(name, {}), **reached})

    if run.folder.resuming:
        restore(learner)
    shared = (run.seed, run.timer, Engine(), run.trackers, keep, run.ranks.primary)
    TrainingLoop(title, loaders, epochs, *shared).fit([learner])
    if epochs == 0:
        keep()
    return _accuracy(learner, loaders, shared=True)


def _accuracy(learner: Learner, loaders: tuple, shared: bool) -> float:
    """The accuracy after the last epoch; now, if there was none."""
    if learner.history:
        return learner.history[-1]["top1"]
    return evaluate([learner], loaders[1], Engine(), shared=shared)[0]


# ---- the baseline


def train_baseline(run: Context) -> tuple[float, float]:
    """Train the model from a random start (GNet-R); returns accuracy and seconds."""
    args = options.stage_options(run.args, "baseline")
    given = models.arguments(args.model, img_size=tuple(run.data_config["input_size"][1:]), **run.model_args)
    model = models.create(args.model, pretrained=args.pretrained, seed=args.seed, **given)
    loaders = _shared_loaders(run, args)
    learner = _global_learner(run, "baseline", model, args, len(loaders[0]), run.folder.baseline)
    return _fit(run, learner, loaders, args.epochs, "baseline", {}), learner.seconds
