"""Domains: K boxes in the input's spatial axes, one per part, possibly overlapping.

A `Domain` does not know the image's size; `Domain.boxes(size)` places it. Source: gu2022 section 2.1.2,
(2.6) for boxes without overlap, (2.8) for uniform ones, section 3.1.2 for overlap and margin.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import SplitError


@dataclass(frozen=True)
class Box:
    """A sub-image: `start` and `extent` in pixels, one number for each spatial axis."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """A view of ``x`` (B, C, *size), of shape (B, C, *extent)."""
        for axis, (start, extent) in enumerate(zip(self.start, self.extent), start=2):
            x = x.narrow(axis, start, extent)
        return x

    def __str__(self) -> str:
        return " × ".join(f"{s}:{s + e}" for s, e in zip(self.start, self.extent))


@dataclass(frozen=True)
class Domain:
    """K boxes over an image; make one with `full` or `grid`.

    Attributes:
        grid_shape: boxes along each spatial axis; empty when every part sees the whole image.
        parts: K, the number of boxes.
        overlap: pixels by which a box is longer than its grid cell, along every axis that is cut.
        margin: pixels cropped from every border beforehand.
    """

    grid_shape: tuple[int, ...]
    parts: int
    overlap: int = 0
    margin: int = 0

    @classmethod
    def full(cls, parts: int) -> Domain:
        """Every part sees the whole image."""
        return cls((), parts)

    @classmethod
    def grid(cls, *shape: int, overlap: int = 0, margin: int = 0) -> Domain:
        """A grid of boxes, row by row: ``grid(2, 2, overlap=4)`` gives four 20×20 boxes on 32×32.

        Along an axis of n pixels cut into m cells, cell i is ``[i·n // m, (i+1)·n // m)``. A box is its cell
        grown by `overlap` pixels, half on either side, and moved back inside the image at the borders, so
        every pixel inside the margin is covered and border boxes are as large as inner ones.

        Raises:
            SplitError: a negative number, or no cell along an axis.
        """
        if not shape or any(n < 1 for n in shape):
            raise SplitError(f"a grid needs at least one box along every axis, got {'x'.join(map(str, shape))}")
        if overlap < 0 or margin < 0:
            raise SplitError(f"overlap and margin are pixels from 0 up, got {overlap} and {margin}")
        return cls(tuple(shape), math.prod(shape), overlap, margin)

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        """The K boxes in an image of `size` pixels (one number for each spatial axis).

        Raises:
            SplitError: the grid has another number of axes, or a box would leave the image.
        """
        size = tuple(size)
        if not self.grid_shape:
            return (Box((0,) * len(size), size),) * self.parts
        if len(self.grid_shape) != len(size):
            raise SplitError(f"{self} has {len(self.grid_shape)} axes, but the image of {_px(size)} has {len(size)}")
        runs = [self._runs(n, m, size) for n, m in zip(size, self.grid_shape)]
        return tuple(Box(*zip(*box)) for box in itertools.product(*runs))

    def _runs(self, n: int, cells: int, size: tuple[int, ...]) -> list[tuple[int, int]]:
        """(start, extent) of the boxes along one axis of n pixels."""
        inner = n - 2 * self.margin
        if inner < cells:
            raise SplitError(
                f"{self}: {cells} boxes do not fit into {max(inner, 0)} of the {n} pixels of an image of {_px(size)}; "
                "use fewer boxes, a smaller margin or a larger image"
            )
        overlap = self.overlap if cells > 1 else 0
        runs = []
        for i in range(cells):
            low, high = i * inner // cells, (i + 1) * inner // cells
            extent = high - low + overlap
            if extent > inner:
                raise SplitError(
                    f"{self}: a box of {extent} pixels is larger than the image of {_px(size)}; "
                    f"the largest overlap here is {inner - -(-inner // cells)}"
                )
            start = min(max(low - overlap // 2, 0), inner - extent)
            runs.append((self.margin + start, extent))
        return runs

    def __str__(self) -> str:
        if not self.grid_shape:
            return f"full image, {self.parts} parts"
        text = f"grid {'x'.join(map(str, self.grid_shape))}"
        text += f", overlap {self.overlap}" if self.overlap else ""
        return text + (f", margin {self.margin}" if self.margin else "")

    def to_json(self) -> dict:
        return {"grid": list(self.grid_shape), "parts": self.parts, "overlap": self.overlap, "margin": self.margin}

    @classmethod
    def from_json(cls, d: dict) -> Domain:
        return cls(tuple(map(int, d["grid"])), int(d["parts"]), int(d["overlap"]), int(d["margin"]))


def check_parts(parts: Any) -> None:
    """Raise SplitError unless `parts` is a possible K."""
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise SplitError(f"K, the number of parts, is a whole number from 1 up, got {parts!r}")


def default_domain(parts: int, axes: int) -> Domain:
    """The most square grid of `parts` boxes without overlap: 4 gives 2×2, 8 gives 2×4, 5 gives 1×5."""
    check_parts(parts)
    shape, left = [], parts
    for axis in range(axes, 1, -1):
        root = round(left ** (1 / axis))
        n = max(d for d in range(1, root + 1) if left % d == 0)
        shape.append(n)
        left //= n
    return Domain.grid(*shape, left)


def _px(size: Sequence[int]) -> str:
    return "×".join(map(str, size))
