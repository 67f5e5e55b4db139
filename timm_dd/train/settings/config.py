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
        return keywords and all(isinstance(key, str) and key.isidentifier() for key in value)
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
        found = _Loader(path.read_text(encoding="utf-8")).get_single_data()
        return {} if found is None else found
    except OSError as e:
        p.error(f"cannot read {shown(name)}: {e.strerror}")
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # not UTF-8; a date that there is not
        mark, problem = getattr(e, "problem_mark", None), getattr(e, "problem", None)
        p.error(f"{name} is not YAML: " + (f"line {mark.line + 1}: {problem}" if mark and problem else headline(e)))


class _Loader(yaml.SafeLoader):
    """YAML's, for which a key that is there twice is an error, and so is a list of lists that is written by its name:
    a few of these in each other are more than fits into memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        known = {key.value: key for key in reversed(keys)}
        for key in keys:
            if known[key.value] is not key:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        if mark is not None and isinstance(node, yaml.CollectionNode):
            members = [m for member in node.value for m in (member if isinstance(member, tuple) else (member,))]
            if not all(isinstance(m, yaml.ScalarNode) for m in members):
                raise yaml.composer.ComposerError(None, None, "an alias of a list of lists; write it out", mark)
        return node
