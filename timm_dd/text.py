"""Text for files and terminals: JSON, and rows in aligned columns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from .errors import FileError


def json_text(value: Any) -> str:
    """`value` as it stands in our files.

    Raises:
        FileError: it holds what JSON has no form for.
    """
    try:
        return json.dumps(value, indent=1) + "\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise FileError(f"only numbers, texts and lists can be written ({e}); give the model other arguments") from e


def table(rows: Sequence[Sequence[str]]) -> str:
    """`rows`, the first of them the heading, as lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def number(value: float) -> str:
    """Two decimals; of a number below 1 three digits."""
    decimals = 2 - math.floor(math.log10(value)) if 0 < value < 1 else 2
    return f"{value:,.{decimals}f}"
