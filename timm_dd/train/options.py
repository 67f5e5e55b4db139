"""The options of a training run, from YAML and the command line, and as each of its stages sees them.

A flag may have a value for the parts alone (``--part-lr``) and one for the baseline (``--baseline-lr``).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

from .. import models
from ..algebra.domain import Domain, default_domain
from ..errors import SplitError, TrainError, headline
from .flags import STAGED, _flag, parser

MAY_CHANGE_ON_RESUME = {  # may change when a run goes on
    "checkpoint_every", "config", "cycles", "device", "engine", "experiment", "log_tensorboard", "log_wandb", "output",
    "pin_mem", "quiet", "resume", "validation_batch_size", "verbose", "wandb_project", "workers",
}  # fmt: skip
COMPOSED = ("calibrate", "off_diagonal_lr", "off_diagonal_noise", "update_bn")  # nothing to parts and baseline


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from YAML (``-c``), then the command line. Errors exit with status 2."""
    p = parser()
    known, _ = p.parse_known_args(argv) if _asks_for_config(argv) else (None, None)
    if known is not None:
        p.set_defaults(**_config(p, known.config))
    args = p.parse_args(argv)
    if not 0 <= args.roam <= 1:
        p.error(f"--roam is a probability from 0 to 1, got {args.roam}")
    for name in ("parts", "grad_accum_steps", "cycles"):
        if getattr(args, name) < 1:
            p.error(f"{_flag(name)} is a whole number from 1 up, got {getattr(args, name)}")
    if args.parts == 1 and args.calibrate != "sum":
        p.error("--calibrate is for two parts or more")
    if isinstance(args.part_lr, (int, float)):  # from YAML
        args.part_lr = [args.part_lr]
    if args.part_lr is not None and len(args.part_lr) not in (1, args.parts):
        p.error(f"--part-lr has one rate for all {args.parts} parts or one for each, got {len(args.part_lr)}")
    if args.mixup and args.batch_size % 2:
        p.error(f"--mixup mixes pairs: --batch-size is even, got {args.batch_size}")
    if not args.dataset and not args.data_dir:
        p.error("nothing to train on: give --data-dir DIR, or --dataset digits")
    for stage in (None, "part", "baseline"):
        s = stage_options(args, stage)
        if s.decay_rates and len(s.decay_rates) != len(s.decay_milestones or ()):
            p.error(f"{len(s.decay_rates)} decay rates for {len(s.decay_milestones or ())} milestones; give as many")
    return args


def _asks_for_config(argv) -> bool:
    import sys

    return any(a in ("-c", "--config") or a.startswith("--config=") for a in (sys.argv[1:] if argv is None else argv))


def _config(p: argparse.ArgumentParser, name: str) -> dict:
    path = Path(name)
    if not path.is_file():
        path = resources.files(__package__) / "configs" / name
    if not path.is_file():
        have = ", ".join(
            sorted(f.name for f in (resources.files(__package__) / "configs").iterdir() if f.name.endswith(".yaml"))
        )
        p.error(f"no config {name!r}; expected a YAML file, or one of {have}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        p.error(f"{name} is not YAML: {headline(e)}")
    if not isinstance(values, dict):
        p.error(f"{name}: expected options and values, got {type(values).__name__}")
    options = {a.dest: a for a in p._actions}
    unknown = sorted(set(values) - options.keys())
    if unknown:
        p.error(f"{name} has options that do not exist: {', '.join(unknown)}")
    return {k: options[k].type(v) if isinstance(v, str) and options[k].type else v for k, v in values.items()}


def stage_options(args: argparse.Namespace, name: str | None, part: int = 0) -> argparse.Namespace:
    """The options as a stage sees them: ``part``, which may have a learning rate of its own, ``baseline``, or None for
    the composed model. By default the parts train as many epochs as the composed model, and the baseline as many as
    both."""
    own = copy.copy(args)
    if name is None:
        return own
    for option in STAGED:
        value = getattr(args, f"{name}_{option}")
        if value is not None:
            setattr(own, option, value)
    for option in COMPOSED:
        setattr(own, option, None)
    if name == "part" and args.part_lr is not None:
        own.lr = args.part_lr[part % len(args.part_lr)]
    if name == "baseline" and args.baseline_epochs is None:
        own.epochs = stage_options(args, "part").epochs + args.epochs
    return own


def training_identity(args: argparse.Namespace) -> dict:
    """The options, as a stage sees them, on which a network's weights depend; as JSON."""
    own = {
        k: v for k, v in vars(args).items() if k not in MAY_CHANGE_ON_RESUME and not k.startswith(("part_", "baseline"))
    }
    return json.loads(json.dumps(own))


def command(args: argparse.Namespace) -> str:
    """The command line that gives the same weights; of the data's folder, which is the reader's affair, the name."""
    words = ["timm-dd", "train"]
    for action in parser(add_help=False)._actions:
        value = getattr(args, action.dest)
        if value == action.default or action.dest in MAY_CHANGE_ON_RESUME:
            continue
        flag = _flag(action.dest)
        if action.dest == "data_dir":
            words += [flag, Path(value).name]
        elif action.dest == "grid" and not isinstance(value, str):
            words += [flag, "x".join(map(str, value))]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [flag, *(f"{k}={v}" for k, v in value.items())]
        else:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return shlex.join(words)


def check_same(before: dict, now: dict) -> None:
    """Raise ValueError unless a network goes on with the options that it began with."""
    other = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if other:
        raise ValueError(", ".join(f"{_flag(k)} was {before.get(k)}, not {now.get(k)}" for k in sorted(other)))


def domain(args: argparse.Namespace) -> Domain:
    """The boxes of ``--grid``, ``--overlap`` and ``--margin``."""
    extra = {"overlap": args.overlap, "margin": args.margin}
    if args.grid == "centered8":
        return Domain.centered8(**extra)
    if args.grid == "full":
        return Domain.full(args.parts)
    if args.grid == "type-b":
        if any(extra.values()):
            raise SplitError("--grid type-b takes neither --overlap nor --margin")
        return _type_b(args.parts, models.axes(args.model))
    shape = args.grid or default_domain(args.parts, models.axes(args.model)).grid_shape
    return Domain.grid(*shape, **extra)


def _type_b(parts: int, axes: int) -> Domain:
    """The smallest with at least K boxes; split says if they are more."""
    return next(d for d in (Domain.type_b(p, axes) for p in itertools.count(1)) if d.parts >= parts)


def model_arguments(args: argparse.Namespace, classes: int | None) -> dict:
    """Keyword arguments for `timm.create_model`."""
    classes = args.num_classes or classes
    if classes is None:
        raise TrainError("the number of classes is not known from the data; give --num-classes")
    own = {"num_classes": classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path, **args.model_kwargs}
    return {k: v for k, v in own.items() if v is not None}
