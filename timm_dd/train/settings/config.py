"""Files of options: YAML, of which each value is read as the command line reads it."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ...errors import headline, shown
from .flags import flag_of, parser

SCALARS = (str, int, float, datetime.date)  # of YAML, but for true, false and null


def read(p: argparse.ArgumentParser, name: str) -> dict[str, Any]:
    """What a file says, converted and checked by the flags of the same name; what is null there has its default. Errors
    exit with status 2."""
    values = _load(p, name)
    if not isinstance(values, dict):
        p.error(f"{name}: expected options and values, got {type(values).__name__}")
    by = parser(add_help=False)
    by.prog = f"{p.prog}: {name}"
    defaults = vars(by.parse_args([]))
    unknown = sorted(str(key) for key in values if key not in defaults)
    if unknown:
        p.error(f"{name} has options that do not exist: {', '.join(unknown)}")
    return {key: _converted(by, key, value, defaults[key]) for key, value in values.items()}


def words(name: str, value: Any) -> list[str]:
    """An option's value as words of a command line."""
    flag = flag_of(name)
    if name == "grid" and isinstance(value, (list, tuple)):
        value = "x".join(map(str, value))
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, Mapping):
        return [flag, *(f"{k}={v!r}" for k, v in value.items())]
    if isinstance(value, (list, tuple)):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"] if str(value)[:1] in ("", "-") else [flag, str(value)]


def _converted(by: argparse.ArgumentParser, name: str, value: Any, default: Any) -> Any:
    if value is None:
        return default
    switch, several = isinstance(default, bool), isinstance(value, (list, tuple))
    if isinstance(value, bool) if switch else _is_plain(value, isinstance(default, dict)):
        if switch:
            return value
        found = vars(by.parse_args(words(name, value)))[name]
        if not several or isinstance(found, (list, tuple, dict)):
            return found
    expected = "true or false" if switch else "one value" if several else "a value"
    by.error(f"{name}: expected {expected}, got {value!r}")


def _is_plain(value: Any, keywords: bool) -> bool:
    """Whether a command line has words for it."""
    if isinstance(value, Mapping):
        return keywords and all(isinstance(key, str) for key in value)
    members = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(v, SCALARS) and not isinstance(v, bool) for v in members)


def _load(p: argparse.ArgumentParser, name: str) -> Any:
    path, ours = Path(name), resources.files(__package__) / "configs"
    try:
        if not path.is_file():
            path = ours / name
        if not path.is_file():
            have = ", ".join(sorted(f.name for f in ours.iterdir() if f.name.endswith(".yaml")))
            p.error(f"no config {name!r}; expected a YAML file, or one of {have}")
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as e:
        p.error(f"cannot read {shown(name)}: {e.strerror}")
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # not UTF-8; a date that there is not
        p.error(f"{name} is not YAML: {headline(e)}")
