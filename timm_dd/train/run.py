"""A run, from its options to its summary: split, train the parts, compose, fine-tune, and the baseline if asked for."""

from __future__ import annotations

import argparse
import copy
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils.data import Dataset

from .. import console, models
from ..algebra.domain import Domain
from ..errors import SplitError, TrainError, headline
from ..planning.plan import Plan
from ..reports.outcome import MEGA
from ..storage import files
from ..storage.atomic import replace_json
from ..surgery.claim import check_claim
from ..surgery.parts import Parts
from ..surgery.split import split
from ..text import number
from .epochs import checkpoints
from .epochs.checkpoints import CheckpointTimer
from .epochs.trackers import Trackers
from .images import data
from .images.decoded import decoded
from .images.readable import left_out
from .ranks.cores import cores, part_threads
from .ranks.dealing import parts_of
from .ranks.meeting import Meeting
from .ranks.sharing import Sharing, sees
from .ranks.world import Ranks, alone
from .rehearsal import rehearse
from .settings import options, views
from .stages import coarse, initial, momenta, origins
from .stages.arrived import Arrived
from .stages.baseline import train_baseline
from .stages.composed import reordered
from .stages.context import Context
from .stages.folder import RunFolder
from .stages.joint import train_joint
from .stages.parts import meet, take_arrived, train_parts
from .stages.summary import multiply_adds, summary_table
from .stages.together import train_together
from .stages.tuned import tune

SEEN = 5  # seconds in which a network's file system shows a new file
CHECK_SECONDS = 10  # for the plan's claim by value, before hours of training are built on it


def train(args: argparse.Namespace) -> dict:
    """A run; its summary."""
    run = Run(args)
    try:
        summary = run.go()
    except BaseException:
        run.meeting.leave()
        raise
    if dist.is_initialized():
        dist.destroy_process_group()
    run.meeting.end()
    return summary


