"""From a traced graph to its `Plan`, in two passes and an assembly; and which K works, where this one does not.

`reader` runs the rules over the nodes: they name axes and unify them, so that at the end every channel axis is a sum of
products of Widths. `relations` cuts the Widths and evaluates the laws, which say how the parts' tensors give the merged
network's, where that is not exact, and so how merge treats each parameter. `numbers` keeps the sizes that the graph
computes with as they are in the global network. `assemble` writes all down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..algebra.domain import Domain
from ..errors import SplitError, WidthError
from .assemble import assemble
from .graphs import Graph
from .numbers import settle
from .plan import Plan
from .reader import Inexpressible, Reading, read
from .relations import Relations, relate


@dataclass(frozen=True)
class Analysis:
    """What the rules say of a graph: what each pass found, and the place and size of each Width that is too narrow."""

    reading: Reading
    relations: Relations
    narrow: tuple[tuple[str, int], ...] = ()

    @property
    def approximations(self) -> tuple[tuple[str, str, str], ...]:
        """(node, module path, reason), in the order of the graph."""
        return tuple(self.relations.approximations)

    def plan(self, model: str | None, model_args: dict) -> Plan:
        return assemble(self.reading, self.relations, self.narrow, model, model_args)


def make_plan(
    gm: Graph,
    divisor: int,
    domain: Domain,
    input_size: Sequence[int],
    model: str | None = None,
    model_args: dict | None = None,
    *,
    output: str = "logits",
    replicate: bool = True,
) -> Plan:
    """Plan the split of a traced `skeleton`; arguments and errors of `analyse`, and timm's name and arguments."""
    analysis = analyse(gm, divisor, domain, input_size, output=output, replicate=replicate)
    plan = analysis.plan(model, model_args or {})
    if analysis.reading.sizes.scaled:
        _check_reads_no_positions(plan)
    return plan


def analyse(
    gm: Graph,
    divisor: int,
    domain: Domain,
    input_size: Sequence[int],
    *,
    output: str = "logits",
    replicate: bool = True,
) -> Analysis:
    """All that the rules say of a traced `skeleton`.

    Args:
        gm: from `trace.trace`.
        divisor: of the widths: K, unless the parts are not to be merged.
        input_size: the whole image, (C, *size), or (F,).
        output: ``logits``, whole in every part; ``features``, of which each part gives its channels; ``boxes``, of
            the input's shape, of which each part gives its box.
        replicate: keep Widths smaller than K whole in every part; otherwise they are an error.

    Raises:
        SplitError: an operation without a rule, a layer narrower than `divisor` unless `replicate`, a box on which the
            network does not run, or a scale with a network of which no part could see another one.
    """
    _check_scale(domain, input_size, output)
    try:
        reading = read(gm, divisor, domain, input_size, output)
        narrow = reading.replicate_narrow() if replicate else ()
        width, most = reading.narrowest()
    except Inexpressible as e:
        most = _largest(gm, divisor, input_size, output)
        if most == divisor:
            raise _of_boxes(e, domain) from e
        raise SplitError(f"{e}; the largest K that works here is {most}") from e
    except WidthError as e:
        raise _of_boxes(e, domain) from e
    if most < divisor:
        fewer = "fewer than" if width.size < divisor else "and needs two in each of"
        raise SplitError(
            f"{width.origin} has {width.size} channels to cut, {fewer} {divisor} parts; narrow='replicate' keeps "
            f"them whole in every part; otherwise the largest K that works here is "
            f"{_largest(gm, divisor, input_size, output)}"
        )
    relations = relate(reading)
    settle(reading, relations.cuts)
    return Analysis(reading, relations, narrow)


def _of_boxes(error: Exception, domain: Domain) -> SplitError:
    """What a spatial extent does not allow, which the whole image has not."""
    remedy = f"Domain.full({domain.parts})" if domain.scale == 1 else "scale 1"
    return SplitError(f"the channels cannot be cut on these boxes: {error}; use {remedy}")


def _check_scale(domain: Domain, input_size: Sequence[int], output: str) -> None:
    """Raise SplitError for a scale with what has no coarser grid, or gives its boxes back."""
    if domain.scale == 1:
        return
    if len(input_size) == 1:
        raise SplitError(f"scale is for images, not for the features of an input of {input_size[0]}; use scale 1")
    if output == "boxes":
        raise SplitError("reconstruct gives each part's box back, whose pixels a scaled view lacks; use scale 1")


def _check_reads_no_positions(plan: Plan) -> None:
    """Raise SplitError if parameters or outputs belong to positions, of which a scaled view has others, (2.13)."""
    axes = [(name, a) for name, t in {**plan.tensors, **plan.constants}.items() for a in t.axes]
    axes += [(o.node, o.axis) for o in plan.outputs]
    for name, axis in axes:
        if axis is not None and axis.is_windowed:
            raise SplitError(
                f"{name} reads the positions of a map, and a scaled view has others; "
                "scale is for networks with global pooling; use scale 1"
            )


def _largest(gm: Graph, divisor: int, input_size: Sequence[int], output: str) -> int:
    """The largest K below `divisor` that works. How Widths arise changes with K only at the rules' thresholds, so one
    reading serves all K between two of those."""
    parts = divisor
    while parts > 1:
        below = parts - 1
        try:
            reading = read(gm, parts, Domain.full(parts), input_size, output)
            _, most = reading.narrowest()
            below = max((t for t in reading.notes.thresholds if t < parts), default=1)
            if most > below:
                return min(most, parts)
        except Inexpressible:
            pass
        parts = below
    return 1
