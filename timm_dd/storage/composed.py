"""A composed model in timm's form, looked at before it is believed: ``config.json``, and that the weights are its."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data.transforms import str_to_interp_mode

from .. import models
from ..errors import MergeError, headline, shown
from ..machine import memory
from ..text import is_number
from .files import CONFIG, MODEL, reading
from .tensorfile import TensorFile

AGAIN = "compose the parts again"
MANY = 10**7  # classes, or pixels along an axis


def read_config(folder: Path) -> dict:
    """timm's ``config.json`` in `folder`, the names of the classes as a list, or None.

    Raises:
        MergeError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    with _damaged(str(path)):
        if not path.exists():
            raise MergeError(f"no {CONFIG} in {folder}: only what timm can create has one, and can be loaded by it")
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        config = json.loads(path.read_text(encoding="utf-8"))
        _check(config, {"architecture": _is_text, "num_classes": _is_count, "pretrained_cfg": _is_mapping})
        _check(config["pretrained_cfg"], {"input_size": _is_size})
    check_images(config["pretrained_cfg"], str(path))
    names = check_names(config.get("label_names"), config["num_classes"], str(path))
    return {**config, "label_names": names if config.get("label_names") else None}


def check_images(cfg: Mapping[str, Any], where: str) -> None:
    """Raise MergeError unless timm can prepare images as a `pretrained_cfg` says, where it says anything."""
    with _damaged(where):
        said = {name: fits for name, fits in IMAGES.items() if cfg.get(name) is not None}
        _check(cfg, said)
        channels = {len(cfg[name]) for name in ("mean", "std") if name in said}
        if "input_size" in said and channels - {cfg["input_size"][0]}:
            raise ValueError(f"mean and std are not of {cfg['input_size'][0]} channels")


def check_names(given: Any, classes: int, where: str) -> Sequence[str]:
    """The names of the classes, from a list, or from a dict by number as some of timm's configs have; their numbers
    where nobody has named them. MergeError unless each has one."""
    if isinstance(given, Mapping):
        given = [given.get(i, given.get(str(i), i)) for i in range(classes)]
    names = given or range(classes)
    with _damaged(where):
        if not isinstance(names, (list, tuple, range)) or not all(isinstance(name, (str, int)) for name in names):
            raise ValueError(f"label_names is {shown(given)}")
    if len(names) != classes:
        raise MergeError(f"{where} has {len(names)} label_names for {classes} classes; mend its {CONFIG}")
    return [str(name) for name in names]


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise MergeError unless the weights in `folder` are finite and, as far as this timm has the architecture of its
    `config`, those of the model."""
    path = folder / MODEL
    if timm.is_model(config["architecture"]):
        model = models.load(folder)
        odd = [name for name, t in model.named_parameters() if not t.isfinite().all()]
        odd += [name for name, t in model.named_buffers() if t.isnan().any()]  # infinite ones are bounds
        infinite = next(iter(odd), None)
    else:
        with reading(path, AGAIN), TensorFile(path) as file:
            _, infinite = file.scan()
    if infinite is not None:
        raise MergeError(f"{path}: {shown(infinite)} is not finite; take weights from before they diverged")


@contextlib.contextmanager
def _damaged(where: str) -> Iterator[None]:
    try:
        yield
    except MergeError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
        raise MergeError(f"{where} is damaged ({headline(e)}); {AGAIN}") from e


def _check(said: Mapping[str, Any], checks: Mapping[str, Callable[[Any], bool]]) -> None:
    for name, fits in checks.items():
        if not fits(said.get(name)):
            raise ValueError(f"{name} is {shown(said.get(name))}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MANY


def _is_size(value: Any) -> bool:
    """Of an image that this machine can hold."""
    whole = isinstance(value, (list, tuple)) and len(value) > 1 and all(_is_count(n) and n for n in value)
    return whole and 4 * math.prod(value) <= memory()


def _are_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_number, value))


def _is_interpolation(value: Any) -> bool:
    with contextlib.suppress(LookupError, TypeError):
        return str_to_interp_mode(value) is not None
    return False


IMAGES: Mapping[str, Callable[[Any], bool]] = {  # what timm reads of a `pretrained_cfg` to prepare an image
    "input_size": _is_size,
    "mean": _are_numbers,
    "std": lambda value: _are_numbers(value) and min(value) > 0,
    "interpolation": _is_interpolation,
    "crop_pct": lambda value: is_number(value) and value >= 0.1,  # of the image's side before it is cropped
}
