"""The table that ends a run: what each of its networks gets right, what training took, and what an image costs."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import fx

from ...planning.costs import Cost, cost
from ...reports import outcome
from ...surgery.parts import Parts
from ...text import table
from ...two_level.aggregate import CoarseNet
from ..ranks.dealing import costs
from ..settings import options
from ..updates import schedule


def multiply_adds(args: argparse.Namespace, parts: Parts, joint: Parts | None) -> dict:
    """Of one image: each part on its view, all parts on the whole image where they see it, each way to decide together,
    and the composed network; and the operations that `planning.costs` cannot count, which are not in the figures.

    Args:
        joint: the parts as they are on whole images; None if there is no joint stage.
    """
    whole, each = cost(copy.deepcopy(parts.graph), parts.plan.input_size), costs(parts)
    alone = [part.multiply_adds for part in each]
    ways = (*args.aggregate, *args.together)
    weighed = {how for how in ways if how in ("dnn", *options.TOGETHER)}
    weighing = _of_coarse_net(args).multiply_adds if weighed else 0
    found = {"parts": alone, "composed": whole.multiply_adds}
    if joint is not None:
        found["joint"] = sum(part.multiply_adds for part in costs(joint))
    found["two_level"] = {how: sum(alone) + weighing * (how in weighed) for how in ways}
    return {**found, "uncounted": sorted({name for c in (whole, *each) for *_, name in c.uncounted})}


def _of_coarse_net(args: argparse.Namespace) -> Cost:
    with torch.device("meta"):
        net = CoarseNet(args.parts, args.num_classes, args.coarse_widths)
    return cost(fx.symbolic_trace(net), (args.parts * args.num_classes,))


def summary_table(summary: dict, args: argparse.Namespace) -> str:
    """The table that ends a run."""
    epochs = {name: schedule.epochs(options.stage_options(args, name)) for name in (*options.STAGES, None)}
    epochs = {**epochs, "composed": epochs.pop(None), "dnn": args.coarse_epochs}
    return table([outcome.HEADING, *(row.cells() for row in outcome.rows(summary, epochs))])
