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
from collections.abc import Callable, Mapping, Sequence
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
from . import data, options, resident, views
from .checkpoints import CheckpointTimer, restore
from .composed import add_noise, between, calibrate, rate_between, refit_head, some
from .distill import distilled
from .engines import Engine, cores_of_rank, engine, engine_of_one, share_cores
from .folder import PartsStage, Ranks, RunFolder
from .learner import Learner
from .loop import TrainingLoop, evaluate
from .momenta import carry
from .trackers import Trackers

WAIT = datetime.timedelta(days=7)  # the first rank to finish its parts waits for the last


@dataclass
class Context:
    """What the stages of a run share.

    Attributes:
        folder: of the run.
        seed: of the order of images, and of dropout.
        parts: as they were split; later as they were trained.
        whole: the same parts as they are on whole images, for the joint stage; None if there is none.
        model_args: for `timm.create_model`.
        class_names: in the order of their numbers; None if not known.
        sets: (train, validation).
    """

    args: argparse.Namespace
    ranks: Ranks
    device: torch.device
    folder: RunFolder
    seed: int
    parts: Parts
    whole: Parts | None
    model_args: dict
    class_names: Sequence[str] | None
    data_config: dict
    sets: Sequence[Dataset]
    timer: CheckpointTimer
    trackers: Trackers

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

    def about(self, stage: str) -> dict[str, str]:
        """What a model's metadata say of where it comes from; `stage` is its name in the run's summary."""
        return {"run": self.folder.digest(self.parts.plan), "stage": stage}


# ---- stage 1: the parts


def train_parts(run: Context) -> None:
    """Train part k on rank k mod world size, those that are not done. One that fails does not stop the others."""
    of_this_rank = range(run.ranks.rank, run.args.parts, run.ranks.world)
    due = [k for k in of_this_rank if not run.folder.parts.is_done(k)]
    for k in set(of_this_rank) - set(due):
        run.folder.parts.check(k)
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
        shared = (run.seed, run.timer, by, run.trackers)
        TrainingLoop("parts", loaders, args.epochs, *shared, shared=False, isolate_failures=True).fit(learners)
    for k, learner in zip(due, learners):
        if learner.failure is not None:
            run.folder.parts.fail(k, learner.failure)
        else:
            finish_part(run, run.folder.parts, run.parts.plan, k, learner, accuracy(learner, loaders, shared=False))


def finish_part(run: Context, stage: PartsStage, plan: Plan, k: int, learner: Learner, top1: float) -> None:
    """Write what a stage made of part k, and that it is done."""
    epochs = len(learner.history)
    files.save_part(learner.folder, plan, k, learner.result.state_dict(), run.seed, epochs)
    summary = {
        "part": k,
        "top1": top1,
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
    """Wait until every rank has trained its parts.

    Raises:
        TrainError: some failed.
    """
    if run.ranks.world > 1:
        with run.timer.away():
            if not dist.is_initialized():
                dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo", timeout=WAIT)
            dist.barrier()
    failed = run.folder.parts.missing()
    if failed and not run.ranks.primary:
        raise SystemExit(1)  # the first rank says why
    if failed:
        raise TrainError(
            f"{'; '.join(f'part {k} failed ({run.folder.parts.failure(k)})' for k in failed)}; "
            f"{run.args.parts - len(failed)} of {run.args.parts} parts are done and kept: --resume {run.folder.path} "
            f"goes on with what failed, from its last checkpoint, or from the start and with other options if "
            f"{run.folder.parts.path}/k is removed"
        )


# ---- stage 2: the composed model


def tune(run: Context) -> tuple[dict[str, float], dict[str, float]]:
    """Compose, re-estimate the BatchNorm statistics, and fine-tune; returns the accuracies of the parts together and
    of the composed model after each step, and the seconds of each: those of `composed` are with the statistics."""
    begun = time.perf_counter()
    if run.ranks.primary:
        trained, start = run.folder.trained.path, run.folder.start
        write_merged(trained, run.folder.composed, "sum", run.about("composed"), start)
    if run.ranks.world > 1:
        dist.barrier()
    seconds = {"compose": time.perf_counter() - begun}
    plan, args = run.parts.plan, options.stage_options(run.args, None)
    loaders = shared_loaders(run, args)
    load_trained(run.folder.parts, run.parts)
    learners = [part_learner(run, k, 1) for k in range(len(run.parts))]
    together = evaluate(learners, loaders[1], Engine(), together=True)[-1]  # each part on its box
    model = models.create(plan.model, **plan.model_args)
    files.load_composed(run.folder.composed, model)
    learner = global_learner(run, "composed model", model, args, len(loaders[0]), run.folder.tuned)
    if args.distill:
        learner.loss = distilled(learner, run.folder.two_level, args.distill)
    found = {"together": together, "composed": evaluate([learner], loaders[1], Engine())[0]}
    start = time.perf_counter()
    data.seed_epoch(run.seed, args.epochs)
    changed = _prepare(run, learner, plan, loaders[0], args)
    learner.seconds = seconds["statistics"] = time.perf_counter() - start
    if changed:
        found["updated"] = evaluate([learner], loaders[1], Engine())[0]
    made_of = files.summary(plan, plan.digest())
    about = {name: {**made_of, **run.about(stage)} for name, stage in (("last", "tuned"), ("best", "best"))}
    found["tuned"] = fit(run, learner, loaders, args.epochs, "fine-tuning", partial(_save, run, learner, about))
    found["best"] = max((row["top1"] for row in learner.history), default=found["tuned"])
    return found, {**seconds, "composed": learner.seconds}


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
        model = DistributedDataParallel(model, device_ids=[run.device.index] if run.device.type == "cuda" else None)
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
        *before, last = [row["top1"] for row in learner.history] or [0.0]
        reached = {"epoch": str(len(learner.history)), "top1": f"{last:.2f}"}
        for name in ["last", "best"] if last > max(before, default=-1.0) else ["last"]:
            save(name, reached)

    if run.folder.resuming:
        restore(learner)
    with engine_of_one(run.args.engine, run.device) as by:
        shared = (run.seed, run.timer, by, run.trackers, keep, run.ranks.primary, run.ranks.primary)
        TrainingLoop(title, loaders, epochs, *shared).fit([learner])
    if epochs == 0:
        keep()
    return accuracy(learner, loaders, shared=True)


def _save(
    run: Context, learner: Learner, about: Mapping[str, Mapping[str, str]], name: str, reached: dict[str, str]
) -> None:
    """Write the global model with what is said `about` it."""
    config = models.config(learner.result, run.data_config)
    files.save_model(learner.folder / name, learner.result, config, {**about.get(name, {}), **reached})


def accuracy(learner: Learner, loaders: tuple, shared: bool) -> float:
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
    loaders = shared_loaders(run, args)
    learner = global_learner(run, "baseline", model, args, len(loaders[0]), run.folder.baseline)
    top1 = fit(run, learner, loaders, args.epochs, "baseline", partial(_save, run, learner, {}))
    return top1, learner.seconds
