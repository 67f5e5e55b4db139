"""Random transforms of a batch where it lies, with a draw for each image: what timm's and torchvision's do to one image
after another on CPUs.

A step draws for all images of an epoch by torch's generator for CPUs, and takes the numbers of a batch with it. Images
are (B, C, H, W) of uint8, those to erase from normalized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as tv

ATTEMPTS = 10  # of timm's crops and erased boxes, to fit into the image
LUMA = (19595, 38470, 7471)  # of 2**16: Pillow's weights of red, green and blue in "L"


class Step(Protocol):
    def draw(self, n: int) -> tuple[Tensor, ...]:
        """For each of `n` images, in the first dim of each tensor."""

    def __call__(self, x: Tensor, *drawn: Tensor) -> Tensor:
        """(B, C, H, W) after it."""


@dataclass(frozen=True)
class Flip:
    """Along `dim` with a probability."""

    dim: int
    probability: float

    def draw(self, n: int) -> tuple[Tensor]:
        return (torch.rand(n, 1, 1, 1) < self.probability,)

    def __call__(self, x: Tensor, flipped: Tensor) -> Tensor:
        return torch.where(flipped, x.flip(self.dim), x)


@dataclass(frozen=True)
class Shift:
    """By up to so many pixels each way; what comes in from the edge repeats it."""

    pixels: int

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randint(-self.pixels, self.pixels + 1, (n, 1)) for _ in range(2))

    def __call__(self, x: Tensor, down: Tensor, right: Tensor) -> Tensor:
        images, channels, *places = (torch.arange(size, device=x.device) for size in x.shape)
        rows, columns = (
            (place + start).clamp(0, len(place) - 1) for place, start in zip(places, (down, right), strict=True)
        )
        return x[images[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]


def _triangle(d: Tensor) -> Tensor:
    return (1 - d.abs()).clamp(min=0)


def _cubic(d: Tensor) -> Tensor:
    """Keys' with a = -1/2, which Pillow takes, too."""
    d = d.abs()
    return torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, (((2.5 - 0.5 * d) * d - 4) * d + 2) * (d < 2))


KERNELS = {tv.InterpolationMode.BILINEAR: _triangle, tv.InterpolationMode.BICUBIC: _cubic}


