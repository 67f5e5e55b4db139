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

MEGA = 10**6


def multiply_adds(args: argparse.Namespace, parts: Parts, joint: Parts | None) -> dict:
    """Of one image: each part on its view, all parts on the whole image where they see it, each way to decide together,
    and the composed network; and the operations that `planning.costs` cannot count, which are not in the figures.

    Args:
        joint: the parts as they are on whole images; None if there is no joint stage.
    """
    whole, each = cost(copy.deepcopy(parts.graph), parts.plan.input_size), _of_parts(parts)
    alone = [part.multiply_adds for part in each]
    ways = (*args.aggregate, *args.together)
    weighed = {how for how in ways if how in ("dnn", *options.TOGETHER)}
    weighing = _of_coarse_net(args).multiply_adds if weighed else 0
    found = {"parts": alone, "composed": whole.multiply_adds}
    if joint is not None:
        found["joint"] = sum(part.multiply_adds for part in _of_parts(joint))
    found["two_level"] = {how: sum(alone) + weighing * (how in weighed) for how in ways}
    return {**found, "uncounted": sorted({name for c in (whole, *each) for *_, name in c.uncounted})}


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
    return table([("", "top-1 %", "top-5 %", "epochs", "seconds", "multiply-adds"), *_rows(summary, args)])


def _rows(summary: dict, args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    seconds, macs, top5 = summary["seconds"], summary["multiply_adds"], summary["top5"]
    bound = "at least " if macs["uncounted"] else ""

    def row(title: str, top1: float, count: int, epochs: int | None = None, took: float | str = "", five=None):
        shown = f"{took:.1f}" if isinstance(took, float) else took
        cost = f"{bound}{number(count / MEGA)} M"
        return title, f"{top1:.2f}", _percent(five), "" if epochs is None else str(epochs), shown, cost

    def epochs(stage: str | None) -> int:
        return schedule.epochs(options.stage_options(args, stage))

    for k, (top1, five, count) in enumerate(zip(summary["parts"], top5["parts"], macs["parts"])):
        took = "" if k else f"{seconds['parts']:.1f} for all"
        yield row(f"part {k}, its own box", top1, count, epochs("part"), took, five)
    yield row("sum of the parts, own boxes", summary["together"], sum(macs["parts"]), five=top5["together"])
    for how, top1 in summary.get("two_level", {}).items():
        took = (args.coarse_epochs, seconds["two_level"]) if how == "dnn" else ()
        if how in options.TOGETHER:
            took = (epochs(how), seconds[how])
        yield row(f"two levels, {how}", top1, macs["two_level"][how], *took)
    if "joint" in summary:
        yield row("joint, whole images", summary["joint"], macs["joint"], epochs("joint"), seconds["joint"])
    whole = macs["composed"]
    yield row("composed, before fine-tuning", summary["composed"], whole, 0, five=top5["composed"])
    if "updated" in summary:
        yield row("composed, BatchNorm re-estimated", summary["updated"], whole, 0, five=top5["updated"])
    tuned = seconds["composed"]
    yield row("composed, after fine-tuning", summary["tuned"], whole, epochs(None), tuned, top5["tuned"])
    if summary["best_epoch"]:
        yield row("composed, best epoch", summary["best"], whole, summary["best_epoch"], five=top5["best"])
    if "baseline" in summary:
        took = seconds["baseline"]
        yield row("baseline, random start", summary["baseline"], whole, epochs("baseline"), took, top5["baseline"])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
