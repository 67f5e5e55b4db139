"""A run, from its options to its summary: split, train the parts, compose, fine-tune, and the baseline if asked for."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from .. import models
from ..errors import TrainError
from ..storage.atomic import replace_json
from ..surgery.parts import Parts
from ..surgery.split import split
from ..text import table
from . import data, options, views
from .checkpoints import CheckpointTimer
from .composed import reassign
from .decoded import decoded
from .folder import Ranks, RunFolder
from .stages import Context, meet, train_baseline, train_parts, tune
from .trackers import Trackers


def train(args: argparse.Namespace) -> dict:
    """A run, or several cycles of it, each from the last one's fine-tuned model; the last one's summary."""
    run = Run(args)
    summary = run.go()
    while run.cycle < args.cycles:
        run = Run(args, run)
        summary = run.go()
    if dist.is_initialized():
        dist.destroy_process_group()
    return summary


class Run:
    """One cycle of a training run; `go` carries it out and returns its summary.

    Args:
        before: the cycle whose fine-tuned model is split; None for a fresh or pretrained one.
    """

    def __init__(self, args: argparse.Namespace, before: Run | None = None):
        self.args, self.ranks, self.begun = args, Ranks.from_environment(), time.time()
        self.device = self.ranks.device(args.device)
        self.train_set, self.val_set, classes = data.datasets(args)
        self.model_args = options.model_arguments(args, classes)
        args.num_classes = self.model_args["num_classes"]
        empty = models.create_empty(args.model, **self.model_args)
        self.data_config = data.data_config(args, empty)
        self.timer = CheckpointTimer(args.checkpoint_every)
        self.place = RunFolder.of_run(args, self.ranks) if before is None else before.place.next_cycle()
        self.parts = self._split(before)
        self.parts.plan = replace(self.parts.plan, config=models.config(empty, self.data_config))

    @property
    def folder(self) -> Path:
        return self.place.path

    @property
    def cycle(self) -> int:
        return self.place.cycle

    def _split(self, before: Run | None) -> Parts:
        args = self.args
        parts = split(
            args.model,
            args.parts,
            domain=options.domain(args),
            narrow=args.narrow,
            img_size=tuple(self.data_config["input_size"][1:]),
            pretrained=args.pretrained and before is None,
            seed=args.seed,
            **self.model_args,
        )
        if args.reassign and not parts.plan.exact:
            raise TrainError(f"--reassign: {args.model} is not the same with its channels in another order")
        views.check(args, parts)
        if before is not None:
            state = load_file(before.place.tuned / "last" / "model.safetensors")
            parts.take(reassign(state, parts.plan) if args.reassign else state)
        return parts

    def go(self) -> dict:
        """Both stages, and the baseline if asked for; writes and prints the summary on the first rank."""
        if self.ranks.primary:
            self.place.open(self.parts.plan, self.begun)
            print(self._title(), flush=True)
        if self.place.resuming and self.cycle < self.args.cycles and self.place.done:
            for k in range(self.args.parts):
                self.place.check_part(k)
            return json.loads(self.place.summary.read_text())
        with self.timer, Trackers(self.args, self.folder, self.ranks.rank) as trackers:
            try:
                summary = self._carry_out(trackers)
            except RuntimeError:  # other ranks that stop take the process group with them, and workers the loader
                self.timer.check("the last checkpoints are kept")
                raise
        if self.ranks.primary:
            replace_json(self.place.summary, summary)
            where = f"{self.folder}: composed/ before fine-tuning, global/best after"
            print(f"\n{summary_table(summary, self.args)}\n\n{where}", flush=True)
        if self.ranks.world > 1:
            dist.barrier()  # the next cycle reads what the first rank wrote
        if self.ranks.primary and self.cycle == self.args.cycles:
            shutil.rmtree(self.place.decoded, ignore_errors=True)
        return summary

    def _title(self) -> str:
        plan = self.parts.plan
        verdict = "exact" if plan.exact else f"approximate in {len(plan.approximations)} places"
        return (
            f"{self.args.model} in {plan.parts} parts, {plan.domain}, {verdict}; "
            f"{plan.params():,} parameters, {plan.params(0):,} in part 0\n"
            f"{len(self.train_set):,} images to train on, {len(self.val_set):,} to validate; "
            f"{self.ranks.world} rank(s) on {self.device.type}; {self.folder}"
        )

    def _carry_out(self, trackers: Trackers) -> dict:
        named = {"train": self.train_set, "validation": self.val_set}
        context = Context(
            args=self.args,
            ranks=self.ranks,
            device=self.device,
            folder=self.place,
            seed=self.args.seed + self.cycle - 1,
            parts=self.parts,
            model_args=self.model_args,
            data_config=self.data_config,
            sets=[decoded(s, self.place.decoded / f"{n}.safetensors", self.args.workers) for n, s in named.items()],
            timer=self.timer,
            trackers=trackers,
        )
        train_parts(context)
        meet(context)
        trained = [self.place.part_summary(k) for k in range(self.args.parts)]
        tuned = tune(context)
        seconds = {"parts": max(p["seconds"] for p in trained), "composed": tuned.pop("seconds")}
        summary = {"parts": [p["top1"] for p in trained], **tuned, "seconds": seconds, **self._about()}
        if self.args.baseline and self.cycle == 1:
            summary["baseline"], summary["seconds"]["baseline"] = train_baseline(context)
        return summary

    def _about(self) -> dict[str, str]:
        """By what the run can be repeated, and known by its models."""
        return {
            "command": options.command(self.args),
            "dataset": (self.args.dataset or Path(self.args.data_dir).resolve().name).split("/")[-1],
            "split": self.args.val_split,
            "run": self.place.digest(self.parts.plan),
        }


def summary_table(summary: dict, args: argparse.Namespace) -> str:
    """The table that ends a run."""
    seconds = summary["seconds"]
    trained = str(options.stage_options(args, "part").epochs)
    of_parts = f"{seconds['parts']:.1f} for all"
    rows = [["", "top-1 %", "epochs", "seconds"]]
    for k, accuracy in enumerate(summary["parts"]):
        rows.append([f"part {k}, its own box", f"{accuracy:.2f}", trained, of_parts if k == 0 else ""])
    rows.append(["sum of the parts, own boxes", f"{summary['together']:.2f}", "", ""])
    rows.append(["composed, before fine-tuning", f"{summary['composed']:.2f}", "0", ""])
    if "updated" in summary:
        rows.append(["composed, BatchNorm re-estimated", f"{summary['updated']:.2f}", "0", ""])
    tuned = f"{summary['tuned']:.2f}"
    rows.append(["composed, after fine-tuning", tuned, str(args.epochs), f"{seconds['composed']:.1f}"])
    if "baseline" in summary:
        epochs = str(options.stage_options(args, "baseline").epochs)
        rows.append(["baseline, random start", f"{summary['baseline']:.2f}", epochs, f"{seconds['baseline']:.1f}"])
    return table(rows)
