"""What an epoch is worth: ``--eval-metric`` of the rows of a history, of which some were not evaluated."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence


def sign(args: argparse.Namespace) -> int:
    """-1 where a smaller figure is the better one."""
    return -1 if args.eval_metric == "loss" else 1


def _value(row: Mapping[str, float | None], args: argparse.Namespace) -> float | None:
    return row.get("eval_loss" if args.eval_metric == "loss" else args.eval_metric)


def latest(rows: Sequence[Mapping[str, float | None]], args: argparse.Namespace) -> float:
    """Of the last row that was evaluated; the worst there is, if none was."""
    known = [value for row in rows if (value := _value(row, args)) is not None]
    return known[-1] if known else -sign(args) * math.inf


def best(rows: Sequence[Mapping[str, float | None]], args: argparse.Namespace) -> int | None:
    """The first of the best rows, from 0; None if none was evaluated."""
    known = [(sign(args) * v, -i) for i, row in enumerate(rows) if (v := _value(row, args)) is not None]
    return -max(known)[1] if known else None
