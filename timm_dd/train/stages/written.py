"""What a run has written of itself, read again: JSON and YAML of which nothing is believed before it is looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from ...errors import TrainError, headline, shown

READ_ERRORS = (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError)
Checks = Mapping[str, Callable[[Any], bool]]


def read(
    path: Path, kind: type = dict, checks: Checks = MappingProxyType({}), parse: Callable[[str], Any] = json.loads
) -> Any:
    """What a file of a run says.

    Args:
        checks: by name, what a value has to be; of one that is not there, None.
        parse: its text.

    Raises:
        TrainError: it cannot be read, or says something else.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("no such file")
        found = parse(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"expected a {kind.__name__}, got {shown(found)}")
        for name, fits in checks.items():
            if not fits(found.get(name)):
                raise ValueError(f"{name} is {shown(found.get(name))}")
        return found
    except READ_ERRORS as e:
        raise TrainError(f"{path} is damaged ({headline(e)}); remove {path.parent} to train it again") from e


def can_be_read(path: Path) -> bool:
    """Whether it is there, and JSON with names."""
    try:
        read(path)
        return True
    except TrainError:
        return False


def yaml_of(text: str) -> Any:
    """What an empty file says is nothing."""
    return yaml.safe_load(text) or {}


def is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
