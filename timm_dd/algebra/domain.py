"""Domains: K boxes in the input's spatial axes, one per part, possibly overlapping, at a scale.

A `Domain` does not know the image's size; `Domain.boxes(size)` places it, in 1D, 2D or 3D. Source: gu2022 section
2.1.2, (2.6) for boxes without overlap, (2.8) for uniform ones, section 3.1.2 for overlap, margin and eight boxes;
klawonn2023 Fig. 3 for type B.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral
from operator import index
from typing import TYPE_CHECKING, Any

from ..errors import SplitError, shown
from .view import Box, View, check_scale

MOST = 2**20  # parts, far more than any network has channels

# The places of eight boxes by the number of axes, as fractions of the way from the first possible place to the last.
AROUND_CENTRE: dict[int, list[tuple[float, ...]]] = {
    1: [(i / 7,) for i in range(8)],
    2: [place for place in itertools.product((0, 0.5, 1), repeat=2) if place != (0.5, 0.5)],
    3: list(itertools.product((0, 1), repeat=3)),
}


def spatial(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of an input (C, *size) that a domain cuts: `size`; of features (F,) their only one."""
    return tuple(shape[1:] if len(shape) > 1 else shape)


@dataclass(frozen=True)
class Domain(abc.ABC):
    """K boxes over an image; make one with `full`, `grid`, `centered8`, `type_b` or `custom`.

    Attributes:
        parts: K, the number of boxes.
        scale: of the boxes' pixels a part sees so many along every axis, see `views`.
    """

    scale: float = field(default=1.0, kw_only=True)

    if TYPE_CHECKING:  # a field of some, computed by others

        @property
        def parts(self) -> int: ...

    @abc.abstractmethod
    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        """The K boxes in an image of `size` pixels (one number for each spatial axis).

        Raises:
            SplitError: the domain has another number of axes, or a box would leave the image.
        """

    def views(self, size: Sequence[int]) -> tuple[View, ...]:
        """What the K parts see of an image of `size` pixels: the boxes, at the domain's scale.

        Raises:
            SplitError: as of `boxes`.
        """
        return tuple(box.view(self.scale) for box in self.boxes(size))

    @abc.abstractmethod
    def _layout(self) -> str:
        """The boxes, in words."""

    def __str__(self) -> str:
        return self._layout() + (f", scale {self.scale:g}" if self.scale != 1 else "")

    @staticmethod
    def full(parts: int, *, scale: float = 1.0) -> Domain:
        """Every part sees the whole image; ``full(4, scale=0.625)`` shows four 20×20 pixels of 32×32.

        Raises:
            SplitError: K below 1, or a scale that is not above 0 and up to 1, here and in the following.
        """
        check_parts(parts)
        return Full(parts, scale=check_scale(scale))

    @staticmethod
    def grid(*shape: int, overlap: int = 0, margin: int = 0, scale: float = 1.0) -> Domain:
        """A grid of boxes, row by row: ``grid(2, 2, overlap=4)`` gives four 20×20 boxes on 32×32.

        Along an axis of n pixels cut into m cells, cell i is ``[i·n // m, (i+1)·n // m)``. A box is its cell
        grown by `overlap` pixels, half on either side, and moved back inside the image at the borders, so
        every pixel inside the `margin` (pixels cropped from every border beforehand) is covered and border boxes are
        as large as inner ones. 16 boxes of 70×70 for Food-101 are ``grid(4, 4, overlap=26, margin=24)``.

        Raises:
            SplitError: a negative number, or no cell along an axis.
        """
        if not shape or not all(map(_is_whole, shape)) or min(shape) < 1:
            raise SplitError(f"a grid needs at least one box along every axis, got {'x'.join(map(str, shape))}")
        _check_pixels(overlap, margin)
        return Grid(tuple(shape), overlap, margin, scale=check_scale(scale))

    @staticmethod
    def centered8(overlap: int = 0, margin: int = 0, *, scale: float = 1.0) -> Domain:
        """The eight boxes of gu2022 Fig. 3.4, all of which reach the centre of the image.

        The figure is known here by its caption and by section 3.1.2, which says that the centre matters most. It is
        read as eight boxes of half the image's height and width, `overlap` pixels more in each: the four quadrants,
        and four of the same size at the middles of the sides. In 1D they are eight at even steps, in 3D the octants.
        The FLOPs of Table 3.4 and of gu2021 are those of boxes of 96×96: ``centered8(overlap=8, margin=24)`` of 224.

        Raises:
            SplitError: a negative number.
        """
        _check_pixels(overlap, margin)
        return Centered8(overlap, margin, scale=check_scale(scale))

    @staticmethod
    def type_b(p: int, axes: int = 2, *, scale: float = 1.0) -> Domain:
        """klawonn2023 Fig. 3, type B: a grid of p boxes along each of `axes` axes without overlap, then one as large
        across every inner corner of the grid, from the middle of a cell to that of the next: p² + (p - 1)² boxes.

        Raises:
            SplitError: fewer than one box, or not one to three axes.
        """
        if not _is_whole(p) or p < 1 or axes not in AROUND_CENTRE:
            raise SplitError(f"type B needs at least one box along one to three axes, got {p} along {axes} axes")
        return TypeB(p, axes, scale=check_scale(scale))

    @staticmethod
    def custom(boxes: Sequence[Box], *, scale: float = 1.0) -> Domain:
        """Your own boxes, of any size, in the coordinates of the image.

        Raises:
            SplitError: no box, an empty one, a negative start, or boxes with other numbers of axes.
        """
        try:
            boxes = tuple(Box(tuple(map(index, b.start)), tuple(map(index, b.extent))) for b in boxes)
        except (AttributeError, TypeError):
            raise SplitError(
                f"expected boxes of whole pixels, like [Box((0, 0), (16, 16))], got {shown(boxes)}"
            ) from None
        axes = {len(n) for b in boxes for n in (b.start, b.extent)}
        if len(axes) != 1 or 0 in axes:
            raise SplitError(f"expected boxes with as many starts and extents as the image has axes, got {boxes}")
        for b in boxes:
            if min(b.start) < 0 or min(b.extent) < 1:
                raise SplitError(f"a box starts at a pixel from 0 up and has at least one along every axis, got {b}")
        return Custom(boxes, scale=check_scale(scale))

    def to_json(self) -> dict:
        """The kind and its numbers, for `from_json`; no scale is scale 1."""
        values = asdict(self)
        scale = values.pop("scale")
        return {"kind": type(self).__name__, **values, **({} if scale == 1 else {"scale": scale})}

    @staticmethod
    def from_json(d: dict) -> Domain:
        """The domain that `to_json` described; ValueError, KeyError or TypeError if none was."""
        values = {k: v for k, v in d.items() if k != "kind"}
        makers: dict[str, Callable[..., Domain]]
        makers = {"Full": Domain.full, "Centered8": Domain.centered8, "TypeB": Domain.type_b}
        if d["kind"] in makers:
            return makers[d["kind"]](**values)
        if d["kind"] == "Custom":
            return Domain.custom([Box(**b) for b in values.pop("own")], **values)
        if d["kind"] == "Grid":
            return Domain.grid(*values.pop("grid_shape"), **values)
        raise ValueError(f"unknown domain {d['kind']!r}")