class Run:
    """One cycle of a training run; `go` carries out the first one, and those that follow.

    Args:
        before: the cycle whose fine-tuned model is split; None for a fresh or pretrained one.
    """

    def __init__(self, args: argparse.Namespace, before: Run | None = None):
        self.args, self.ranks, self.begun = args, Ranks.from_environment(), time.time()
        self.before = None if before is None else before.folder
        self.last = None if before is None else before.folder.tuned / "last"
        self.meeting = Meeting(self.ranks) if before is None else before.meeting
        self.sharing = None if before is None else before.sharing
        self.done: Sequence[int] = ()
        self.over = False  # whether this cycle is done
        self.device = self.ranks.device(args.device)
        if args.sync_bn and self.device.type == "cpu":
            raise TrainError("--sync-bn: torch's SyncBatchNorm runs on GPUs alone; leave it out on CPUs")
        args.workers = min(4, cores()) if args.workers is None else args.workers
        self.train_set, self.val_set, classes = data.datasets(args, self.ranks.world)
        self.model_args = options.model_arguments(args, classes)
        args.num_classes = self.model_args["num_classes"]
        coarse.check(args, self.train_set)
        empty = models.create_empty(args.model, **self.model_args)
        self.data_config = data.data_config(args, empty)
        initial.set_checkpointing(args, empty)
        self.timer = CheckpointTimer(args.checkpoint_every)
        self.folder = RunFolder.of_run(args, self.meeting) if before is None else before.folder.next_cycle()
        threads = args.engine, args.parts, self.ranks.local_world
        args.part_threads = args.part_threads or self.folder.threads or part_threads(*threads)
        self.class_names = data.class_names(self.train_set, args.num_classes)
        config = models.config(empty, self.data_config, self.class_names)
        self.parts = self._as_seen(config)
        self.whole = self._whole(config)
        self.mine = parts_of(self.ranks.rank, self.ranks.world, self.parts, args.only_parts or range(args.parts))
        views.check(args, self.parts)
        self.multiply_adds = multiply_adds(args, self.parts, self.whole)
        self.arrived = None
        if args.from_parts is not None and before is None and self.ranks.primary:
            self.arrived = Arrived(args.from_parts, self.parts.plan, self.folder.parts, args.seed)
        if before is None:
            size = views.loader_size(options.stage_options(args, "part"), self.parts.plan)
            rehearse(args, self.data_config, (self.train_set, self.val_set), size)

    @property
    def cycle(self) -> int:
        return self.folder.cycle

    def _as_seen(self, config: dict | None) -> Parts:
        """The parts on what they see; where no option says it, the recipe's view, boxes if the network reads positions,
        and whole images if it takes one size alone."""
        whole = Domain.full(self.args.parts)
        if options.follows_recipe(self.args):
            for domain in (replace(whole, scale=options.SCALE), console.domain(self.args)):
                with suppress(SplitError):
                    return self._split(domain, config)
            return self._split(whole, config)
        return self._split(console.domain(self.args), config)

    def _whole(self, config: dict | None) -> Parts | None:
        """The parts as they are on whole images; None if there is no joint stage.

        Raises:
            TrainError: a joint stage is asked for that they cannot have.
        """
        args, part = self.args, options.stage_options(self.args, "part")
        epochs = part.epochs // options.JOINT if args.joint_epochs is None else args.joint_epochs
        whole = self._split(Domain.full(args.parts), config) if epochs else None
        if whole is not None and whole.plan.tensors != self.parts.plan.tensors:
            if args.joint_epochs is not None:
                raise TrainError(
                    f"--joint-epochs: the parts of {args.model} have weights for the positions of their boxes, (2.13), "
                    "and do not run on whole images; use --grid full, or leave out the joint stage"
                )
            whole, epochs = None, 0
        args.joint_epochs = epochs
        return whole

    def _split(self, domain: Domain, config: dict | None) -> Parts:
        args = self.args
        parts = split(
            args.model,
            args.parts,
            domain=domain,
            narrow=args.narrow,
            img_size=tuple(self.data_config["input_size"][1:]),
            pretrained=args.pretrained and not args.pretrained_path and self.last is None,
            seed=args.seed,
            **self.model_args,
        )
        if args.reassign and not parts.plan.exact:
            raise TrainError(f"--reassign: {args.model} is not the same with its channels in another order")
        start = self._start(parts.plan)
        if start is not None:
            parts.take(start)
        parts.plan = replace(parts.plan, config=config)
        return parts

    def _start(self, plan: Plan) -> dict[str, torch.Tensor] | None:
        """The model that this cycle splits: the last one's, its channels in another order if they are reassigned; of
        the first cycle that of a file, if one is given."""
        if self.last is None:
            return initial.weights(self.args, self.data_config["input_size"][1:], self.model_args)
        state = load_file(self.last / files.MODEL)
        return {n: reordered(plan, n, t) for n, t in state.items()} if self.args.reassign else state

    def _states(self) -> momenta.States:
        """Of the last cycle's optimizer, in the order of the channels here."""
        if self.before is None or not self.args.keep_momenta:
            return {}
        plan = self.parts.plan
        states = momenta.of_tuned(self.before.tuned, options.stage_options(self.args, None), plan)
        return momenta.changed(states, partial(reordered, plan)) if self.args.reassign else states

    def go(self) -> dict:
        """All cycles, each from the last one's fine-tuned model; the last one's summary.

        Raises:
            FileError: another process trains in the run's folder.
        """
        if self.ranks.primary and not self.folder.resuming:
            check_claim(self.parts, CHECK_SECONDS)
        with ExitStack() as holding:
            run = self
            if self.device.type != "cpu":
                holding.enter_context(alone(self.device, self.meeting.run))
            while True:
                _agree(run, holding)
                summary = run._go()
                if run.cycle == self.args.cycles or self.args.only_parts is not None:
                    return summary
                run = Run(self.args, run)

    def _go(self) -> dict:
        """Both stages, and the baseline if asked for, unless all is done; writes and prints the summary on the first
        rank."""
        with _explained(self.timer, self.folder.path):
            sets = [] if self.over else self._decoded()
        with self.timer:  # from before anybody can read that it has begun, and stop it
            if self.sharing.keeps:
                self.folder.open(self.parts.plan, self.begun)
            if self.ranks.primary:
                bad = [f"left out: {why}" for why in left_out(self.train_set, self.val_set)]
                print(_title(self), *bad, sep="\n", flush=True)
            summary = {} if self.over else self._through(sets)
        if summary:
            self.meeting.gate()  # the next cycle reads what the first rank wrote
            self.sharing.share(self.folder.tuned)
            if self.sharing.keeps and self.cycle == self.args.cycles:
                self.folder.remove_decoded()
        return summary

    def _through(self, sets: Sequence[Dataset]) -> dict:
        """The stages of a cycle that is not over; empty if others train the rest of its parts."""
        rank, explained = self.ranks.rank, _explained(self.timer, self.folder.path)
        with Trackers(self.args, self.folder.path, rank) as tracked, explained:
            summary = _stages(self, _context(self, tracked, sets))
            if not summary:
                return summary
            if self.ranks.primary:
                replace_json(self.folder.summary, summary)
            tracked.end_run()
        if self.ranks.primary:
            where = f"{self.folder.path}: composed/ before fine-tuning, global/best after"
            print(f"\n{summary_table(summary, self.args)}\n\n{where}", flush=True)
        return summary

    def _decoded(self) -> list[Dataset]:
        """(train, validation), decoded if they fit; what a run that does not begin has made of them is removed."""
        named = {"train": self.train_set, "validation": self.val_set}
        try:
            return [decoded(s, self.folder.decoded / f"{n}.safetensors", self.args.workers) for n, s in named.items()]
        except BaseException:
            if not self.folder.begun:
                shutil.rmtree(self.folder.decoded, ignore_errors=True)
                with suppress(OSError):
                    self.folder.path.rmdir()
            raise


