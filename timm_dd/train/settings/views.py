"""What the parts see while they train: their views, or of several listed ones (``--views``) one for each update.

A part is evaluated on its own view. It may train on others, since the composed network will see the whole image at
full size.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from random import Random

from ...algebra.domain import Domain
from ...algebra.view import View, check_scale
from ...errors import SplitError, TrainError
from ...planning.plan import Plan
from ...planning.planner import make_plan
from ...surgery.parts import Parts


def listed(text: str) -> str:
    """A list for ``--views``, as it came, for argparse."""
    try:
        for word in text.split(","):
            domain_of(word, Domain.full(1))
    except ValueError as e:
        raise argparse.ArgumentTypeError(
            f"expected box or full, each with @S for a scale S above 0 and up to 1, like full@0.5,box, got {text!r}"
        ) from e
    return text


def domain_of(word: str, own: Domain) -> Domain:
    """The parts' views by a word of ``--views``: ``box``, those of their own domain, or ``full``, the whole image; with
    ``@S`` at scale S."""
    name, at, scale = word.strip().partition("@")
    if name not in ("box", "full"):
        raise SplitError(f"a view is box or full, got {name!r}")
    domain = own if name == "box" else Domain.full(own.parts)
    return replace(domain, scale=check_scale(float(scale))) if at else domain


def check(args: argparse.Namespace, parts: Parts) -> None:
    """Raise TrainError unless the parts run on all views of ``--views`` with the tensors and numbers that they have."""
    plan, replicate = parts.plan, args.narrow == "replicate"
    for word in args.views.split(",") if args.views else ():
        domain = domain_of(word, plan.domain)
        try:
            other = make_plan(
                parts.graph, plan.divisor, domain, plan.input_size, output=plan.output, replicate=replicate
            )
        except SplitError as e:
            raise TrainError(f"--views {word}: {e}") from e
        if any(getattr(other, name) != getattr(plan, name) for name in ("tensors", "constants", "edits")):
            raise TrainError(
                f"--views {word}: {plan.model} reads positions, so that its parts would be others on these views; "
                "leave --views out, or take a network with global pooling"
            )


def of_part(args: argparse.Namespace, plan: Plan, k: int) -> tuple[View | None, ...]:
    """What part k trains on; None is a batch as it comes."""
    if loader_size(args, plan) is not None:
        return (None,)
    domains = [domain_of(word, plan.domain) for word in args.views.split(",")] if args.views else [plan.domain]
    return tuple(domain.views(plan.input_size[1:])[k] for domain in domains)


def loader_size(args: argparse.Namespace, plan: Plan) -> tuple[int, ...] | None:
    """The size at which the loader makes the parts' training images itself, so that they are resampled once: that of
    their only view, where this is the whole image at a scale and timm's random resized crop is in use. None: the full
    size."""
    view, *others = set(plan.views())
    crops = not (args.no_aug or args.shift) and args.train_crop_mode in (None, "rrc")
    alone = not (others or args.views) and view.scaled and view.box.extent == plan.input_size[1:]
    return view.size if crops and alone else None


def drawn(views: tuple[View | None, ...], seed: int, update: int) -> View | None:
    """One of the `views`, the same for all parts, of which each update is of one shape."""
    return views[Random(f"{seed} {update}").randrange(len(views))]
