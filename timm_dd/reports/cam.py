"""Class activation maps: where a network looks for a class.

With a global pooling and one linear layer the score of class c is Σ_n w_cn · mean(X_n) + b_c, and the map is
M = Σ_n w_cn X_n (Zhou et al. 2016; gu2022 section 3.2). At each of the P positions the derivative of the score by X_n
is then w_cn / P, and with other maps in the place of X the score moves as it says. Where that is found by value the map
is computed from it and is that of the definition; otherwise it is Grad-CAM's, ReLU(Σ_n mean(∂score / ∂X_n) X_n)
(Selvaraju et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..algebra.view import Box
from ..errors import ReportError
from . import draw
from .draw import Drawing, Panel

SAME = 1e-4  # relative: equal but for rounding


@dataclass(frozen=True)
class Maps:
    """Maps of some images, (N, height, width), and whether they are the definition's, Σ_n w_n X_n."""

    values: torch.Tensor
    exact: bool


class _LastMap(TorchFunctionMode):
    """Keeps the last result that has several positions; or gives another, `instead` of that of call number `at`."""

    def __init__(self, axes: int, at: int | None = None, instead: torch.Tensor | None = None):
        super().__init__()
        self.axes, self.at, self.instead, self.calls = axes, at, instead, 0
        self.found: torch.Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        self.calls += 1
        if self.instead is not None:
            return self.instead if self.calls == self.at else y
        if isinstance(y, torch.Tensor) and y.requires_grad and y.ndim == 2 + self.axes and math.prod(y.shape[2:]) > 1:
            self.found, self.at = y, self.calls
        return y


def maps(network: nn.Module, x: torch.Tensor, classes: torch.Tensor) -> Maps:
    """Where a `network` in eval mode looks in images (N, C, *size), each for its class of `classes` (N,).

    Raises:
        ReportError: it gives no logits, or has no maps with several positions.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), _LastMap(x.ndim - 2) as last:
        logits = network(x)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or last.found is None:
        raise ReportError("no class activation maps: the network has no logits, or no maps before them")
    scores = logits.gather(1, classes[:, None])[:, 0]
    (slope,) = torch.autograd.grad(scores.sum(), last.found, allow_unused=True)
    if slope is None:
        raise ReportError("no class activation maps: the logits do not come from the last maps")
    features, mean = last.found.detach(), slope.flatten(2).mean(2).reshape(*slope.shape[:2], *[1] * (x.ndim - 2))
    weighted, other = (mean * features).sum(1), -2 * features
    with torch.no_grad(), _LastMap(x.ndim - 2, last.at, other):
        moved = network(x).gather(1, classes[:, None])[:, 0] - scores.detach()
    if _alike(slope, mean) and _alike(moved, (slope * (other - features)).flatten(1).sum(1)):
        return Maps(math.prod(features.shape[2:]) * weighted, True)
    return Maps(weighted.relu(), False)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= SAME * a.abs().max())


def row(name: str, found: Maps, i: int, size: Sequence[int], box: Box | None = None) -> dict[str, Any]:
    """The map of image i on an image of `size`: network, exact, ``map`` as the network has it, and ``over``, resampled
    to the pixels of the `box` that the network saw, from 0, its smallest number, to 1; NaN outside the box."""
    value = found.values[i].detach()
    extent = tuple(size) if box is None else box.extent
    large = F.interpolate(value[None, None].float(), size=extent, mode="bilinear", align_corners=False)[0, 0]
    spread = float(large.max() - large.min())
    over = torch.full(tuple(size), torch.nan)
    (over if box is None else box.crop(over)).copy_((large - large.min()) / (spread or 1.0))
    return {"network": name, "exact": found.exact, "map": value.numpy(), "over": over.numpy()}


def look(table: Sequence[Mapping[str, Any]], picture: np.ndarray, label: str, number: int) -> Drawing:
    """An image, and over it the map of each network; red is high."""
    found = [Panel(label, picture)] + [Panel(row["network"], picture, over=row["over"]) for row in table]
    kinds = {True: "Σ w X of the last maps (CAM)", False: "Grad-CAM"}
    how = " and ".join(kinds[exact] for exact in dict.fromkeys(row["exact"] for row in table))
    caption = f"Where the networks look for {label}, {how}: red is high. Parts see their boxes alone."
    places = "; ".join(f"{row['network']} {_centre(row['over'])}" for row in table)
    return Drawing(
        f"cam-{number}", caption, f"{caption} Highest at (row, column): {places}.", table, draw.panels(found)
    )


def _centre(over: np.ndarray) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(np.nanargmax(over), over.shape)))
