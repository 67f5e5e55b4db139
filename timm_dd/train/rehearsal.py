"""Before there is a run's folder: everything that its stages will need is made once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.utils.data import Dataset, IterableDataset

from ..errors import TrainError, headline
from . import data, optimizers, options, schedule, trackers


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Errors of timm, torch and Pillow as TrainError, in one line that begins with `what`."""
    try:
        yield
    except TrainError:
        raise
    except Exception as e:  # each library has its own for what it does not know
        raise TrainError(f"{what}: {type(e).__name__}: {headline(e)}; give another") from e


def rehearse(args: argparse.Namespace, data_config: dict, sets: Sequence[Dataset]) -> None:
    """Make what every stage will need, and throw it away: what cannot be made is known before there is a folder.

    Raises:
        TrainError: an optimizer, a schedule, a transform or a tracker cannot be made.
    """
    trackers.check(args)
    for stage in ("part", *args.together, None, *(["baseline"] if args.baseline else [])):
        staged = options.stage_options(args, stage)
        staged.workers = 0  # one image needs no process of its own
        with _said_of(f"--opt {staged.opt}"):
            optimizer = optimizers.create(torch.nn.Linear(1, 1), staged, 1.0)
        with _said_of(f"--sched {staged.sched}"):
            schedule.create(staged, optimizer, 1).step_update(1)
        with _said_of("augmentation"):
            made = data.loaders(staged, data_config, *sets, torch.device("cpu"), distributed=False)
        for loader in made:
            if not isinstance(loader.dataset, IterableDataset):
                with _said_of("the first image"):
                    loader.dataset[0]
