"""The table that ends a run: what each of its networks gets right, what training took, and what an image costs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator

import torch
from torch import fx

from ..planning.costs import Cost, cost
from ..surgery.parts import Parts
from ..text import number, table
from ..two_level.aggregate import CoarseNet
from . import options, schedule
from .stages import Context

MEGA = 10**6


def multiply_adds(run: Context) -> dict:
    """Of one image: each part on its view, all parts on the whole image where they see it, each way to decide together,
    and the composed network; and the operations that `planning.costs` cannot count, which are not in the figures."""
    plan, graph = run.parts.plan, copy.deepcopy(run.parts.graph)
    whole, parts = cost(graph, plan.input_size), _of_parts(run.parts)
    alone = [part.multiply_adds for part in parts]
    ways = (*run.args.aggregate, *run.args.together)
    weighed = {how for how in ways if how in ("dnn", *options.TOGETHER)}
    weighing = _of_coarse_net(run.args).multiply_adds if weighed else 0
    found = {"parts": alone, "composed": whole.multiply_adds}
    if run.whole is not None:
        found["joint"] = sum(part.multiply_adds for part in _of_parts(run.whole))
    found["two_level"] = {how: sum(alone) + weighing * (how in weighed) for how in ways}
    return {**found, "uncounted": sorted({name for c in (whole, *parts) for *_, name in c.uncounted})}


def _of_parts(parts: Parts) -> list[Cost]:
    """Of each part; those of equal shapes are counted once."""
    counted: dict[tuple, Cost] = {}
    found = []
    for part, view in zip(parts, parts.plan.views()):
        size = (*parts.plan.input_size[: -len(view.size)], *view.size)
        kind = (size, *(t.shape for t in part.state_dict().values()))
        if kind not in counted:
            counted[kind] = cost(copy.deepcopy(part), size, parts.graph)
        found.append(counted[kind])
    return found


def _of_coarse_net(args: argparse.Namespace) -> Cost:
    with torch.device("meta"):
        net = CoarseNet(args.parts, args.num_classes, args.coarse_widths)
    return cost(fx.symbolic_trace(net), (args.parts * args.num_classes,))


def summary_table(summary: dict, args: argparse.Namespace) -> str:
    """The table that ends a run."""
    return table([("", "top-1 %", "epochs", "seconds", "multiply-adds"), *_rows(summary, args)])


def _rows(summary: dict, args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    seconds, macs = summary["seconds"], summary["multiply_adds"]
    bound = "at least " if macs["uncounted"] else ""

    def row(title: str, top1: float, count: int, epochs: int | None = None, took: float | None = None, note: str = ""):
        time = "" if took is None else f"{took:.1f}{note}"
        return title, f"{top1:.2f}", "" if epochs is None else str(epochs), time, f"{bound}{number(count / MEGA)} M"

    def epochs(stage: str | None) -> int:
        return schedule.epochs(options.stage_options(args, stage))

    trained = epochs("part")
    for k, (top1, count) in enumerate(zip(summary["parts"], macs["parts"])):
        yield row(f"part {k}, its own box", top1, count, trained, None if k else seconds["parts"], " for all")
    yield row("sum of the parts, own boxes", summary["together"], sum(macs["parts"]))
    for how, top1 in summary.get("two_level", {}).items():
        took = (args.coarse_epochs, seconds["two_level"]) if how == "dnn" else ()
        if how in options.TOGETHER:
            took = (epochs(how), seconds[how])
        yield row(f"two levels, {how}", top1, macs["two_level"][how], *took)
    if "joint" in summary:
        yield row("joint, whole images", summary["joint"], macs["joint"], epochs("joint"), seconds["joint"])
    whole = macs["composed"]
    yield row("composed, before fine-tuning", summary["composed"], whole, 0)
    if "updated" in summary:
        yield row("composed, BatchNorm re-estimated", summary["updated"], whole, 0)
    yield row("composed, after fine-tuning", summary["tuned"], whole, epochs(None), seconds["composed"])
    if "baseline" in summary:
        yield row("baseline, random start", summary["baseline"], whole, epochs("baseline"), seconds["baseline"])
