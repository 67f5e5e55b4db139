"""A picture of a domain: its boxes on an image, then each alone with the rest of the image dimmed."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, make_grid

from ..algebra.domain import Domain
from ..algebra.view import Box
from ..errors import SplitError

SIDE, COLUMNS = 192, 6  # pixels of a panel at least, panels in a row


def draw(domain: Domain, size: Sequence[int], image: str | Path | None = None) -> Image.Image:
    """The boxes of `domain` on an image of `size` (height, width), or on a chessboard if no file is given.

    Raises:
        SplitError: other than two axes, or the file is not an image.
    """
    if len(size) != 2:
        raise SplitError(f"a picture has two axes, but the input has {len(size)}")
    boxes, scale = domain.boxes(size), -(-SIDE // max(size))
    canvas = _chessboard(size) if image is None else _open(image, size)
    canvas = canvas.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    colours = [_colour(k, len(boxes)) for k in range(len(boxes))]
    corners = torch.tensor([_corners(b, scale) for b in boxes])
    labels = list(map(str, range(len(boxes))))
    panels = [draw_bounding_boxes(canvas, corners, labels, colours, width=3)]
    for k, box in enumerate(boxes):
        alone = canvas // 4
        rows, columns = (slice(s * scale, (s + e) * scale) for s, e in zip(box.start, box.extent))
        alone[:, rows, columns] = canvas[:, rows, columns]
        panels.append(draw_bounding_boxes(alone, corners[k : k + 1], labels[k : k + 1], colours[k : k + 1], width=3))
    return to_pil_image(make_grid(panels, nrow=min(COLUMNS, len(panels)), padding=8, pad_value=255))


def _corners(box: Box, scale: int) -> list[int]:
    """(left, top, right, bottom), the last two inside the box."""
    (top, left), (height, width) = box.start, box.extent
    return [left * scale, top * scale, (left + width) * scale - 1, (top + height) * scale - 1]


def _colour(k: int, count: int) -> tuple[int, int, int]:
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / count, 1.0, 0.9))


def _chessboard(size: Sequence[int]) -> torch.Tensor:
    """Eight fields along the shorter side, (3, height, width)."""
    field = max(1, min(size) // 8)
    rows, columns = (torch.arange(n) // field for n in size)
    return (200 + 40 * ((rows[:, None] + columns) % 2)).to(torch.uint8).expand(3, *size)


def _open(image: str | Path, size: Sequence[int]) -> torch.Tensor:
    """The image's central part of the shape of `size`, scaled to it."""
    try:
        picture = Image.open(image).convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise SplitError(f"{image} cannot be read as an image ({e})") from e
    ratio = min(picture.height / size[0], picture.width / size[1])
    return resize(pil_to_tensor(center_crop(picture, [int(n * ratio) for n in size])), list(size), antialias=True)
