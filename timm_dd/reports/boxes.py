"""What the parts see of an image: their boxes, where they overlap, and the margin that nobody sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..algebra.domain import spatial
from ..planning.plan import Plan
from . import draw
from .draw import BAD, BADGE, INK, Drawing, colour_of_part


def rows(plan: Plan) -> list[dict[str, Any]]:
    """The box of each part: part, and its first pixel and that behind its last; and the size that it is seen at."""
    return [
        {
            "part": k,
            "start": v.box.start,
            "stop": tuple(s + e for s, e in zip(v.box.start, v.box.extent)),
            "size": v.size,
        }
        for k, v in enumerate(plan.views())
    ]


def cover(table: Sequence[dict[str, Any]], size: Sequence[int]) -> np.ndarray:
    """How many parts see each pixel of an image of `size`."""
    count = np.zeros(size, dtype=int)
    for row in table:
        count[tuple(slice(a, b) for a, b in zip(row["start"], row["stop"]))] += 1
    return count


def boxes(plan: Plan, image: np.ndarray | None = None) -> Drawing:
    """On an image (height, width, 3) from 0 to 1, or on grey; in one or three dimensions as intervals of each axis."""
    table, size = rows(plan), spatial(plan.input_size)
    fig = _on_image(table, size, image) if len(size) == 2 else _intervals(table, size)
    counts = cover(table, size)
    shared, free = (100 * float((counts > 1).mean()), 100 * float((counts == 0).mean()))
    seen = ", ".join(dict.fromkeys("×".join(map(str, row["size"])) for row in table))
    caption = (
        f"{plan.domain}: {plan.parts} boxes of an image of {'×'.join(map(str, size))}, seen as {seen}. "
        f"{shared:.0f} % lies in several boxes, {free:.0f} % in none."
    )
    words = "; ".join(f"part {row['part']} has {row['start']} to {row['stop']}" for row in table[:16])
    return Drawing("boxes", caption, f"{caption} {words}.", table, fig)


def _on_image(table: Sequence[dict[str, Any]], size: Sequence[int], image: np.ndarray | None):
    from matplotlib.patches import Patch, Rectangle

    height, width = size
    fig = draw.figure(min(4.4 * height / width, 6.0) + 0.4, 4.4)
    ((ax,),) = draw.axes(fig)
    ax.axis("off")
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    grey = np.full((height, width, 3), 0.8)
    ax.imshow(grey if image is None else image, interpolation="none", extent=whole)
    counts, handles = cover(table, size), []
    for chosen, label, colour, strength in (
        (counts > 1, "overlap", "#ffffff", 0.35),
        (counts == 0, "margin", BAD, 0.5),
    ):
        if chosen.any():
            tint = np.zeros((height, width, 4))
            tint[chosen] = (*(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)), strength)
            ax.imshow(tint, interpolation="none", extent=whole)
            handles.append(Patch(facecolor=colour, alpha=0.6, edgecolor=INK, label=f"{label}"))
    alike = len({(row["start"], row["stop"]) for row in table}) == 1
    for row in table[:1] if alike else table:
        (top, left), (bottom, right) = row["start"], row["stop"]
        k, inset = row["part"], 0.012 * max(size) * (row["part"] % 4)
        colour, name = colour_of_part(k), f"all {len(table)} parts" if alike else str(k)
        corner = (left - 0.5 + inset, top - 0.5 + inset)
        frame = {"fill": False, "edgecolor": colour, "linewidth": 2.2}
        ax.add_patch(Rectangle(corner, right - left - 2 * inset, bottom - top - 2 * inset, **frame))
        at = ((left + right - 1) / 2, (top + bottom - 1) / 2)
        badge = {"boxstyle": "round,pad=0.25", "facecolor": BADGE, "edgecolor": colour}
        ax.text(*at, name, ha="center", va="center", fontsize=9, color=INK, bbox=badge)
    if handles:
        draw.legend(fig, handles=handles)
    return fig


def _intervals(table: Sequence[dict[str, Any]], size: Sequence[int]):
    fig = draw.figure(0.8 + 0.18 * len(table) * len(size))
    places = draw.axes(fig, len(size), 1).flat
    for axis, place in enumerate(places):
        for row in table:
            start, stop, k = row["start"][axis], row["stop"][axis], row["part"]
            place.barh(k, stop - start, left=start, color=colour_of_part(k), height=0.7)
        place.set(xlim=(0, size[axis]), ylabel="part", xlabel=f"axis {axis}", yticks=[row["part"] for row in table][:8])
        place.invert_yaxis()
    return fig
