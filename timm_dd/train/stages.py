"""The stages of a run: the parts, each rank some of them without communication; the composed model, all ranks together;
and the baseline.

Ranks meet once, when their parts are done, and exchange the parts through the run's folder, or where they do not see
one by copies of it. The first rank composes the parts there; every rank reads what it needs, and
DistributedDataParallel gives all the first one's weights.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import models
from ..errors import TrainError
from ..planning.graphs import BATCH_NORMS
from ..planning.plan import Plan
from ..storage import files
from ..storage.merge_files import write_merged
from ..surgery.parts import Parts
from . import data, initial, metrics, options, resident, schedule, views
from .arrived import Arrived, numbers
from .checkpoints import CheckpointTimer, SharedTimer, read_newest, restore
from .composed import add_noise, between, calibrate, rate_between, refit_head, some
from .distill import distilled
from .engines import Engine, cores_of_rank, engine, engine_of_one, share_cores
from .folder import PartsStage, RunFolder
from .learner import Learner, average_statistics
from .loop import TrainingLoop, evaluate, measure
from .meeting import Meeting
from .momenta import carry
from .progress import after_parts, filled, seconds_of
from .ranks import Ranks
from .sharing import Sharing
from .trackers import Trackers


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
        train, val = data.loaders(args, config, *sets, device, distributed, train_size)
        return resident.training(train, args, config, device), resident.validation(val, config, device)

    def stop_if_asked(self) -> None:
        """Raise TrainError if this process was asked to stop while nothing of it is to be saved."""
        self.timer.check("all is saved")

    def about(self, stage: str) -> dict[str, str]:
        """What a model's metadata say of where it comes from; `stage` is its name in the run's summary."""
        return {"run": self.folder.digest(self.parts.plan), "stage": stage}


# ---- stage 1: the parts


def train_parts(run: Context) -> None:
    """Train the parts of this rank that are not done. One that fails does not stop the others."""
    due = []
    for k in run.mine:
        if run.folder.parts.is_done(k):
            run.folder.parts.check(k)
        elif k not in run.done:
            due.append(k)
    if not due:
        return
    args = options.stage_options(run.args, "part")
    torch.set_num_threads(run.args.part_threads)
    size, (images, _) = views.loader_size(args, run.parts.plan), data.folds(run.args, run.sets[0])
    loaders = run.loaders(args, distributed=False, train_size=size, images=images)
    learners = [part_learner(run, k, len(loaders[0])) for k in due]
    if run.folder.resuming:
        for k, learner in zip(due, learners):
            run.folder.parts.forget_failure(k)
            learner.guard(partial(restore, learner), isolate_failures=True)
    with engine(args.engine, learners, run.device, cores_of_rank(run.ranks.local_world)) as by:
        epochs = schedule.epochs(args)
        shared = (run.seed, run.timer, by, run.trackers, partial(_tell, run, learners, epochs))
        how = {"shared": False, "isolate_failures": True, "later": _after_parts(run)}
        shared[-1]()
        TrainingLoop("parts", loaders, epochs, *shared, **how).fit(learners)
    for k, learner in zip(due, learners):
        if learner.failure is not None:
            run.folder.parts.fail(k, learner.failure)
        else:
            finish_part(run, run.folder.parts, run.parts.plan, k, learner, accuracy(learner, loaders, shared=False))


def _tell(run: Context, learners: Sequence[Learner], epochs: int) -> None:
    """Say how far this rank is, for those who wait for its parts."""
    names, ended = ", ".join(n.name for n in learners), max(len(n.history) for n in learners)
    run.meeting.tell(f"{names} of rank {run.ranks.rank}: epoch {ended} of {epochs}")


def _after_parts(run: Context) -> float | None:
    """What follows the parts, see `Progress`, by the time that a few images take; None if that is not to be known."""
    plan, macs, device = run.parts.plan, run.multiply_adds, run.device
    size = (*plan.input_size[: -len(plan.views()[0].size)], *plan.views()[0].size)
    try:
        whole = filled(run.parts.graph, device)
        pace = seconds_of(whole, plan.input_size, device, cores_of_rank(run.ranks.local_world)) / macs["composed"]
        pace_of_part = seconds_of(copy.deepcopy(run.parts[0]), size, device, run.args.part_threads) / macs["parts"][0]
    except (RuntimeError, ZeroDivisionError):  # no memory for it, or nothing that counts
        return None
    return after_parts(run.args, macs, pace / pace_of_part, run.mine, run.ranks.world)


def finish_part(run: Context, stage: PartsStage, plan: Plan, k: int, learner: Learner, top1: float) -> None:
    """Write what a stage made of part k, and that it is done."""
    epochs = len(learner.history)
    files.save_part(learner.folder, plan, k, learner.result.state_dict(), run.seed, epochs)
    summary = {
        "part": k,
        "top1": top1,
        "top5": _top5(learner),
        "epochs": epochs,
        "updates": learner.updates,
        "seconds": learner.seconds,
        "options": learner.options,
    }
    stage.finish(k, summary)


def part_learner(run: Context, k: int, updates: int) -> Learner:
    args, view = options.stage_options(run.args, "part", k), run.parts.plan.views()[k]
    batch = data.images_of_an_update(args)
    learner = learner_of(run, f"part {k}", run.parts[k], view, args, updates, batch, k, run.folder.parts.part(k))
    learner.sight.draws = views.of_part(args, run.parts.plan, k)
    return learner


def learner_of(run: Context, name, model, sees, args, updates, batch, stream, folder) -> Learner:
    learner = Learner(name, model, sees, args, run.device, updates, batch, run.seed * 1000 + stream, folder)
    folder.mkdir(parents=True, exist_ok=True)
    return learner


def meet(run: Context) -> None:
    """Wait until every rank has trained its parts; then they are a process group, unless nothing else is to be done.

    Raises:
        TrainError: some failed.
    """
    if run.ranks.world > 1 and run.meeting.group is None:
        if run.args.only_parts is None:
            run.meeting.join(run.device, run.stop_if_asked)
            run.sharing.begin()
        else:
            run.meeting.meet(run.stop_if_asked)
    run.meeting.gate(run.stop_if_asked)
    run.sharing.share(run.folder.parts.path, of_all=True)
    parts = range(run.args.parts) if run.args.only_parts is None else run.mine
    failed = [k for k in run.folder.parts.missing() if k in parts]
    if failed and not run.ranks.primary and run.args.only_parts is None:
        raise SystemExit(1)  # the first rank says why
    if failed:
        raise TrainError(
            f"{'; '.join(f'part {k} failed ({run.folder.parts.failure(k)})' for k in failed)}; "
            f"{len(parts) - len(failed)} of {len(parts)} parts are done and kept: --resume {run.folder.path} "
            f"goes on with what failed, from its last checkpoint, or from the start and with other options if "
            f"{run.folder.parts.path}/k is removed"
        )
    if run.args.only_parts is not None and parts:
        left = run.folder.parts.missing()
        then = f"; parts {numbers(left)} are not there yet" if left else ", all that there are"
        print(f"parts {numbers(parts)} of {run.args.parts} are trained, in {run.folder.parts.path}{then}", flush=True)


def take_arrived(run: Context, arrived: Arrived) -> None:
    """Take parts that were trained elsewhere into the run's folder; what they reach is found if nobody says it."""
    unknown = arrived.take()
    if run.args.keep_momenta and not run.args.joint_epochs and run.args.epochs:
        without = [k for k in arrived.parts if read_newest(run.folder.parts.part(k)) is None]
        if without:
            tqdm.write(f"parts {numbers(without)} came without optimizer states: fine-tuning has none", sys.stdout)
    if not unknown:
        return
    share_cores(run.ranks.local_world)
    loaders = run.loaders(options.stage_options(run.args, "part"), distributed=False)
    for part in unknown:
        learner = part_learner(run, part.k, len(loaders[0]))
        learner.net.load_state_dict(load_file(part.file))
        told = {"epochs": part.epoch or 0, "updates": 0, "seconds": 0.0, "options": learner.options}
        top1 = accuracy(learner, loaders, shared=False)
        run.folder.parts.finish(part.k, {"part": part.k, "top1": top1, **told})


