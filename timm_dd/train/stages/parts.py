"""Stage 1: the parts, each rank some of them without communication.

Ranks meet once, when their parts are done, and exchange the parts through the run's folder, or where they do not see
one by copies of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ...errors import TrainError
from ...planning.plan import Plan
from ...storage import files
from ..engines import Engine, engine
from ..epochs.checkpoints import read_newest, restore
from ..epochs.loop import TrainingLoop, measure
from ..epochs.progress import after_parts, filled, seconds_of
from ..images import data
from ..ranks.cores import cores_of_rank, share_cores
from ..settings import options, views
from ..updates import schedule
from ..updates.learner import Learner
from .arrived import Arrived, numbers
from .context import Context, accuracy, last_top5, part_learner
from .folder import PartsStage
from .momenta import hand_down


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
    for k, learner in zip(due, learners) if run.states else ():
        hand_down(learner, run.parts.plan, k, run.states)
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
        finish_part(run, run.folder.parts, run.parts.plan, k, learner, loaders, isolate_failures=True)


def _tell(run: Context, learners: Sequence[Learner], epochs: int) -> None:
    """Say how far this rank is, for those who wait for its parts."""
    names, ended = ", ".join(n.name for n in learners), max(len(n.history) for n in learners)
    run.meeting.tell(f"{names} of rank {run.ranks.rank}: epoch {ended} of {epochs}")


def _after_parts(run: Context) -> float | None:
    """What follows the parts, see `Progress`, by the time that a few images take; None if that is not to be known."""
    plan, macs, device = run.parts.plan, run.multiply_adds, run.device
    try:
        whole = filled(run.parts.graph, device)
        pace = seconds_of(whole, plan.input_size, device, cores_of_rank(run.ranks.local_world)) / macs["composed"]
        part, size = copy.deepcopy(run.parts[0]), plan.part_input_size(0)
        pace_of_part = seconds_of(part, size, device, run.args.part_threads) / macs["parts"][0]
    except Exception:  # no memory for it, or a network on which such numbers fail: nothing that a run should end for
        return None
    return after_parts(run.args, macs, pace / pace_of_part, run.mine, run.ranks.world)


def finish_part(
    run: Context,
    stage: PartsStage,
    plan: Plan,
    k: int,
    learner: Learner,
    loaders: tuple,
    isolate_failures: bool = False,
) -> None:
    """Write what a stage made of part k, and that it is done; or why it failed. Running statistics overflow without a
    trace in the loss, and no file of what is not finite is read."""
    epochs, state = len(learner.history), learner.result.state_dict()
    if learner.failure is None:
        learner.guard(partial(files.check_state, plan, k, state), isolate_failures)
    if learner.failure is not None:
        return stage.fail(k, learner.failure)
    top1 = accuracy(learner, loaders, shared=False)
    files.save_part(learner.folder, plan, k, state, run.seed, epochs)
    summary = {
        "part": k,
        "top1": top1,
        "top5": last_top5(learner),
        "epochs": epochs,
        "updates": learner.updates,
        "seconds": learner.seconds,
        "options": learner.options,
    }
    stage.finish(k, summary)


def take_arrived(run: Context, arrived: Arrived) -> None:
    """Take parts that were trained elsewhere into the run's folder; what they reach is found if nobody says it."""
    unknown = arrived.take()
    if run.args.keep_momenta and not run.args.joint_epochs and run.args.epochs:
        without = [k for k in arrived.parts if read_newest(run.folder.parts.part(k)) is None]
        if without:
            tqdm.write(f"parts {numbers(without)} came without optimizer states: fine-tuning has none")
    if not unknown:
        return
    share_cores(run.ranks.local_world)
    loaders = run.loaders(options.stage_options(run.args, "part"), distributed=False)
    for part in unknown:
        run.parts[part.k].load_state_dict(load_file(part.file))
        learner = part_learner(run, part.k, len(loaders[0]))
        found = measure([learner], loaders[1], Engine(), shared=False)[0]
        told = {"epochs": part.epoch or 0, "updates": 0, "seconds": 0.0, "options": learner.options}
        run.folder.parts.finish(part.k, {"part": part.k, "top1": found["top1"], "top5": found["top5"], **told})


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
