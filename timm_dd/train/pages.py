"""The page of a run, on the images of its own data set."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from .. import models
from ..errors import headline, public
from ..planning.plan import Plan
from ..reports import draw, networks
from ..reports.make import make, of_files
from ..reports.networks import Samples
from ..reports.outcome import counted
from ..reports.record import Record, read
from .images import data
from .settings import flags

IMAGES = 300  # of the run's data set, unless said otherwise
NO_DATA = "No training run made this, so there are no images of its data set; --images takes a folder."


@public
def report(
    run: str | Path,
    output: str | Path,
    *,
    images: str | Path | int | None = None,
    compare: str | Path | Sequence[str | Path] = (),
    layers: Sequence[str] | None = None,
) -> None:
    """Write a run as one HTML page, and its figures as PNG and SVG into a folder beside it.

    timm_dd.report("runs/x", "report.html")

    Args:
        run: a run's folder, whether it is done or not; a folder of parts; or a composed model.
        output: the page; for ``report.html`` the figures go into ``report-figures/``.
        images: to show to the networks: a folder, or how many of the run's own validation images; 0 for none.
        compare: another run, or several, side by side with this one; those that differ in their seed alone are one
            curve.
        layers: of the feature maps, by path; by default some, evenly from the first to the last.

    Raises:
        ReportError: nothing to show in the folder, it is damaged, or matplotlib is not installed.
        MergeError: a plan, a part or a model is damaged.
        FileError: the page cannot be written.
    """
    record = read(run)
    named = [compare] if isinstance(compare, (str, Path)) else compare
    others = [read(other) for other in named]
    samples, why = _samples(record, images)
    make(record, Path(output), samples, compare=others, layers=layers, why=why)


def figures(folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, matplotlib's Figure) of what a run's files say; errors as of `report`."""
    draw.check_matplotlib()
    for section in of_files(read(folder)):
        for drawing in section.drawings:
            yield f"{section.name}/{drawing.name}", drawing.figure


def _samples(record: Record, images: str | Path | int | None) -> tuple[Samples | None, str]:
    """Images, or why there are none."""
    count = IMAGES if images is None else images
    if not isinstance(count, int):
        return networks.of_folder(count, record, IMAGES), ""
    if not count:
        return None, "No image was asked for."
    if not record.args or record.plan is None:
        return None, NO_DATA
    if networks.missing(record):
        return None, ""
    try:
        return _of_run(record, record.plan, count), ""
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as e:  # the data set is elsewhere, or is none
        return None, f"The run's images are not to be had: {headline(e)}. --images takes a folder of others."


def _of_run(record: Record, plan: Plan, count: int) -> Samples:
    """The first of a fixed shuffle of the run's validation images."""
    args = argparse.Namespace(**{**vars(flags.parser(add_help=False).parse_args([])), **record.args, "workers": 0})
    val = data.validation_set(args, (plan.config or {}).get("label_names"))
    config = data.data_config(args, models.create_empty(args.model, **plan.model_args))
    names = data.class_names(val, args.num_classes)
    if not isinstance(val, IterableDataset):
        val = data.First(val, count, seed=0)
    loader = data.loader_of(args, config, val)
    batches = list(islice(loader, -(-count // loader.loader.batch_size)))
    x, y = (torch.cat(column)[:count] for column in zip(*batches))
    source = f"{counted(len(x), 'image')} of the {args.val_split} split of {args.dataset or Path(args.data_dir).name}"
    return Samples(x, y, names, config["mean"], config["std"], source)
