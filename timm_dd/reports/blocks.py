"""The composed network's weights, block by block: what fine-tuning put between the blocks, and which layers moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..planning.plan import Plan, TensorPlan
from . import draw
from .draw import SERIES, Drawing, Panel

LAYERS = 6  # that are shown
State = Mapping[str, torch.Tensor]


def middle(plan: Plan) -> list[str]:
    """The weights that are cut along both axes, of which the composed network has K blocks in K×K, (2.12)."""
    return [name for name, t in plan.tensors.items() if t.trained and len(t.axes) > 1 and all(map(_is_cut, t.axes[:2]))]


def _is_cut(axis: Any) -> bool:
    return axis is not None and axis.is_cut


def norms(weight: torch.Tensor, t: TensorPlan, parts: int) -> np.ndarray:
    """Frobenius norms of the K×K blocks of a weight: in row i, column j what part i's channels read of part j's."""
    rows, columns = ([axis.index(k, parts) for k in range(parts)] for axis in t.axes[:2])  # type: ignore[union-attr]
    w = weight.double()
    return np.array([[float(w[row][:, column].norm()) for column in columns] for row in rows])


def rows(plan: Plan, before: State | None, after: State | None) -> list[dict[str, Any]]:
    """Of each weight in the middle: layer, the block norms before and after fine-tuning, the share of the squared norm
    that is between the blocks, and by how much of its norm the weight moved; None where a model is not there."""
    found = []
    for name in middle(plan):
        t, states = plan.tensors[name], {"before": before, "after": after}
        blocks = {when: None if s is None else norms(s[name], t, plan.parts) for when, s in states.items()}
        shares = {f"between_{when}": None if b is None else between(b) for when, b in blocks.items()}
        moved = None
        if before is not None and after is not None:
            old, new = before[name].double(), after[name].double()
            moved = float((new - old).norm() / old.norm().clamp(min=1e-30))
        found.append({"layer": name.removesuffix(".weight"), **blocks, **shares, "moved": moved})
    return found


def between(blocks: np.ndarray) -> float:
    """The share of the squared norm that lies outside the diagonal."""
    squares = blocks**2
    return float(np.where(np.eye(len(squares)), 0, squares).sum() / max(squares.sum(), 1e-300))


def maps(table: Sequence[Mapping[str, Any]]) -> Drawing:
    """Some layers' blocks as heat maps, before and after fine-tuning."""
    chosen = evenly(table, LAYERS)
    found = []
    for row in chosen:
        present = {when: row[when] for when in ("before", "after") if row[when] is not None}
        largest = max(float(b.max()) for b in present.values())
        found += [
            Panel(f"{_short(row['layer'], 17)}\n{when}: {100 * row[f'between_{when}']:.1f} %", b, limits=(0, largest))
            for when, b in present.items()
        ]
    caption = (
        "Norms of the K×K blocks of some weights: row i, column j is what part i's channels read of part j's. Above "
        "each the share of the squared norm that lies between the blocks, which is zero before fine-tuning."
    )
    said = "; ".join(" ".join(panel.title.splitlines()) for panel in found)
    return Drawing("blocks", caption, f"{caption} {said}.", chosen, draw.panels(found, 4))


def moved(table: Sequence[Mapping[str, Any]]) -> Drawing:
    """By how much fine-tuning moved each layer, and how much it put between the blocks."""
    fig = draw.figure(0.9 + 0.24 * len(table), draw.WIDTH)
    ((ax,),) = draw.axes(fig)
    names = [_short(row["layer"]) for row in table]
    at = np.arange(len(table))
    moves, filled = [100 * row["moved"] for row in table], [100 * row["between_after"] for row in table]
    ax.barh(at - 0.2, moves, 0.38, color=SERIES["composed"], label="moved, % of its norm")
    ax.barh(at + 0.2, filled, 0.38, color=SERIES["baseline"], label="between the blocks, % of the squared norm")
    ax.set_yticks(at, names, fontsize=7)
    ax.grid(False, axis="y")
    ax.invert_yaxis()
    draw.legend(fig, 1)
    most = max(table, key=lambda row: row["moved"])
    caption = f"Which layers fine-tuning moved, from the image to the classes; {most['layer']} moved most."
    said = "; ".join(f"{row['layer']} {100 * row['moved']:.0f} %" for row in table[:40])
    return Drawing("moved", caption, f"{caption} {said}.", table, fig)


def evenly(found: Sequence, count: int) -> list:
    """So many of them, from the first to the last."""
    if len(found) <= count:
        return list(found)
    return [found[i] for i in sorted({round(i * (len(found) - 1) / (count - 1)) for i in range(count)})]


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"
