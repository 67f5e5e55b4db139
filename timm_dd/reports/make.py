"""A report: what lies in a folder, as a page with figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import draw, page, sections
from .gallery import NO_IMAGES, gallery, shown
from .networks import Samples
from .page import Section
from .record import Record


def make(
    record: Record,
    output: Path,
    samples: Samples | None = None,
    *,
    compare: Sequence[Record] = (),
    layers: Sequence[str] | None = None,
    why: str = NO_IMAGES,
) -> None:
    """Write the page of a record.

    Args:
        samples: images to show to the networks; None for none, and `why`.
        compare: other runs, side by side with this one.
        layers: of the feature maps, by path.

    Raises:
        ReportError: matplotlib is not installed, images of another size, or no such layer.
        MergeError: a network is damaged.
        FileError: the page cannot be written.
    """
    draw.check_matplotlib()
    page.check_output(output)
    flat = samples is not None and samples.images.ndim == 4
    image = samples.picture(shown(samples, 1)[0]) if flat else None
    learned, *others = of_files(record, image)
    side_by_side = [sections.compared(sections.grouped([record, *compare]))] if compare else []
    asked = gallery(record, samples, layers, why)
    found = [sections.happened(record), learned, *side_by_side, *others, *asked, sections.again(record)]
    page.write(output, f"{record.name}: a report", found)


def of_files(record: Record, image: np.ndarray | None = None) -> list[Section]:
    """The sections with figures of what the run's files say; the boxes on an `image`."""
    return [sections.learning(record), sections.times(record), sections.sight(record, image), sections.weights(record)]