@dataclass(frozen=True)
class Full(Domain):
    parts: int

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        return (Box((0,) * len(size), tuple(size)),) * self.parts

    def _layout(self) -> str:
        return f"full image, {self.parts} parts"


@dataclass(frozen=True)
class Grid(Domain):
    grid_shape: tuple[int, ...]
    overlap: int
    margin: int

    @property
    def parts(self) -> int:
        return math.prod(self.grid_shape)

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        _check_axes(self, len(self.grid_shape), size)
        return _product([self._runs(n, m, size) for n, m in zip(size, self.grid_shape)])

    def _runs(self, n: int, cells: int, size: Sequence[int]) -> list[tuple[int, int]]:
        """(start, extent) of the boxes along one axis of n pixels."""
        inner = _inside(self, n, self.margin, cells, size)
        overlap = self.overlap if cells > 1 else 0
        runs = []
        for low, high in _cells(inner, cells):
            extent = high - low + overlap
            _check_extent(self, extent, inner, inner - -(-inner // cells), size)
            runs.append((self.margin + min(max(low - overlap // 2, 0), inner - extent), extent))
        return runs

    def _layout(self) -> str:
        return f"grid {'x'.join(map(str, self.grid_shape))}" + _extras(self.overlap, self.margin)


@dataclass(frozen=True)
class Centered8(Domain):
    overlap: int
    margin: int

    @property
    def parts(self) -> int:
        return 8

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        if len(size) not in AROUND_CENTRE:
            raise SplitError(f"{self} is for one, two or three axes, but the image of {_px(size)} has {len(size)}")
        inner = [_inside(self, n, self.margin, 2, size) for n in size]
        extent = tuple(-(-n // 2) + self.overlap for n in inner)
        for n, e in zip(inner, extent):
            _check_extent(self, e, n, n // 2, size)
        return tuple(
            Box(tuple(self.margin + math.floor(f * (n - e) + 0.5) for f, n, e in zip(place, inner, extent)), extent)
            for place in AROUND_CENTRE[len(size)]
        )

    def _layout(self) -> str:
        return "8 boxes around the centre" + _extras(self.overlap, self.margin)


@dataclass(frozen=True)
class TypeB(Domain):
    p: int
    axes: int

    @property
    def parts(self) -> int:
        return self.p**self.axes + (self.p - 1) ** self.axes

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        _check_axes(self, self.axes, size)
        cells = [_cells(_inside(self, n, 0, self.p, size), self.p) for n in size]
        middles = [[(low + high) // 2 for low, high in axis] for axis in cells]
        across = [list(zip(axis, axis[1:])) for axis in middles]
        return tuple(
            box for runs in (cells, across) for box in _product([[(a, b - a) for a, b in axis] for axis in runs])
        )

    def _layout(self) -> str:
        return f"type B of {'x'.join([str(self.p)] * self.axes)}"


@dataclass(frozen=True)
class Custom(Domain):
    own: tuple[Box, ...]  # a key of plan.json

    @property
    def parts(self) -> int:
        return len(self.own)

    def boxes(self, size: Sequence[int]) -> tuple[Box, ...]:
        _check_axes(self, len(self.own[0].start), size)
        for box in self.own:
            if any(s + e > n for s, e, n in zip(box.start, box.extent, size)):
                raise SplitError(f"the box {box} leaves the image of {_px(size)}; use a smaller box or larger images")
        return self.own

    def _layout(self) -> str:
        return f"{self.parts} custom boxes"


def _cells(n: int, count: int) -> list[tuple[int, int]]:
    """(low, high) of `count` cells along n pixels, as even as can be."""
    return [(i * n // count, (i + 1) * n // count) for i in range(count)]


def _product(runs: list[list[tuple[int, int]]]) -> tuple[Box, ...]:
    """Boxes from their (start, extent) along each axis, row by row."""
    return tuple(Box(*zip(*box)) for box in itertools.product(*runs))


def _extras(overlap: int, margin: int) -> str:
    return (f", overlap {overlap}" if overlap else "") + (f", margin {margin}" if margin else "")


def _check_pixels(overlap: int, margin: int) -> None:
    if not (_is_whole(overlap) and _is_whole(margin)) or overlap < 0 or margin < 0:
        raise SplitError(
            f"overlap and margin are whole numbers of pixels from 0 up, got {shown(overlap)} and {shown(margin)}"
        )


def _is_whole(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool)


def _check_axes(domain: Domain, axes: int, size: Sequence[int]) -> None:
    if axes != len(size):
        raise SplitError(f"{domain} has {axes} axes, but the image of {_px(size)} has {len(size)}")


def _inside(domain: Domain, n: int, margin: int, least: int, size: Sequence[int]) -> int:
    """The pixels inside the margin along an axis of n."""
    inner = n - 2 * margin
    if inner < least:
        raise SplitError(
            f"{domain}: {least} boxes do not fit into {max(inner, 0)} of the {n} pixels of an image of {_px(size)}; "
            "use fewer boxes, a smaller margin or a larger image"
        )
    return inner


def _check_extent(domain: Domain, extent: int, inner: int, largest: int, size: Sequence[int]) -> None:
    if extent > inner:
        raise SplitError(
            f"{domain}: a box of {extent} pixels is larger than the image of {_px(size)}; "
            f"the largest overlap here is {largest}"
        )


def check_parts(parts: Any) -> None:
    """Raise SplitError unless `parts` is a possible K."""
    if not isinstance(parts, int) or isinstance(parts, bool) or parts < 1:
        raise SplitError(f"K, the number of parts, is a whole number from 1 up, got {parts!r}")
    if parts > MOST:
        raise SplitError(f"K, the number of parts, is {MOST} at most, got {shown(parts)}; no network is so wide")


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
