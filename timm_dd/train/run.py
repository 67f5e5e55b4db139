"""A run, from its options to its summary: split, train the parts, compose, fine-tune, and the baseline if asked for."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
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
from ..storage import files
from ..storage.atomic import replace_json
from ..surgery.claim import check_claim
from ..surgery.parts import Parts
from ..surgery.split import split
from ..text import number
from . import checkpoints, coarse, data, initial, options, views
from .checkpoints import CheckpointTimer
from .composed import reassign
from .decoded import decoded
from .engines import cores, part_threads
from .folder import Ranks, RunFolder
from .images import left_out
from .joint import train_joint
from .rehearsal import rehearse
from .stages import Context, meet, train_baseline, train_parts, tune
from .summary import MEGA, multiply_adds, summary_table
from .together import train_together
from .trackers import Trackers

CHECK_SECONDS = 10  # for the plan's claim by value, before hours of training are built on it


def train(args: argparse.Namespace) -> dict:
    """A run; its summary."""
    summary = Run(args).go()
    if dist.is_initialized():
        dist.destroy_process_group()
    return summary


class Run:
    """One cycle of a training run; `go` carries out the first one, and those that follow.

    Args:
        before: the cycle whose fine-tuned model is split; None for a fresh or pretrained one.
    """

    def __init__(self, args: argparse.Namespace, before: Run | None = None):
        self.args, self.ranks, self.begun = args, Ranks.from_environment(), time.time()
        self.last = None if before is None else before.place.tuned / "last"
        self.device = self.ranks.device(args.device)
        args.workers = min(4, cores()) if args.workers is None else args.workers
        self.train_set, self.val_set, classes = data.datasets(args, self.ranks.world)
        self.model_args = options.model_arguments(args, classes)
        args.num_classes = self.model_args["num_classes"]
        coarse.check(args, self.train_set)
        empty = models.create_empty(args.model, **self.model_args)
        self.data_config = data.data_config(args, empty)
        initial.set_checkpointing(args, empty)
        self.timer = CheckpointTimer(args.checkpoint_every)
        self.place = RunFolder.of_run(args, self.ranks) if before is None else before.place.next_cycle()
        threads = args.engine, args.parts, self.ranks.local_world
        args.part_threads = args.part_threads or self.place.threads or part_threads(*threads)
        self.class_names = data.class_names(self.train_set, args.num_classes)
        config = models.config(empty, self.data_config, self.class_names)
        self.parts = self._as_seen(config)
        self.whole = self._whole(config)
        views.check(args, self.parts)
        self.multiply_adds = multiply_adds(args, self.parts, self.whole)
        if before is None:
            size = views.loader_size(options.stage_options(args, "part"), self.parts.plan)
            rehearse(args, self.data_config, (self.train_set, self.val_set), size)
            if self.ranks.primary and not self.place.resuming:
                check_claim(self.parts, CHECK_SECONDS)

    @property
    def folder(self) -> Path:
        return self.place.path

    @property
    def cycle(self) -> int:
        return self.place.cycle

    def _as_seen(self, config: dict | None) -> Parts:
        """The parts on what they see; where no option says it, the recipe's view, or boxes if the network reads
        positions."""
        if options.follows_recipe(self.args):
            try:
                return self._split(Domain.full(self.args.parts, scale=options.SCALE), config)
            except SplitError:
                pass
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
        return reassign(state, plan) if self.args.reassign else state

    def go(self) -> dict:
        """All cycles, each from the last one's fine-tuned model; the last one's summary.

        Raises:
            FileError: another process trains in the run's folder.
        """
        with self.place.held() if self.ranks.primary else nullcontext():
            run, summary = self, self._go()
            while run.cycle < self.args.cycles:
                run = Run(self.args, run)
                summary = run._go()
            return summary

    def _go(self) -> dict:
        """Both stages, and the baseline if asked for; writes and prints the summary on the first rank."""
        if self.ranks.primary:
            self.place.check(self.parts.plan, self.train_set)
        done = self.place.resuming and self.cycle < self.args.cycles and self.place.done
        with _explained(self.timer, self.folder):
            sets = [] if done else self._decoded()
        if self.ranks.primary:
            self.place.open(self.parts.plan, self.begun)
            print(_title(self), *left_out(self.train_set, self.val_set), sep="\n", flush=True)
        if done:
            return json.loads(self.place.summary.read_text())
        rank, explained = self.ranks.rank, _explained(self.timer, self.folder)
        with self.timer, Trackers(self.args, self.folder, rank) as tracked, explained:
            summary = self._carry_out(tracked, sets)
        if self.ranks.primary:
            replace_json(self.place.summary, summary)
            where = f"{self.folder}: composed/ before fine-tuning, global/best after"
            print(f"\n{summary_table(summary, self.args)}\n\n{where}", flush=True)
        if self.ranks.world > 1:
            dist.barrier()  # the next cycle reads what the first rank wrote
        if self.ranks.primary and self.cycle == self.args.cycles:
            shutil.rmtree(self.place.decoded, ignore_errors=True)
        return summary

    def _decoded(self) -> list[Dataset]:
        """(train, validation), decoded if they fit; what a run that does not begin has made of them is removed."""
        named = {"train": self.train_set, "validation": self.val_set}
        try:
            return [decoded(s, self.place.decoded / f"{n}.safetensors", self.args.workers) for n, s in named.items()]
        except BaseException:
            if not self.place.begun:
                shutil.rmtree(self.place.decoded, ignore_errors=True)
                with suppress(OSError):
                    self.folder.rmdir()
            raise

    def _carry_out(self, tracked: Trackers, sets: Sequence[Dataset]) -> dict:
        context = Context(
            args=self.args,
            ranks=self.ranks,
            device=self.device,
            folder=self.place,
            seed=self.args.seed + self.cycle - 1,
            parts=self.parts,
            whole=self.whole,
            model_args=self.model_args,
            class_names=self.class_names,
            data_config=self.data_config,
            sets=sets,
            timer=self.timer,
            trackers=tracked,
            multiply_adds=self.multiply_adds,
        )
        fresh = {how: copy.deepcopy(self.parts) for how in self.args.together}
        train_parts(context)
        meet(context)
        trained = self.place.parts.summaries()
        seconds, joint = {"parts": max(p["seconds"] for p in trained)}, {}
        if self.args.joint_epochs:
            joint["joint"], seconds["joint"] = train_joint(context)
        second = {}
        if self.args.aggregate and self.ranks.primary:
            second, seconds["two_level"] = coarse.decide_together(context)
        for how, parts in fresh.items():
            second[how], seconds[how] = train_together(context, how, parts)
        if self.place.start is not None and self.ranks.primary:
            mine = self.parts.plan
            files.save_state(self.place.start, self._start(mine), mine.config, {})
        tuned = tune(context)
        seconds["composed"], top5 = tuned.pop("seconds"), tuned.pop("top5")
        summary = {
            "parts": [p["top1"] for p in trained],
            **({"two_level": second} if second else {}),
            **joint,
            **tuned,
            "top5": {"parts": [p.get("top5") for p in trained], **top5},
            "seconds": seconds,
            "multiply_adds": self.multiply_adds,
            **_about(self),
        }
        if self.args.baseline and self.cycle == 1:
            baseline = train_baseline(context)
            summary["baseline"], summary["top5"]["baseline"], summary["seconds"]["baseline"] = baseline
        return summary


def _about(run: Run) -> dict[str, Any]:
    """By what the run can be repeated, and known by its models."""
    return {
        "command": options.command(run.args),
        "dataset": (run.args.dataset or Path(run.args.data_dir).resolve().name).split("/")[-1],
        "split": run.args.val_split,
        **({} if run.class_names is None else {"class_names": list(run.class_names)}),
        "run": run.place.digest(run.parts.plan),
    }


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
        f"{run.ranks.world} rank(s) on {run.device.type}; {run.folder}"
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