@dataclass(frozen=True)
class ResizedCrop:
    """timm's RandomResizedCropAndInterpolation: a box of random area and shape, resampled with antialiasing as Pillow
    does it, but for its rounding between rows and columns.

    Args:
        size: (H, W) of the images, and `out` of what is made of them.
        scale: of the box's area, ranges; `ratio`: of its width over its height.
        kernels: to draw from.
    """

    size: tuple[int, int]
    out: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    kernels: tuple[Callable[[Tensor], Tensor], ...]

    def draw(self, n: int) -> tuple[Tensor, ...]:
        """Top, left, height, width, and the number of the kernel."""
        high, wide = self.size
        h, w = _boxes(n, self.size, self.scale, [math.log(r) for r in self.ratio])
        fits = (h <= high) & (w <= wide)
        whole = min(high, round(wide / self.ratio[0])), min(wide, round(high * self.ratio[1]))
        h, w = (_first(t, fits, instead) for t, instead in zip((h, w), whole))
        top, left = (_place(size - t) for size, t in zip(self.size, (h, w)))
        centred = ~fits.any(1)
        top[centred], left[centred] = (high - whole[0]) // 2, (wide - whole[1]) // 2
        return top, left, h, w, torch.randint(len(self.kernels), (n,))

    def __call__(self, x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, kernel: Tensor) -> Tensor:
        rows = self._weights(self.out[0], x.shape[2], top, height, kernel)
        columns = self._weights(self.out[1], x.shape[3], left, width, kernel)
        x = rows[:, None] @ x.float() @ columns[:, None].mT
        return (x + 0.5).clamp(0, 255).to(torch.uint8)

    def _weights(self, out: int, size: int, start: Tensor, length: Tensor, kernel: Tensor) -> Tensor:
        """(B, out, size): what each pixel of an axis gives to those that are made of its box."""
        start, length, kernel = (t[:, None, None] for t in (start, length, kernel))
        scale = length / out
        place = torch.arange(size, device=start.device) - start
        centers = (torch.arange(out, device=start.device)[:, None] + 0.5) * scale
        distance = (place + 0.5 - centers) / scale.clamp(min=1)  # the kernel grows where pixels become fewer
        weights = sum(k(distance) * (kernel == i) for i, k in enumerate(self.kernels))
        weights = weights * ((place >= 0) & (place < length))
        return weights / weights.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Jitter:
    """torchvision's ColorJitter without hue: brightness, contrast and saturation, in an order of each image's own.

    Args:
        factors: ranges of the three; None: left as it is.
        probability: of an image to be changed.
    """

    factors: tuple[tuple[float, float] | None, ...]
    probability: float = 1.0

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        """(n, 3): the factors, and which of them comes when."""
        low, high = torch.tensor([given or (1.0, 1.0) for given in self.factors]).T
        changed = torch.rand(n, 1) < self.probability
        factors = torch.where(changed, low + (high - low) * torch.rand(n, 3), 1.0)
        return factors, torch.rand(n, 3).argsort(1)

    def __call__(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        for which in order.T:
            gray = _luma(x)
            mean = (gray.mean((2, 3), keepdim=True, dtype=torch.float32) + 0.5).floor()
            towards = torch.stack([torch.zeros_like(gray), mean.to(gray.dtype).expand_as(gray), gray], 1)
            chosen = which[:, None, None, None, None].expand(-1, 1, *gray.shape[1:])
            base = towards.gather(1, chosen)[:, 0]
            factor = factors.gather(1, which[:, None])[:, :, None, None]
            x = (base + factor * (x.float() - base)).clamp(0, 255).to(torch.uint8)  # cut off, as Pillow does
        return x


def _luma(x: Tensor) -> Tensor:
    """(B, 1, H, W) of int32, as Pillow's "L"."""
    weighted = (weight * channel for weight, channel in zip(LUMA, x.int().split(1, 1), strict=True))
    return (sum(weighted) + 2**15) >> 16


@dataclass(frozen=True)
class Erase:
    """timm's RandomErasing of normalized images: up to `count` boxes an image, of 0 or of normal noise.

    Args:
        size: (H, W) of the images.
        area: of a box, a share of the image, divided by the number of the boxes; `log_ratio`: of height over width.
        mode: ``const``: zeros; ``rand``: a colour for each box; ``pixel``: one for each pixel.
    """

    size: tuple[int, int]
    probability: float
    area: tuple[float, float]
    log_ratio: tuple[float, float]
    count: tuple[int, int]
    mode: str

    def draw(self, n: int) -> tuple[Tensor, ...]:
        """(n, count) of top, left, height and width; nothing is 0 pixels wide."""
        few, most = self.count
        count = torch.randint(few, most + 1, (n, 1))
        boxes = n * most
        w, h = _boxes(boxes, self.size, self.area, self.log_ratio, count.expand(n, most).reshape(-1, 1))
        fits = (h < self.size[0]) & (w < self.size[1])
        h, w = (_first(t, fits, 0) for t in (h, w))
        top, left = (_place(size - t) for size, t in zip(self.size, (h, w)))
        erased = (torch.rand(n, 1) <= self.probability) & (torch.arange(most) < count)
        return *(t.view(n, most) for t in (top, left, h)), w.view(n, most) * erased

    def __call__(self, x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
        rows, columns = (torch.arange(size, device=x.device) for size in x.shape[2:])
        for k in range(top.shape[1]):
            high, wide = (
                (place >= start[:, k, None]) & (place < (start + length)[:, k, None])
                for place, start, length in ((rows, top, height), (columns, left, width))
            )
            x = torch.where((high[:, :, None] & wide[:, None])[:, None], self._filling(x), x)
        return x

    def _filling(self, x: Tensor) -> Tensor:
        if self.mode == "const":
            return x.new_zeros(())
        return torch.randn(x.shape if self.mode == "pixel" else (*x.shape[:2], 1, 1), dtype=x.dtype, device=x.device)


def _boxes(
    n: int, size: Sequence[int], share: Sequence[float], log_ratio: Sequence[float], count: Tensor | int = 1
) -> tuple[Tensor, Tensor]:
    """(n, ATTEMPTS) of two sides, whose product is a share of the image's area over `count`; `log_ratio` is of the
    second over the first."""
    area = torch.empty(n, ATTEMPTS).uniform_(*share) * math.prod(size) / count
    ratio = torch.empty(n, ATTEMPTS).uniform_(*log_ratio).exp()
    return (area / ratio).sqrt().round().long(), (area * ratio).sqrt().round().long()


def _first(t: Tensor, fits: Tensor, instead: int) -> Tensor:
    """(n,) of (n, ATTEMPTS): of the first that fits, or `instead`."""
    return torch.where(fits.any(1), t.gather(1, fits.int().argmax(1, keepdim=True))[:, 0], instead)


def _place(room: Tensor) -> Tensor:
    """(n,) of 0 to `room`."""
    return (torch.rand(len(room), dtype=torch.float64) * (room + 1)).long()


def steps(transform: tv.Compose, size: tuple[int, int]) -> list[Step] | None:
    """Those of a loader's `transform` of images of one `size`, whose last makes tensors; None if some are of another
    kind."""
    found: list[Step] = []
    for t in transform.transforms[:-1]:
        made = _step(t, size)
        if made is None:
            return None
        found += made
    return found


def _step(t: object, size: tuple[int, int]) -> list[Step] | None:
    match t:
        case tv.Resize() | tv.CenterCrop() if _keeps(t.size, size):
            return []
        case tv.RandomCrop(padding=int(pixels), padding_mode="edge", fill=0) if _keeps(t.size, size):
            return [Shift(pixels)]
        case tv.RandomHorizontalFlip(p=p):
            return [Flip(3, p)]
        case tv.RandomVerticalFlip(p=p):
            return [Flip(2, p)]
        case RandomResizedCropAndInterpolation(size=out, scale=scale, ratio=ratio, interpolation=by):
            by = by if isinstance(by, tuple) else (by,)
            known = all(mode in KERNELS for mode in by)
            return [ResizedCrop(size, out, scale, ratio, tuple(KERNELS[mode] for mode in by))] if known else None
        case tv.ColorJitter(hue=None):
            return [Jitter((t.brightness, t.contrast, t.saturation))]
        case tv.RandomApply(transforms=[tv.ColorJitter(hue=None) as jitter], p=p):
            return [Jitter((jitter.brightness, jitter.contrast, jitter.saturation), p)]
    return None


def _keeps(asked: int | Sequence[int], size: tuple[int, int]) -> bool:
    """Whether images of `size` have what is asked for already; a number is of the shorter side."""
    return min(size) == asked if isinstance(asked, int) else tuple(asked) == size


def erasing(by: RandomErasing | None, size: tuple[int, int]) -> list[Erase]:
    if by is None:
        return []
    fill = "pixel" if by.per_pixel else "rand" if by.rand_color else "const"
    count = by.min_count, by.max_count
    return [Erase(size, by.probability, (by.min_area, by.max_area), by.log_aspect_ratio, count, fill)]
