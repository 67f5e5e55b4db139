"""Seconds an update of each stage of each of the `ways`, on this machine, on batches that stand in memory.

Accuracies do not depend on the machine, so these figures put runs of one machine beside the time of another. Stages
take turns of four updates; a figure is the median turn. Ways whose stage is the same share its figure.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import ways
from common import provenance, write_table

import timm_dd
from timm_dd import Domain, models
from timm_dd.train.engines import Auto, engine, engine_of_one
from timm_dd.train.ranks.cores import cores_of_rank, part_threads, share_cores
from timm_dd.train.ranks.world import Ranks
from timm_dd.train.stages.joint import Joint
from timm_dd.train.updates.learner import Learner

TURN, WARM = 4, 5  # updates of a turn; turns in which an engine is chosen and kernels are


class Stage(NamedTuple):
    """What an update is of: parts on their views, together in the joint stage, or the network itself without any."""

    name: str
    parts: int
    seen: Domain | None
    keywords: str


def stages(which: str, way: str, n: int, given: list[str]) -> dict[Stage, argparse.Namespace]:
    args, lengths = ways.parse(which, way, n, given), ways.epochs(way, n)
    seen = {"part": ways.domain(args), "joint": Domain.full(args.parts), "tune": None}
    return {
        Stage(s, args.parts if s != "tune" else 1, seen[s], str(args.model_kwargs)): args for s in lengths if lengths[s]
    }


def update_of(which: str, stage: Stage, args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """An update of a stage on a random batch."""
    args.lr = 1e-4
    size = {"img_size": args.img_size, "num_classes": ways.SETS[which].classes, **args.model_kwargs}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, generator=generator).to(device)
    y = torch.randint(size["num_classes"], (args.batch_size,), generator=generator).to(device)
    if stage.seen is None:
        nets, views = [models.create(args.model, **models.arguments(args.model, **size))], [None]
    else:
        split = timm_dd.split(args.model, stage.parts, domain=stage.seen, **size)
        nets, views = list(split), split.plan.views() if stage.name == "part" else [None] * stage.parts
    made = [
        Learner(f"part {k}", net.to(device).train(), view, args, device, 1000, args.batch_size, k, Path())
        for k, (net, view) in enumerate(zip(nets, views))
    ]
    if stage.seen is None:
        threads, by = partial(share_cores, 1), engine_of_one(args.engine, device)
    else:
        count = part_threads(args.engine, stage.parts, 1)
        threads = partial(torch.set_num_threads, count)
        threads()
        around = {"around": partial(Joint, group=None)} if stage.name == "joint" else {}
        by = engine(args.engine, made, device, cores_of_rank(1), **around)

    def update() -> None:
        threads()
        by.step(made, x, y, isolate_failures=False)

    for _ in range(TURN * (WARM if isinstance(by, Auto) or device.type == "cuda" else 1)):
        update()
    return update


def seconds(update: Callable[[], None], device: torch.device) -> float:
    """Of an update, in a turn of some."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(TURN):
        update()
    wait()
    return (time.perf_counter() - start) / TURN


def measure(args: argparse.Namespace, path: Path) -> None:
    """Write the figures of args.sets and args.ways over those that the table at `path` has of them."""
    device = Ranks.from_environment().device(args.device)
    origin = provenance()
    for which in args.sets:
        n, given = args.epochs or ways.SETS[which].epochs, [*args.given, "--engine", args.engine]
        found = {way: stages(which, way, n, given) for way in args.ways}
        updates = {
            stage: update_of(which, stage, by, device) for of_way in found.values() for stage, by in of_way.items()
        }
        times: dict[Stage, list[float]] = {stage: [] for stage in updates}
        for _ in range(args.rounds):
            for stage, update in updates.items():
                times[stage].append(seconds(update, device))
        rows = []
        if path.exists():
            with path.open(newline="") as f:
                rows = [row for row in csv.DictReader(f) if not _again(row, which, args.ways, origin["device"])]
        for way, of_way in found.items():
            for stage, by in of_way.items():
                about = {"set": which, "way": way, "stage": stage.name, "engine": args.engine, "batch": by.batch_size}
                figure = {"options": " ".join(args.given), "seconds": f"{statistics.median(times[stage]):.6f}"}
                rows.append({**about, **figure, **origin})
                print(which, way, stage.name, figure["seconds"], flush=True)
        write_table(path, rows, list(rows[-1]))


def _again(row: dict[str, str], which: str, measured: list[str], device: str) -> bool:
    return row["set"] == which and row["way"] in measured and row["device"] == device