# ---- stage 2: the composed model


def tune(run: Context) -> tuple[dict[str, Any], dict[str, float | None], dict[str, float]]:
    """Compose, re-estimate the BatchNorm statistics, and fine-tune; returns the accuracies of the parts together and
    of the composed model after each step, with the best epoch; top-5 of the same; and the seconds of each step: those
    of `composed` are with the statistics."""
    begun = time.perf_counter()
    if run.ranks.primary:
        trained, start = run.folder.trained.path, run.folder.start
        write_merged(trained, run.folder.composed, "sum", run.about("composed"), start)
    run.meeting.gate(run.stop_if_asked)
    run.sharing.share(run.folder.composed)
    seconds = {"compose": time.perf_counter() - begun}
    plan, args = run.parts.plan, options.stage_options(run.args, None)
    loaders = shared_loaders(run, args)
    load_trained(run.folder.parts, run.parts)
    learners = [part_learner(run, k, 1) for k in range(len(run.parts))]
    together = measure(learners, loaders[1], Engine(), together=True)[-1]  # each part on its box
    model = models.create(plan.model, **plan.model_args)
    files.load_composed(run.folder.composed, model)
    initial.set_checkpointing(args, model)
    learner = global_learner(run, "composed model", model, args, len(loaders[0]), run.folder.tuned)
    if args.distill:
        learner.loss = distilled(learner, run.folder.two_level, args.distill)
    steps = {"together": together, "composed": measure([learner], loaders[1], Engine())[0]}
    start = time.perf_counter()
    data.seed_epoch(run.seed, args.epochs)
    changed = _prepare(run, learner, plan, loaders[0], args)
    learner.seconds = seconds["statistics"] = time.perf_counter() - start
    if changed:
        steps["updated"] = measure([learner], loaders[1], Engine())[0]
    made_of = files.summary(plan, plan.digest())
    about = {name: {**made_of, **run.about(stage)} for name, stage in (("last", "tuned"), ("best", "best"))}
    found = {name: step["top1"] for name, step in steps.items()}
    found["tuned"] = fit(
        run, learner, loaders, schedule.epochs(args), "fine-tuning", partial(_save, run, learner, about)
    )
    best = metrics.best(learner.history, args)
    found["best"] = found["tuned"] if best is None else learner.history[best]["top1"]
    found["best_epoch"] = 0 if best is None else best + 1
    top5 = {name: step["top5"] for name, step in steps.items()}
    top5 |= {"tuned": _top5(learner), "best": None if best is None else learner.history[best].get("top5")}
    return found, top5, {**seconds, "composed": learner.seconds}


