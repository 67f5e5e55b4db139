"""Image files, as networks take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels


def read(file: Any, mode: str) -> Image.Image:
    """The image in a file, or at a path, in a Pillow's `mode`, as timm reads it; what would be cut off is an error."""
    with Image.open(file) as image:
        if isinstance(image.info.get("transparency"), bytes):  # of which Pillow warns
            image = image.convert("RGBA")
        converted = image.convert(mode)
        if image.mode[0] in "IF" and not np.array_equal(image, image.convert("L")):
            raise ValueError(f"pixels of mode {image.mode}, which Pillow cuts off at 255: 8 bits will do")
    return converted