def _about(run: Run) -> dict[str, Any]:
    """By what the run can be repeated, and known by its models."""
    return {
        "command": options.command(run.args),
        "dataset": (run.args.dataset or Path(run.args.data_dir).resolve().name).split("/")[-1],
        "split": run.args.val_split,
        **({} if run.class_names is None else {"class_names": list(run.class_names)}),
        "run": run.folder.digest(run.parts.plan),
    }


def _agree(run: Run, holding: ExitStack) -> None:
    """Whether the run may begin or go on here, as the first rank says; who keeps a folder holds it."""

    def found() -> dict:
        run.folder.check(run.parts.plan, run.train_set)
        origins.check(run.folder)
        if run.arrived is not None:
            run.arrived.check_complete()
        arrived = run.arrived.parts if run.arrived is not None else ()
        done = [k for k in range(run.args.parts) if k in arrived or run.folder.parts.is_done(k)]
        over = run.folder.resuming and run.cycle < run.args.cycles and run.folder.done
        return {"goes_on": run.folder.resuming, "threads": run.args.part_threads, "done": done, "over": over}

    if run.ranks.primary and run.before is None:
        holding.enter_context(run.folder.held())
    told = run.meeting.agree(f"cycle-{run.cycle}", found)
    run.folder, run.args.part_threads = replace(run.folder, goes_on=told["goes_on"]), told["threads"]
    run.done, run.over = told["done"], told["over"]
    if run.sharing is None:
        run.folder = replace(run.folder, copy=not run.ranks.primary and _is_apart(run))
        run.sharing = Sharing(run.folder.path, run.ranks.primary or run.folder.copy)
    if run.folder.copy:
        if run.before is None:
            holding.enter_context(run.folder.held())
        run.folder.check(run.parts.plan, run.train_set)


def _is_apart(run: Run) -> bool:
    """Whether this rank has to keep a folder, since its machine does not see that of the first rank."""
    until = time.monotonic() + SEEN
    while not (seen := sees(run.folder.path, run.meeting.run)) and time.monotonic() < until:
        time.sleep(0.1)
    if not seen and run.ranks.local_rank == 0:
        who, folder = f"rank {run.ranks.rank} on {socket.gethostname()}", run.folder.path
        print(f"{who} does not see the first rank's {folder}: it sends its parts once all are trained", flush=True)
    return not seen and run.ranks.local_rank == 0


