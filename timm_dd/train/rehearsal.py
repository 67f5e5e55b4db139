"""Before there is a run's folder: everything that its stages will need is made once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import TrainError, headline
from ..machine import memory
from ..planning.modes import watched_draws
from .epochs import trackers
from .images import data
from .settings import options
from .updates import optimizers, schedule
from .updates.learner import compiled, criterion


@contextmanager
def _said_of(what: str, remedy: str = "give another") -> Iterator[None]:
    """Errors of timm, torch and Pillow as TrainError, in one line that begins with `what`."""
    try:
        yield
    except TrainError:
        raise
    except Exception as e:  # each library has its own for what it does not know
        raise TrainError(f"{what}: {type(e).__name__}: {headline(e)}; {remedy}") from e


def rehearse(
    args: argparse.Namespace, data_config: dict, sets: Sequence[Dataset], part_size: Sequence[int] | None
) -> None:
    """Make what every stage will need, and throw it away: what cannot be made is known before there is a folder.

    Args:
        part_size: of the images that the parts' loader makes; None: as of the others.

    Raises:
        TrainError: an optimizer, a schedule, a batch of images or a tracker cannot be made.
        ReportError: nor a report.
    """
    trackers.check(args)
    if args.torchcompile is not None:
        with _said_of(f"--torchcompile {args.torchcompile}"):
            compiled(torch.nn.Linear(1, 1), args)
    kinds = {}
    for stage in ("part", *args.together, None, *(["baseline"] if args.baseline else [])):
        staged = options.stage_options(args, stage)
        with _said_of(f"--opt {staged.opt}"):
            optimizer = optimizers.create(torch.nn.Linear(1, 1), staged, 1.0)
        with _said_of(f"--sched {staged.sched}"):
            schedule.create(staged, optimizer, 1).step_update(1)
        with _said_of(f"--loss {staged.loss}"):
            criterion(staged)
        size = part_size if stage == "part" else None
        kinds[staged.shift, size and tuple(size)] = staged  # of batches
    with watched_draws():
        for (_, size), staged in kinds.items():
            _batches(staged, data_config, sets, size)


def _batches(args: argparse.Namespace, data_config: dict, sets: Sequence[Dataset], size: Sequence[int] | None) -> None:
    """Make a batch for training and one for validation; of streams, whose workers read ahead, none."""
    args.workers = 0  # one batch needs no process of its own
    with _said_of("augmentation"):
        loaders = data.loaders(args, data_config, *sets, torch.device("cpu"), distributed=False, train_size=size)
    for loader in loaders:
        if isinstance(loader.dataset, IterableDataset):
            continue
        images = min(loader.loader.batch_size, len(loader.dataset))
        needed = 4 * images * math.prod(data_config["input_size"])  # bytes
        if needed > memory():
            raise TrainError(
                f"a batch of {images} images of {data_config['input_size']} takes {needed:,} bytes, this machine has "
                f"{memory():,}; use a smaller --batch-size, --validation-batch-size or --img-size"
            )
        with _said_of("a batch of images", "change the augmentation, --batch-size or --img-size"):
            next(iter(loader.loader))
