"""Feature maps of a part beside those of the composed network, on the activation field of the part's box, (2.15)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..algebra.domain import Domain, spatial
from ..errors import ReportError
from ..planning.planner import analyse
from ..planning.rules.laws import Kind
from ..surgery.parts import Parts
from . import draw
from .blocks import evenly
from .claims import claims
from .draw import Drawing, Panel
from .maps import Given, in_float64, pairs

LAYERS, CHANNELS = 3, 4  # that are shown


def rows(
    model: nn.Module, parts: Parts, x: torch.Tensor, k: int = 0, layers: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Of some layers of part k and of the composed `model` on an image (1, C, height, width), in float64: layer,
    operation, the numbers of the channels in the composed network, their maps ``composed`` and ``part``
    (channels, height, width), ``field`` (where they are to agree), and ``error``, the largest difference of the whole
    layer there, relative to the largest number of its map; None where the field is empty.

    Args:
        layers: by path; by default some, evenly from the first to the last.

    Raises:
        ReportError: there is no such layer, or none with maps that can be compared.
    """
    plan = parts.plan
    wanted, _ = claims(analyse(parts.graph, plan.divisor, plan.domain, plan.input_size, output=plan.output))
    scaled = any(view.scaled for view in plan.views())
    boxes = Domain.full(plan.parts).boxes(spatial(plan.input_size)) if scaled else plan.boxes()
    wanted = [c for c in wanted if c.kind is Kind.SHARD and len(c.channels) == x.ndim - 1]
    nets = in_float64(model, parts, "sum")
    compared = pairs(nets, plan, wanted, boxes, Given.of(parts.graph, x), [k])
    found = [_row(pair) for pair in compared if pair.part.ndim == x.ndim]
    if layers is None:
        wide = [row for row in found if min(row["part"].shape[1:]) > 1]
        return evenly([row for row in wide if row["error"] is not None] or wide, LAYERS)
    paths = {row["layer"]: row for row in found}
    unknown = [path for path in layers if path not in paths]
    if unknown:
        raise ReportError(f"--layers: no maps of {unknown[0]!r} to compare; expected some of {', '.join(paths)}")
    return [paths[path] for path in layers]


def _row(pair) -> dict[str, Any]:
    y, clean = pair.whole[pair.at], pair.field
    error = float((y - pair.part)[clean].abs().max() / (pair.whole.abs().max() or 1.0)) if clean.any() else None
    strongest = pair.part[0].flatten(1).std(1, unbiased=False).argsort(descending=True)[:CHANNELS].sort().values
    numbers = pair.at[1].flatten() if len(pair.at) == 1 else pair.at[1][0, :, 0, 0]
    return {
        "layer": pair.claim.path,
        "operation": pair.claim.operation,
        "part_number": pair.k,
        "channels": numbers[strongest].tolist(),
        "composed": y[0, strongest].numpy(),
        "part": pair.part[0, strongest].numpy(),
        "field": clean[0, strongest].numpy(),
        "error": error,
    }


def maps(row: Mapping[str, Any], number: int) -> Drawing:
    """A layer's maps: the composed network's, the part's, and their difference on the field."""
    k, count = row["part_number"], len(row["channels"])
    both = np.stack([row["composed"], row["part"]])
    low, high = float(both.min()), float(both.max())
    difference = np.where(row["field"], np.abs(row["composed"] - row["part"]), np.nan)
    found = [Panel(f"composed, {c}", y, limits=(low, high)) for c, y in zip(row["channels"], row["composed"])]
    found += [Panel(f"part {k}", y, limits=(low, high)) for y in row["part"]]
    found += [Panel("difference", d, limits=(0, high - low or 1.0), map="magma") for d in difference]
    on_field = 100 * float(row["field"].mean())
    said = {None: "nothing can be compared", 0.0: "they are the same"}.get(
        row["error"], f"they differ by at most {row['error'] or 0:.0e} of the largest number"
    )
    caption = (
        f"{row['layer'] or row['operation']}: channels of part {k} and of the composed network on the same positions. "
        f"The activation field of the box has {on_field:.0f} % of them; there {said}."
    )
    return Drawing(f"maps-{number}", caption, caption, [row], draw.panels(found, count))
