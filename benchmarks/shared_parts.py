"""Runs that differ in what comes after their parts alone, and share these."""

import argparse
import csv
import json
import shutil
from hashlib import sha256
from pathlib import Path

from timm_dd import console
from timm_dd.train.run import train
from timm_dd.train.settings import options

STAGES = ("parts", "joint")


def key(args: argparse.Namespace, stage: str) -> str:
    """Of all that a stage's parts depend on."""
    names = STAGES[: STAGES.index(stage) + 1]
    made_of = [options.training_identity(options.stage_options(args, name.rstrip("s"))) for name in names]
    made_of += [str(console.domain(args)), args.joint_epochs if stage == "joint" else 0]
    return sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def trained(args: argparse.Namespace, run: Path, kept: Path) -> dict:
    """A run's summary, with its accuracy after the "first" epoch of fine-tuning; its parts and their joint stage are
    those that lie in `kept`, or will lie there.

    Args:
        args: that resume `run`, which is not there yet.
    """
    shared = [s for s in STAGES if args.cycles == 1 and (s == "parts" or args.joint_epochs)]
    places = {stage: kept / key(args, stage) for stage in shared}
    for place in places.values():
        if place.exists():
            shutil.copytree(place, run, dirs_exist_ok=True)
    if not (run / "args.yaml").exists():
        args.resume = None
    found = train(args)
    for stage, place in places.items():
        if not place.exists():
            shutil.copytree(run / stage, place / stage)
            for name in ("args.yaml", "plan.json"):
                shutil.copy(run / name, place / name)
    with max(run.rglob("global/summary.csv"), key=lambda p: p.stat().st_mtime).open() as f:
        return {**found, "first": float(next(csv.DictReader(f))["eval_top1"])}
