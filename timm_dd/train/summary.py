"""The table that ends a run: what each of its networks gets right, what training took, and what an image costs."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import fx

from ..planning.costs import Cost, cost
from ..reports import outcome
from ..surgery.parts import Parts
from ..text import table
from ..two_level.aggregate import CoarseNet
from . import options
from .stages import Context


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
    epochs = {name: options.stage_options(args, name).epochs for name in ("part", *options.TOGETHER, "baseline")}
    epochs |= {"joint": args.joint_epochs, "dnn": args.coarse_epochs, "composed": args.epochs}
    return table([outcome.HEADING, *(row.cells() for row in outcome.rows(summary, epochs))])
