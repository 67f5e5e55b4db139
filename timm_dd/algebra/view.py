"""What a part sees of an image: a box (restriction to a subdomain), on a grid with as many pixels or with fewer
(restriction to a coarse grid)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Box:
    """A sub-image: `start` and `extent` in pixels, one number for each spatial axis."""

    start: tuple[int, ...]
    extent: tuple[int, ...]

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """A view of ``x`` (B, C, *size), of shape (B, C, *extent); of features (B, F) those of the box."""
        for axis, (start, extent) in enumerate(zip(self.start, self.extent), start=x.ndim - len(self.start)):
            x = x.narrow(axis, start, extent)
        return x

    def anywhere(self, size: Sequence[int], random: Random) -> Box:
        """A box of the same extent at a random place of an image of `size`."""
        return Box(tuple(random.randint(0, n - e) for n, e in zip(size, self.extent)), self.extent)

    def __str__(self) -> str:
        return " × ".join(f"{s}:{s + e}" for s, e in zip(self.start, self.extent))


@dataclass(frozen=True)
class View:
    """A box, resampled to `size` pixels, one number for each spatial axis."""

    box: Box
    size: tuple[int, ...]

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """What the part sees of ``x`` (B, C, *image), of shape (B, C, *size); without a copy where nothing is
        resampled."""
        x = self.box.crop(x)
        return x if self.size == self.box.extent else resample(x, self.size)

    def anywhere(self, size: Sequence[int], random: Random) -> View:
        """The same of a box at a random place of an image of `size`."""
        return View(self.box.anywhere(size, random), self.size)


def resample(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``x`` (B, C, *image) on a coarser grid, (B, C, *size), by linear interpolation with anti-aliasing: a triangle
    filter as wide as a coarse pixel, along one axis after the other, as in image libraries' bilinear resizing."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return resample(x.float(), size).to(x.dtype)
    if x.ndim == 4:
        return F.interpolate(x, tuple(size), mode="bilinear", antialias=True)
    if x.ndim == 3:
        return resample(x.unsqueeze(2), (1, *size)).squeeze(2)
    slices = resample(x.flatten(1, 2), size[1:])  # a volume's, each an image
    columns = slices.unflatten(1, x.shape[1:3]).flatten(3)
    return resample(columns, (size[0], columns.shape[3])).unflatten(3, tuple(size[1:]))
