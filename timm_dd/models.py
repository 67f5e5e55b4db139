"""timm models by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from .compat import timm_config, tree_map_only
from .errors import MergeError, SplitError, headline, shown

FAILURES = (  # of a model's constructor, whatever it makes of its arguments
    ArithmeticError, AssertionError, AttributeError, FileNotFoundError, ImportError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def create(name: str, /, pretrained: bool = False, seed: int | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, its errors as SplitError, its weights from `seed` if one is given.

    Raises:
        SplitError: an unknown model (the nearest names are in the message), an argument that it does not take.
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        except FAILURES as e:
            raise _explain(name, e) from e


def create_empty(name: str, /, **kwargs: Any) -> nn.Module:
    """The model without weights, wherever they are: on the meta device, or on the CPU if its constructor needs
    numbers."""
    kwargs = {**kwargs, "pretrained": False, "checkpoint_path": None}
    try:
        with torch.device("meta"):
            return create(name, **kwargs)
    except (SplitError, NotImplementedError):
        return create(name, **kwargs)


def _explain(name: str, error: Exception) -> SplitError:
    if not any(said in str(error) for said in ("Unknown model", "Invalid pretrained tag")):
        return SplitError(f"timm cannot create {name!r}: {type(error).__name__}: {headline(error)}")
    known = timm.list_models() + (timm.list_pretrained() if "." in name else [])
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
    return SplitError(f"timm has no model {name!r}; {hint}")


def config(model: nn.Module, data: Mapping[str, Any], names: Sequence[str] | None = None) -> dict | None:
    """timm's ``config.json`` for a model, with what `data` says of its images (input_size, mean, std, interpolation,
    crop_pct), and the `names` of its classes in their order, where they are known; None for what timm has no config
    for: your own nn.Module, features of several layers."""
    if not hasattr(model, "pretrained_cfg") or not hasattr(model, "num_classes"):
        return None
    known = ("input_size", "mean", "std", "interpolation", "crop_pct")
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in data.items() if k in known}
    try:
        found = timm_config(model, given)
    except (TypeError, ValueError):  # arguments that JSON has no form for
        return None
    found["pretrained_cfg"].update(given)  # timm's function writes the last two axes of a size alone
    return found if names is None else {**found, "label_names": list(names)}


def load(folder: Path) -> nn.Module:
    """The model of a folder in timm's form.

    Raises:
        MergeError: timm does not load it.
    """
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as e:  # of timm, torch and safetensors
        raise MergeError(f"{folder} is no model of timm ({headline(e)}); compose its parts again") from e


def registered(name: str, model: nn.Module, args: dict) -> tuple[str, dict]:
    """The name and arguments by which any timm makes `model` again, whatever its weights: for ``local-dir:`` and
    ``hf-hub:`` those that are written there; NumPy's numbers as Python's, which JSON has."""
    kept = {key: value for key, value in args.items() if key not in OF_WEIGHTS}
    kept = tree_map_only(np.generic, np.generic.item, kept)
    if any(key in args for key in CFGS):  # which may say these too
        kept = {"num_classes": getattr(model, "num_classes", 0), "in_chans": input_size(model)[0], **kept}
    if timm.is_model(name):
        return name, kept
    found = config(model, {})
    if found is None:
        raise SplitError(f"{name}: timm has no config for this model; split it by its timm name")
    return found["architecture"], {**found.get("model_args", {}), **kept}


CFGS = ("pretrained_cfg", "pretrained_cfg_overlay")
OF_WEIGHTS = (*CFGS, "checkpoint_path", "cache_dir")  # arguments that say where they are
NOT_OF_A_PLAN = ("pretrained", *OF_WEIGHTS)


def check_known(name: str, args: Mapping[str, Any]) -> None:
    """Raise MergeError unless a model that a plan names is known to timm, with arguments that load nothing."""
    if not timm.is_model(name):  # neither is anything with a source: local-dir:, hf-hub:
        raise MergeError(f"this timm has no model {shown(name)}; use the version of timm that split it")
    if forbidden := [key for key in NOT_OF_A_PLAN if key in args]:
        raise MergeError(f"a plan has no argument {forbidden[0]!r}; write the parts again")


def arguments(name: str, /, img_size: int | Sequence[int] | None = None, **kwargs: Any) -> dict:
    """The keyword arguments for `timm.create_model`, with `img_size` where the model's constructor takes it."""
    fixed = img_size is not None and getattr(_pretrained_cfg(name), "fixed_input_size", False)
    return {**kwargs, "img_size": img_size} if fixed else kwargs


def axes(name: str) -> int:
    """The number of spatial axes of a timm model's images."""
    cfg = _pretrained_cfg(name)
    return 2 if cfg is None else len(cfg.input_size) - 1


def _pretrained_cfg(name: str) -> Any:
    """What timm knows of a model by its name alone; None if that is nothing, errors as of `create`."""
    try:
        return timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as e:  # a tag that the model does not have
        raise _explain(name, e) from e


def input_size(
    model: nn.Module, img_size: int | Sequence[int] | None = None, in_chans: int | None = None
) -> tuple[int, ...]:
    """(C, *size) of the images that a timm model takes, `img_size` pixels and `in_chans` channels if given."""
    channels, *size = timm.data.resolve_model_data_config(model)["input_size"]
    channels = in_chans or getattr(model, "in_chans", channels)
    if isinstance(img_size, int):
        size = [img_size] * len(size)
    elif isinstance(img_size, (tuple, list)) and [isinstance(n, int) for n in img_size] == [True] * len(size):
        size = img_size
    elif img_size is not None:
        several = "(height, width)" if len(size) == 2 else f"{len(size)} numbers"
        raise SplitError(f"img_size: expected pixels, or {several}, got {img_size!r}")
    return channels, *size


def of_run(folder: Path) -> Path:
    """Where a run's model is, that after its best epoch; another `folder` as it is.

    Raises:
        MergeError: the run has none yet, or cannot be read.
    """
    best = folder / "global" / "best"
    try:
        is_run, is_there = (folder / "args.yaml").exists(), (best / "config.json").exists()
    except OSError as e:
        raise MergeError(f"{e.filename} cannot be read ({e.strerror}); make it readable") from e
    if not is_run:
        return folder
    if not is_there:
        raise MergeError(f"no network in {folder}: the run has no model yet; timm-dd train --resume {folder} goes on")
    return best


def gives_features(model: nn.Module) -> bool:
    """Whether the outputs are features: a model without classes, or one of timm's ``features_only``."""
    classes = getattr(model, "num_classes", 0 if hasattr(model, "feature_info") else None)
    return isinstance(classes, int) and classes <= 0  # as timm takes it