def _context(run: Run, tracked: Trackers, sets: Sequence[Dataset]) -> Context:
    """What a cycle's stages are given."""
    return Context(
        args=run.args,
        ranks=run.ranks,
        meeting=run.meeting,
        sharing=run.sharing,
        device=run.device,
        folder=run.folder,
        seed=run.args.seed + run.cycle - 1,
        mine=run.mine,
        done=run.done,
        parts=run.parts,
        whole=run.whole,
        model_args=run.model_args,
        class_names=run.class_names,
        data_config=run.data_config,
        sets=sets,
        timer=run.timer,
        trackers=tracked,
        multiply_adds=run.multiply_adds,
        states=run._states(),
    )


def _stages(run: Run, context: Context) -> dict:
    """All of a cycle; its summary."""
    if run.args.from_parts is not None and run.before is None:
        run.meeting.agree("arrived", partial(take_arrived, context, run.arrived), context.stop_if_asked)
    fresh = {how: copy.deepcopy(run.parts) for how in run.args.together}
    train_parts(context)
    meet(context)
    if run.args.only_parts is not None:
        return {}
    _check_starts(context)
    trained = run.folder.parts.summaries()
    seconds, joint = {"parts": max(p["seconds"] for p in trained)}, {}
    if run.args.joint_epochs:
        joint["joint"], seconds["joint"] = train_joint(context)
        _check_starts(context)
    second = {}
    if run.args.aggregate and run.ranks.primary:
        second, seconds["two_level"] = coarse.decide_together(context)
    run.meeting.gate(context.stop_if_asked)
    run.sharing.share(run.folder.two_level)
    for how, parts in fresh.items():
        second[how], seconds[how] = train_together(context, how, parts)
    if run.folder.start is not None and run.ranks.primary:
        mine = run.parts.plan
        files.save_state(run.folder.start, run._start(mine), mine.config, {})
    tuned, top5, took = tune(context)
    seconds |= took
    summary = {
        "parts": [p["top1"] for p in trained],
        **({"two_level": second} if second else {}),
        **joint,
        **tuned,
        "top5": {"parts": [p.get("top5") for p in trained], **top5},
        "seconds": seconds,
        "multiply_adds": run.multiply_adds,
        **_about(run),
    }
    if run.args.baseline and run.cycle == 1:
        baseline = train_baseline(context)
        summary["baseline"], summary["top5"]["baseline"], summary["seconds"]["baseline"] = baseline
    return summary


def _check_starts(run: Context) -> None:
    """Once parts are trained: what was trained from them before was from these, or the run ends here."""
    if run.ranks.primary:
        origins.check(run.folder)
    run.meeting.gate(run.stop_if_asked)


def _title(run: Run) -> str:
    plan, macs, batch = run.parts.plan, run.multiply_adds, data.images_of_an_update(run.args)
    verdict = "exact" if plan.exact else f"approximate in {len(plan.approximations)} places"
    seen = dict.fromkeys("×".join(map(str, view.size)) for view in plan.views())
    updates = data.pace(run.args, run.train_set, 1).get("updates_per_epoch")
    return (
        f"{run.args.model} in {plan.parts} parts, {plan.domain}, {verdict}; "
        f"{plan.params():,} parameters, {plan.params(0):,} in part 0\n"
        f"images of {'×'.join(map(str, plan.input_size))}, of which parts see {' or '.join(seen)}; multiply-adds: "
        f"{number(macs['parts'][0] / MEGA)} M in part 0, {number(macs['composed'] / MEGA)} M in the whole model\n"
        f"{len(run.train_set):,} images to train on, {len(run.val_set):,} to validate; "
        f"{f'{updates:,} batches' if updates else 'batches'} of {batch} an epoch of the parts; "
        f"{run.ranks.world} rank(s) on {run.device.type}; {run.folder.path}"
    )


@contextmanager
def _explained(timer: CheckpointTimer, folder: Path) -> Iterator[None]:
    """What becomes of workers, and of other ranks that stop: they take the process group with them."""
    try:
        yield
    except RuntimeError as e:
        written = any(checkpoints.found(path) for path in folder.rglob("*") if path.is_dir())
        kept = "the last checkpoints are kept" if written else "no checkpoint was written yet"
        timer.check(kept)
        if "DataLoader worker (pid" in str(e):
            raise TrainError(
                f"a worker of the data loader was killed ({headline(e)}); {kept}; if memory is short "
                "use fewer --workers"
            ) from e
        raise
