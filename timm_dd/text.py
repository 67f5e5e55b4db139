"""Text for files and terminals: JSON, and rows in aligned columns."""

from __future__ import annotations

import json
import math
import re
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


def duration(seconds: float) -> str:
    """In the two largest units that matter: ``40 s``, ``3 min``, ``2 h 5 min``, ``3 d 4 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def number(value: float) -> str:
    """Two decimals; of a number below 1 three digits."""
    decimals = 2 - math.floor(math.log10(value)) if 0 < value < 1 else 2
    return f"{value:,.{decimals}f}"


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number, and finite."""
    return type(value) in (int, float) and math.isfinite(value)


def printable(text: str) -> str:
    """The same, with escapes for bytes of a file's name that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def one_line(text: str) -> str:
    """The same, with escapes for all that is no letter: ends of lines, and what turns round or hides what follows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_markdown(text: str) -> str:
    """`one_line` that Markdown shows as it is."""
    return re.sub(r"[\\`*_~|$&<>\[\]]", r"\\\g<0>", one_line(text))
