"""Stage 2: the composed network, fine-tuned by all ranks together.

The first rank composes the parts in the run's folder; every rank reads what it needs, and DistributedDataParallel gives
all the first one's weights.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from torch.optim.swa_utils import update_bn

from ... import models
from ...planning.graphs import BATCH_NORMS
from ...planning.plan import Plan
from ...storage import files
from ...storage.merge_files import write_merged
from ..engines import Engine
from ..epochs import checkpoints
from ..epochs.loop import measure
from ..images import data
from ..settings import options
from ..updates import metrics, schedule
from ..updates.learner import Learner, average_statistics
from . import initial
from .composed import add_noise, between, calibrate, rate_between, refit_head, some
from .context import (
    Context,
    check_global,
    fit,
    global_learner,
    last_top5,
    load_trained,
    part_learner,
    save_global,
    shared_loaders,
)
from .distill import distilled
from .momenta import carry


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
    as_files = partial(save_global, run, learner, about), partial(check_global, run)
    found["tuned"] = fit(run, learner, loaders, schedule.epochs(args), "fine-tuning", *as_files)
    if not learner.history and args.keep_momenta and run.ranks.primary:
        checkpoints.save(learner)  # its optimizer's states are for the next cycle
    best = metrics.best(learner.history, args)
    found["best"] = found["tuned"] if best is None else learner.history[best]["top1"]
    found["best_epoch"] = 0 if best is None else best + 1
    top5 = {name: step["top5"] for name, step in steps.items()}
    top5 |= {"tuned": last_top5(learner), "best": None if best is None else learner.history[best].get("top5")}
    return found, top5, {**seconds, "composed": learner.seconds}


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
        carry(learner, plan, run.folder.trained, run.parts[0], run.states)
    if learner.ema is not None:
        learner.ema.set(net)
    return re_estimate or bool(args.off_diagonal_noise) or args.refit_head