def _top5(learner: Learner) -> float | None:
    """After the last epoch; None if it was not evaluated."""
    return learner.history[-1].get("top5") if learner.history else None


def shared_loaders(run: Context, args: argparse.Namespace) -> tuple:
    """Of which each rank reads its share."""
    share_cores(run.ranks.local_world)
    return run.loaders(args, distributed=run.ranks.world > 1)


def load_trained(stage: PartsStage, parts: Parts) -> None:
    """Give the parts the weights of a stage's files, which other ranks may have trained."""
    with files.PartsFolder(stage.path) as trained:
        for k, part in enumerate(parts):
            part.load_state_dict(trained.load(k))


def global_learner(run: Context, name: str, model: nn.Module, args, updates: int, folder: Path) -> Learner:
    model = model.to(run.device)
    if run.ranks.world > 1:
        model = convert_sync_batchnorm(model) if args.sync_bn else model
        devices = None if run.device.type == "cpu" else [run.device.index]
        model = DistributedDataParallel(model, devices, broadcast_buffers=args.dist_bn != "reduce")
    batch, stream = data.images_of_an_update(args) * run.ranks.world, 999 - run.ranks.rank
    return learner_of(run, name, model, None, args, updates, batch, stream, folder)


def _prepare(run: Context, learner: Learner, plan: Plan, loader, args: argparse.Namespace) -> bool:
    """Make the composed model ready to be fine-tuned; whether its accuracy may be another."""
    net = learner.net
    weights = list(between(plan, net)) if args.off_diagonal_noise or args.off_diagonal_lr != 1 else []
    if args.off_diagonal_noise:
        add_noise(weights, args.off_diagonal_noise, run.seed)
    if args.off_diagonal_lr != 1:
        learner.around_step = partial(rate_between, weights, args.off_diagonal_lr)
    re_estimate = args.update_bn and any(isinstance(m, BATCH_NORMS) for m in net.modules())
    if re_estimate:
        update_bn(some(loader), learner.model, run.device)
        average_statistics(learner)
    if args.refit_head:
        refit_head(net, plan, loader, run.device)
    calibrate(net, plan, args.calibrate, loader, run.device)
    if args.keep_momenta:
        carry(learner, plan, run.folder.trained, run.parts[0])
    if learner.ema is not None:
        learner.ema.set(net)
    return re_estimate or bool(args.off_diagonal_noise) or args.refit_head


def fit(
    run: Context, learner: Learner, loaders: tuple, epochs: int, title: str, save: Callable[[str, dict[str, str]], None]
) -> float:
    """Train a network of all ranks; returns the last accuracy.

    Args:
        save: what it gives, as ``last`` epoch's or ``best``, with the epoch and the accuracy that it reached.
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
    restore(learner)
    with engine_of_one(run.args.engine, run.device) as by:
        timer = run.timer if run.ranks.world == 1 else SharedTimer(run.timer, writes=run.ranks.primary)
        shared = (run.seed, timer, by, run.trackers, keep, run.ranks.primary, run.ranks.primary)
        TrainingLoop(title, loaders, epochs, *shared).fit([learner])
    if epochs == 0:
        keep()
    return accuracy(learner, loaders, shared=True)


def _save(
    run: Context, learner: Learner, about: Mapping[str, Mapping[str, str]], name: str, reached: dict[str, str]
) -> None:
    """Write the global model with what is said `about` it."""
    config = models.config(learner.result, run.data_config, run.class_names)
    files.save_model(learner.folder / name, learner.result, config, {**about.get(name, {}), **reached})


def accuracy(learner: Learner, loaders: tuple, shared: bool) -> float:
    """The accuracy after the last epoch; now, if there was none."""
    if learner.history and learner.history[-1]["top1"] is not None:
        return learner.history[-1]["top1"]
    return evaluate([learner], loaders[1], Engine(), shared=shared)[0]


# ---- the baseline


def train_baseline(run: Context) -> tuple[float, float | None, float]:
    """Train the model from a random start (GNet-R); returns its accuracy, top-5 and seconds."""
    args = options.stage_options(run.args, "baseline")
    model = initial.model(args, run.data_config["input_size"][1:], run.model_args)
    initial.set_checkpointing(args, model)
    loaders = shared_loaders(run, args)
    learner = global_learner(run, "baseline", model, args, len(loaders[0]), run.folder.baseline)
    top1 = fit(run, learner, loaders, schedule.epochs(args), "baseline", partial(_save, run, learner, {}))
    return top1, _top5(learner), learner.seconds
