"""What a part sees of an image: a box of it, at a scale.

In domain decomposition's words a box is the restriction to a subdomain, a scale the restriction to a coarser grid.
Scale 1 is gu2022's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F

from ..errors import SplitError, shown


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

    def view(self, scale: float = 1.0) -> View:
        """The box at `scale`: n pixels along an axis become ``floor(scale · n + 0.5)``, at least one."""
        return View(self, tuple(max(1, math.floor(scale * n + 0.5)) for n in self.extent))

    def __str__(self) -> str:
        return " × ".join(f"{s}:{s + e}" for s, e in zip(self.start, self.extent))


@dataclass(frozen=True)
class View:
    """A box of the image, resampled to `size` pixels, one number for each spatial axis."""

    box: Box
    size: tuple[int, ...]

    @property
    def scaled(self) -> bool:
        """Whether it has other pixels than its box."""
        return self.size != self.box.extent

    def crop(self, x: torch.Tensor) -> torch.Tensor:
        """What the part sees of ``x`` (B, C, *image), of shape (B, C, *size) and of the dtype of ``x``: a view of it,
        or where it is `scaled` its box under the anti-aliased triangle filter of `torch.nn.functional.interpolate`,
        with which timm resizes validation images too."""
        cropped = self.box.crop(x)
        return resample(cropped, self.size) if self.scaled else cropped

    def anywhere(self, size: Sequence[int], random: Random) -> View:
        """The same of a box at a random place of an image of `size`."""
        return View(self.box.anywhere(size, random), self.size)


def check_scale(scale: float) -> float:
    """`scale` as a float; SplitError unless 0 < scale <= 1."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= 1:
        raise SplitError(f"scale is a number above 0, up to 1 for all pixels, got {shown(scale)}")
    return float(scale)


def resample(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``x`` (B, C, *image) on a coarser grid, (B, C, *size), in one to three axes, in which the filter is separable."""
    if x.dtype in (torch.float16, torch.bfloat16):  # which F.interpolate does not take on CPUs
        return resample(x.float(), size).to(x.dtype)
    if len(size) == 2:
        return F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    if len(size) == 1:
        return resample(x.unsqueeze(2), (1, *size)).squeeze(2)
    depth, *plane = size
    x = resample(x.flatten(1, 2), plane).unflatten(1, x.shape[1:3])
    return resample(x.flatten(3), (depth, math.prod(plane))).unflatten(3, plane)
